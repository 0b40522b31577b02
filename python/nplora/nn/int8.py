"""Switches that exclude layers and products from int8, for weights with compute="int8"."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar
from typing import Protocol

from nplora.nn.module import inferring

_allowed: ContextVar[bool] = ContextVar("nplora_int8", default=True)


class Int8Layer(Protocol):
    """A layer that can be excluded from int8.

    If `int8` is False, the layer's large products are computed in bfloat16.
    """

    int8: bool


@contextlib.contextmanager
def without_int8() -> Iterator[None]:
    """Inside `with without_int8():` products that would be computed in int8 are computed in bfloat16.

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


def in_int8(*layers: Int8Layer) -> bool:
    """Whether a training pass may compute products of these layers in int8. False in inference."""
    return _allowed.get() and not inferring() and all(layer.int8 for layer in layers)
