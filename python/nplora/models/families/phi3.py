"""Phi-3 and Phi-4-mini (Abdin et al. 2024): Llama with one layer for q, k and v, and one for gate and up.

LongRoPE may extend the context, and only a part of each head may be rotated.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from nplora.formats.config_json import Fields
from nplora.formats.errors import FormatError, UnsupportedError, brief
from nplora.formats.gguf import Typed
from nplora.models.config import MAX_POSITIONS, ModelConfig
from nplora.models.families import config_fields, gguf_fields
from nplora.models.families.family import Family
from nplora.models.families.gguf_fields import ArchitectureMetadata
from nplora.models.rope import LongRope, RopeConfig, require_theta

Array = npt.NDArray[Any]

_LONG, _SHORT = "rope_factors_long.weight", "rope_factors_short.weight"
_ORIGINAL = "rope.scaling.original_context_length"
_LENGTH = 4096  # the default original context length


class Phi3(Family):
    model_type = "phi3"
    architecture = "phi3"
    layers: ClassVar[Mapping[str, str]] = {
        "self_attn.qkv_proj": "attn_qkv",
        "self_attn.o_proj": "attn_output",
        "mlp.gate_up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down",
    }
    rms_norm_eps = 1e-5
    rope_tensors = frozenset({_LONG, _SHORT})

    def read_config(self, fields: Fields) -> ModelConfig:
        config = super().read_config(fields)
        found = config_fields.rope_fields(fields)
        factor = found.number("partial_rotary_factor", fields.number("partial_rotary_factor", 1.0))
        if not 0 < factor <= 1:
            raise FormatError(f"{fields.source}: partial_rotary_factor is {factor}, expected in (0, 1]")
        dim = int(config.head_dim * factor)
        window = fields.integer_or_null("sliding_window", None)
        windows = config.sliding_windows
        if window is not None:
            windows = (config_fields.require_window(fields.source, window),) * config.num_hidden_layers
        return dataclasses.replace(
            config,
            rope=_rope(fields, found, config, dim),
            rotary_dim=None if dim == config.head_dim else dim,
            sliding_windows=windows,
        )

    def read_rope_fields(self, fields: Fields) -> RopeConfig:
        """Read only the base of the rotation. `read_config` adds the factors of LongRoPE."""
        theta = config_fields.rope_fields(fields).number(
            "rope_theta", fields.number("rope_theta", self.rope_theta)
        )
        return RopeConfig(require_theta(fields.source, theta))

    def read_rotary_dim(self, data: ArchitectureMetadata, head_dim: int) -> int:
        return data.integer("rope.dimension_count", head_dim)

    def read_rope(self, data: ArchitectureMetadata, dim: int) -> RopeConfig:
        is_long = gguf_fields.scaling_kind(data) == "longrope"
        if not is_long and not self.rope_tensors & data.file.keys():
            return gguf_fields.rope(data, dim, self.rope_theta)
        long, short = (gguf_fields.pair_factors(data.file, name, dim) for name in (_LONG, _SHORT))
        length = data.integer(_ORIGINAL)
        _require_length(data.source, data.key(_ORIGINAL), length)
        factor = data.number("rope.scaling.attn_factor", 1.0)
        return RopeConfig(
            gguf_fields.base(data, self.rope_theta),
            gguf_fields.linear_factor(data, "longrope"),
            long=_long(data.source, length, short, long, factor),
        )

    def metadata(self, config: ModelConfig) -> dict[str, Any]:
        long, metadata = config.rope.long, super().metadata(config)
        if long is None:
            return metadata
        length = Typed(long.original_length, "UINT32")
        factor = np.float32(long.attention_factor)
        return metadata | {
            _ORIGINAL: length,
            "rope.scaling.attn_factor": factor,
        }

    def rope_factors(self, config: ModelConfig) -> dict[str, Array]:
        long = config.rope.long
        return {} if long is None else {_LONG: long.long, _SHORT: long.short}

    def linear_shapes(self, config: ModelConfig) -> dict[str, tuple[int, int, bool]]:
        d, f, q = config.hidden_size, config.intermediate_size, config.heads_width
        return {
            "self_attn.qkv_proj": (q + 2 * config.key_value_width, d, False),
            "self_attn.o_proj": (d, q, False),
            "mlp.gate_up_proj": (2 * f, d, False),
            "mlp.down_proj": (d, f, False),
        }


def _rope(fields: Fields, found: Fields, config: ModelConfig, dim: int) -> RopeConfig:
    kind = config_fields.rope_kind(found)
    if kind == "default":
        return config.rope
    if kind not in ("longrope", "su"):
        raise UnsupportedError(
            f"{found.source}: the rotation is scaled by {brief(kind)}, expected 'default' or 'longrope'"
        )
    name = "original_max_position_embeddings"
    length = fields.integer(name, found.integer(name, _LENGTH))
    _require_length(fields.source, name, length)
    stretch = config_fields.positive(found, "factor", config.max_position_embeddings / length)
    factor = math.sqrt(1 + math.log(stretch) / math.log(length)) if stretch > 1 else 1.0
    short, long = (np.array(found.numbers(f"{name}_factor", dim // 2)) for name in ("short", "long"))
    factor = found.number("attention_factor", factor)
    return dataclasses.replace(config.rope, long=_long(fields.source, length, short, long, factor))


def _require_length(source: str, name: str, length: int) -> None:
    """Raise FormatError if the original context length is impossible."""
    if not 1 < length <= MAX_POSITIONS:
        raise FormatError(f"{source}: {name} is {length:,}, expected 2 to {MAX_POSITIONS:,}")


def _long(source: str, length: int, short: Array, long: Array, factor: float) -> LongRope:
    for value in (*short, *long, factor):
        if not 0 < value < 1e30:
            raise FormatError(
                f"{source}: a factor of the rotation is {value:g}, expected above 0 and below 1e30"
            )
    return LongRope(length, short, long, factor)
