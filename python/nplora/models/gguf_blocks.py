"""The scales of low-bit blocks: one that is not finite makes every answer NaN, so the loader names it."""

from __future__ import annotations

import numpy as np

from nplora.formats.errors import FormatError, brief
from nplora.formats.gguf import Tensor

# Where the float16 scales lie in a block, by its type, and the bytes and elements of a block.
_SCALES = {
    "Q8_0": (34, 32, (0,)),
    "Q4_0": (18, 32, (0,)),
    "Q5_0": (22, 32, (0,)),
    "Q4_1": (20, 32, (0, 2)),
    "Q5_1": (24, 32, (0, 2)),
    "Q4_K": (144, 256, (0, 2)),
    "Q5_K": (176, 256, (0, 2)),
    "Q6_K": (210, 256, (208,)),
}
_INFINITE = 0x7C00  # float16's exponent, all ones: infinity or NaN


def require_finite_scales(tensor: Tensor) -> None:
    """Raise FormatError for the first block of a quantised tensor whose scale is NaN or infinite."""
    if tensor.type not in _SCALES:
        return
    nbytes, elements, offsets = _SCALES[tensor.type]
    blocks = tensor.data.reshape(-1, nbytes)
    for offset in offsets:
        bits = np.ndarray(len(blocks), np.dtype("<u2"), blocks, offset, (nbytes,))
        bad = np.flatnonzero((bits & _INFINITE) == _INFINITE)
        if bad.size:
            block = int(bad[0])
            row, column = divmod(block * elements, tensor.shape[-1])
            scale = float(bits[block : block + 1].view(np.float16)[0])
            raise FormatError(
                f"{tensor.source}: tensor {brief(tensor.name)}: block {block:,} (row {row:,}, from column "
                f"{column:,}) has a scale of {scale}, expected a finite one"
            )
