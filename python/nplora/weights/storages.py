"""Converts rows of a matrix to the bytes of a storage format and back.

A storage format has the same name as in `FrozenWeight.dtype`: "float32", "bfloat16", "q8_0", "q4_k", and so
on. In this module, an encoded row of "nf4" consists of the codes of the row, followed by the float32 absmax
of each block in the row. So rows can be encoded one by one. No file stores NF4 in this way.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nplora import _core

Array = NDArray[Any]

FLOATS = {"float32": "<f4", "float64": "<f8", "float16": "<u2", "bfloat16": "<u2"}  # 16 bits: bit patterns
FORMATS = _core.block_formats()
BLOCKS = {name: (of.elements, of.nbytes) for name, of in FORMATS.items()}  # (values, bytes) per block
BLOCKS["nf4"] = (BLOCKS["nf4"][0], BLOCKS["nf4"][1] + 4)
STORAGES = (*FLOATS, *BLOCKS)

# ggml's type names. The names of unquantised types are also the names in safetensors files.
GGML_NAMES = {"float32": "F32", "float64": "F64", "float16": "F16", "bfloat16": "BF16"} | {
    name: of.ggml_name for name, of in FORMATS.items() if of.ggml_name is not None
}
GGML_BLOCKS = {of.ggml_name: of for of in FORMATS.values() if of.ggml_name is not None}
GGML_FLOATS = {GGML_NAMES[name]: name for name in FLOATS}

_ELEMENTS_AT_A_TIME = 1 << 18  # 1 MiB of float32


def block_elements(storage: str) -> int:
    """Return the number of elements in a block, or 1 for an unquantised format."""
    return BLOCKS[storage][0] if storage in BLOCKS else 1


def fits(storage: str, d_in: int) -> bool:
    """Whether a row of d_in elements can be divided into whole blocks."""
    return d_in % block_elements(storage) == 0


def row_nbytes(storage: str, d_in: int) -> int:
    """Return the number of bytes of an encoded row of d_in elements, which must fill whole blocks."""
    if storage in BLOCKS:
        elements, nbytes = BLOCKS[storage]
        return d_in // elements * nbytes
    return d_in * np.dtype(FLOATS[storage]).itemsize


def row_blocks(rows: int, d_in: int) -> Iterator[slice]:
    """Yield slices that together cover all rows, in order. The rows of one slice are decoded together."""
    step = max(1, _ELEMENTS_AT_A_TIME // max(1, d_in))
    return (slice(first, min(rows, first + step)) for first in range(0, rows, step))


def compute_dtype(storage: str) -> np.dtype[Any]:
    """Return the dtype of the arrays that `decode` returns: float64 for float64 storage, else float32."""
    return np.dtype(np.float64 if storage == "float64" else np.float32)


def encode(rows: Array, storage: str) -> Array:
    """Encode float rows (n, d_in) to uint8 (n, row_nbytes).

    Float formats round to nearest, ties to even. The codes of low-bit formats are chosen for a small squared
    error.

    Raises:
        ValueError: a value is not finite, or too large for a low-bit format.
    """
    n, d_in = rows.shape
    if storage == "nf4":
        return _encode_nf4(np.ascontiguousarray(rows, np.float32))
    if storage in BLOCKS:
        out = np.empty((n, row_nbytes(storage, d_in)), np.uint8)
        _core.quantize(np.ascontiguousarray(rows, np.float32), storage, out)
        return out
    if storage in ("float32", "float64"):
        with np.errstate(over="ignore"):
            return np.ascontiguousarray(rows, FLOATS[storage]).view(np.uint8)
    bits = np.empty((n, d_in), np.uint16)
    _core.narrow(np.ascontiguousarray(rows, np.float32), storage, bits)
    return bits.view(np.uint8)


def decode(raw: Array, storage: str, d_in: int) -> Array:
    """Decode contiguous bytes (n, row_nbytes) to a new array (n, d_in) in `compute_dtype`."""
    out = np.empty((len(raw), d_in), compute_dtype(storage))
    if storage == "nf4":
        _core.dequantize_nf4(*split_nf4(raw, d_in), out)
    elif storage in BLOCKS:
        _core.dequantize(raw, storage, out)
    elif storage in ("float32", "float64"):
        out[...] = _elements(raw, storage, d_in)
    else:
        _core.widen(np.require(_elements(raw, storage, d_in), requirements="A"), storage, out)
    return out


def _encode_nf4(rows: Array) -> Array:
    n, d_in = rows.shape
    codes, absmax = np.empty((n, d_in // 2), np.uint8), np.empty((n, d_in // BLOCKS["nf4"][0]), np.float32)
    _core.quantize_nf4(rows, codes.reshape(-1), absmax.reshape(-1))
    return np.concatenate([codes, absmax.view(np.uint8)], axis=1)


def split_nf4(raw: Array, d_in: int) -> tuple[Array, Array]:
    """Split encoded rows of NF4 into two contiguous arrays with one axis: the codes and the absmax."""
    codes, absmax = raw[:, : d_in // 2], raw[:, d_in // 2 :]
    return np.ascontiguousarray(codes).reshape(-1), np.ascontiguousarray(absmax).reshape(-1).view(np.float32)


def _elements(raw: Array, storage: str, d_in: int) -> Array:
    return raw.reshape(-1).view(FLOATS[storage]).reshape(len(raw), d_in)
