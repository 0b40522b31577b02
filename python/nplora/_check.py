"""Every check of what a user passes in. A message names the op, what was wanted and what was got."""

from __future__ import annotations  # np.random, which takes a while to import, is only named here

import difflib
import inspect
import math
import numbers
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]
T = TypeVar("T")

_OVERLAP_WORK = 10_000  # candidates that np.shares_memory may try; beyond, arrays count as overlapping


_INT64_MAX = 2**63 - 1

MAX_RANK = 1 << 16  # of an adapter, made or read: a larger one is a mistake, and could ask for all memory


def is_bfloat16(array: Array) -> bool:
    """Whether the array holds ml_dtypes.bfloat16, known by its name so that ml_dtypes need not be there."""
    return array.dtype.name == "bfloat16"


# ---- kinds ----


def kind(value: object) -> str:
    """What was got, in a few words however large it is. Other packages' classes have their module's name."""
    if isinstance(value, type):
        return f"the class {_title(value)}, not one of its objects"
    return f"{value[:40]!r}" if isinstance(value, str) else f"a {_title(type(value))}"


def _title(cls: type) -> str:
    package = cls.__module__.partition(".")[0]
    return cls.__name__ if package in ("builtins", "nplora") else f"{cls.__module__}.{cls.__qualname__}"


# ---- numbers and words ----


def options(op: str, kind: Callable[..., T], given: dict[str, Any]) -> T:
    """An object of a dataclass, made of keywords.

    Raises:
        TypeError: it has no field of a keyword's name; the nearest one is told. Others as the class.
    """
    known = inspect.signature(kind).parameters
    for name in given:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
            raise TypeError(f"{op}: no option {name!r}{f'; the nearest: {near[0]}' if near else ''}")
    return kind(**given)


def number(op: str, name: str, value: object) -> float:
    """A finite real number; a bool is not one."""
    if isinstance(value, bool | np.bool_) or not isinstance(value, numbers.Real):
        raise TypeError(f"{op}: {name} is {value!r}, expected a number")
    try:
        checked = float(value)
    except OverflowError:
        raise ValueError(f"{op}: {name} is beyond the range of float64") from None
    if not math.isfinite(checked):
        raise ValueError(f"{op}: {name} is {value}, expected a finite number")
    return checked


def scale(op: str, value: object, dtype: npt.DTypeLike) -> float:
    """A number that is finite in the dtype that it will be multiplied in."""
    checked = number(op, "scale", value)
    if abs(checked) > float(np.finfo(dtype).max):
        raise ValueError(f"{op}: scale is {value}, which {np.dtype(dtype).name} cannot hold")
    return checked


def at_least(op: str, name: str, value: object, least: float) -> float:
    """A finite real number no smaller than `least`."""
    checked = number(op, name, value)
    if checked < least:
        raise ValueError(f"{op}: {name} is {value}, expected at least {least:g}")
    return checked


def integer(op: str, name: str, value: object, least: int, most: int | None = None) -> int:
    """An integer from `least` to `most`; a bool is not one."""
    if isinstance(value, bool | np.bool_) or not isinstance(value, numbers.Integral):
        raise TypeError(f"{op}: {name} is {value!r}, expected an integer")
    if value < least:
        raise ValueError(f"{op}: {name} is {value}, expected at least {least}")
    if most is not None and int(value) > most:
        raise ValueError(f"{op}: {name} is {value}, expected at most {most}")
    return int(value)


def rank(op: str, value: object) -> int:
    """The rank of an adapter: an integer from 1 to MAX_RANK."""
    return integer(op, "rank", value, least=1, most=MAX_RANK)


def probability(op: str, name: str, value: object) -> float:
    """A number in [0, 1)."""
    checked = number(op, name, value)
    if not 0 <= checked < 1:
        raise ValueError(f"{op}: {name} is {value}, expected at least 0 and below 1")
    return checked


def texts(op: str, name: str, value: object) -> tuple[str, ...]:
    """A list or tuple of str, as a tuple."""
    if not isinstance(value, list | tuple) or not all(isinstance(text, str) for text in value):
        raise TypeError(f"{op}: {name} is {value!r}, expected a list of texts")
    return tuple(value)


def choice(op: str, name: str, value: object, allowed: Iterable[str]) -> str:
    """One of the words allowed."""
    words = list(allowed)
    if not isinstance(value, str) or value not in words:
        raise ValueError(f"{op}: {name}={value!r} is not available; possible: {', '.join(map(repr, words))}")
    return value


