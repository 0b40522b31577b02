"""Stores activations for the backward pass.

Activations are usually stored as float32. If the gradients of the factors are computed in bfloat16,
activations are stored as bfloat16, which takes half the memory.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from nplora import _core
from nplora.nn import Linear, LoRALinear
from nplora.weights import buffers

Array = npt.NDArray[Any]


def keeps_bits(layer: Linear | LoRALinear) -> bool:
    """Whether a layer's inputs and outputs are stored as bfloat16 bits."""
    return getattr(layer.weight, "compute", None) in ("bfloat16", "int8")


def narrowed(values: Array) -> Array:
    """Round float32 values to bfloat16, and return the bits as uint16."""
    bits = buffers.empty(values.shape, np.uint16)
    _core.narrow(values, "bfloat16", bits)
    return bits


def widened(bits: Array) -> Array:
    """Convert bfloat16 bits to float32."""
    values = buffers.empty(bits.shape, np.float32)
    _core.widen(bits, "bfloat16", values)
    return values
