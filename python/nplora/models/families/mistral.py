"""Mistral (Jiang et al. 2023): Llama with an optional sliding window over the last tokens."""

from __future__ import annotations

import dataclasses

from nplora.formats.config_json import Fields
from nplora.models.config import ModelConfig
from nplora.models.families import config_fields
from nplora.models.families.family import Family


class Mistral(Family):
    model_type = "mistral"
    architecture = "llama"
    permutes_rows = True
    key_value_heads = 8

    def read_config(self, fields: Fields) -> ModelConfig:
        config = super().read_config(fields)
        kind = "sliding_attention" if config_fields.has_window(fields) else "full_attention"
        windows = config_fields.windows(fields, [kind] * config.num_hidden_layers)
        return dataclasses.replace(config, sliding_windows=windows)
