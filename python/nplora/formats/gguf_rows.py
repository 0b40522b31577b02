"""The order of rows in GGUF, where some architectures rotate neighbouring rows of a head of q and k together.

Hugging Face, and the other architectures, rotate row i of a head with row half + i. Source: llama.cpp's
convert_hf_to_gguf.py, LlamaModel.permute.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray


def interleave(rows: NDArray[Any], heads: int) -> NDArray[Any]:
    """Rows (heads * 2 * half, d) in GGUF's order: in each head, i to 2 i and half + i to 2 i + 1."""
    half = len(rows) // heads // 2
    return rows.reshape(heads, 2, half, rows.shape[1]).swapaxes(1, 2).reshape(rows.shape)


def row_order(rows: int, heads: int) -> NDArray[Any]:
    """The numbers of Hugging Face's rows in GGUF's order."""
    return interleave(np.arange(rows)[:, None], heads)[:, 0]


def deinterleave(rows: NDArray[Any], heads: int) -> NDArray[Any]:
    """The other way round."""
    half = len(rows) // heads // 2
    return rows.reshape(heads, half, 2, rows.shape[1]).swapaxes(1, 2).reshape(rows.shape)
