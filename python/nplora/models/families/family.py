"""The base class of decoder families: reads configurations, names tensors, and builds blocks.

Each family has its own module: `llama`, `mistral`, ...
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from nplora.formats.config_json import Fields
from nplora.formats.errors import FormatError, UnsupportedError
from nplora.formats.gguf import GgufFile, Typed
from nplora.models.attention import Attention
from nplora.models.block import DecoderBlock, Half, Mixer, assemble
from nplora.models.config import ModelConfig, require_layers
from nplora.models.families import config_fields, gguf_fields
from nplora.models.families.config_fields import NO_WINDOW
from nplora.models.families.gguf_fields import ROPE_FREQS, ArchitectureMetadata
from nplora.models.families.tensor_spec import TensorSpec
from nplora.models.mlp import MLP
from nplora.models.rope import Rope, RopeConfig
from nplora.nn import Linear, RMSNorm
from nplora.nn.module import Module

Array = npt.NDArray[Any]

_OUTSIDE = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
_LAYER = re.compile(r"model\.layers\.(0|[1-9][0-9]{0,5})\.(.+)")
_BLOCK = re.compile(r"blk\.(0|[1-9][0-9]{0,5})\.(.+)")


class Family:
    """The base class of all families. The base class itself describes Llama.

    A block computes h = x + attention(norm(x)), then y = h + mlp(norm(h)). Blocks use RMSNorm, rotary
    position embeddings, grouped-query attention, and a gated MLP. Most families resemble Llama, so a subclass
    defines only what differs from Llama.

    Attributes:
        model_type: Hugging Face's name for the family.
        architecture: GGUF's name for the family.
        layers, norms: dicts from Hugging Face's name of a layer or norm in a block to GGUF's name.
        halves: the half-blocks (attention and MLP) of a block.
        head_dim: the default width of a head; None: hidden_size / number of heads.
        key_value_heads: the default number of key and value heads; None: the number of query heads.
        rms_norm_eps, rope_theta, ties_embeddings: the defaults of these fields of config.json.
        activation_field: the name of config.json's field for the activation.
        hidden_act: the default activation. GGUF does not store the activation; the architecture implies it.
        norm_offset: nplora adds this number to norm weights from Hugging Face's files. The norm weights in
            GGUF files already contain it.
        permutes_rows: whether GGUF reorders the rows of the weights of q and k, so that two neighbouring rows
            form a pair that is rotated.
        rope_tensors: the names of GGUF's tensors that describe the rotation.
    """

    model_type: ClassVar[str]
    architecture: ClassVar[str]
    layers: ClassVar[Mapping[str, str]] = {
        "self_attn.q_proj": "attn_q",
        "self_attn.k_proj": "attn_k",
        "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output",
        "mlp.gate_proj": "ffn_gate",
        "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down",
    }
    norms: ClassVar[Mapping[str, str]] = {
        "input_layernorm": "attn_norm",
        "post_attention_layernorm": "ffn_norm",
    }
    halves: ClassVar[tuple[Half, ...]] = (
        Half("self_attn", before="input_layernorm"),
        Half("mlp", before="post_attention_layernorm"),
    )
    head_dim: ClassVar[int | None] = None
    key_value_heads: ClassVar[int | None] = None
    rms_norm_eps: ClassVar[float] = 1e-6
    rope_theta: ClassVar[float] = 10_000.0
    ties_embeddings: ClassVar[bool] = False
    activation_field: ClassVar[str] = "hidden_act"
    hidden_act: ClassVar[str] = "silu"
    norm_offset: ClassVar[float] = 0.0
    permutes_rows: ClassVar[bool] = False
    rope_tensors: ClassVar[frozenset[str]] = frozenset({ROPE_FREQS})

    # ---- config.json ----

    def read_config(self, fields: Fields) -> ModelConfig:
        """The configuration that a config.json describes. May raise FormatError or UnsupportedError."""
        config_fields.require_readable(fields)
        layers, width = fields.integer("num_hidden_layers"), fields.integer("hidden_size")
        require_layers(fields.source, layers)
        heads, kv_heads = self.attention_heads(fields)
        return ModelConfig(
            source=fields.source,
            model_type=self.model_type,
            vocab_size=fields.integer("vocab_size"),
            hidden_size=width,
            intermediate_size=fields.integer("intermediate_size"),
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=kv_heads,
            head_dim=fields.integer("head_dim", self.head_dim or width // heads),
            rms_norm_eps=fields.number("rms_norm_eps", self.rms_norm_eps),
            max_position_embeddings=fields.integer("max_position_embeddings"),
            rope=self.read_rope_fields(fields),
            sliding_windows=(NO_WINDOW,) * layers,
            tie_word_embeddings=fields.boolean("tie_word_embeddings", self.ties_embeddings),
            hidden_act=config_fields.activation(fields, self.activation_field, self.hidden_act),
        )

    def read_rope_fields(self, fields: Fields) -> RopeConfig:
        """The rotation that a config.json describes."""
        config_fields.require_whole_rotation(fields)
        theta = fields.number("rope_theta", self.rope_theta)
        return config_fields.rope(config_fields.rope_fields(fields), theta)

    def attention_heads(self, fields: Fields) -> tuple[int, int]:
        """The number of query heads, and the number of key/value heads.

        Raises:
            FormatError: a number is missing or not an integer, or there are no query heads.
        """
        heads = fields.integer("num_attention_heads")
        if heads < 1:
            raise FormatError(f"{fields.source}: num_attention_heads is {heads}, expected at least 1")
        kv_heads = fields.integer_or_null("num_key_value_heads", self.key_value_heads or heads)
        return heads, heads if kv_heads is None else kv_heads

    # ---- GGUF's metadata ----

    def read_metadata(self, file: GgufFile) -> ModelConfig:
        """The configuration that a GGUF file's metadata and tensor names describe.

        May raise FormatError or UnsupportedError.
        """
        data = ArchitectureMetadata(file, self.architecture)
        layers = data.integer("block_count")
        require_layers(file.source, layers)
        heads, width = data.integer("attention.head_count"), data.integer("embedding_length")
        if heads < 1:
            raise FormatError(
                f"{file.source}: {data.key('attention.head_count')} is {heads}, expected at least 1"
            )
        head_dim = data.integer("attention.key_length", width // heads)
        gguf_fields.require_length(data, "attention.value_length", head_dim)
        rotary_dim = self.read_rotary_dim(data, head_dim)
        window = data.integer("attention.sliding_window", NO_WINDOW)
        return ModelConfig(
            source=file.source,
            model_type=self.model_type,
            vocab_size=gguf_fields.vocabulary(data),
            hidden_size=width,
            intermediate_size=data.integer("feed_forward_length"),
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=gguf_fields.heads_of_keys(data, heads),
            head_dim=head_dim,
            rms_norm_eps=data.number("attention.layer_norm_rms_epsilon"),
            max_position_embeddings=data.integer("context_length"),
            rope=self.read_rope(data, rotary_dim),
            rotary_dim=None if rotary_dim == head_dim else rotary_dim,
            sliding_windows=(config_fields.require_window(file.source, window) if window else NO_WINDOW,)
            * layers,
            tie_word_embeddings="output.weight" not in file,
            qkv_bias=f"blk.0.{self.layers.get('self_attn.q_proj')}.bias" in file,
            o_bias=f"blk.0.{self.layers['self_attn.o_proj']}.bias" in file,
            mlp_bias=f"blk.0.{self.layers['mlp.down_proj']}.bias" in file,
            hidden_act=self.hidden_act,
            interleaved=self.permutes_rows,
        )

    def read_rotary_dim(self, data: ArchitectureMetadata, head_dim: int) -> int:
        """The number of values in a head that RoPE rotates."""
        gguf_fields.require_length(data, "rope.dimension_count", head_dim)
        return head_dim

    def read_rope(self, data: ArchitectureMetadata, dim: int) -> RopeConfig:
        """The rotation that the metadata describe. RoPE rotates `dim` values of each head."""
        return gguf_fields.rope(data, dim, self.rope_theta)

    def metadata(self, config: ModelConfig) -> dict[str, Any]:
        """A dict of hyperparameters. The keys are those of llama.cpp, without the prefix "<architecture>.".

        Raises:
            UnsupportedError: GGUF cannot express a setting of the model.
        """
        if config.hidden_act != self.hidden_act:
            raise UnsupportedError(
                f"{config.source}: hidden_act is {config.hidden_act}, which GGUF cannot express: "
                f"architecture {self.architecture} implies {self.hidden_act}"
            )
        sizes = {
            "context_length": config.max_position_embeddings,
            "embedding_length": config.hidden_size,
            "block_count": config.num_hidden_layers,
            "feed_forward_length": config.intermediate_size,
            "attention.head_count": config.num_attention_heads,
            "attention.head_count_kv": config.num_key_value_heads,
            "attention.key_length": config.head_dim,
            "attention.value_length": config.head_dim,
            "rope.dimension_count": config.rotary_dim or config.head_dim,
            "vocab_size": config.vocab_size,
        }
        window = self.metadata_window(config)
        if window != NO_WINDOW:
            sizes["attention.sliding_window"] = window
        metadata: dict[str, Any] = {key: Typed(value, "UINT32") for key, value in sizes.items()}
        metadata["attention.layer_norm_rms_epsilon"] = np.float32(config.rms_norm_eps)
        metadata["rope.freq_base"] = np.float32(config.rope.theta)
        if config.rope.linear_factor != 1:
            metadata["rope.scaling.type"] = "linear"
            metadata["rope.scaling.factor"] = np.float32(config.rope.linear_factor)
        return metadata

    def metadata_window(self, config: ModelConfig) -> int:
        """The sliding window for GGUF's metadata. Raises UnsupportedError if the layers' windows differ."""
        windows = set(config.sliding_windows)
        if len(windows) > 1:
            raise UnsupportedError(
                f"{config.source}: the layers have sliding windows of {sorted(windows)} tokens; GGUF needs "
                "the same window in all layers"
            )
        return windows.pop()

    def rope_factors(self, config: ModelConfig) -> dict[str, Array]:
        """The tensors (by name) that describe the rotation in a GGUF file."""
        if config.rope.llama3 is None:
            return {}
        width = config.rotary_dim or config.head_dim
        frequencies = config.rope.theta ** (-np.arange(0, width, 2, dtype=np.float64) / width)
        return {ROPE_FREQS: config.rope.llama3.factors(frequencies)}

    # ---- names ----

    def gguf_layer(self, name: str) -> str | None:
        """GGUF's name of a layer or norm, without ".weight"; None if the family has no such layer."""
        match = _LAYER.fullmatch(name)
        if match is None:
            return _OUTSIDE.get(name)
        stored = self.layers.get(match[2]) or self.norms.get(match[2])
        return None if stored is None else f"blk.{match[1]}.{stored}"

    def gguf_tensor(self, name: str) -> str | None:
        """GGUF's name of a tensor such as "model.layers.0.input_layernorm.weight"; None if unknown."""
        layer, _, kind = name.rpartition(".")
        stored = self.gguf_layer(layer)
        return None if stored is None else f"{stored}.{kind}"

    def hf_layer(self, stored: str) -> str | None:
        """Hugging Face's name of a layer or norm, given GGUF's name: the inverse of `gguf_layer`."""
        match = _BLOCK.fullmatch(stored)
        if match is None:
            return next((name for name, other in _OUTSIDE.items() if other == stored), None)
        names = {**self.layers, **self.norms}
        found = next((name for name, other in names.items() if other == match[2]), None)
        return None if found is None else f"model.layers.{match[1]}.{found}"

    def permuted_heads(self, name: str, heads: int, kv_heads: int) -> int:
        """The number of heads in a layer if GGUF reorders the rows of the layer's weight; 0 if not.

        Args:
            name: Hugging Face's name of the layer.
        """
        permuted = {"q_proj": heads, "k_proj": kv_heads} if self.permutes_rows else {}
        return permuted.get(name.rpartition(".")[2], 0)

    # ---- tensors ----

    def linear_shapes(self, config: ModelConfig) -> dict[str, tuple[int, int, bool]]:
        """A dict from each linear layer of a block to (d_out, d_in, whether the layer has a bias)."""
        d, f, q, kv = config.hidden_size, config.intermediate_size, config.heads_width, config.key_value_width
        return {
            "self_attn.q_proj": (q, d, config.qkv_bias),
            "self_attn.k_proj": (kv, d, config.qkv_bias),
            "self_attn.v_proj": (kv, d, config.qkv_bias),
            "self_attn.o_proj": (d, q, config.o_bias),
            "mlp.gate_proj": (f, d, config.mlp_bias),
            "mlp.up_proj": (f, d, config.mlp_bias),
            "mlp.down_proj": (d, f, config.mlp_bias),
        }

    def norm_widths(self, config: ModelConfig) -> dict[str, int]:
        """A dict from each norm of a block to its width. The default is the residual stream's width."""
        return dict.fromkeys(self.norms, config.hidden_size)

    def tensors(self, config: ModelConfig) -> Iterator[TensorSpec]:
        """All tensors of a model."""
        d = config.hidden_size
        yield TensorSpec("model.embed_tokens.weight", "token_embd.weight", (config.vocab_size, d))
        yield TensorSpec("model.norm.weight", "output_norm.weight", (d,), offset=self.norm_offset)
        if not config.tie_word_embeddings:
            yield TensorSpec("lm_head.weight", "output.weight", (config.vocab_size, d))
        heads = config.num_attention_heads, config.num_key_value_heads
        for i in range(config.num_hidden_layers):
            for name, width in self.norm_widths(config).items():
                stored = f"blk.{i}.{self.norms[name]}.weight"
                yield TensorSpec(f"model.layers.{i}.{name}.weight", stored, (width,), 0, self.norm_offset)
            for name, (d_out, d_in, has_bias) in self.linear_shapes(config).items():
                layer, stored = f"model.layers.{i}.{name}", f"blk.{i}.{self.layers[name]}"
                permuted = self.permuted_heads(name, *heads)
                yield TensorSpec(f"{layer}.weight", f"{stored}.weight", (d_out, d_in), permuted)
                if has_bias:
                    yield TensorSpec(f"{layer}.bias", f"{stored}.bias", (d_out,), permuted)

    # ---- modules ----

    def block(
        self, config: ModelConfig, layer: int, rope: Rope | None, modules: Mapping[str, Linear | RMSNorm]
    ) -> DecoderBlock:
        """Build a block. `modules` is a dict from names within the block to the block's layers and norms."""

        def mixer(name: str, own: Mapping[str, Module]) -> Mixer:
            return self.mixer(name, config, layer, rope, own)

        return assemble(self.block_halves(config), mixer, modules)

    def block_halves(self, config: ModelConfig) -> tuple[Half, ...]:
        """The half-blocks of a block."""
        return self.halves

    def mixer(
        self, name: str, config: ModelConfig, layer: int, rope: Rope | None, modules: Mapping[str, Module]
    ) -> Mixer:
        """Build a half-block's mixer from its layers and norms."""
        if name == "self_attn":
            return Attention(config, layer, rope, modules)
        return MLP(config.hidden_act, modules)
