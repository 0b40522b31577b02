"""GGUF: the file format of ggml and llama.cpp, which holds named tensors and metadata in one file.

    4 bytes     "GGUF"
    uint32      version: 2 or 3
    uint64      number of tensors
    uint64      number of metadata entries
    entries     key, uint32 type, value; an array is uint32 type, uint64 count, elements
    tensors     name, uint32 n (number of axes), n x uint64 ne (the shape in reverse order), int32 type,
                uint64 offset
    padding     to a multiple of general.alignment (32 by default)
    the rest    the tensors' bytes; offsets count from here and are multiples of the alignment

All numbers are little-endian. A string is stored as its uint64 length, followed by UTF-8 bytes. This reader
refuses arrays of arrays and big-endian files. The PyPI package gguf accepts every file that this reader
accepts, except for files with Q8_1 tensors, because that package computes a wrong size for such tensors.

Source: ggml's docs/gguf.md.
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
