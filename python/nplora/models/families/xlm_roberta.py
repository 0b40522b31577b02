"""XLM-RoBERTa (Conneau et al. 2020): RoBERTa for 100 languages, as in multilingual E5 and BGE-M3."""

from __future__ import annotations

from nplora.formats.config_json import Fields
from nplora.models.families import config_fields
from nplora.models.families.encoder_family import EncoderFamily


class XlmRoberta(EncoderFamily):
    model_type = "xlm-roberta"
    prefix = "roberta"

    def read_first_position(self, fields: Fields) -> int:
        return config_fields.after_padding(fields)
