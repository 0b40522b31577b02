"""Activations that wait for backward: in bfloat16 where the products compute in it, which halves them."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from nplora import _core
from nplora.nn import Linear, LoRALinear
from nplora.weights import buffers

Array = npt.NDArray[Any]


def keeps_bits(layer: Linear | LoRALinear) -> bool:
    """Whether what a layer reads or gives is kept as bfloat16 bits."""
    return getattr(layer.weight, "compute", None) == "bfloat16"


def narrowed(values: Array) -> Array:
    """The bits (uint16) of float32 values, rounded to bfloat16."""
    bits = buffers.empty(values.shape, np.uint16)
    _core.narrow(values, "bfloat16", bits)
    return bits


def widened(bits: Array) -> Array:
    """And back."""
    values = buffers.empty(bits.shape, np.float32)
    _core.widen(bits, "bfloat16", values)
    return values
