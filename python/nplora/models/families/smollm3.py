"""SmolLM3 (Bakouch et al. 2025): Llama without rotation in every fourth layer."""

from __future__ import annotations

import dataclasses
from typing import Any

from nplora.formats.config_json import Fields
from nplora.formats.errors import FormatError, UnsupportedError
from nplora.formats.gguf import GgufFile
from nplora.models.config import ModelConfig
from nplora.models.families import config_fields
from nplora.models.families.family import Family

_INTERVAL = 4


class SmolLM3(Family):
    model_type = "smollm3"
    architecture = "smollm3"
    permutes_rows = True
    key_value_heads = 4
    rope_theta = 2_000_000.0
    ties_embeddings = True

    def read_config(self, fields: Fields) -> ModelConfig:
        config = config_fields.with_attention_bias(super().read_config(fields), fields)
        layers = config.num_hidden_layers
        unrotated = _every(layers, fields.integer("no_rope_layer_interval", _INTERVAL), fields.source)
        if "no_rope_layers" in fields:  # 0 for a layer without rotation, else 1
            rotates = fields.integers("no_rope_layers", layers)
            unrotated = frozenset(i for i in range(layers) if not rotates[i])
        has_window = fields.boolean("use_sliding_window", False) and "sliding_window" in fields
        slides = unrotated if has_window else frozenset[int]()
        kinds = ["sliding_attention" if i in slides else "full_attention" for i in range(layers)]
        windows = config_fields.windows(fields, kinds, default=None)
        mlp_bias = fields.boolean("mlp_bias", False)
        return dataclasses.replace(config, unrotated=unrotated, sliding_windows=windows, mlp_bias=mlp_bias)

    def read_metadata(self, file: GgufFile) -> ModelConfig:
        config = super().read_metadata(file)
        return dataclasses.replace(config, unrotated=_every(config.num_hidden_layers, _INTERVAL, file.source))

    def metadata(self, config: ModelConfig) -> dict[str, Any]:
        if config.unrotated != _every(config.num_hidden_layers, _INTERVAL, config.source):
            raise UnsupportedError(
                f"{config.source}: GGUF can describe SmolLM3 only if every fourth layer has no "
                "rotary positions, and all other layers have them (no_rope_layers)"
            )
        return super().metadata(config)


def _every(layers: int, interval: int, source: str) -> frozenset[int]:
    """The indices of the layers without rotation, if every `interval`-th layer is without rotation."""
    if interval < 1:
        raise FormatError(f"{source}: no_rope_layer_interval is {interval}, expected at least 1")
    return frozenset(i for i in range(layers) if (i + 1) % interval == 0)
