"""Converts between float32 and bfloat16, which NumPy lacks. A bfloat16 is the upper half of a float32."""

from typing import Any

import numpy as np
from numpy.typing import NDArray


def widen(bits: NDArray[Any]) -> NDArray[Any]:
    """Convert bfloat16 bit patterns (uint16) to float32, exactly."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def narrow(values: NDArray[Any]) -> NDArray[Any]:
    """Convert finite float32 values to bfloat16 bit patterns (uint16), rounded to nearest, ties to even."""
    bits = values.view(np.uint32).astype(np.uint64)
    return ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16)
