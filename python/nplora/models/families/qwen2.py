"""Qwen2 and Qwen2.5 (Yang et al. 2024): Llama with biases on q, k and v.

In small models, the head shares the weight of the embedding.
"""

from __future__ import annotations

import dataclasses

from nplora.formats.config_json import Fields
from nplora.models.config import ModelConfig
from nplora.models.families import config_fields
from nplora.models.families.family import Family


class Qwen2(Family):
    model_type = "qwen2"
    architecture = "qwen2"
    key_value_heads = 32

    def read_config(self, fields: Fields) -> ModelConfig:
        """Read a config.json. Without `layer_types`, the first `max_window_layers` layers have no window."""
        config = super().read_config(fields)
        layers, first = config.num_hidden_layers, fields.integer("max_window_layers", 28)
        if not fields.boolean("use_sliding_window", False) or not config_fields.has_window(fields):
            first = layers
        kinds = ["full_attention" if i < first else "sliding_attention" for i in range(layers)]
        windows = config_fields.windows(fields, kinds)
        return dataclasses.replace(config, qkv_bias=True, sliding_windows=windows)
