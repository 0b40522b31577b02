"""MPNet (Song et al. 2020): BERT, but attention scores also depend on the distance between two tokens."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import ClassVar

from nplora.formats.config_json import Fields
from nplora.formats.errors import UnsupportedError
from nplora.models.encoder_config import EncoderConfig
from nplora.models.families.encoder_family import EncoderFamily, Names
from nplora.models.families.head_spec import HeadSpec

_BUCKETS = 32  # transformers always computes with this number, even if config.json has another one


class MpNet(EncoderFamily):
    model_type = "mpnet"
    prefix = "mpnet"
    layers: ClassVar[Mapping[str, Names]] = {
        **EncoderFamily.layers,
        "self_attn.q_proj": ("attention.attn.q", ""),
        "self_attn.k_proj": ("attention.attn.k", ""),
        "self_attn.v_proj": ("attention.attn.v", ""),
        "self_attn.o_proj": ("attention.attn.o", ""),
    }
    norms: ClassVar[Mapping[str, Names]] = {
        **EncoderFamily.norms,
        "attention_norm": ("attention.LayerNorm", ""),
    }
    outside: ClassVar[Mapping[str, Names]] = {
        **EncoderFamily.outside,
        "relative_bias": ("encoder.relative_attention_bias", ""),
    }
    first_position = 2  # the rows before row 2 are for padding

    def read_config(self, fields: Fields) -> EncoderConfig:
        buckets = fields.integer("relative_attention_num_buckets", _BUCKETS)
        if buckets != _BUCKETS:
            raise UnsupportedError(
                f"{fields.source}: relative_attention_num_buckets is {buckets}, expected {_BUCKETS}"
            )
        config = super().read_config(fields)
        return dataclasses.replace(config, type_vocab_size=0, relative_buckets=buckets)

    def head(self, config: EncoderConfig) -> HeadSpec:
        return HeadSpec("cls", "classifier.out_proj", ("classifier",), "classifier.dense")
