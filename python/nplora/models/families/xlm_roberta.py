"""XLM-RoBERTa (Conneau et al. 2020): RoBERTa for 100 languages, as in multilingual E5 and BGE-M3."""

from __future__ import annotations

from nplora.models.families.encoder_family import EncoderFamily


class XlmRoberta(EncoderFamily):
    model_type = "xlm-roberta"
    prefix = "roberta"
    first_position = 2  # the rows before it are for padding
