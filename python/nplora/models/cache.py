"""Keys and values of the tokens so far, which spare a decoder computing them again for each new one."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from nplora import _check
from nplora.models.config import ModelConfig
from nplora.nn.module import Module

Array = npt.NDArray[Any]


class KVCache:
    """Room for the sequences of a batch, each in a slot of its own.

    Attributes:
        slots, capacity: how many sequences, and how many tokens of each.
        lengths: int64 (slots,), the tokens that each holds. Writing a smaller number forgets the last ones.
        limits: int64 (slots,), how many tokens each may come to hold, `capacity` at first. LongRoPE rotates a
            sequence by this length: set it before the first token, where it is known to be less.
        keys, values: for each layer an array (slots, capacity, kv_heads · head_dim); memory is taken as it is
            filled.
        owner: the model that fills it, with the named adapters that were selected then; None: any model.
    """

    def __init__(self, config: ModelConfig, slots: int, capacity: int, owner: Module | None = None) -> None:
        self.owner = owner
        self.slots = _check.integer("KVCache", "slots", slots, least=1)
        self.capacity = _check.integer("KVCache", "capacity", capacity, least=1)
        shape = (self.slots, self.capacity, config.num_key_value_heads * config.head_dim)
        self.keys = [np.zeros(shape, np.float32) for _ in range(config.num_hidden_layers)]
        self.values = [np.zeros(shape, np.float32) for _ in range(config.num_hidden_layers)]
        self.lengths = np.zeros(self.slots, np.int64)
        self.limits = np.full(self.slots, self.capacity)

    def reset(self) -> None:
        """Forget every sequence."""
        self.lengths[:] = 0

    def require_room(self, slots: Array, count: int) -> None:
        """Check that each of these slots, named once, has room for `count` more tokens."""
        _check.in_range("decode", "slots", slots, self.slots)
        if len(np.unique(slots)) != len(slots):
            raise ValueError(f"decode: slots are {slots.tolist()}, expected each one once")
        for slot in slots:
            most, limit = self.lengths[slot] + count, min(self.limits[slot], self.capacity)
            if most > limit:
                raise ValueError(f"decode: {most} tokens in a slot, the cache has room for {limit}")

    @property
    def nbytes(self) -> int:
        """Bytes when full."""
        return sum(array.nbytes for array in (*self.keys, *self.values))
