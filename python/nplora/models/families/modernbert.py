"""ModernBERT (Warner et al. 2024): rotary positions, a norm before each half-block, GeGLU, mostly no biases.

Every third layer attends to the whole text. All other layers have a sliding window, and rotary position
embeddings with a different base.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import ClassVar

from nplora.formats.config_json import Fields
from nplora.formats.errors import FormatError, UnsupportedError, brief
from nplora.formats.gguf import GgufFile
from nplora.models.block import Half, Mixer
from nplora.models.config import require_layers
from nplora.models.encoder_config import EncoderConfig
from nplora.models.families import config_fields, gguf_fields
from nplora.models.families.config_fields import NO_WINDOW
from nplora.models.families.encoder_family import EncoderFamily, Names
from nplora.models.families.gguf_fields import ArchitectureMetadata
from nplora.models.families.head_spec import HeadSpec
from nplora.models.mlp import MLP
from nplora.models.relative_bias import RelativeBias
from nplora.models.rope import Rope, RopeConfig, require_theta
from nplora.nn.module import Module

_PATTERN = 3  # every third layer attends to all tokens
_WINDOW = 128  # tokens, half of them on each side of a token
_POOLINGS, _ACTIVATIONS = ("cls", "mean"), ("gelu", "relu", "silu", "tanh")  # for a classifier's head
_GLOBAL_THETA, _LOCAL_THETA = 160_000.0, 10_000.0


class ModernBert(EncoderFamily):
    model_type = "modernbert"
    architecture = "modern-bert"
    gguf_tokenizer = "gpt2"
    prefix = "model"
    blocks = "layers"
    layers: ClassVar[Mapping[str, Names]] = {
        "self_attn.qkv_proj": ("attn.Wqkv", "attn_qkv"),
        "self_attn.o_proj": ("attn.Wo", "attn_output"),
        "mlp.gate_up_proj": ("mlp.Wi", "ffn_up"),
        "mlp.down_proj": ("mlp.Wo", "ffn_down"),
    }
    norms: ClassVar[Mapping[str, Names]] = {
        "attention_norm": ("attn_norm", "attn_norm"),
        "mlp_norm": ("mlp_norm", "ffn_norm"),
    }
    outside: ClassVar[Mapping[str, Names]] = {
        "embed_tokens": ("embeddings.tok_embeddings", "token_embd"),
        "embed_norm": ("embeddings.norm", "token_embd_norm"),
        "norm": ("final_norm", "output_norm"),
    }
    ignored = ()
    halves = (Half("self_attn", before="attention_norm"), Half("mlp", before="mlp_norm"))

    def read_config(self, fields: Fields) -> EncoderConfig:
        config_fields.require_readable(fields)
        layers = fields.integer("num_hidden_layers")
        require_layers(fields.source, layers)
        return EncoderConfig(
            source=fields.source,
            model_type=self.model_type,
            vocab_size=fields.integer("vocab_size"),
            hidden_size=fields.integer("hidden_size"),
            intermediate_size=fields.integer("intermediate_size"),
            num_hidden_layers=layers,
            num_attention_heads=config_fields.heads(fields, "num_attention_heads"),
            layer_norm_eps=fields.number("norm_eps", 1e-5),
            max_position_embeddings=fields.integer("max_position_embeddings", 8192),
            hidden_act=config_fields.activation(fields, "hidden_activation", "gelu"),
            sliding_windows=_windows(fields, layers),
            rope=_rope(fields, "full_attention", "global_rope_theta", _GLOBAL_THETA),
            local_rope=_rope(fields, "sliding_attention", "local_rope_theta", _LOCAL_THETA),
            attention_bias=fields.boolean("attention_bias", False),
            mlp_bias=fields.boolean("mlp_bias", False),
            norm_bias=fields.boolean("norm_bias", False),
            classifier_pooling=fields.string("classifier_pooling", "cls"),
            classifier_activation=fields.string("classifier_activation", "gelu"),
            classifier_bias=fields.boolean("classifier_bias", False),
        )

    def read_metadata(self, file: GgufFile) -> EncoderConfig:
        config, data = super().read_metadata(file), ArchitectureMetadata(file, self.architecture)
        key = "attention.sliding_window"
        window = _half_window(file.source, f"{self.architecture}.{key}", data.integer(key))
        slides = gguf_fields.sliding_layers(data, config.num_hidden_layers, _PATTERN, first=True)
        return dataclasses.replace(
            config,
            sliding_windows=tuple(window if sliding else NO_WINDOW for sliding in slides),
            rope=RopeConfig(gguf_fields.base(data, _GLOBAL_THETA)),
            local_rope=RopeConfig(
                require_theta(file.source, data.number("rope.freq_base_swa", _LOCAL_THETA))
            ),
            position_rows=0,
            attention_bias=False,
            mlp_bias=False,
            norm_bias=False,
        )

    def head(self, config: EncoderConfig) -> HeadSpec:
        if config.classifier_pooling not in _POOLINGS:
            raise UnsupportedError(
                f"{config.source}: classifier_pooling is {brief(config.classifier_pooling)}, expected "
                f"{' or '.join(map(repr, _POOLINGS))}"
            )
        if config.classifier_activation not in _ACTIVATIONS:
            raise UnsupportedError(
                f"{config.source}: classifier_activation is {brief(config.classifier_activation)}, expected "
                f"one of {', '.join(_ACTIVATIONS)}"
            )
        return HeadSpec(
            config.classifier_pooling,
            "classifier",
            ("head", "classifier"),
            "head.dense",
            config.classifier_activation,
            "head.norm",
            dense_bias=config.classifier_bias,
            norm_bias=config.norm_bias,
        )

    def token_head(self, config: EncoderConfig) -> HeadSpec:
        return dataclasses.replace(self.head(config), pooling=None)

    def linear_shapes(self, config: EncoderConfig) -> dict[str, tuple[int, int, bool]]:
        d, f = config.hidden_size, config.intermediate_size
        return {
            "self_attn.qkv_proj": (3 * d, d, config.attention_bias),
            "self_attn.o_proj": (d, d, config.attention_bias),
            "mlp.gate_up_proj": (2 * f, d, config.mlp_bias),
            "mlp.down_proj": (d, f, config.mlp_bias),
        }

    def block_norms(self, config: EncoderConfig, layer: int) -> tuple[str, ...]:
        """The first block has no norm before attention, because the norm of the embeddings precedes it."""
        return tuple(self.norms) if layer else ("mlp_norm",)

    def block_halves(self, config: EncoderConfig, layer: int) -> tuple[Half, ...]:
        return self.halves if layer else (Half("self_attn"), self.halves[1])

    def mixer(
        self,
        name: str,
        config: EncoderConfig,
        layer: int,
        rope: Rope | None,
        bias: RelativeBias | None,
        modules: Mapping[str, Module],
    ) -> Mixer:
        if name == "mlp":
            return MLP(config.hidden_act, modules)
        return super().mixer(name, config, layer, rope, bias, modules)


def _windows(fields: Fields, layers: int) -> tuple[int, ...]:
    """Return `EncoderConfig.sliding_windows`. The field `local_attention` is twice the number of tokens that
    a token attends to on each side.
    """
    pattern, total = (
        fields.integer("global_attn_every_n_layers", _PATTERN),
        fields.integer("local_attention", _WINDOW),
    )
    if pattern < 1:
        raise FormatError(f"{fields.source}: global_attn_every_n_layers is {pattern}, expected at least 1")
    kinds = ["sliding_attention" if i % pattern else "full_attention" for i in range(layers)]
    if "layer_types" in fields:
        kinds = fields.strings("layer_types", layers)
    window = _half_window(fields.source, "local_attention", total)
    sizes = {"full_attention": NO_WINDOW, "sliding_attention": window}
    for kind in kinds:
        if kind not in sizes:
            known = " or ".join(map(repr, sizes))
            raise UnsupportedError(f"{fields.source}: a layer has type {brief(kind)}, expected {known}")
    return tuple(sizes[kind] for kind in kinds)


def _half_window(source: str, name: str, total: int) -> int:
    """The entry of `EncoderConfig.sliding_windows` if a token attends to `total` / 2 tokens on each side."""
    if not 0 <= total < 1 << 31:
        raise FormatError(f"{source}: {name} is {total}, expected 0 to 2^31 - 1")
    return total // 2 + 1


def _rope(fields: Fields, kind: str, old_name: str, theta: float) -> RopeConfig:
    """The rotation in layers of the type `kind`. Before transformers 5, files give only the base of the
    angles.
    """
    found = fields.object("rope_parameters").object(kind)
    old = fields.number(old_name, theta) if old_name in fields else theta
    return config_fields.rope(found, old)
