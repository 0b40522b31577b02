"""The rows of a batch on which activated LoRA (aLoRA, Greenewald et al. 2025) acts."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar
from typing import Any

import numpy.typing as npt

Array = npt.NDArray[Any]

_active: ContextVar[Array | None] = ContextVar("nplora_active_rows", default=None)


def active_rows() -> Array | None:
    """The indices of the rows on which adapters act in the current pass, or None for all rows."""
    return _active.get()


@contextlib.contextmanager
def only_active(rows: Array | None) -> Iterator[None]:
    """Inside `with only_active(rows):`, LoRA layers add their update only to `rows` (None: to all rows)."""
    token = _active.set(rows)
    try:
        yield
    finally:
        _active.reset(token)
