"""Chooses new types for the tensors of a model, and converts the tensors a few rows at a time."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from nplora.weights import storages

Array = NDArray[Any]


class _Stored(Protocol):
    @property
    def type(self) -> str: ...
    @property
    def shape(self) -> tuple[int, ...]: ...


def storage_of(given: str, shape: tuple[int, ...], dtype: str) -> str:
    """Choose the storage type of a tensor.

    Vectors are float32, because ggml computes with float32 vectors. A matrix gets the requested type if its
    rows can be divided into whole blocks of that type. If not, the matrix gets a type with shorter blocks. If
    the rows cannot be divided into these shorter blocks either, the matrix gets float16.
    """
    if len(shape) == 1:
        return "float32"
    wanted = given if dtype == "same" else dtype
    shorter = storages.FORMATS[wanted].shorter if wanted in storages.FORMATS else None
    for storage in (wanted, shorter or wanted):
        if storages.fits(storage, shape[-1]):
            return "float32" if storage == "float64" else storage
    return "float16"


def short(tensors: Mapping[str, _Stored], dtype: str) -> str:
    """A sentence about the matrices that did not get the requested type, or "" if there are none."""
    matrices = [tensor for tensor in tensors.values() if len(tensor.shape) > 1]
    others = [t for t in matrices if dtype != "same" and t.type != storages.GGML_NAMES[dtype]]
    if not others:
        return ""
    kinds = ", ".join(dict.fromkeys(tensor.type for tensor in others))
    rows = f"their rows cannot be divided into whole blocks of {storages.block_elements(dtype)} values"
    return f"{len(others)} of {len(matrices)} matrices are {kinds} instead of {dtype}: {rows}"


def chunks(
    name: str, raw: Array, given: str, d_in: int, storage: str, order: Array | None = None, offset: float = 0
) -> Callable[[], Iterator[memoryview]]:
    """Return a function that yields the bytes of a tensor in another type, a few rows at a time.

    Args:
        name: the tensor's name, for messages.
        raw: uint8 (rows, row_nbytes), the rows in their present type `given`.
        d_in: the number of values in a row.
        storage: the new type.
        order: row i of the result is row order[i] of `raw`. None: the result has the order of `raw`.
        offset: a number that is added to each value.
    """

    def produced() -> Iterator[memoryview]:
        for block in storages.row_blocks(len(raw), d_in):
            rows = np.ascontiguousarray(raw[block] if order is None else raw[order[block]])
            if storage != given or offset:
                values = storages.decode(rows, given, d_in)
                rows = _encoded(name, values + np.float32(offset) if offset else values, storage)
            yield rows.reshape(-1).data

    return produced


def _encoded(name: str, values: Array, storage: str) -> Array:
    try:
        raw = storages.encode(values, storage)
    except ValueError as error:
        raise ValueError(f"model_to_gguf: tensor {name}: {error}") from error
    after = storages.decode(raw, storage, values.shape[1]) if storage in storages.FLOATS else values
    lost = int(np.count_nonzero(np.isfinite(values) & ~np.isfinite(after)))
    if lost:
        raise ValueError(f"model_to_gguf: tensor {name}: {lost} finite values become infinite in {storage}")
    return raw