def generator(op: str, rng: np.random.Generator | int | None) -> np.random.Generator:
    """The generator itself, or one that an integer seeds; None: a random seed."""
    try:
        return np.random.default_rng(rng)
    except (TypeError, ValueError) as error:
        message = f"{op}: rng is {rng!r}, expected a numpy Generator, an integer of at least 0, or None"
        raise type(error)(message) from None


# ---- arrays that are read ----


def as_array(op: str, name: str, value: npt.ArrayLike) -> Array:
    """What NumPy makes of the value."""
    try:
        return np.asarray(value)
    except ValueError as error:
        if "inhomogeneous" not in str(error):
            raise ValueError(f"{op}: {name} is not an array: {error}") from error
        raise ValueError(f"{op}: {name} is inhomogeneous: lists inside it differ in length") from None


def matrix(op: str, name: str, array: Array) -> Array:
    """An array with the two axes of a weight."""
    if array.ndim != 2:
        if array.ndim == 0 and array.dtype.kind not in "fiub" and not is_bfloat16(array):
            raise TypeError(
                f"{op}: {name} is a {type(array.item()).__name__}, expected an array (d_out, d_in)"
            )
        raise ValueError(f"{op}: {name} has {_axes(array)}, expected 2 (d_out, d_in)")
    return array


def _axes(array: Array) -> str:
    return "1 axis" if array.ndim == 1 else f"{array.ndim} axes"


def floats(op: str, name: str, value: npt.ArrayLike, dtype: npt.DTypeLike) -> Array:
    """Any real array as a C-contiguous array of `dtype`; copied only where it is not one already."""
    if value is None:
        raise TypeError(f"{op}: {name} is None, expected an array")
    array = as_array(op, name, value)
    if array.dtype.kind not in "fiub" and not is_bfloat16(array):
        raise TypeError(f"{op}: {name} has dtype {array.dtype}, expected real numbers")
    return np.require(array, dtype, ("C", "A"))


def shaped(op: str, name: str, value: npt.ArrayLike, shape: tuple[int, ...], dtype: npt.DTypeLike) -> Array:
    """A real array of exactly this shape."""
    array = floats(op, name, value, dtype)
    if array.shape != shape:
        raise ValueError(f"{op}: {name} has shape {array.shape}, expected {shape}")
    return array


def saved(op: str, value: object, kind: type) -> None:
    """Refuse what is not the second of the two that a forward pass of this kind returns.

    Raises:
        TypeError: it is something else.
    """
    if not isinstance(value, kind):
        raise TypeError(
            f"{op}: saved is of type {type(value).__name__}, "
            f"expected {kind.__name__}, which the forward pass returns beside its output"
        )


def kept(op: str, name: str, array: Array | None, shape: tuple[int, ...], dtype: np.dtype[Any]) -> None:
    """Refuse an array of a forward pass that is not of the layer whose backward pass it is given to.

    Raises:
        ValueError: its shape or dtype is another.
    """
    if array is not None and (array.shape != shape or array.dtype != dtype):
        raise ValueError(
            f"{op}: saved is not of this layer: its {name} is {array.dtype} of shape {array.shape}, "
            f"expected {dtype} of shape {shape}"
        )


def own(op: str, saved: Any, layer: object) -> None:
    """Refuse what the forward pass of another layer kept, even where all shapes fit. Called last.

    Raises:
        ValueError: it is of another layer.
    """
    if saved.layer is not None and saved.layer is not layer:
        kind = type(saved.layer).__name__
        raise ValueError(f"{op}: saved is not of this layer: it is from a forward pass of another {kind}")


def rows(
    op: str, name: str, value: npt.ArrayLike, width: int, width_name: str, dtype: npt.DTypeLike
) -> tuple[Array, tuple[int, ...]]:
    """An array (..., width) as (n, width), and the shape of its leading axes."""
    array = floats(op, name, value, dtype)
    if array.ndim == 0:
        raise ValueError(f"{op}: {name} is a single number, expected (..., {width_name}={width})")
    if array.shape[-1] != width:
        raise ValueError(f"{op}: {name} has last axis {array.shape[-1]}, expected {width_name}={width}")
    lead = array.shape[:-1]
    return array.reshape(math.prod(lead), width), lead


def vector(op: str, name: str, value: npt.ArrayLike, dtype: npt.DTypeLike) -> Array:
    """A copy of an array with one axis."""
    array = floats(op, name, value, dtype)
    if array.ndim != 1:
        raise ValueError(f"{op}: {name} has {_axes(array)}, expected 1")
    return array.copy()


