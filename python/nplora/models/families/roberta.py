"""RoBERTa (Liu et al. 2019): BERT with byte-level tokens. Its table of positions begins with unused rows."""

from __future__ import annotations

from nplora.models.families.encoder_family import EncoderFamily


class Roberta(EncoderFamily):
    model_type = "roberta"
    prefix = "roberta"
    first_position = 2  # the rows before it are for padding
