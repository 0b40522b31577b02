"""Qwen2 and Qwen2.5 (Yang et al. 2024): Llama with biases on q, k and v; small ones tie the embeddings."""

from __future__ import annotations

from nplora.formats.config_json import Fields
from nplora.models.families.family import Family, has_window, windows


class Qwen2(Family):
    model_type = "qwen2"
    architecture = "qwen2"

    def biases(self, fields: Fields) -> dict[str, bool]:
        return {"qkv_bias": True}

    def sliding_windows(self, fields: Fields, layers: int) -> tuple[int, ...]:
        """The first `max_window_layers` layers see everything, where there is a window at all."""
        first = fields.integer("max_window_layers", 28)
        if not fields.boolean("use_sliding_window", False) or not has_window(fields):
            first = layers
        return windows(
            fields, ["full_attention" if i < first else "sliding_attention" for i in range(layers)]
        )
