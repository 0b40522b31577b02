"""Switches that turn off int8 arithmetic: for one layer, or for all layers inside a `with` block."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar
from typing import Protocol, runtime_checkable

from nplora.nn.module import inferring

_allowed: ContextVar[bool] = ContextVar("nplora_int8", default=True)


@runtime_checkable
class Int8Layer(Protocol):
    """A layer whose int8 arithmetic can be turned off.

    If `int8` is False, products with many rows use bfloat16 instead of int8. "Many" means more than 8 rows in
    a forward pass, and more than 4 rows in a backward pass.
    """

    int8: bool


@contextlib.contextmanager
def without_int8() -> Iterator[None]:
    """Inside `with without_int8():` bfloat16 arithmetic replaces int8 arithmetic.

    >>> import nplora, numpy as np
    >>> from nplora.nn.int8 import without_int8
    >>> layer = nplora.LoRALinear(np.random.default_rng(0).random((2, 64)), rank=1, compute="int8")
    >>> x = np.random.default_rng(1).random((9, 64))
    >>> with without_int8():
    ...     exact, _ = layer.forward(x)
    >>> np.array_equal(exact, layer.forward(x)[0])
    False
    """
    token = _allowed.set(False)
    try:
        yield
    finally:
        _allowed.reset(token)


def arithmetic_of_inference(compute: str) -> str:
    """The arithmetic in which a layer with this `compute` multiplies many rows in inference.

    >>> from nplora.nn.int8 import arithmetic_of_inference
    >>> arithmetic_of_inference("int8"), arithmetic_of_inference("float32")
    ('bfloat16', 'float32')
    """
    return "bfloat16" if compute == "int8" else compute


def in_int8(layer: Int8Layer, *more: Int8Layer) -> bool:
    """Whether all of these layers may now compute products with many rows in int8. False in inference."""
    return _allowed.get() and not inferring() and all(each.int8 for each in (layer, *more))
