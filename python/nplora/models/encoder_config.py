"""The configuration of an encoder, independent of its file type."""

from __future__ import annotations

import dataclasses
import math

from nplora.formats.errors import FormatError
from nplora.models.config import (
    MAX_HEAD_DIM,
    MAX_HEADS,
    MAX_POSITIONS,
    MAX_VOCABULARY,
    MAX_WIDTH,
    described,
    require_layers,
)
from nplora.models.rope import RopeConfig

_MAX_TYPES = 1 << 10
_MAX_BUCKETS = 1 << 12


@dataclasses.dataclass(frozen=True)
class EncoderConfig:
    """The sizes and settings of an encoder. A field that BERT's config.json has too has the same meaning.

    Attributes:
        source: the file that the configuration was read from.
        model_type: the name of the model's family in `models.families`.
        max_position_embeddings: the maximum number of tokens in a text.
        hidden_act: the activation: "gelu" (exact), "gelu_pytorch_tanh" or "silu".
        type_vocab_size: the number of token types; 0 if the model has no token types.
        position_rows: the number of rows in the table of learned positions; 0 if the model has no such table.
        first_position: the first token of each text uses this row of the table of learned positions.
        relative_buckets: the number of buckets of distances in `RelativeBias`; 0 if the model has no relative
            bias.
        sliding_windows: a number w for each layer. A token attends to itself and to w - 1 tokens on each
            side. If w is 0, a token attends to all tokens.
        rope: the rotation of q and k in layers without a window; None: no rotation.
        local_rope: the rotation of q and k in layers with a window; None: no rotation.
        attention_bias, mlp_bias, norm_bias: whether these layers have a bias: the linear layers of attention,
            the linear layers of the MLP, and the norms.
        classifier_pooling, classifier_activation, classifier_bias: settings of the head of a classifier.
        causal: always False, because a token of an encoder also attends to later tokens.
    """

    source: str
    model_type: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    layer_norm_eps: float
    max_position_embeddings: int
    hidden_act: str
    sliding_windows: tuple[int, ...]
    type_vocab_size: int = 0
    position_rows: int = 0
    first_position: int = 0
    relative_buckets: int = 0
    rope: RopeConfig | None = None
    local_rope: RopeConfig | None = None
    attention_bias: bool = True
    mlp_bias: bool = True
    norm_bias: bool = True
    classifier_pooling: str = "cls"
    classifier_activation: str = "tanh"
    classifier_bias: bool = True
    causal: bool = False

    def __post_init__(self) -> None:
        self._require("vocab_size", self.vocab_size, 1, MAX_VOCABULARY)
        self._require("hidden_size", self.hidden_size, 1, MAX_WIDTH)
        self._require("intermediate_size", self.intermediate_size, 1, MAX_WIDTH)
        self._require("num_attention_heads", self.num_attention_heads, 1, MAX_HEADS)
        self._require("max_position_embeddings", self.max_position_embeddings, 1, MAX_POSITIONS)
        self._require("pad_token_id + 1", self.first_position, 0, MAX_POSITIONS)
        self._require("type_vocab_size", self.type_vocab_size, 0, _MAX_TYPES)
        self._require("relative_attention_num_buckets", self.relative_buckets, 0, _MAX_BUCKETS)
        require_layers(self.source, self.num_hidden_layers)
        if self.hidden_size % self.num_attention_heads:
            raise FormatError(
                f"{self.source}: hidden_size {self.hidden_size} is not a multiple of "
                f"num_attention_heads {self.num_attention_heads}"
            )
        self._require("the width of a head", self.head_dim, 1, MAX_HEAD_DIM)
        if self.rope is not None and self.head_dim % 2:
            raise FormatError(f"{self.source}: a head is {self.head_dim} wide, expected an even number")
        if not 0 < self.layer_norm_eps < 1:
            raise FormatError(f"{self.source}: layer_norm_eps is {self.layer_norm_eps}, expected in (0, 1)")

    def _require(self, name: str, value: int, least: int, most: int) -> None:
        if not least <= value <= most:
            raise FormatError(f"{self.source}: {name} is {value:,}, expected {least:,} to {most:,}")

    def described(self) -> str:
        """Return a text with all settings except `source`. Equal settings have equal texts."""
        return described(self)

    @property
    def head_dim(self) -> int:
        """The width of a head."""
        return self.hidden_size // self.num_attention_heads

    @property
    def num_key_value_heads(self) -> int:
        """The number of key and value heads, which equals that of the query heads."""
        return self.num_attention_heads

    @property
    def heads_width(self) -> int:
        """The total width of the query heads."""
        return self.hidden_size

    @property
    def key_value_width(self) -> int:
        """The total width of the key heads, which equals that of the value heads."""
        return self.hidden_size

    @property
    def attention_scale(self) -> float:
        """The factor by which the attention scores are multiplied."""
        return 1 / math.sqrt(self.head_dim)

    def rope_of(self, layer: int) -> RopeConfig | None:
        """The rotation in a layer, or None if the layer has none."""
        return self.local_rope if self.sliding_windows[layer] else self.rope
