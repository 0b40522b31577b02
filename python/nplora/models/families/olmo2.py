"""OLMo 2 (OLMo Team 2024): norms come only after attention and MLP.

All heads of q are normalised together, and so are all heads of k.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from nplora.formats.config_json import Fields
from nplora.formats.errors import UnsupportedError
from nplora.formats.gguf import GgufFile
from nplora.models.block import Half
from nplora.models.config import ModelConfig
from nplora.models.families import config_fields
from nplora.models.families.family import Family


class Olmo2(Family):
    model_type = "olmo2"
    architecture = "olmo2"
    norms: ClassVar[Mapping[str, str]] = {
        "post_attention_layernorm": "post_attention_norm",
        "post_feedforward_layernorm": "post_ffw_norm",
        "self_attn.q_norm": "attn_q_norm",
        "self_attn.k_norm": "attn_k_norm",
    }
    halves = (
        Half("self_attn", after="post_attention_layernorm"),
        Half("mlp", after="post_feedforward_layernorm"),
    )
    rms_norm_eps = 1e-5

    def read_config(self, fields: Fields) -> ModelConfig:
        return config_fields.with_attention_bias(super().read_config(fields), fields)

    def read_metadata(self, file: GgufFile) -> ModelConfig:
        """Refuse OLMo 3, which GGUF files also call "olmo2". OLMo 3 has sliding windows in most layers."""
        config = super().read_metadata(file)
        if any(config.sliding_windows):
            raise UnsupportedError(
                f"{file.source}: the model has sliding windows (OLMo 3), which is not supported"
            )
        return config

    def norm_widths(self, config: ModelConfig) -> dict[str, int]:
        heads = {"self_attn.q_norm": config.heads_width, "self_attn.k_norm": config.key_value_width}
        return super().norm_widths(config) | heads
