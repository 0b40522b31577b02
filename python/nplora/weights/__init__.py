"""Frozen weights, their storage formats, and the memory for results."""

from nplora.weights.frozen_weight import (
    COMPUTES,
    FLOAT_COMPUTES,
    FrozenWeight,
    become_infinite,
    dtype_name,
    freeze,
    keeping_int8,
)
from nplora.weights.int8_error import Int8Error

__all__ = [
    "COMPUTES",
    "FLOAT_COMPUTES",
    "FrozenWeight",
    "Int8Error",
    "become_infinite",
    "dtype_name",
    "freeze",
    "keeping_int8",
]
