"""Gemma 3 (Gemma Team 2025) for text only: 270M, 1B, and larger models stored as Gemma3ForCausalLM.

There are norms before and after each half-block (attention or MLP). Each head of q and k is also normalised.
Hugging Face's files store norm weights minus 1. Every sixth layer attends to all earlier tokens. All other
layers have a sliding window, and rotary position embeddings with a different base.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np

from nplora.formats.config_json import Fields
from nplora.formats.errors import FormatError, UnsupportedError
from nplora.formats.gguf import GgufFile
from nplora.models.block import Half
from nplora.models.config import ModelConfig
from nplora.models.families import config_fields, gguf_fields
from nplora.models.families.config_fields import NO_WINDOW
from nplora.models.families.family import Family
from nplora.models.families.gguf_fields import ArchitectureMetadata
from nplora.models.rope import RopeConfig, require_theta

_PATTERN = 6  # every sixth layer attends to all tokens
_LOCAL_THETA = 10_000.0
_LARGEST = 62  # the layers of the 27B model, for which llama.cpp assumes another `query_pre_attn_scalar`


class Gemma3(Family):
    model_type = "gemma3_text"
    architecture = "gemma3"
    norms: ClassVar[Mapping[str, str]] = {
        "input_layernorm": "attn_norm",
        "post_attention_layernorm": "post_attention_norm",
        "pre_feedforward_layernorm": "ffn_norm",
        "post_feedforward_layernorm": "post_ffw_norm",
        "self_attn.q_norm": "attn_q_norm",
        "self_attn.k_norm": "attn_k_norm",
    }
    halves = (
        Half("self_attn", before="input_layernorm", after="post_attention_layernorm"),
        Half("mlp", before="pre_feedforward_layernorm", after="post_feedforward_layernorm"),
    )
    head_dim = 256
    key_value_heads = 4
    rope_theta = 1_000_000.0
    ties_embeddings = True
    activation_field = "hidden_activation"
    hidden_act = "gelu_pytorch_tanh"
    norm_offset = 1.0

    def read_config(self, fields: Fields) -> ModelConfig:
        config_fields.require_absent(fields, "final_logit_softcapping", "attn_logit_softcapping")
        config = config_fields.with_attention_bias(super().read_config(fields), fields)
        pattern = fields.integer(
            "sliding_window_pattern", fields.integer("_sliding_window_pattern", _PATTERN)
        )
        windows = config_fields.windows(fields, _kinds(fields.source, config.num_hidden_layers, pattern))
        bidirectional = fields.boolean("use_bidirectional_attention", False)
        if bidirectional:  # as in EmbeddingGemma
            windows = _on_both_sides(windows)
        return dataclasses.replace(
            config,
            sliding_windows=windows,
            causal=not bidirectional,
            local_rope=self._local_rope(fields),
            query_pre_attn_scalar=config_fields.positive(fields, "query_pre_attn_scalar", 256),
            embedding_multiplier=math.sqrt(config.hidden_size),
        )

    def read_rope_fields(self, fields: Fields) -> RopeConfig:
        config_fields.require_whole_rotation(fields)
        found = config_fields.rope_fields(fields)
        if "rope_parameters" in fields:
            found = found.object("full_attention")
        return config_fields.rope(found, fields.number("rope_theta", self.rope_theta))

    def _local_rope(self, fields: Fields) -> RopeConfig:
        """The rotation in layers with a window. Only the field `rope_parameters` can scale this rotation."""
        found = fields.object("rope_parameters").object("sliding_attention")
        return config_fields.rope(found, fields.number("rope_local_base_freq", _LOCAL_THETA))

    def read_metadata(self, file: GgufFile) -> ModelConfig:
        config, data = super().read_metadata(file), ArchitectureMetadata(file, self.architecture)
        for name in ("final_logit_softcapping", "attn_logit_softcapping"):
            gguf_fields.require_number(data, name, 0.0)
        window, layers = config.sliding_windows[0], config.num_hidden_layers
        slides = gguf_fields.sliding_layers(data, layers, _PATTERN)
        local = require_theta(file.source, data.number("rope.freq_base_swa", _LOCAL_THETA))
        return dataclasses.replace(
            config,
            sliding_windows=tuple(window if sliding else NO_WINDOW for sliding in slides),
            local_rope=RopeConfig(local),
            query_pre_attn_scalar=_implied_scalar(config),
            embedding_multiplier=math.sqrt(config.hidden_size),
        )

    def metadata(self, config: ModelConfig) -> dict[str, Any]:
        if config.query_pre_attn_scalar != _implied_scalar(config):
            raise UnsupportedError(
                f"{config.source}: query_pre_attn_scalar is {config.query_pre_attn_scalar:g}, which GGUF "
                f"cannot store; the GGUF file would imply {_implied_scalar(config)}"
            )
        local = config.local_rope or config.rope
        if (local.linear_factor, local.llama3) != (1.0, None):
            raise UnsupportedError(
                f"{config.source}: the rotation is scaled in the layers with a sliding window, which GGUF "
                "cannot express"
            )
        return super().metadata(config) | {"rope.freq_base_swa": np.float32(local.theta)}

    def metadata_window(self, config: ModelConfig) -> int:
        window = max(config.sliding_windows)
        kinds = _kinds(config.source, config.num_hidden_layers, _PATTERN)
        if config.sliding_windows != tuple(
            window if kind == "sliding_attention" else NO_WINDOW for kind in kinds
        ):
            raise UnsupportedError(
                f"{config.source}: GGUF can describe Gemma 3 only if every sixth layer has no sliding "
                "window, and all other layers have the same one (layer_types)"
            )
        return window

    def norm_widths(self, config: ModelConfig) -> dict[str, int]:
        head = dict.fromkeys(("self_attn.q_norm", "self_attn.k_norm"), config.head_dim)
        return super().norm_widths(config) | head


class EmbeddingGemma(Gemma3):
    """Gemma 3 for embeddings, in GGUF. Each token also attends to later tokens."""

    architecture = "gemma-embedding"

    def read_metadata(self, file: GgufFile) -> ModelConfig:
        config = super().read_metadata(file)
        return dataclasses.replace(
            config, causal=False, sliding_windows=_on_both_sides(config.sliding_windows)
        )


def _on_both_sides(windows: tuple[int, ...]) -> tuple[int, ...]:
    """Convert sliding windows for a model that is not causal: half of a window comes before a token, and half
    after it.
    """
    return tuple(window // 2 + 1 if window else NO_WINDOW for window in windows)


def _kinds(source: str, layers: int, pattern: int) -> list[str]:
    """The type of each layer, if every `pattern`-th layer attends to all tokens."""
    if pattern < 1:
        raise FormatError(f"{source}: sliding_window_pattern is {pattern}, expected at least 1")
    return ["sliding_attention" if (i + 1) % pattern else "full_attention" for i in range(layers)]


def _implied_scalar(config: ModelConfig) -> int:
    """The `query_pre_attn_scalar` that llama.cpp assumes, because GGUF has no entry for it."""
    if config.num_hidden_layers == _LARGEST:
        return config.hidden_size // config.num_attention_heads
    return config.head_dim
