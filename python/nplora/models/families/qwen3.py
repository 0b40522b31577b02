"""Qwen3 (Yang et al. 2025): each head of q and k is normalised before it is rotated; no biases by default."""

from __future__ import annotations

from nplora.formats.config_json import Fields
from nplora.models.families.qwen2 import Qwen2


class Qwen3(Qwen2):
    model_type = "qwen3"
    architecture = "qwen3"
    head_dim = 128
    qk_norm = True

    def biases(self, fields: Fields) -> dict[str, bool]:
        attention = fields.boolean("attention_bias", False)
        return {"qkv_bias": attention, "o_bias": attention}
