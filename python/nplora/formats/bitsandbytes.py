"""4-bit matrices of bitsandbytes (QLoRA's NF4). A safetensors file stores a matrix as several tensors.

    NAME                                uint8 (ceil(n / 2), 1): the codes of n values, row after row
    NAME.absmax                         the largest magnitude of each block of 64 values: float32, or uint8
                                        codes if absmax is itself quantised (the second quantisation)
    NAME.quant_map                      float32 (16,), the levels
    NAME.nested_absmax                  second quantisation: float32 scales, one for each 256 values of absmax
    NAME.nested_quant_map               second quantisation: float32 (256,), the levels
    NAME.quant_state.bitsandbytes__nf4  uint8: JSON with the shape and the block sizes

Source: bitsandbytes.functional.QuantState.as_dict(packed=True).
"""

import math
from collections.abc import Collection, Container
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nplora.formats import strict_json
from nplora.formats.errors import FormatError, LimitError, UnsupportedError, brief
from nplora.formats.safetensors import SafetensorsFile, Tensor
from nplora.formats.sharded import ShardedFile

Array = NDArray[Any]
File = SafetensorsFile | ShardedFile

BLOCK, GROUP, LEVELS, NESTED_LEVELS = 64, 256, 16, 256
_STATE = ".quant_state.bitsandbytes__"
_MAP = ".quant_map"
_PARTS = (".absmax", _MAP, ".nested_absmax", ".nested_quant_map")
_MAX_STATE = 1 << 16
_MAX_SIZE = 1 << 48
_MAX_OFFSET = float(np.finfo(np.float32).max)


@dataclass(frozen=True)
class Nested:
    """The second quantisation, which stores absmax as codes: absmax = levels[code] * scale + offset.

    Attributes:
        levels: float32 (256,).
        scales: float32, one scale for each 256 values of absmax.
    """

    levels: Array
    scales: Array
    offset: float


@dataclass(frozen=True)
class Nf4:
    """A matrix in NF4. Each value is levels[code] times the absmax of its block of 64 values.

    Attributes:
        codes: uint8 (ceil(n / 2),) for n values, two codes in a byte, the first in the upper four bits.
        absmax: float32 (ceil(n / 64),), or uint8 codes of these floats if `nested` is set.
        levels: float32 (16,).
    """

    shape: tuple[int, ...]
    codes: Array
    absmax: Array
    levels: Array
    nested: Nested | None


def holds(file: Container[str], name: str) -> bool:
    """Whether a tensor is stored in one of bitsandbytes' 4-bit types."""
    return f"{name}{_MAP}" in file


def refuse(file: Container[str], name: str, source: str, deed: str) -> None:
    """Raise UnsupportedError if a tensor has a 4-bit type.

    `deed` completes the message: "..., which nplora does not {deed}".
    """
    if holds(file, name):
        raise UnsupportedError(
            f"{source}: tensor {brief(name)} has a 4-bit type of bitsandbytes, which nplora does not {deed}; "
            "use the unquantised model instead"
        )


def parts(names: Collection[str]) -> dict[str, str]:
    """Map the name of each auxiliary tensor, such as NAME.absmax, to the name of its 4-bit matrix, NAME."""
    states = {name: name.partition(_STATE)[0] for name in names if _STATE in name}
    others = {f"{matrix}{part}": matrix for matrix in states.values() for part in _PARTS}
    return states | {name: others[name] for name in others.keys() & set(names)}


def shape(file: File, name: str) -> tuple[int, ...]:
    """The shape of a matrix, read from its quantisation state. Raises the errors of `read`."""
    return _shape(*_state(file, name))


def read(file: File, name: str) -> Nf4:
    """Read a 4-bit matrix. The arrays of the result are views of the file.

    Raises:
        UnsupportedError: the matrix is not NF4, its block size is not 64, or the block size of its absmax is
            not 256.
        FormatError: a tensor of the matrix is missing, has the wrong dtype or size, or is not finite.
    """
    where, state = _state(file, name)
    size = math.prod(_shape(where, state))
    _require(where, state, "blocksize", BLOCK)
    blocks = -(-size // BLOCK)
    nested = None
    if f"{name}.nested_absmax" in file:
        _require(where, state, "nested_blocksize", GROUP)
        offset = state.get("nested_offset")
        if not isinstance(offset, int | float) or isinstance(offset, bool) or abs(offset) > _MAX_OFFSET:
            raise FormatError(f"{where}: nested_offset is {brief(offset)}, expected a float32 number")
        nested = Nested(
            _part(file, f"{name}.nested_quant_map", "float32", NESTED_LEVELS),
            _part(file, f"{name}.nested_absmax", "float32", -(-blocks // GROUP)),
            float(np.float32(offset)),
        )
    return Nf4(
        _shape(where, state),
        _part(file, name, "uint8", -(-size // 2)),
        _part(file, f"{name}.absmax", "float32" if nested is None else "uint8", blocks),
        _part(file, f"{name}{_MAP}", "float32", LEVELS),
        nested,
    )


def _state(file: File, name: str) -> tuple[str, dict[str, Any]]:
    """Return a matrix's name for error messages (file and tensor), and its quantisation state."""
    where = f"{file.source}: tensor {brief(name)}"
    if f"{name}{_STATE}nf4" not in file:
        kinds = [part.partition(_STATE)[2] for part in file if part.startswith(f"{name}{_STATE}")]
        raise UnsupportedError(
            f"{where} has the bitsandbytes type {', '.join(map(brief, kinds)) or 'none'}, expected nf4"
        )
    tensor = file[f"{name}{_STATE}nf4"]
    if tensor.dtype != "uint8":
        raise FormatError(f"{where}: its quant_state is {tensor.dtype}, expected uint8")
    if tensor.nbytes > _MAX_STATE:
        raise LimitError(
            f"{where}: its quant_state has {tensor.nbytes:,} bytes, expected at most {_MAX_STATE:,}"
        )
    state = strict_json.loads(tensor.array.tobytes(), f"{where}: quant_state")
    if not isinstance(state, dict):
        raise FormatError(f"{where}: its quant_state is {brief(state)}, expected an object")
    return where, state


def _shape(where: str, state: dict[str, Any]) -> tuple[int, ...]:
    sizes = state.get("shape")
    if not isinstance(sizes, list) or any(type(n) is not int or n < 0 for n in sizes):
        raise FormatError(f"{where}: its shape is {brief(sizes)}, expected a list of sizes")
    if math.prod(sizes) > _MAX_SIZE:
        raise LimitError(f"{where}: {math.prod(sizes):,} values, expected at most {_MAX_SIZE:,}")
    return tuple(sizes)


def _require(where: str, state: dict[str, Any], name: str, expected: int) -> None:
    if state.get(name) != expected:
        raise UnsupportedError(f"{where}: {name} is {brief(state.get(name))}, expected {expected}")


def _part(file: File, name: str, dtype: str, size: int) -> Array:
    """Check the dtype and size of one tensor of a matrix, and return the tensor as a flat array."""
    where = f"{file.source}: tensor {brief(name)}"
    if name not in file:
        raise FormatError(f"{where} is missing")
    tensor: Tensor = file[name]
    if tensor.dtype != dtype or tensor.array.size != size:
        raise FormatError(
            f"{where} is {tensor.dtype} of shape {tensor.shape}, expected {size:,} values of {dtype}"
        )
    if dtype == "float32" and not np.isfinite(tensor.array).all():
        raise FormatError(f"{where} holds NaN or an infinity")
    return tensor.array.reshape(-1)
