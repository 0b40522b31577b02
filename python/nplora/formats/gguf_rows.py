"""The row order of q and k in GGUF. Some architectures rotate neighbouring rows of a head together.

Hugging Face and the other architectures rotate row i of a head together with row half + i.
Source: llama.cpp's convert_hf_to_gguf.py, LlamaModel.permute.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray


def interleave(rows: NDArray[Any], heads: int) -> NDArray[Any]:
    """Reorder rows (heads * 2 * half, d) for GGUF: in each head, i moves to 2 i and half + i to 2 i + 1."""
    half = len(rows) // heads // 2
    return rows.reshape(heads, 2, half, rows.shape[1]).swapaxes(1, 2).reshape(rows.shape)


def row_order(rows: int, heads: int) -> NDArray[Any]:
    """Indices that take rows from Hugging Face's order to GGUF's."""
    return interleave(np.arange(rows)[:, None], heads)[:, 0]


def deinterleave(rows: NDArray[Any], heads: int) -> NDArray[Any]:
    """The inverse of `interleave`."""
    half = len(rows) // heads // 2
    return rows.reshape(heads, half, 2, rows.shape[1]).swapaxes(1, 2).reshape(rows.shape)
