"""Finds NaN and infinite values in a model's file, to report them before anything is computed."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from nplora import _core
from nplora.formats import gguf, safetensors
from nplora.formats.errors import FormatError, brief
from nplora.weights import storages

_INFINITE = 0x7C00  # float16's exponent, all ones: infinity or NaN


def require_finite(source: str, tensor: gguf.Tensor | safetensors.Tensor) -> None:
    """Check that all values of a tensor, or the scales of its blocks, are finite.

    The check takes about as long as reading the tensor once. Tensors that hold neither floats nor blocks with
    scales, such as integers, are not checked.

    Raises:
        FormatError: a value or scale is NaN or infinite. The message names the file, the tensor and the
            position of the first such value.
    """
    if isinstance(tensor, gguf.Tensor) and tensor.type in storages.GGML_BLOCKS:
        _require_finite_scales(source, tensor)
        return
    kind = storages.GGML_FLOATS.get(tensor.type) if isinstance(tensor, gguf.Tensor) else tensor.dtype
    if kind not in storages.FLOATS:
        return
    values = np.require(tensor.numpy(), requirements=("C", "A"))
    bits = values.view(np.uint16) if values.itemsize == 2 else values
    first = _core.first_nonfinite(bits, kind)
    if first >= 0:
        place = tuple(map(int, np.unravel_index(first, values.shape)))
        raise FormatError(
            f"{source}: tensor {brief(tensor.name)}: the value at {list(place)} is "
            f"{_as_float(bits.reshape(-1)[first : first + 1], kind)}, expected a finite number"
        )


def _as_float(bits: npt.NDArray[np.generic], storage: str) -> float:
    return float(storages.decode(bits.view(np.uint8).reshape(1, -1), storage, 1)[0, 0])


def _require_finite_scales(source: str, tensor: gguf.Tensor) -> None:
    of = storages.GGML_BLOCKS[tensor.type]
    blocks = tensor.data.reshape(-1, of.nbytes)
    for offset in of.scale_offsets:
        bits = np.ndarray(len(blocks), np.dtype("<u2"), blocks, offset, (of.nbytes,))
        bad = np.flatnonzero((bits & _INFINITE) == _INFINITE)
        if bad.size:
            block = int(bad[0])
            row, column = divmod(block * of.elements, tensor.shape[-1])
            scale = float(bits[block : block + 1].view(np.float16)[0])
            raise FormatError(
                f"{source}: tensor {brief(tensor.name)}: block {block:,} (row {row:,}, from column "
                f"{column:,}) has a scale of {scale}, expected a finite number"
            )
