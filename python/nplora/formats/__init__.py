"""File formats: conversion between bytes and {name: tensor}. This package knows nothing about layers."""

from nplora.formats import gguf, safetensors, sharded
from nplora.formats.errors import (
    CorruptError,
    DataError,
    FormatError,
    LimitError,
    NotFetchedError,
    TruncatedError,
    UnsafeError,
    UnsupportedError,
)

__all__ = [
    "CorruptError",
    "DataError",
    "FormatError",
    "LimitError",
    "NotFetchedError",
    "TruncatedError",
    "UnsafeError",
    "UnsupportedError",
    "gguf",
    "safetensors",
    "sharded",
]
