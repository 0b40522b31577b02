"""Qwen3 (Yang et al. 2025): each head of q and k is normalised before the rotation.

By default, the linear layers have no biases.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from nplora.formats.config_json import Fields
from nplora.models.config import ModelConfig
from nplora.models.families import config_fields
from nplora.models.families.family import Family
from nplora.models.families.qwen2 import Qwen2


class Qwen3(Qwen2):
    model_type = "qwen3"
    architecture = "qwen3"
    norms: ClassVar[Mapping[str, str]] = {
        **Family.norms,
        "self_attn.q_norm": "attn_q_norm",
        "self_attn.k_norm": "attn_k_norm",
    }
    head_dim = 128

    def read_config(self, fields: Fields) -> ModelConfig:
        return config_fields.with_attention_bias(super().read_config(fields), fields)

    def norm_widths(self, config: ModelConfig) -> dict[str, int]:
        head = dict.fromkeys(("self_attn.q_norm", "self_attn.k_norm"), config.head_dim)
        return super().norm_widths(config) | head
