"""bfloat16, which NumPy does not have: its bit patterns are the upper halves of those of float32."""

from typing import Any

import numpy as np
from numpy.typing import NDArray


def widen(bits: NDArray[Any]) -> NDArray[Any]:
    """The float32 values of uint16 bit patterns, exactly."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def narrow(values: NDArray[Any]) -> NDArray[Any]:
    """The uint16 bit patterns nearest to finite float32 values, of two equally near ones the even one."""
    bits = values.view(np.uint32).astype(np.uint64)
    return ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16)
