"""Llama 2 and 3 (Touvron et al. 2023, Grattafiori et al. 2024), and similar models such as SmolLM2."""

from __future__ import annotations

import dataclasses

from nplora.formats.config_json import Fields
from nplora.formats.gguf import GgufFile
from nplora.models.config import ModelConfig
from nplora.models.families import config_fields
from nplora.models.families.config_fields import NO_WINDOW
from nplora.models.families.family import Family


class Llama(Family):
    model_type = "llama"
    architecture = "llama"
    permutes_rows = True

    def read_config(self, fields: Fields) -> ModelConfig:
        config = config_fields.with_attention_bias(super().read_config(fields), fields)
        return dataclasses.replace(config, mlp_bias=fields.boolean("mlp_bias", False))

    def read_metadata(self, file: GgufFile) -> ModelConfig:
        """Read a GGUF file's metadata. In GGUF, only the sliding window distinguishes Mistral from Llama."""
        config = super().read_metadata(file)
        if config.sliding_windows[0] == NO_WINDOW:
            return config
        return dataclasses.replace(config, model_type="mistral")
