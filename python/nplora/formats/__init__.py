"""File formats: read and write files that map names to tensors. The package does not import `nplora.nn`."""

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
