"""The base class of encoder families: reads configurations, names tensors, and builds blocks.

Each family has its own module: `bert`, `modernbert`, ...
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import ClassVar

from nplora.formats.config_json import Fields
from nplora.formats.errors import UnsupportedError
from nplora.formats.gguf import GgufFile
from nplora.models.attention import Attention
from nplora.models.block import DecoderBlock, Half, Mixer, assemble
from nplora.models.config import require_layers
from nplora.models.encoder_config import EncoderConfig
from nplora.models.families import config_fields, gguf_fields
from nplora.models.families.config_fields import NO_WINDOW
from nplora.models.families.gguf_fields import ArchitectureMetadata
from nplora.models.families.head_spec import HeadSpec
from nplora.models.families.tensor_spec import TensorSpec
from nplora.models.feed_forward import FeedForward
from nplora.models.norms import Norm
from nplora.models.relative_bias import RelativeBias
from nplora.models.rope import Rope
from nplora.nn import Linear
from nplora.nn.module import Module

# The name of a layer, norm or table in transformers' files, and its name in GGUF ("" if llama.cpp has none).
Names = tuple[str, str]

_BLOCK = re.compile(r"blk\.(0|[1-9][0-9]{0,5})\.(.+)")
_LAYER = re.compile(r"layers\.(0|[1-9][0-9]{0,5})(?:\.(.+))?")


@dataclass(frozen=True)
class StoredNames:
    """The names of an encoder's tensors in a safetensors file.

    If the file also contains a head, the names of the encoder's tensors begin with a prefix. In old files,
    the weight and the bias of a norm are called gamma and beta.

    Attributes:
        names: the names of all tensors in the file.
        prefix: the prefix of the names of the encoder's tensors in the file, or "".
        ignored: prefixes of the names of tensors that do not affect the hidden states.
    """

    names: frozenset[str]
    prefix: str
    ignored: tuple[str, ...]

    def stored(self, name: str) -> str:
        """The name that a tensor has in the file. `name` is the tensor's name in transformers."""
        found = self.prefix + name
        layer, _, kind = found.rpartition(".")
        old = f"{layer}.{({'weight': 'gamma', 'bias': 'beta'}).get(kind, kind)}"
        return old if found not in self.names and old in self.names else found

    def is_unused(self, name: str) -> bool:
        """Whether a tensor of the file has no effect on the hidden states."""
        return not name.startswith(self.prefix) or name.removeprefix(self.prefix).startswith(self.ignored)


