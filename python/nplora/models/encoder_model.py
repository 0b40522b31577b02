"""An encoder: embeddings of tokens and positions, and blocks in which a token attends to the whole text."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

from nplora.models.block import DecoderBlock
from nplora.models.decoder import Decoder
from nplora.models.encoder_config import EncoderConfig
from nplora.models.norms import norm_backward, norm_forward
from nplora.models.positions import CachePositions, PackedPositions
from nplora.nn import Embedding, LayerNorm, LoRAEmbedding
from nplora.nn.module import Module, Saved, inferring
from nplora.weights import FrozenWeight, buffers

Array = npt.NDArray[Any]


@dataclasses.dataclass(frozen=True, slots=True)
class EmbeddedSaved(Saved):
    """The values that the backward pass of the embeddings needs.

    Attributes:
        total: the sum of the embeddings, which is the input of the embeddings' norm.
        tokens: the values that the backward pass of the token embedding needs.
    """

    total: Array | None
    tokens: Any


class EncoderModel(Decoder):
    """The embeddings, the blocks and the last norm of an encoder. Some families have no last norm.

    Texts of different lengths are packed, so no work is spent on padding. The layers have the names that
    transformers gives them, such as "encoder.layer.0.attention.self.query".

    Args:
        positions: the table of position embeddings, or None. This table cannot have an adapter, so it is a
            weight, not a module.
        types: the table of token-type embeddings, which is also a weight; or None. All tokens have type 0.
        embed_norm: the LayerNorm that normalises the sum of the embeddings.
        norm: the LayerNorm after the last block, or None.
        hf_name: a function that turns nplora's name of a module into the name in transformers.
    """

    norm: LayerNorm | None  # type: ignore[assignment]

    def __init__(
        self,
        config: EncoderConfig,
        embed_tokens: Embedding | LoRAEmbedding,
        positions: FrozenWeight | None,
        types: FrozenWeight | None,
        embed_norm: LayerNorm,
        layers: list[DecoderBlock],
        norm: LayerNorm | None,
        hf_name: Callable[[str], str],
    ) -> None:
        super().__init__(embed_tokens, layers, norm)  # type: ignore[arg-type]
        self._positions, self._types = positions, types
        self.embed_norm = embed_norm
        self._first_position, self._hf_name = config.first_position, hf_name

    def local_frozen(self) -> list[FrozenWeight | Array]:
        return [weight for weight in (self._positions, self._types) if weight is not None]

    def _walk(self, prefix: str, seen: set[int]) -> Iterator[tuple[str, Module]]:
        for name, module in super()._walk("", seen):
            yield ".".join(filter(None, (prefix, self._hf_name(name)))), module

    def _embedded(self, ids: Array, positions: PackedPositions | CachePositions) -> tuple[Array, Any]:
        x, tokens = self.embed_tokens.forward(ids)
        if self._positions is not None:
            x += self._positions.take(positions.in_sequence + self._first_position)
        if self._types is not None:
            x += self._types.take(np.zeros(1, np.int64))
        return norm_forward(self.embed_norm, x), EmbeddedSaved(None if inferring() else x, tokens)

    def _embedded_backward(self, dx: Array, saved: EmbeddedSaved) -> None:
        assert saved.total is not None
        norm_backward(self.embed_norm, dx, saved.total, dx)
        self.embed_tokens.backward(dx, saved.tokens)

    def hidden_states(self, x: Array) -> Array:
        """Apply the last norm to the residual stream x (n, d). If the model has no last norm, return x."""
        return x if self.norm is None else norm_forward(self.norm, x)

    def hidden_states_backward(self, dy: Array, x: Array) -> Array:
        dx = buffers.empty_like(x)
        if self.norm is None:
            np.copyto(dx, dy)
        else:
            norm_backward(self.norm, dy, x, dx)
        return dx
