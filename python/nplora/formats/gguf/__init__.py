"""GGUF: the file format of ggml and llama.cpp, which holds named tensors and metadata in one file.

    4 bytes     "GGUF"
    uint32      version: 2 or 3
    uint64      number of tensors
    uint64      number of metadata entries
    entries     key, uint32 type, value; an array is uint32 type, uint64 count, elements
    tensors     name, uint32 n, n x uint64 ne (the shape in reverse order), int32 type, uint64 offset
    padding     to a multiple of general.alignment (32 by default)
    the rest    the tensors' bytes; offsets count from here and are multiples of the alignment

All numbers are little-endian. A string is its uint64 length, then UTF-8. Source: ggml's docs/gguf.md. Arrays
of arrays and big-endian files are refused. PyPI's gguf accepts every file that this reader accepts, except
files with Q8_1 tensors, whose size it computes wrongly.
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
