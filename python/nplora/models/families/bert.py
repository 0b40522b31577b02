"""BERT (Devlin et al. 2019), and the models with its architecture: MiniLM, BGE, E5 and GTE."""

from __future__ import annotations

from nplora.models.families.encoder_family import EncoderFamily


class Bert(EncoderFamily):
    model_type = "bert"
    architecture = "bert"
    gguf_tokenizer = "bert"
    prefix = "bert"
