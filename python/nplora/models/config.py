"""The configuration of a decoder-only language model, independent of its file type."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np

from nplora.formats.errors import FormatError
from nplora.models.rope import RopeConfig

# Limits that no model reaches. A file with larger values is wrong, and nothing is allocated for it.
MAX_LAYERS = 4096
MAX_HEADS = 1 << 16
MAX_HEAD_DIM = 4096
MAX_WIDTH = 1 << 20
MAX_VOCABULARY = 1 << 24
MAX_POSITIONS = 1 << 30
_MAX_FACTOR = 1e6
_FACTORS = (
    "query_pre_attn_scalar",
    "attention_multiplier",
    "embedding_multiplier",
    "residual_multiplier",
    "logits_scaling",
)


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """The sizes and settings of a decoder. Most fields have the same name as in Hugging Face's config.json.

    Attributes:
        source: the file that the configuration was read from.
        model_type: the name of the model's family in `models.families`.
        max_position_embeddings: the context length that the model was trained for.
        rope: the rotation of q and k.
        sliding_windows: for each layer, a number w. A token attends to itself and to the w - 1 tokens before
            it (if not `causal`, also to the w - 1 tokens after it). If w is 0, there is no window.
        local_rope: the rotation in layers with a sliding window, or None if it is the same as in other
            layers.
        unrotated: the indices of the layers without rotation.
        rotary_dim: the number of values that are rotated in each head, beginning with the first value; None:
            all values.
        qkv_bias, o_bias, mlp_bias: whether these linear layers have a bias.
        hidden_act: the MLP's activation: "silu", "gelu", or "gelu_pytorch_tanh" (which approximates
            GELU with tanh).
        query_pre_attn_scalar: attention scores are divided by the square root of this number. None: the
            number is `head_dim`.
        attention_multiplier: attention scores are multiplied by this number, instead of being divided by a
            square root. None: the scores are divided by the square root of `query_pre_attn_scalar`.
        embedding_multiplier: a factor for the embeddings.
        residual_multiplier: a factor for the output of each half-block (attention or MLP).
        logits_scaling: a divisor for the logits.
        causal: whether a token attends only to itself and earlier tokens. If False, the model is an encoder.
        interleaved: which values of a head are rotated as a pair. True: two neighbours, as in some GGUF
            files. False: the values i and i + rotary_dim / 2.

    >>> import nplora
    >>> config = nplora.load_model("model.gguf").config
    >>> config.model_type, config.hidden_size, config.num_hidden_layers, config.max_position_embeddings
    ('llama', 32, 2, 64)
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
    local_rope: RopeConfig | None = None
    unrotated: frozenset[int] = frozenset()
    rotary_dim: int | None = None
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    hidden_act: str = "silu"
    query_pre_attn_scalar: float | None = None
    attention_multiplier: float | None = None
    embedding_multiplier: float = 1.0
    residual_multiplier: float = 1.0
    logits_scaling: float = 1.0
    interleaved: bool = False
    causal: bool = True

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
                f"{self.source}: {self.num_attention_heads} attention heads, expected a multiple of "
                f"{self.num_key_value_heads}, the number of key/value heads"
            )
        if self.head_dim % 2:
            raise FormatError(f"{self.source}: head_dim is {self.head_dim}, expected an even number")
        if self.rotary_dim is not None and not (
            2 <= self.rotary_dim <= self.head_dim and self.rotary_dim % 2 == 0
        ):
            raise FormatError(
                f"{self.source}: {self.rotary_dim} values of a head are rotated, expected an even number "
                f"from 2 to head_dim={self.head_dim}"
            )
        for name in _FACTORS:
            value = getattr(self, name)
            if value is not None and not 0 < value < _MAX_FACTOR:
                bounds = f"above 0 and below {_MAX_FACTOR:,.0f}"
                raise FormatError(f"{self.source}: {name} is {value}, expected {bounds}")
        if not 0 < self.rms_norm_eps < 1:
            raise FormatError(f"{self.source}: rms_norm_eps is {self.rms_norm_eps}, expected in (0, 1)")

    def _require(self, name: str, value: int, most: int) -> None:
        if not 1 <= value <= most:
            raise FormatError(f"{self.source}: {name} is {value:,}, expected 1 to {most:,}")

    def described(self) -> str:
        """Return a text with all settings except `source`. Equal settings have equal texts.

        Settings with their default value are left out. So an old model's text does not change when a new
        version of nplora adds a setting to this class.

        >>> import nplora
        >>> print(nplora.load_model("model.gguf").config.described())
        ModelConfig(source='', model_type='llama', vocab_size=266, ...
        """
        return described(self)

    @property
    def attention_scale(self) -> float:
        """The factor of the attention scores, by default 1 / sqrt(head_dim)."""
        if self.attention_multiplier is not None:
            return self.attention_multiplier
        return 1 / math.sqrt(self.query_pre_attn_scalar or self.head_dim)

    @property
    def heads_width(self) -> int:
        """The total width of the query heads."""
        return self.num_attention_heads * self.head_dim

    @property
    def key_value_width(self) -> int:
        """The total width of the key heads, which equals that of the value heads."""
        return self.num_key_value_heads * self.head_dim

    def rope_of(self, layer: int) -> RopeConfig | None:
        """The rotation in a layer, or None if the layer has none.

        >>> import nplora
        >>> config = nplora.load_model("model.gguf").config
        >>> config.rope_of(0) is config.rope
        True
        """
        if layer in self.unrotated:
            return None
        return self.local_rope if self.local_rope is not None and self.sliding_windows[layer] else self.rope


def described(config: Any) -> str:
    """Return a text with all settings of a configuration except `source`."""
    return _described(dataclasses.replace(config, source=""))


def _described(value: Any) -> str:
    if dataclasses.is_dataclass(value):
        named = ((field, getattr(value, field.name)) for field in dataclasses.fields(value))
        parts = [f"{field.name}={_described(item)}" for field, item in named if _differs(item, field.default)]
        return f"{type(value).__name__}({', '.join(parts)})"
    if isinstance(value, np.ndarray):
        return repr(value.tolist())
    return repr(sorted(value) if isinstance(value, frozenset) else value)


def _differs(value: object, default: object) -> bool:
    return type(value) is not type(default) or value != default


def require_layers(source: str, count: int) -> None:
    """Refuse an impossible number of layers before anything is allocated for them."""
    if not 1 <= count <= MAX_LAYERS:
        raise FormatError(f"{source}: {count:,} layers, expected 1 to {MAX_LAYERS:,}")
