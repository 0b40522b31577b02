"""XLM-RoBERTa (Conneau et al. 2020): RoBERTa for 100 languages, as in multilingual E5 and BGE-M3."""

from __future__ import annotations

from nplora.models.families.roberta import Roberta


class XlmRoberta(Roberta):
    model_type = "xlm-roberta"
    gguf_tokenizer = "t5"
    prefix = "roberta"
