"""File formats: bytes to {name: tensor} and back. Nothing here knows a layer."""

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
