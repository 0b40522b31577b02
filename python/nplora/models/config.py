"""What defines a decoder-only language model of the Llama kind, whatever file told it."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator

from nplora.formats.errors import FormatError
from nplora.models.rope import RopeConfig

# Beyond what any model has; a file that says more is wrong, and nothing is allocated for it.
MAX_LAYERS = 4096
MAX_HEADS = 1 << 16
MAX_HEAD_DIM = 4096
MAX_WIDTH = 1 << 20
MAX_VOCABULARY = 1 << 24
MAX_POSITIONS = 1 << 30


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Sizes and switches, by the names of Hugging Face's config.json.

    Attributes:
        source: the file that told them.
        model_type: the family: "llama", "mistral", "qwen2" or "qwen3".
        max_position_embeddings: the length of the context that the model was trained for.
        sliding_windows: for each layer, how many tokens a query sees, itself included; 0: all before it.
        qkv_bias, o_bias, mlp_bias: which linear layers have a bias.
        qk_norm: whether each head of q and k is normalised before the rotation.
        hidden_act: what the MLP applies to its gate: "silu", or "gelu_pytorch_tanh", GELU by tanh.
        interleaved: whether the pairs that rotate are neighbours in a head, as GGUF stores them for
            architecture llama, or half a head apart.
    """

    source: str
    model_type: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rms_norm_eps: float
    max_position_embeddings: int
    rope: RopeConfig
    sliding_windows: tuple[int, ...]
    tie_word_embeddings: bool
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    hidden_act: str = "silu"
    interleaved: bool = False

    def __post_init__(self) -> None:
        self._require("vocab_size", self.vocab_size, MAX_VOCABULARY)
        self._require("hidden_size", self.hidden_size, MAX_WIDTH)
        self._require("intermediate_size", self.intermediate_size, MAX_WIDTH)
        self._require("num_attention_heads", self.num_attention_heads, MAX_HEADS)
        self._require("num_key_value_heads", self.num_key_value_heads, MAX_HEADS)
        self._require("head_dim", self.head_dim, MAX_HEAD_DIM)
        self._require("max_position_embeddings", self.max_position_embeddings, MAX_POSITIONS)
        require_layers(self.source, self.num_hidden_layers)
        if self.num_attention_heads % self.num_key_value_heads:
            raise FormatError(
                f"{self.source}: {self.num_attention_heads} attention heads cannot share "
                f"{self.num_key_value_heads} heads of keys and values evenly"
            )
        if self.head_dim % 2:
            raise FormatError(f"{self.source}: head_dim is {self.head_dim}, expected an even number")
        if not 0 < self.rms_norm_eps < 1:
            raise FormatError(f"{self.source}: rms_norm_eps is {self.rms_norm_eps}, expected in (0, 1)")

    def _require(self, name: str, value: int, most: int) -> None:
        if not 1 <= value <= most:
            raise FormatError(f"{self.source}: {name} is {value:,}, expected 1 to {most:,}")

    @property
    def attention_scale(self) -> float:
        """What scores are multiplied by: 1 / sqrt(head_dim)."""
        return 1 / math.sqrt(self.head_dim)

    def shapes(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        """The name and shape of every tensor of the model, by Hugging Face's names."""
        d, f = self.hidden_size, self.intermediate_size
        q, kv = self.num_attention_heads * self.head_dim, self.num_key_value_heads * self.head_dim
        yield "model.embed_tokens.weight", (self.vocab_size, d)
        yield "model.norm.weight", (d,)
        if not self.tie_word_embeddings:
            yield "lm_head.weight", (self.vocab_size, d)
        linears = (
            ("self_attn.q_proj", q, d, self.qkv_bias),
            ("self_attn.k_proj", kv, d, self.qkv_bias),
            ("self_attn.v_proj", kv, d, self.qkv_bias),
            ("self_attn.o_proj", d, q, self.o_bias),
            ("mlp.gate_proj", f, d, self.mlp_bias),
            ("mlp.up_proj", f, d, self.mlp_bias),
            ("mlp.down_proj", d, f, self.mlp_bias),
        )
        for i in range(self.num_hidden_layers):
            layer = f"model.layers.{i}"
            yield f"{layer}.input_layernorm.weight", (d,)
            yield f"{layer}.post_attention_layernorm.weight", (d,)
            if self.qk_norm:
                yield f"{layer}.self_attn.q_norm.weight", (self.head_dim,)
                yield f"{layer}.self_attn.k_norm.weight", (self.head_dim,)
            for name, d_out, d_in, bias in linears:
                yield f"{layer}.{name}.weight", (d_out, d_in)
                if bias:
                    yield f"{layer}.{name}.bias", (d_out,)


def require_layers(source: str, count: int) -> None:
    """Refuse a number of layers that cannot be, before anything is made for each of them."""
    if not 1 <= count <= MAX_LAYERS:
        raise FormatError(f"{source}: {count:,} layers, expected 1 to {MAX_LAYERS:,}")
