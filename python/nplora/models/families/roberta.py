"""RoBERTa (Liu et al. 2019): BERT with byte-level tokens. The table of positions begins with unused rows."""

from __future__ import annotations

from nplora.formats.config_json import Fields
from nplora.models.encoder_config import EncoderConfig
from nplora.models.families import config_fields
from nplora.models.families.encoder_family import EncoderFamily
from nplora.models.families.head_spec import HeadSpec


class Roberta(EncoderFamily):
    model_type = "roberta"
    architecture = "bert"  # GGUF files omit the unused rows of the position table
    gguf_tokenizer = "gpt2"
    prefix = "roberta"

    def read_first_position(self, fields: Fields) -> int:
        return config_fields.after_padding(fields)

    def head(self, config: EncoderConfig) -> HeadSpec:
        return HeadSpec("cls", "classifier.out_proj", ("classifier",), "classifier.dense")