class EncoderFamily:
    """The base class of all families of encoders. The base class itself describes BERT.

    A block computes h = norm(x + attention(x)), then y = norm(h + mlp(h)). Blocks use LayerNorm, learned
    positions, biases, and a feed-forward network without a gate. A subclass defines only what differs from
    BERT.

    In nplora, a module has the same name in all families (`self_attn.q_proj`). In transformers, the name
    depends on the family (`attention.self.query` in BERT). Adapter files and `named_modules` use the name in
    transformers.

    Attributes:
        model_type: Hugging Face's name for the family.
        architecture: GGUF's name for the family; None if llama.cpp has none.
        gguf_tokenizer: GGUF's name for the tokenizer. The tokenizer distinguishes families with the same
            architecture.
        prefix: the prefix of the names of the encoder's tensors in files that also contain a head.
        blocks: transformers' name of the list of blocks.
        layers, norms: dicts from nplora's name of a layer or norm in a block to a pair: the name in
            transformers, and the name in GGUF.
        outside: a dict from nplora's name of a table or norm outside the blocks to a pair: the name in
            transformers, and the name in GGUF.
        ignored: prefixes of the names of tensors that do not affect the hidden states.
        halves: the half-blocks (attention and MLP) of a block.
        activation_field: the name of config.json's field for the activation.
        first_position: the row of the position table for the first token, if config.json does not give this
            row.
    """

    model_type: ClassVar[str]
    architecture: ClassVar[str | None] = None
    gguf_tokenizer: ClassVar[str] = ""
    prefix: ClassVar[str]
    blocks: ClassVar[str] = "encoder.layer"
    layers: ClassVar[Mapping[str, Names]] = {
        "self_attn.q_proj": ("attention.self.query", "attn_q"),
        "self_attn.k_proj": ("attention.self.key", "attn_k"),
        "self_attn.v_proj": ("attention.self.value", "attn_v"),
        "self_attn.o_proj": ("attention.output.dense", "attn_output"),
        "mlp.up_proj": ("intermediate.dense", "ffn_up"),
        "mlp.down_proj": ("output.dense", "ffn_down"),
    }
    norms: ClassVar[Mapping[str, Names]] = {
        "attention_norm": ("attention.output.LayerNorm", "attn_output_norm"),
        "mlp_norm": ("output.LayerNorm", "layer_output_norm"),
    }
    outside: ClassVar[Mapping[str, Names]] = {
        "embed_tokens": ("embeddings.word_embeddings", "token_embd"),
        "embed_positions": ("embeddings.position_embeddings", "position_embd"),
        "embed_types": ("embeddings.token_type_embeddings", "token_types"),
        "embed_norm": ("embeddings.LayerNorm", "token_embd_norm"),
    }
    ignored: ClassVar[tuple[str, ...]] = ("pooler.", "embeddings.position_ids", "embeddings.token_type_ids")
    halves: ClassVar[tuple[Half, ...]] = (
        Half("self_attn", outer="attention_norm"),
        Half("mlp", outer="mlp_norm"),
    )
    activation_field: ClassVar[str] = "hidden_act"
    first_position: ClassVar[int] = 0

    # ---- config.json ----

    def read_config(self, fields: Fields) -> EncoderConfig:
        """The configuration that a config.json describes. May raise FormatError or UnsupportedError."""
        config_fields.require_readable(fields)
        self.require_encoder(fields)
        layers, rows = fields.integer("num_hidden_layers"), fields.integer("max_position_embeddings", 512)
        first = self.read_first_position(fields)
        return EncoderConfig(
            source=fields.source,
            model_type=self.model_type,
            vocab_size=fields.integer("vocab_size"),
            hidden_size=fields.integer("hidden_size"),
            intermediate_size=fields.integer("intermediate_size"),
            num_hidden_layers=layers,
            num_attention_heads=config_fields.heads(fields, "num_attention_heads"),
            layer_norm_eps=fields.number("layer_norm_eps", 1e-12),
            max_position_embeddings=rows - first,
            hidden_act=config_fields.activation(fields, self.activation_field, "gelu"),
            sliding_windows=config_fields.no_windows(fields, layers),
            type_vocab_size=fields.integer("type_vocab_size", 2),
            position_rows=rows,
            first_position=first,
        )

    def read_first_position(self, fields: Fields) -> int:
        """The index of the position table's row for the first token of a text."""
        return self.first_position

    def require_encoder(self, fields: Fields) -> None:
        """Raise UnsupportedError for variants of the family that nplora does not support."""
        for name in ("is_decoder", "add_cross_attention"):
            if fields.boolean(name, False):
                raise UnsupportedError(f"{fields.source}: {name} is set, expected an encoder")
        kind = fields.string("position_embedding_type", "absolute")
        if kind != "absolute":
            raise UnsupportedError(
                f"{fields.source}: position_embedding_type is {kind!r}, expected 'absolute'"
            )

    # ---- GGUF's metadata ----

    def read_metadata(self, file: GgufFile) -> EncoderConfig:
        """The configuration from a GGUF file's metadata. May raise FormatError or UnsupportedError."""
        assert self.architecture is not None
        data = ArchitectureMetadata(file, self.architecture)
        layers, width = data.integer("block_count"), data.integer("embedding_length")
        require_layers(file.source, layers)
        if data.boolean("attention.causal", False):
            raise UnsupportedError(
                f"{file.source}: {data.key('attention.causal')} is set, expected an encoder"
            )
        rows = data.integer("context_length")
        types = file.entries.get("token_types.weight")
        return EncoderConfig(
            source=file.source,
            model_type=self.model_type,
            vocab_size=gguf_fields.vocabulary(data),
            hidden_size=width,
            intermediate_size=data.integer("feed_forward_length"),
            num_hidden_layers=layers,
            num_attention_heads=data.integer("attention.head_count"),
            layer_norm_eps=data.number("attention.layer_norm_epsilon"),
            max_position_embeddings=rows,
            hidden_act="gelu",
            sliding_windows=(NO_WINDOW,) * layers,
            type_vocab_size=0 if types is None or not types.shape else types.shape[0],
            position_rows=rows,
        )

    def is_unused_in_gguf(self, name: str) -> bool:
        """Whether a tensor of a GGUF file has no effect on the hidden states."""
        return name.startswith("cls.")

    # ---- names ----

    def hf_name(self, name: str) -> str:
        """The name in transformers of a module of the encoder, such as "layers.0.self_attn.q_proj".

        If transformers has no name for a module in a block, translate only the name of the block.
        """
        match = _LAYER.fullmatch(name)
        if match is None:
            return self.outside.get(name, (name,))[0]
        names = {**self.layers, **self.norms}.get(match[2] or "")
        return ".".join(filter(None, (self.blocks, match[1], names[0] if names else match[2])))

    def hf_layer(self, stored: str) -> str | None:
        """The name in transformers of a layer or norm, given GGUF's name; None if the name is unknown."""
        match = _BLOCK.fullmatch(stored)
        names = self.outside if match is None else {**self.layers, **self.norms}
        found = next((name for name, gguf in names.values() if gguf == (match[2] if match else stored)), None)
        return found if match is None or found is None else f"{self.blocks}.{match[1]}.{found}"

    def stored_names(self, names: Collection[str]) -> StoredNames:
        """How the encoder's tensors are named in a file. `names` are the names of all tensors in the file."""
        prefix = f"{self.prefix}."
        has_prefix = f"{prefix}{self.outside['embed_tokens'][0]}.weight" in names
        return StoredNames(frozenset(names), prefix if has_prefix else "", self.ignored)

    # ---- the head of a classifier ----

    def head(self, config: EncoderConfig) -> HeadSpec:
        """Describe the head of this family's `...ForSequenceClassification` model in transformers."""
        return HeadSpec("cls", "classifier", ("pooler", "classifier"), f"{self.prefix}.pooler.dense")

    def token_head(self, config: EncoderConfig) -> HeadSpec:
        """Describe the head of this family's `...ForTokenClassification` model in transformers."""
        return HeadSpec(None, "classifier", ("classifier",))

    # ---- tensors ----

    def linear_shapes(self, config: EncoderConfig) -> dict[str, tuple[int, int, bool]]:
        """A dict from each linear layer of a block to (d_out, d_in, whether the layer has a bias)."""
        d, f = config.hidden_size, config.intermediate_size
        attention = dict.fromkeys(
            (name for name in self.layers if name.startswith("self_attn.")), (d, d, config.attention_bias)
        )
        return {
            **attention,
            "mlp.up_proj": (f, d, config.mlp_bias),
            "mlp.down_proj": (d, f, config.mlp_bias),
        }

    def block_norms(self, config: EncoderConfig, layer: int) -> tuple[str, ...]:
        """The names of the norms of a block."""
        return tuple(self.norms)

    def tensors(self, config: EncoderConfig) -> Iterator[TensorSpec]:
        """All tensors of an encoder that affect its hidden states."""
        d = config.hidden_size
        tables = {
            "embed_tokens": config.vocab_size,
            "embed_positions": config.position_rows,
            "embed_types": config.type_vocab_size,
            "relative_bias": config.relative_buckets,
        }
        for part, (name, gguf) in self.outside.items():
            if part in tables:
                width = config.num_attention_heads if part == "relative_bias" else d
                if tables[part]:
                    yield TensorSpec(f"{name}.weight", f"{gguf}.weight", (tables[part], width))
            else:
                yield from self._norm_tensors(config, name, gguf)
        for i in range(config.num_hidden_layers):
            for part in self.block_norms(config, i):
                name, gguf = self.norms[part]
                yield from self._norm_tensors(config, f"{self.blocks}.{i}.{name}", f"blk.{i}.{gguf}")
            for part, (d_out, d_in, has_bias) in self.linear_shapes(config).items():
                name, gguf = f"{self.blocks}.{i}.{self.layers[part][0]}", f"blk.{i}.{self.layers[part][1]}"
                yield TensorSpec(f"{name}.weight", f"{gguf}.weight", (d_out, d_in))
                if has_bias:
                    yield TensorSpec(f"{name}.bias", f"{gguf}.bias", (d_out,))

    def _norm_tensors(self, config: EncoderConfig, name: str, gguf: str) -> Iterator[TensorSpec]:
        yield TensorSpec(f"{name}.weight", f"{gguf}.weight", (config.hidden_size,))
        if config.norm_bias:
            yield TensorSpec(f"{name}.bias", f"{gguf}.bias", (config.hidden_size,))

    # ---- modules ----

    def block(
        self,
        config: EncoderConfig,
        layer: int,
        rope: Rope | None,
        bias: RelativeBias | None,
        modules: Mapping[str, Linear | Norm],
    ) -> DecoderBlock:
        """Build a block. `modules` is a dict from names within the block to the block's layers and norms."""

        def mixer(name: str, own: Mapping[str, Module]) -> Mixer:
            return self.mixer(name, config, layer, rope, bias, own)

        return assemble(self.block_halves(config, layer), mixer, modules)

    def block_halves(self, config: EncoderConfig, layer: int) -> tuple[Half, ...]:
        """The half-blocks of a block."""
        return self.halves

    def mixer(
        self,
        name: str,
        config: EncoderConfig,
        layer: int,
        rope: Rope | None,
        bias: RelativeBias | None,
        modules: Mapping[str, Module],
    ) -> Mixer:
        """Build a half-block's mixer from its layers."""
        if name == "self_attn":
            return Attention(config, layer, rope, modules, bias)
        return FeedForward(config.hidden_act, modules)
