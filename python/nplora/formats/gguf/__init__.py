"""GGUF: named tensors and metadata in one file, as ggml and llama.cpp keep models and adapters.

    4 bytes     "GGUF"
    uint32      version: 2 or 3
    uint64      number of tensors
    uint64      number of metadata entries
    entries     key, uint32 type, value; an array is uint32 type, uint64 count, elements
    tensors     name, uint32 n, n x uint64 ne (the shape from its end), int32 type, uint64 offset
    padding     to general.alignment, 32 if it is not among the metadata
    the rest    the tensors' bytes; offsets count from here and are multiples of the alignment

Everything is little-endian; a string is its uint64 length and UTF-8. Source: ggml's docs/gguf.md. Arrays of
arrays and big-endian files are refused. What is accepted here is accepted by PyPI's gguf, but for tensors of
Q8_1, whose size it has wrong.
"""

from nplora.formats.gguf.metadata import Metadata, StringArray, Typed
from nplora.formats.gguf.reader import GgufFile, loads, open
from nplora.formats.gguf.tensor import Stream, Tensor
from nplora.formats.gguf.writer import dumps, new_file, save

__all__ = [
    "GgufFile",
    "Metadata",
    "Stream",
    "StringArray",
    "Tensor",
    "Typed",
    "dumps",
    "loads",
    "new_file",
    "open",
    "save",
]
