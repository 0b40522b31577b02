"""Finds the last occurrence of the invocation tokens, at which an activated LoRA (aLoRA) begins to act.

As in PEFT, the tokens before this occurrence are computed without the adapter. If a sequence does not contain
the invocation tokens, the whole sequence is computed without the adapter.
"""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import numpy.typing as npt

from nplora.nn import LoRALinear
from nplora.nn.module import Module

Array = npt.NDArray[Any]

NEVER = np.iinfo(np.int64).max  # the start of a sequence without the invocation tokens


def invocation_of(model: Module) -> tuple[int, ...] | None:
    """The invocation tokens of a model's adapter, or None if the adapter is not an activated LoRA."""
    layers = (module for _, module in model.named_modules())  # a generator, which stops at the first adapter
    return next((layer.invocation_tokens for layer in layers if isinstance(layer, LoRALinear)), None)


def start_of(ids: Array, invocation: tuple[int, ...]) -> int:
    """The position of the last occurrence of the invocation tokens in `ids`; NEVER if they do not occur."""
    if len(ids) < len(invocation):
        return int(NEVER)
    windows = np.lib.stride_tricks.sliding_window_view(ids, len(invocation))
    found = np.flatnonzero((windows == np.array(invocation)).all(axis=1))
    return int(found[-1]) if len(found) else int(NEVER)


def sequences_with(ids: Array, starts: Array, invocation: tuple[int, ...]) -> Array:
    """The number of occurrences of the invocation tokens in each packed sequence.

    Args:
        ids: the tokens (n,).
        starts: the index of the first token of each sequence, followed by n.
    """
    length, count = len(invocation), max(0, len(ids) - len(invocation) + 1)
    matches = np.ones(count, np.bool_)
    for offset, token in enumerate(invocation):
        matches &= ids[offset : offset + count] == token
    found = np.flatnonzero(matches)
    sequence = np.searchsorted(starts, found, side="right") - 1
    is_inside = found + length <= starts[sequence + 1]
    return np.bincount(sequence[is_inside], minlength=len(starts) - 1)


def active_in(ids: Array, starts: Array, invocation: tuple[int, ...]) -> Array:
    """The indices of the tokens of packed sequences on which the adapter acts.

    Args:
        ids: the tokens (n,).
        starts: the index of the first token of each sequence, followed by n.
    """
    parts = [np.empty(0, np.int64)]
    for begin, end in itertools.pairwise(starts):
        start = start_of(ids[begin:end], invocation)
        if start < end - begin:
            parts.append(np.arange(begin + start, end, dtype=np.int64))
    return np.concatenate(parts)
