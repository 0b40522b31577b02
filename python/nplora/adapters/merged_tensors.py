"""Merges updates into a model's tensors, and prepares the files of the new model."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nplora.formats import gguf, safetensors
from nplora.formats.files import NewFile, StrPath
from nplora.lora.delta import LoraDelta
from nplora.lora.merging import Merge, MergeReport, RowsMerge
from nplora.lora.new_rows import NewRows
from nplora.models.model_files import ModelFiles, NewVocabulary, Stream, Tensor
from nplora.weights import storages

Array = NDArray[Any]

# Maps the name of a storage type in a file to the name that FrozenWeight uses.
STORAGES = {kind: name for name, kind in storages.GGML_NAMES.items()} | {s: s for s in storages.FLOATS}


@dataclass
class MergedTensors:
    """Merges updates into a model's tensors. The merged rows of a tensor can be computed only once.

    Attributes:
        updates: the update of each tensor, with rows in the order of the file.
        dtype: the storage type of the merged tensors, or "same" if each tensor keeps its type.
        vocabulary: the new tokens of the adapter, if it has any.
    """

    model: ModelFiles
    updates: Mapping[str, LoraDelta | NewRows]
    dtype: str
    vocabulary: NewVocabulary | None = None

    @cached_property
    def merges(self) -> dict[str, Merge]:
        """The `Merge` of each tensor that changes, by the tensor's name."""
        return {
            name: merge_of(self.model.tensors[name], update, self.dtype)
            for name, update in self.updates.items()
            if self.dtype != "same" or not update.is_zero
        }

    def new_files(self, output: StrPath) -> list[NewFile]:
        """The files of the new model. The weights come first."""
        streams = {name: _stream(self.model, merge) for name, merge in self.merges.items()}
        return self.model.new_files(output, {**self.model.tensors, **streams}, self.vocabulary)

    def loadable_files(self, output: StrPath) -> list[NewFile]:
        """The new files that differ from the files of the model. The weights come first."""
        return self.new_files(output)[: 1 if self.vocabulary is None else None]

    def reports(self) -> tuple[MergeReport, ...]:
        """A report for each tensor in `updates`, in order. Call this method after the files are written."""
        return tuple(
            self.merges[name].report if name in self.merges else _unchanged(self.model.tensors[name])
            for name in self.updates
        )


def possible_storages(model: ModelFiles, widths: Collection[int] = ()) -> tuple[str, ...]:
    """The storage types of the model's file format that can store rows of each length in `widths`."""
    known = storages.GGML_NAMES if model.suffix == ".gguf" else storages.FLOATS
    return tuple(name for name in known if all(storages.fits(name, width) for width in widths))


def kind_of(tensor: Tensor) -> str:
    """The name of a tensor's storage type in the file."""
    return tensor.type if isinstance(tensor, gguf.Tensor) else tensor.dtype


def merge_of(tensor: Tensor, update: LoraDelta | NewRows, dtype: str, sample: Array | None = None) -> Merge:
    """Prepare the merge of a tensor, or only of the tensor's rows with the indices `sample`."""
    storage, (stored, d_in) = STORAGES[kind_of(tensor)], tensor.shape
    rows = _rows(tensor) if update.shape[0] <= stored else _LongerRows(_rows(tensor), update.shape[0])
    if sample is not None:
        rows, update = rows[sample], update.rows(sample)
    if dtype in ("same", storage) and isinstance(update, NewRows):
        return RowsMerge(tensor.name, update.shape, lambda first, last: rows[first:last], update, storage)
    return Merge(
        tensor.name,
        update.shape,
        lambda first, last: storages.decode(rows[first:last], storage, d_in),
        update,
        storage if dtype == "same" else dtype,
    )


def mean_row(tensor: Tensor) -> Array:
    """The mean of all rows of a matrix, float32. The matrix is decoded a few rows at a time."""
    storage, (stored, width) = STORAGES[kind_of(tensor)], tensor.shape
    rows, total = _rows(tensor), np.zeros(width)
    for block in storages.row_blocks(stored, width):
        total += storages.decode(rows[block], storage, width).sum(axis=0, dtype=np.float64)
    return np.asarray(total / stored, np.float32)


class _LongerRows:
    """The bytes of a tensor's rows, followed by rows of zero bytes. Zero bytes decode to 0 in every type."""

    def __init__(self, rows: Array, size: int) -> None:
        self._rows, self._size = rows, size

    def __getitem__(self, wanted: slice | Array) -> Array:
        ids = np.arange(self._size)[wanted]
        found = self._rows[np.minimum(ids, len(self._rows) - 1)]
        found[ids >= len(self._rows)] = 0
        return found


def _stream(model: ModelFiles, merge: Merge) -> Stream:
    def chunks() -> Iterator[memoryview]:
        return (raw.reshape(-1).data for _, raw in merge.rows())

    if model.suffix == ".gguf":
        return gguf.Stream(storages.GGML_NAMES[merge.storage], merge.shape, chunks)
    return safetensors.Stream(merge.storage, merge.shape, chunks)


def _rows(tensor: Tensor) -> Array:
    """The bytes of a tensor's rows (n, row_nbytes)."""
    raw = tensor.data if isinstance(tensor, gguf.Tensor) else tensor.array.reshape(-1).view(np.uint8)
    stored, d_in = tensor.shape
    return raw.reshape(stored, storages.row_nbytes(STORAGES[kind_of(tensor)], d_in))


def _unchanged(tensor: Tensor) -> MergeReport:
    return MergeReport.unchanged(tensor.name, STORAGES[kind_of(tensor)], tensor.nbytes)