def factors(
    op: str, A: npt.ArrayLike, B: npt.ArrayLike, d_out: int, d_in: int, dtype: npt.DTypeLike
) -> tuple[Array, Array]:
    """A (d_out, r) and B (r, d_in) that fit a weight and each other, r at least 1."""
    a, b = floats(op, "A", A, dtype), floats(op, "B", B, dtype)
    if a.ndim != 2 or a.shape[0] != d_out or a.shape[1] == 0:
        raise ValueError(f"{op}: A has shape {a.shape}, expected (d_out={d_out}, r) with r at least 1")
    if b.shape != (a.shape[1], d_in):
        raise ValueError(f"{op}: B has shape {b.shape}, expected (r={a.shape[1]}, d_in={d_in})")
    return a, b


def integers(op: str, name: str, value: npt.ArrayLike) -> Array:
    """An integer array of any shape, as int64. An empty list counts as one."""
    array = as_array(op, name, value)
    if array.dtype.kind not in "iu" and array.size:
        raise TypeError(f"{op}: {name} has dtype {array.dtype}, expected integers")
    if array.dtype.kind == "u" and array.size and array.max() > _INT64_MAX:
        raise ValueError(f"{op}: {name} holds {array.max()}, expected at most 2**63 - 1")
    return np.require(array, np.int64, ("C", "A"))


def in_range(op: str, name: str, ids: Array, size: int) -> Array:
    """Integers in [0, size)."""
    if ids.size and (ids.min() < 0 or ids.max() >= size):
        worst = ids.min() if ids.min() < 0 else ids.max()
        raise ValueError(f"{op}: {name} holds {worst}, expected integers from 0 to {size - 1}")
    return ids


# ---- arrays that are written ----


def writable(op: str, name: str, array: object, *readers: tuple[str, Array]) -> Array:
    """An array that may be written in place without touching any of the arrays being read."""
    if not isinstance(array, np.ndarray):
        raise TypeError(f"{op}: {name} is a {type(array).__name__}, expected a NumPy array to write into")
    if not array.flags.writeable:
        raise ValueError(f"{op}: {name} is read-only")
    if not array.dtype.isnative:
        raise TypeError(f"{op}: {name} is byte-swapped ({array.dtype.str}), expected native byte order")
    if not array.flags.aligned:
        raise ValueError(f"{op}: {name} is not aligned to its elements")
    for reader, other in readers:
        if overlap(array, other):
            raise ValueError(f"{op}: {name} overlaps {reader} in memory")
    return array


def overlap(a: Array, b: Array) -> bool:
    """Whether two arrays share an element; True where that would take too long to find out."""
    try:
        return bool(np.shares_memory(a, b, max_work=_OVERLAP_WORK))  # type: ignore[arg-type, unused-ignore]
    except np.exceptions.TooHardError:
        return True


def merge_target(op: str, W: object, dtype: str | None, *readers: tuple[str, Array]) -> tuple[Array, str]:
    """A weight that `merge_lora` writes in place, as the core takes it, and the name of its storage.

    float32 and float64 stay as they are; float16 and bfloat16 are passed on as their bit patterns.
    """
    array = writable(op, "W", W, *readers)
    storage = _storage_in_place(op, array, dtype)
    matrix(op, "W", array)
    if array.size:
        _require_rows(op, array)
    return (array.view(np.uint16) if array.itemsize == 2 else array), storage


def _require_rows(op: str, W: Array) -> None:
    """Each row in one piece, and behind the one before."""
    row, inner = W.strides
    if W.shape[1] > 1 and inner != W.itemsize:
        raise ValueError(
            f"{op}: the rows of W are not contiguous ({inner} bytes from one element to the next, "
            f"expected {W.itemsize}): is W transposed?"
        )
    if W.shape[0] > 1 and row < W.shape[1] * W.itemsize:
        raise ValueError(f"{op}: the rows of W run backwards or overlap ({row} bytes from one to the next)")


def _storage_in_place(op: str, array: Array, dtype: str | None) -> str:
    if array.dtype == np.uint16 and dtype == "bfloat16":
        return "bfloat16"
    name: str = array.dtype.name
    if name not in ("float32", "float64", "float16", "bfloat16"):
        hint = '; for bit patterns of bfloat16 pass dtype="bfloat16"' if name == "uint16" else ""
        raise TypeError(f"{op}: W has dtype {name}, expected float32, float64, float16 or bfloat16{hint}")
    if dtype not in (None, name):
        raise ValueError(f"{op}: dtype={dtype!r}, but W holds {name}")
    return name
