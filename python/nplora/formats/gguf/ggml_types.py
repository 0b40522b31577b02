"""The element types of ggml tensors and the value types of GGUF metadata, with their numbers and sizes."""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class GgmlType:
    """A type in which the elements of a tensor are stored.

    Attributes:
        number: the type's number in a file.
        block: the number of elements in a block; each row of a tensor is a whole number of blocks.
        block_nbytes: bytes per block.
        dtype: the elements' NumPy type (uint16 bit patterns for BF16); None for quantised blocks.
    """

    name: str
    number: int
    block: int
    block_nbytes: int
    dtype: np.dtype[Any] | None = None

    def nbytes(self, shape: tuple[int, ...]) -> int:
        """The size in bytes of a tensor of this shape. Each row must be a whole number of blocks."""
        return math.prod(shape) // self.block * self.block_nbytes


def _plain(name: str, number: int, dtype: str) -> GgmlType:
    return GgmlType(name, number, 1, np.dtype(dtype).itemsize, np.dtype(dtype))


# ggml no longer uses the numbers that are missing here. Q8_1 and Q8_K hold activations in memory only.
GGML_TYPES = {
    entry.name: entry
    for entry in (
        _plain("F32", 0, "<f4"),
        _plain("F16", 1, "<f2"),
        GgmlType("Q4_0", 2, 32, 18),
        GgmlType("Q4_1", 3, 32, 20),
        GgmlType("Q5_0", 6, 32, 22),
        GgmlType("Q5_1", 7, 32, 24),
        GgmlType("Q8_0", 8, 32, 34),
        GgmlType("Q8_1", 9, 32, 36),
        GgmlType("Q2_K", 10, 256, 84),
        GgmlType("Q3_K", 11, 256, 110),
        GgmlType("Q4_K", 12, 256, 144),
        GgmlType("Q5_K", 13, 256, 176),
        GgmlType("Q6_K", 14, 256, 210),
        GgmlType("Q8_K", 15, 256, 292),
        GgmlType("IQ2_XXS", 16, 256, 66),
        GgmlType("IQ2_XS", 17, 256, 74),
        GgmlType("IQ3_XXS", 18, 256, 98),
        GgmlType("IQ1_S", 19, 256, 50),
        GgmlType("IQ4_NL", 20, 32, 18),
        GgmlType("IQ3_S", 21, 256, 110),
        GgmlType("IQ2_S", 22, 256, 82),
        GgmlType("IQ4_XS", 23, 256, 136),
        _plain("I8", 24, "i1"),
        _plain("I16", 25, "<i2"),
        _plain("I32", 26, "<i4"),
        _plain("I64", 27, "<i8"),
        _plain("F64", 28, "<f8"),
        GgmlType("IQ1_M", 29, 256, 56),
        _plain("BF16", 30, "<u2"),
        GgmlType("TQ1_0", 34, 256, 54),
        GgmlType("TQ2_0", 35, 256, 66),
        GgmlType("MXFP4", 39, 32, 17),
        GgmlType("NVFP4", 40, 64, 36),
        GgmlType("Q1_0", 41, 128, 18),
    )
}
BY_NUMBER = {entry.number: entry for entry in GGML_TYPES.values()}

# The value types of metadata, in the order of their numbers.
VALUE_TYPES = (
    "UINT8", "INT8", "UINT16", "INT16", "UINT32", "INT32", "FLOAT32", "BOOL", "STRING", "ARRAY",
    "UINT64", "INT64", "FLOAT64",
)  # fmt: skip
# The struct module's letter for each value type of fixed size.
VALUE_LETTERS = {
    "UINT8": "B",
    "INT8": "b",
    "UINT16": "H",
    "INT16": "h",
    "UINT32": "I",
    "INT32": "i",
    "FLOAT32": "f",
    "BOOL": "?",
    "UINT64": "Q",
    "INT64": "q",
    "FLOAT64": "d",
}
VALUE_DTYPES = {name: np.dtype("<" + letter) for name, letter in VALUE_LETTERS.items()}


def elements(data: NDArray[Any], dtype: np.dtype[Any]) -> NDArray[Any]:
    """View bytes as a read-only array of elements. Bytes that are not aligned are copied."""
    array = data.view(dtype)
    if not array.flags.aligned:
        array = array.copy()
    array.flags.writeable = False
    return array
