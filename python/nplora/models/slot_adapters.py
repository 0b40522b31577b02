"""The adapter of each slot of a key-value cache."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy.typing as npt

from nplora.models.invocation import invocation_of
from nplora.nn.module import Module

Array = npt.NDArray[Any]


class SlotAdapters:
    """A list with one adapter for each slot. An entry can be changed while its slot is empty.

    Args:
        lengths: the number of tokens in each slot. The cache changes this array in place.
        owner: the model for slots that have no adapter.
        resolve: a function that returns the model for an adapter. If `resolve` is None, only `put` can set an
            adapter.
    """

    def __init__(
        self, lengths: Array, owner: Module | None, resolve: Callable[[Any], Module] | None = None
    ) -> None:
        self._lengths, self._owner, self._resolve = lengths, owner, resolve
        self._given: list[Any] = [None] * len(lengths)
        self._models: list[Module | None] = [owner] * len(lengths)
        own = None if owner is None else invocation_of(owner)
        self._invocations: list[tuple[int, ...] | None] = [own] * len(lengths)
        self._own_invocation = own

    def __len__(self) -> int:
        return len(self._given)

    def __iter__(self) -> Iterator[Any]:
        return iter(self._given)

    def __getitem__(self, slot: int) -> Any:
        return self._given[slot]

    def __setitem__(self, slot: int, adapter: Any) -> None:
        self._require_empty(slot)
        if adapter is not None and self._resolve is None:
            raise TypeError("KVCache.adapters: this cache was not made by LanguageModel.new_cache")
        self._set(slot, adapter, None if adapter is None or self._resolve is None else self._resolve(adapter))

    def put(self, slot: int, model: Module | None) -> None:
        """Use `model` for the tokens of a slot. If `model` is None, use the owner.

        All models of a cache must share their frozen weights.
        """
        self._require_empty(slot)
        self._set(slot, model, model)

    def _require_empty(self, slot: int) -> None:
        if self._lengths[slot]:
            raise ValueError(
                f"KVCache.adapters: slot {slot} has {self._lengths[slot]} tokens, expected an empty slot"
            )

    def _set(self, slot: int, given: Any, model: Module | None) -> None:
        self._given[slot] = given
        self._models[slot] = self._owner if model is None else model
        self._invocations[slot] = self._own_invocation if model is None else invocation_of(model)

    def model(self, slot: int) -> Module | None:
        """The model that processes the tokens of a slot."""
        return self._models[slot]

    def invocation(self, slot: int) -> tuple[int, ...] | None:
        """The invocation tokens of the slot's adapter, or None if the adapter is not an activated LoRA."""
        return self._invocations[slot]

    @property
    def any_invocation(self) -> bool:
        """Whether the adapter of any slot is an activated LoRA."""
        return any(self._invocations)
