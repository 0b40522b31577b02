"""A decoder (token embedding, blocks and last norm), and the activations that its backward pass needs."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager
from contextvars import Context, copy_context
from typing import Any

import numpy as np
import numpy.typing as npt

from nplora.models.block import BlockSaved, DecoderBlock
from nplora.models.cache import KVCache
from nplora.models.invocation import active_in, invocation_of
from nplora.models.norms import norm_backward, norm_forward
from nplora.models.positions import CachePositions, PackedPositions
from nplora.models.prefix_cache import PrefixCache
from nplora.models.word_filter import WordFilter
from nplora.nn import Embedding, LoRAEmbedding, RMSNorm, TrainedEmbedding
from nplora.nn.active_rows import only_active
from nplora.nn.module import Module, Saved, inference
from nplora.nn.row_groups import row_groups
from nplora.runtime.giving_way import give_way
from nplora.runtime.machine import has_bfloat16_instructions
from nplora.weights import FrozenWeight, buffers

Array = npt.NDArray[Any]


@dataclasses.dataclass(frozen=True, slots=True)
class BlockInput(Saved):
    """The values from which the backward pass computes a block again.

    Attributes:
        x: the block's input.
        streams: the states of the block's dropout generators before the block's forward pass.
        context: the forward pass's context variables, which record the adapters that are disabled.
    """

    x: Array
    streams: dict[str, list[int]]
    context: Context


@dataclasses.dataclass(frozen=True, slots=True)
class DecoderSaved(Saved):
    """The values that `run_backward` needs.

    Attributes:
        blocks: the values of each block, beginning with the lowest adapted block. `run_backward` removes the
            values that it has used.
        rows: the indices of the tokens whose outputs were computed; None: all tokens.
    """

    positions: PackedPositions
    embedding: Any
    blocks: list[BlockSaved | BlockInput]
    rows: Array | None = None


class Decoder(Module):
    """Token embedding, blocks and last norm.

    The last norm is computed together with the head, only for the rows whose logits are needed. Blocks below
    the lowest adapted block store nothing and compute no gradient. Before each block, `give_way` lets more
    urgent work run.

    Attributes:
        recompute: use gradient checkpointing (Chen et al. 2016): store only each block's input, and compute
            the block again in the backward pass. Checkpointing increases the computation by a third, and
            reduces the memory to a tenth. The gradients have the same bits as without checkpointing.
        prefix: the cached outputs of the blocks below the lowest adapted block, or None.
        word_filter: a filter that leaves unlikely words out of the head's gradients, or None.
        int8_head: with compute="int8", also compute the gradient of the head's input in int8 instead of
            bfloat16. The gradient of the logits is then rounded to int8 stochastically, so the gradient of
            the input is a little less exact. The default is therefore False on machines with bfloat16
            instructions.
    """

    def __init__(
        self,
        embed_tokens: Embedding | LoRAEmbedding | TrainedEmbedding,
        layers: list[DecoderBlock],
        norm: RMSNorm,
        embedding_multiplier: float = 1.0,
        logits_scaling: float = 1.0,
    ) -> None:
        self._multiplier, self._readout = np.float32(embedding_multiplier), np.float32(1 / logits_scaling)
        self.embed_tokens = embed_tokens
        self.layers = layers
        self.norm = norm
        self.recompute = False
        self.prefix: PrefixCache | None = None
        self.word_filter: WordFilter | None = None
        self.int8_head = not has_bfloat16_instructions()

    @property
    def checkpoint_blocks(self) -> bool:
        """The former name of `recompute`."""
        return self.recompute

    @checkpoint_blocks.setter
    def checkpoint_blocks(self, on: bool) -> None:
        self.recompute = on

    def infer(self, ids: Array, positions: PackedPositions, rows: Array | None = None) -> Array:
        """Compute the residual stream (n, d) after the last block. Call this method in `with inference()`.

        Args:
            rows: int64 (m,), indices of tokens, each at most once. If given, return only the rows
                (m, d) of these tokens.
        """
        first = self.first_adapted() if rows is None else min(self.first_adapted(), len(self.layers) - 1)
        x = self._run_frozen(first, ids, positions)[0]
        with self._activated(ids, positions):
            return _run_through(self.layers[first:], x, positions, rows)

    def may_leave_out_rows(self) -> bool:
        """Whether `run` and `infer` accept `rows`: False if an adapter acts on only some tokens."""
        return invocation_of(self) is None and row_groups() is None

    def _activated(self, ids: Array, positions: PackedPositions) -> AbstractContextManager[None]:
        """A context in which an activated LoRA does not act before its invocation tokens."""
        invocation = invocation_of(self)
        return only_active(None if invocation is None else active_in(ids, positions.starts, invocation))

    def run(
        self, ids: Array, positions: PackedPositions, rows: Array | None = None
    ) -> tuple[Array, DecoderSaved]:
        """Like `infer`, but for training: also return the values that `run_backward` needs."""
        first = self.first_adapted()
        x, embedding = self._run_frozen(first, ids, positions)
        blocks: list[BlockSaved | BlockInput] = []
        with self._activated(ids, positions):
            for block in self.layers[first:]:
                give_way()
                needed = rows if block is self.layers[-1] else None
                if self.recompute:
                    blocks.append(BlockInput(x, block.random_state(), copy_context()))
                    x = block.run(x, positions, needed)[0]
                else:
                    x, saved = block.run(x, positions, needed)
                    blocks.append(saved)
        if rows is not None and not blocks:
            x = x[rows]
        return x, DecoderSaved(positions, embedding, blocks, rows)

    def run_backward(self, dx: Array, saved: DecoderSaved) -> None:
        """Accumulate the gradients of all LoRA factors, given the gradient `dx` (n, d) of the output.

        `dx` is overwritten.
        """
        whole = bool(self.embed_tokens.local_parameters())
        for block in reversed(self.layers[len(self.layers) - len(saved.blocks) :]):
            give_way()
            kept, rows = saved.blocks.pop(), saved.rows if block is self.layers[-1] else None
            if isinstance(kept, BlockInput):
                kept = kept.context.run(_recomputed, block, kept, saved.positions, rows)
            dx = block.run_backward(dx, kept, saved.positions, whole or bool(saved.blocks), rows)
        if whole:
            self._embedded_backward(dx, saved.embedding)

    def run_cached(self, ids: Array, positions: CachePositions, cache: KVCache) -> Array:
        """Compute the residual stream (m, d) after the last block, for the m newest tokens."""
        x = self._embedded(ids, positions)[0]
        active = cache.active(positions) if row_groups() is None else None
        with only_active(active):
            for block, keys, values in zip(self.layers, cache.keys, cache.values, strict=True):
                x = block.run_cached(x, positions, keys, values)
        return x

    def hidden_states(self, x: Array) -> Array:
        """Apply the model's last norm to the residual stream x (n, d)."""
        return norm_forward(self.norm, x)

    def hidden_states_backward(self, dy: Array, x: Array) -> Array:
        """The gradient of the residual stream `x`, given the gradient `dy` of the hidden states.

        `dy` is not changed.
        """
        dx = buffers.empty_like(x)
        norm_backward(self.norm, dy, x, dx)
        return dx

    def read_out(self, x: Array) -> Array:
        """The head's input: the hidden states, divided by `logits_scaling`."""
        y = self.hidden_states(x)
        return y if self._readout == 1 else np.multiply(y, self._readout, out=y)

    def read_out_backward(self, dy: Array, x: Array) -> Array:
        """The gradient of the residual stream `x`, given the gradient `dy` of the head's input."""
        return self.hidden_states_backward(dy if self._readout == 1 else dy * self._readout, x)

    def _run_frozen(self, first: int, ids: Array, positions: PackedPositions) -> tuple[Array, Any]:
        """Return the input (n, d) of the block with index `first`, and the saved values of the embedding."""
        prefix = self.prefix if self.prefix is not None and self.prefix.blocks == first > 0 else None
        found = None if prefix is None else prefix.find(ids, positions.starts)
        if found is not None:
            return found, None
        x, embedding = self._embedded(ids, positions)
        with inference():
            x = _run_through(self.layers[:first], x, positions)
        if prefix is not None:
            prefix.keep(ids, positions.starts, x)
        return x, embedding

    def _embedded(self, ids: Array, positions: PackedPositions | CachePositions) -> tuple[Array, Any]:
        """The embeddings (n, d), and the values that the embedding's backward pass needs."""
        x, saved = self.embed_tokens.forward(ids)
        if self._multiplier != 1:
            np.multiply(x, self._multiplier, out=x)
        return x, saved

    def _embedded_backward(self, dx: Array, saved: Any) -> None:
        """Accumulate the gradients of the embedding, given the gradient `dx` of the embedding's output."""
        self.embed_tokens.backward(dx if self._multiplier == 1 else dx * self._multiplier, saved)

    def int8_weights(self) -> list[FrozenWeight]:
        """The weights that training may multiply in int8, without those of the head.

        These are weights of the blocks from the first adapted block on. The blocks before it compute in
        bfloat16, and so do the parts of the model in which `Int8Check` has turned int8 off.
        """
        trained = frozen_weights(self.layers[self.first_adapted() :])
        return [weight for weight in trained if weight.compute == "int8"]

    def first_adapted(self) -> int:
        """The index of the lowest block that needs a gradient, or the number of blocks if none does."""
        if self.embed_tokens.local_parameters():
            return 0
        adapted = (index for index, block in enumerate(self.layers) if block.parameters())
        return next(adapted, len(self.layers))


def frozen_weights(modules: Iterable[Module]) -> Iterator[FrozenWeight]:
    """The frozen matrices of some modules, and of the modules inside them."""
    for each in modules:
        for _, module in each.named_modules():
            yield from (frozen for frozen in module.local_frozen() if isinstance(frozen, FrozenWeight))


def _run_through(
    blocks: list[DecoderBlock], x: Array, positions: PackedPositions, rows: Array | None = None
) -> Array:
    for index, block in enumerate(blocks, 1):
        give_way()
        x = block.run(x, positions, rows if index == len(blocks) else None)[0]
    return x


def _recomputed(
    block: DecoderBlock, kept: BlockInput, positions: PackedPositions, rows: Array | None
) -> BlockSaved:
    """Run the block's forward pass again, with the dropout masks of the first forward pass."""
    now = block.random_state()
    block.set_random_state(kept.streams)
    saved = block.run(kept.x, positions, rows)[1]
    block.set_random_state(now)
    return saved
