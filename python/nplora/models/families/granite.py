"""Dense Granite 3 (IBM 2024): Llama with factors for embeddings, half-blocks, attention scores and logits.

In GGUF files, dense models of Granite 4 have the same architecture as Granite 3. In Hugging Face's files,
Granite 4 belongs to the family "granitemoehybrid", which nplora does not read.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from nplora.formats.config_json import Fields
from nplora.formats.gguf import GgufFile
from nplora.models.block import Half
from nplora.models.config import ModelConfig
from nplora.models.families import config_fields
from nplora.models.families.family import Family
from nplora.models.families.gguf_fields import ArchitectureMetadata

# Maps the names in ModelConfig and config.json to GGUF's names.
_MULTIPLIERS = {
    "embedding_multiplier": "embedding_scale",
    "residual_multiplier": "residual_scale",
    "attention_multiplier": "attention.scale",
    "logits_scaling": "logit_scale",
}


class Granite(Family):
    model_type = "granite"
    architecture = "granite"
    permutes_rows = True

    def read_config(self, fields: Fields) -> ModelConfig:
        config = config_fields.with_attention_bias(super().read_config(fields), fields)
        mlp_bias = fields.boolean("mlp_bias", False)
        multipliers = {name: config_fields.positive(fields, name, 1.0) for name in _MULTIPLIERS}
        return _multiplied(dataclasses.replace(config, mlp_bias=mlp_bias), multipliers)

    def read_metadata(self, file: GgufFile) -> ModelConfig:
        """Read a GGUF file's metadata. If a multiplier is missing or 0, use the default of `ModelConfig`."""
        data = ArchitectureMetadata(file, self.architecture)
        config = super().read_metadata(file)
        found = {name: data.number(key, 0.0) for name, key in _MULTIPLIERS.items()}
        if not data.boolean("rope.scaling.finetuned", True):  # False switches the rotation off
            config = dataclasses.replace(config, unrotated=frozenset(range(config.num_hidden_layers)))
        return _multiplied(config, {name: value for name, value in found.items() if value})

    def metadata(self, config: ModelConfig) -> dict[str, Any]:
        multipliers = {key: np.float32(getattr(config, name)) for name, key in _MULTIPLIERS.items()}
        return super().metadata(config) | multipliers

    def block_halves(self, config: ModelConfig) -> tuple[Half, ...]:
        return tuple(dataclasses.replace(half, scale=config.residual_multiplier) for half in self.halves)


def _multiplied(config: ModelConfig, multipliers: dict[str, Any]) -> ModelConfig:
    return dataclasses.replace(config, **multipliers)
