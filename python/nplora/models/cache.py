"""Caches the keys and values of earlier tokens, so that a decoder does not compute them again."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from nplora import _check
from nplora.models.config import ModelConfig
from nplora.models.invocation import NEVER, start_of
from nplora.models.positions import CachePositions, cache_positions
from nplora.models.slot_adapters import SlotAdapters
from nplora.nn.module import Module

Array = npt.NDArray[Any]

UNKNOWN = -1
PAGE_UNIT = 16  # the core sums over keys in groups of this many tokens; a group must be in one page


class KVCache:
    """Stores the keys and values of several sequences, each in a slot of its own.

    The memory is divided into pages. Without `page_tokens`, each slot has one page of its own, which holds
    the whole sequence. With `page_tokens` and `pages`, the slots have no pages at first, and each call of
    `give` adds a page to a slot. Several slots may share a page, if their sequences begin with the same
    tokens.

    Args:
        slots, capacity: the number of sequences, and the maximum number of tokens of each sequence.
        owner: the model that processes the tokens of slots without an adapter. `LanguageModel.new_cache`
            passes the model with the selected named adapters. None: the model whose `decode` is called.
        page_tokens: the number of tokens in a page, a multiple of PAGE_UNIT.
        pages: the number of pages. None: from the start, each slot has enough pages of its own for `capacity`
            tokens.
    Attributes:
        slots, capacity: the number of sequences, and the maximum number of tokens of each sequence.
        lengths: int64 (slots,), the number of tokens in each slot. To drop a slot's last tokens, lower its
            length.
        limits: int64 (slots,), the number of tokens that each slot may hold; initially `capacity`. With
            LongRoPE, the limit decides which rotation factors a sequence uses. So if a sequence will be
            shorter than `capacity`, set the slot's limit to the sequence's final length before you add the
            first token.
        keys, values: for each layer an array (pages, page_tokens, kv_heads · head_dim). The arrays take
            memory only as they are filled.
        table: int64 (slots, maximum number of pages of a slot). Row i lists the indices of slot i's pages, in
            the order of the tokens.
        held: int64 (slots,), the number of pages of each slot. Only the first held[i] entries of row i of
            `table` are used.
        adapters: the adapter of each slot, which can be set while the slot is empty. A slot's adapter is a
            name, an `Adapter`, or None. Initially, the adapter of every slot is None. If a slot's adapter is
            None, `owner` processes the slot's tokens.
        activation: int64 (slots,). In a slot with an activated LoRA, the adapter acts from the position
            activation[slot] on. UNKNOWN: `decode` has not found the invocation tokens yet. NEVER: the adapter
            does not act in this slot.
        owner: the model that processes the tokens of slots without an adapter. `LanguageModel.new_cache`
            passes the model with the selected named adapters. None: the model whose `decode` is called.

    >>> lm = nplora.load_model("model.gguf")
    >>> cache = lm.new_cache(slots=2, capacity=16)
    >>> scores = lm.decode([[5, 6, 7], [8]], [0, 1], cache)
    >>> cache.lengths
    array([3, 1])
    >>> cache.reset()
    >>> cache.lengths
    array([0, 0])
    """

    def __init__(
        self,
        config: ModelConfig,
        slots: int,
        capacity: int,
        owner: Module | None = None,
        resolve: Callable[[Any], Module] | None = None,
        page_tokens: int | None = None,
        pages: int | None = None,
    ) -> None:
        self.owner = owner
        self.slots = _check.integer("KVCache", "slots", slots, least=1)
        self.capacity = _check.integer("KVCache", "capacity", capacity, least=1)
        self.page_tokens = self.capacity if page_tokens is None else page_tokens
        of_slot = -(-self.capacity // self.page_tokens)
        if of_slot > 1 and self.page_tokens % PAGE_UNIT:
            raise ValueError(f"KVCache: page_tokens is {page_tokens}, expected a multiple of {PAGE_UNIT}")
        self.pages = self.slots * of_slot if pages is None else pages
        self.table = np.zeros((self.slots, of_slot), np.int64)
        self.held = np.zeros(self.slots, np.int64)
        if pages is None:
            self.table[:] = np.arange(self.pages).reshape(self.table.shape)
            self.held[:] = of_slot
        shape = (self.pages, self.page_tokens, config.num_key_value_heads * config.head_dim)
        self.keys = [np.zeros(shape, np.float32) for _ in range(config.num_hidden_layers)]
        self.values = [np.zeros(shape, np.float32) for _ in range(config.num_hidden_layers)]
        self.lengths = np.zeros(self.slots, np.int64)
        self.limits = np.full(self.slots, self.capacity, np.int64)
        self.activation = np.full(self.slots, UNKNOWN, np.int64)
        self.adapters = SlotAdapters(self.lengths, owner, resolve)
        self.joint: object = None  # a `JointModel`, once `decode` has computed slots with different adapters

    def reset(self) -> None:
        """Drop all sequences.

        >>> lm = nplora.load_model("model.gguf")
        >>> cache = lm.new_cache(slots=1, capacity=16)
        >>> scores = lm.decode([[5, 6, 7]], [0], cache)
        >>> cache.reset()
        >>> cache.lengths
        array([0])
        """
        self.lengths[:] = 0
        self.activation[:] = UNKNOWN

    def give(self, slot: int, page: int) -> None:
        """Append the page with the index `page` to the pages of a slot.

        >>> lm = nplora.load_model("model.gguf")
        >>> cache = KVCache(lm.config, slots=1, capacity=64, owner=lm, page_tokens=16, pages=2)
        >>> cache.give(0, 1)
        >>> cache.held, cache.take(0), cache.held
        (array([0]), [1], array([0]))
        """
        self.table[slot, self.held[slot]] = page
        self.held[slot] += 1

    def take(self, slot: int) -> list[int]:
        """Remove all pages and tokens from a slot. Return the pages.

        >>> lm = nplora.load_model("model.gguf")
        >>> cache = KVCache(lm.config, slots=1, capacity=64, owner=lm, page_tokens=16, pages=2)
        >>> cache.give(0, 1)
        >>> cache.take(0)
        [1]
        """
        pages = [int(page) for page in self.table[slot, : self.held[slot]]]
        self.table[slot] = self.held[slot] = self.lengths[slot] = 0
        self.activation[slot], self.limits[slot] = UNKNOWN, self.capacity
        return pages

    def next_positions(self, slots: Array, counts: Array | int) -> CachePositions:
        """The positions of the next counts[i] tokens in each slot slots[i]."""
        counts = np.broadcast_to(counts, slots.shape).astype(np.intp)
        begins = np.cumsum(counts) - counts  # the first row of each sequence
        in_sequence = np.arange(counts.sum(), dtype=np.int64) + np.repeat(
            self.lengths[slots] - begins, counts
        )
        return self.positions(np.repeat(slots, counts), in_sequence, np.repeat(self.limits[slots], counts))

    def positions(self, slots: Array, in_sequence: Array, limits: Array) -> CachePositions:
        """Return the `CachePositions` of new tokens.

        For each token, the arrays hold the slot, the position in the sequence, and the maximum length of the
        sequence.
        """
        return cache_positions(slots, in_sequence, limits, self.table, self.page_tokens)

    def activate(self, slot: int, ids: Array) -> None:
        """Find the first position on which a slot's activated LoRA acts, given all tokens of the prompt."""
        if (invocation := self.adapters.invocation(slot)) is not None:
            self.activation[slot] = start_of(np.asarray(ids), invocation)

    def find_invocation(self, slots: Array, pieces: Sequence[Array]) -> None:
        """Search the next tokens of each slot for the invocation tokens of the slot's adapter."""
        for slot, piece in zip(slots.tolist(), pieces, strict=True):
            invocation = self.adapters.invocation(slot)
            if invocation is None or self.activation[slot] != UNKNOWN:
                continue
            if (start := start_of(piece, invocation)) != NEVER:
                self.activation[slot] = self.lengths[slot] + start

    def active(self, positions: CachePositions) -> Array | None:
        """The indices of the new tokens on which an adapter acts. None: adapters act on all new tokens."""
        acts = self.acts(positions)
        return None if acts.all() else np.flatnonzero(acts)

    def acts(self, positions: CachePositions) -> Array:
        """For each new token, whether the adapter of the token's slot acts on the token; bool (m,)."""
        if not self.adapters.any_invocation:
            return np.ones(len(positions.slots), np.bool_)
        acts: Array = positions.in_sequence >= self._starts(positions.slots)
        return acts

    def _starts(self, slots: Array) -> Array:
        """The first position at which the adapter of each slot acts."""
        starts = np.where(self.activation[slots] == UNKNOWN, NEVER, self.activation[slots])
        starts[[self.adapters.invocation(slot) is None for slot in slots.tolist()]] = 0
        return starts

    def require_room(self, slots: Array, counts: Array) -> None:
        """Check that `slots` has no slot twice, and that each slot has room for `counts` more tokens."""
        _check.in_range("decode", "slots", slots, self.slots)
        if len(np.unique(slots)) != len(slots):
            raise ValueError(f"decode: slots are {slots.tolist()}, expected no slot twice")
        limits = np.minimum(np.minimum(self.limits, self.capacity), self.held * self.page_tokens)[slots]
        for most, limit in zip(self.lengths[slots] + counts, limits, strict=True):
            if most > limit:
                raise ValueError(f"decode: a slot would hold {most} tokens, but has room for {limit}")

    @property
    def nbytes(self) -> int:
        """The size in bytes of all keys and values of a full cache."""
        return sum(array.nbytes for array in (*self.keys, *self.values))
