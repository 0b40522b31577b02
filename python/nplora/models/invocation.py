"""Finds the last occurrence of the invocation tokens, at which an activated LoRA (aLoRA) begins to act.

As in PEFT, the tokens before this occurrence are computed without the adapter. If a sequence does not contain
the invocation tokens, the whole sequence is computed without the adapter.
"""

from __future__ import annotations

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
    return int(starts_in(ids, np.array([0, len(ids)]), invocation)[0])


def starts_in(ids: Array, starts: Array, invocation: tuple[int, ...]) -> Array:
    """For each packed sequence, the index in `ids` of the last occurrence of the invocation tokens.

    Args:
        ids: the tokens (n,).
        starts: the index of the first token of each sequence, followed by n.
    Returns:
        indices; NEVER for a sequence in which the tokens do not occur.
    """
    length, count = len(invocation), max(0, len(ids) - len(invocation) + 1)
    matches = np.ones(count, np.bool_)
    for offset, token in enumerate(invocation):
        matches &= ids[offset : offset + count] == token
    found = np.flatnonzero(matches)
    sequence = np.searchsorted(starts, found, side="right") - 1
    is_inside = found + length <= starts[sequence + 1]
    last = np.full(len(starts) - 1, -1)
    np.maximum.at(last, sequence[is_inside], found[is_inside])
    return np.where(last < 0, NEVER, last)


def active_in(ids: Array, starts: Array, invocation: tuple[int, ...]) -> Array:
    """The indices of the tokens of packed sequences on which the adapter acts.

    The arguments are those of `starts_in`.
    """
    begin = np.repeat(starts_in(ids, starts, invocation), np.diff(starts))
    return np.flatnonzero(np.arange(len(ids)) >= begin)
