"""bfloat16, which NumPy lacks. Its bit patterns are the upper halves of float32 bit patterns."""

from typing import Any

import numpy as np
from numpy.typing import NDArray


def widen(bits: NDArray[Any]) -> NDArray[Any]:
    """The exact float32 values of uint16 bfloat16 bit patterns."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def narrow(values: NDArray[Any]) -> NDArray[Any]:
    """The uint16 bit patterns of finite float32 values, rounded to nearest, ties to even."""
    bits = values.view(np.uint32).astype(np.uint64)
    return ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16)
