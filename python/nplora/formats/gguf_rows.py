"""Converts the rows of the q and k projections between Hugging Face's order and GGUF's.

In the weight of the q or k projection, each attention head has 2 · half rows. A rotary embedding rotates the
outputs of two rows together, as a pair. Hugging Face pairs row i of the head with row half + i. In GGUF, some
architectures pair the neighbouring rows 2 i and 2 i + 1 instead.
Source: llama.cpp's convert_hf_to_gguf.py, LlamaModel.permute.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray


def interleave(rows: NDArray[Any], heads: int) -> NDArray[Any]:
    """Reorder the rows of an array (heads * 2 * half, d) from Hugging Face's order to GGUF's.

    In each head, row i becomes row 2 i, and row half + i becomes row 2 i + 1.
    """
    half = len(rows) // heads // 2
    return rows.reshape(heads, 2, half, rows.shape[1]).swapaxes(1, 2).reshape(rows.shape)


def row_order(rows: int, heads: int) -> NDArray[Any]:
    """The indices that reorder an array of rows from Hugging Face's order to GGUF's."""
    return interleave(np.arange(rows)[:, None], heads)[:, 0]


def deinterleave(rows: NDArray[Any], heads: int) -> NDArray[Any]:
    """Reorder rows from GGUF's order to Hugging Face's: the inverse of `interleave`."""
    half = len(rows) // heads // 2
    return rows.reshape(heads, half, 2, rows.shape[1]).swapaxes(1, 2).reshape(rows.shape)
