"""File formats: bytes to {name: tensor} and back. This room knows nothing of layers."""

from nplora.formats import gguf, safetensors, sharded
from nplora.formats.errors import (
    CorruptError,
    DataError,
    FormatError,
    LimitError,
    TruncatedError,
    UnsafeError,
    UnsupportedError,
)

__all__ = [
    "CorruptError",
    "DataError",
    "FormatError",
    "LimitError",
    "TruncatedError",
    "UnsafeError",
    "UnsupportedError",
    "gguf",
    "safetensors",
    "sharded",
]
