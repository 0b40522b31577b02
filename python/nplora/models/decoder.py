"""The stack of blocks between the embedding and the last norm, and what of it is kept for backward."""

from __future__ import annotations

import dataclasses
from contextvars import Context, copy_context
from typing import Any

import numpy.typing as npt

from nplora.models.block import BlockSaved, DecoderBlock
from nplora.models.cache import KVCache
from nplora.models.places import CachePlaces, Places
from nplora.models.prefix import KeptPrefix
from nplora.nn import Embedding, LoRAEmbedding, RMSNorm
from nplora.nn.module import Module, Saved, inference

Array = npt.NDArray[Any]


@dataclasses.dataclass(frozen=True, slots=True)
class BlockInput(Saved):
    """What is kept of a block that is computed again.

    Attributes:
        x: its input.
        streams: where its dropout streams stood.
        context: knows which adapters were disabled.
    """

    x: Array
    streams: dict[str, list[int]]
    context: Context


@dataclasses.dataclass(frozen=True, slots=True)
class DecoderSaved(Saved):
    """What each adapted block kept, and those above it; `run_backward` takes them from the end."""

    places: Places
    embedding: Any
    blocks: list[BlockSaved | BlockInput]


class Decoder(Module):
    """Token embedding, blocks, last norm. The norm is computed with the head, only where it is needed.

    Blocks below the lowest adapted one keep nothing and get no gradient.

    Attributes:
        checkpoint_blocks: keep the input of each block only, and compute the rest again in backward (Chen et
            al. 2016): a third more work, a tenth of the memory. Gradients stay the same, to the bit.
        prefix: what the blocks below the lowest adapted one made of sequences met before, or None.
    """

    def __init__(
        self, embed_tokens: Embedding | LoRAEmbedding, layers: list[DecoderBlock], norm: RMSNorm
    ) -> None:
        self.embed_tokens = embed_tokens
        self.layers = layers
        self.norm = norm
        self.checkpoint_blocks = False
        self.prefix: KeptPrefix | None = None

    def infer(self, ids: Array, places: Places) -> Array:
        """The residual stream (n, d) after the last block; to be called in `inference()`."""
        first = self.first_adapted()
        x = self._run_frozen(first, ids, places)[0]
        return _run_through(self.layers[first:], x, places)

    def run(self, ids: Array, places: Places) -> tuple[Array, DecoderSaved]:
        """The same in training, and what `run_backward` needs."""
        first = self.first_adapted()
        x, embedding = self._run_frozen(first, ids, places)
        blocks: list[BlockSaved | BlockInput] = []
        for block in self.layers[first:]:
            if self.checkpoint_blocks:
                blocks.append(BlockInput(x, block.random_state(), copy_context()))
                x = block.run(x, places)[0]
            else:
                x, saved = block.run(x, places)
                blocks.append(saved)
        return x, DecoderSaved(places, embedding, blocks)

    def run_backward(self, dx: Array, saved: DecoderSaved) -> None:
        """Add to the gradients of all factors; dx (n, d), the residual stream's gradient, is used up."""
        whole = bool(self.embed_tokens.local_parameters())
        for block in reversed(self.layers[len(self.layers) - len(saved.blocks) :]):
            kept = saved.blocks.pop()
            if isinstance(kept, BlockInput):
                kept = kept.context.run(_again, block, kept, saved.places)
            dx = block.run_backward(dx, kept, saved.places, need_dx=whole or bool(saved.blocks))
        if whole:
            self.embed_tokens.backward(dx, saved.embedding)

    def run_cached(self, ids: Array, places: CachePlaces, cache: KVCache) -> Array:
        """The residual stream (m, d) of the newest tokens."""
        x = self.embed_tokens.forward(ids)[0]
        for block, keys, values in zip(self.layers, cache.keys, cache.values, strict=True):
            x = block.run_cached(x, places, keys, values)
        return x

    def _run_frozen(self, first: int, ids: Array, places: Places) -> tuple[Array, Any]:
        """The residual stream (n, d) that enters block `first`, and what the embedding kept."""
        prefix = self.prefix if self.prefix is not None and self.prefix.blocks == first > 0 else None
        found = None if prefix is None else prefix.find(ids, places.starts)
        if found is not None:
            return found, None
        x, embedding = self.embed_tokens.forward(ids)
        with inference():
            x = _run_through(self.layers[:first], x, places)
        if prefix is not None:
            prefix.keep(ids, places.starts, x)
        return x, embedding

    def first_adapted(self) -> int:
        """The lowest block that needs a gradient; the number of blocks where none does."""
        if self.embed_tokens.local_parameters():
            return 0
        adapted = (index for index, block in enumerate(self.layers) if block.parameters())
        return next(adapted, len(self.layers))


def _run_through(blocks: list[DecoderBlock], x: Array, places: Places) -> Array:
    for block in blocks:
        x = block.run(x, places)[0]
    return x


def _again(block: DecoderBlock, kept: BlockInput, places: Places) -> BlockSaved:
    """The block's forward pass once more, with the dropout masks of the first time."""
    now = block.random_state()
    block.set_random_state(kept.streams)
    saved = block.run(kept.x, places)[1]
    block.set_random_state(now)
    return saved
