"""Merges an update ΔW = scale · A·B into a weight, a few rows at a time, and measures how much of ΔW is lost.

The quantisation steps of a low-bit format can be larger than the update, so a merge can lose the update. The
new weight is W + ΔW, computed in float32 (in float64 if W is float64) and then rounded to the storage format.
A comparison with W + ΔW in float64 shows how much of ΔW is lost.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nplora import _check
from nplora.lora.delta import LoraDelta
from nplora.lora.new_rows import NewRows
from nplora.weights import FrozenWeight, storages

Array = NDArray[Any]


@dataclass(frozen=True)
class MergeReport:
    """How much of ΔW remains after rounding, for one merged weight.

    The "effective ΔW" is the merged weight, as stored, minus the original weight.

    Attributes:
        name: the name of the layer or tensor.
        storage, nbytes: the storage format of the merged weight, and its size in bytes.
        error: ‖effective ΔW - ΔW‖ / ‖ΔW‖ in the Frobenius norm. If ΔW is 0, the error is 0, or infinite if
            the new storage format changed the weight.
        kept: the kept share of ΔW, ⟨effective ΔW, ΔW⟩ / ‖ΔW‖², or 1 if ΔW is 0. If the share is near 1, the
            error is rounding noise, which hardly changes the outputs. If the share is near 0, rounding has
            restored the original weight, and the update is lost.
        worst_block: the quantised block with the largest relative error: a tuple of the block's row in W and
            its first column. In unquantised formats, a whole row counts as one block.
        worst_error: the relative error of that block.
        norm: ‖ΔW‖.
        weight_norm: ‖W‖ of the original weight.
    """

    name: str
    storage: str
    nbytes: int
    error: float
    kept: float
    worst_block: tuple[int, int]
    worst_error: float
    norm: float = 0.0
    weight_norm: float = 0.0

    @property
    def noise(self) -> float:
        """The norm of the part of the error that is orthogonal to ΔW, divided by ‖ΔW‖.

        This part is noise, not a loss of ΔW.
        """
        return math.sqrt(max(0.0, self.error**2 - (1 - self.kept) ** 2))

    @classmethod
    def unchanged(cls, name: str, storage: str, nbytes: int) -> "MergeReport":
        """Return the report of a weight that does not change because ΔW is 0."""
        return cls(name, storage, nbytes, 0.0, 1.0, (0, 0), 0.0)

    @classmethod
    def of_all(cls, name: str, reports: "Sequence[MergeReport]") -> "MergeReport":
        """Return one report about all weights in `reports` together. The result has no worst block."""
        norms = [report.norm for report in reports]
        error = math.sqrt(weighted_mean(norms, [report.error**2 for report in reports], 0.0))
        kept = weighted_mean(norms, [report.kept for report in reports], 1.0)
        whole = math.hypot(*(report.weight_norm for report in reports))
        storage = ", ".join(dict.fromkeys(report.storage for report in reports))
        nbytes = sum(report.nbytes for report in reports)
        return cls(name, storage, nbytes, error, kept, (0, 0), 0.0, math.hypot(*norms), whole)

    def __str__(self) -> str:
        row, column = self.worst_block
        if math.isinf(self.error):
            return (
                f"{self.name}: {self.storage}, {self.nbytes:,} bytes, ΔW is 0, "
                "only rounding changed the weight"
            )
        return (
            f"{self.name}: {self.storage}, {self.nbytes:,} bytes, {self.kept:.1%} of ΔW kept, noise "
            f"{self.noise:.3g} times ΔW, relative error {self.error:.3g}, at worst {self.worst_error:.3g} "
            f"(row {row:,} from column {column:,})"
        )


def weighted_mean(norms: Iterable[float], values: Iterable[float], nothing: float) -> float:
    """Return the weighted mean of `values`. The weight of values[i] is norms[i]².

    For example, the kept shares of ΔW get the weights ‖ΔW‖². If all norms are 0, return the number `nothing`.
    """
    weighted = [(norm**2, value) for norm, value in zip(norms, values, strict=True) if norm]
    if not weighted:
        return nothing
    return sum(square * value for square, value in weighted) / sum(square for square, _ in weighted)


class Merge:
    """Merges an update into one weight. `rows()` yields the bytes of the new weight.

    After `rows()` has yielded the last bytes, `report` is complete. `rows()` can be used only once.

    Args:
        read: a function; read(first, stop) returns the rows W[first:stop], (n, d_in), float32 or float64.
    Raises:
        ValueError: a row of W is not a whole number of blocks of the storage format.
    """

    def __init__(
        self,
        name: str,
        shape: tuple[int, int],
        read: Callable[[int, int], Array],
        update: LoraDelta | NewRows,
        storage: str,
    ) -> None:
        _check.choice("merge", "dtype", storage, storages.STORAGES)
        if not storages.fits(storage, shape[1]):
            raise ValueError(
                f"merge: {name}: a row has {shape[1]} elements, expected a multiple of "
                f"{storages.block_elements(storage)}, the block length of {storage}"
            )
        self.name, self.shape, self.update, self.storage = name, shape, update, storage
        self.nbytes = shape[0] * storages.row_nbytes(storage, shape[1])
        self._read = read
        self._asked = self._lost = self._along = 0.0  # ‖ΔW‖², ‖error‖², ⟨error, ΔW⟩
        self._weight = 0.0  # ‖W‖²
        self._worst = (-1.0, 0, 0)

    def rows(self) -> Iterator[tuple[int, Array]]:
        """Yield the new rows, n at a time, as pairs: the index of the first row, and the bytes of the n rows.

        The bytes are an array (n, row_nbytes).

        Raises:
            ValueError: a finite value of W would become NaN or infinite, or the storage format cannot encode
                a new value.
        """
        d_out, d_in = self.shape
        for block in storages.row_blocks(d_out, d_in):
            first = block.start
            before = self._read(first, block.stop)
            merged, delta = self.update.apply(before, first), self.update.delta(before, first)
            yield first, self._encoded(before, merged, delta, np.arange(first, block.stop))

    def _encoded(self, before: Array, merged: Array, delta: Array, numbers: Array) -> Array:
        """Encode `merged`, and measure how much of the change `delta` is lost by rounding.

        Args:
            numbers: the indices of these rows in W.
        """
        try:
            raw = storages.encode(merged, self.storage)
        except ValueError as error:
            raise ValueError(f"merge: {self.name}, rows from {numbers[0]:,}: {error}") from error
        after = self.decoded(raw)
        lost = int(np.count_nonzero(np.isfinite(before) & ~np.isfinite(after)))
        if lost:
            raise ValueError(
                f"merge: {self.name}: {lost} finite values would become infinite or NaN "
                f"in {self.storage}; nothing is merged"
            )
        self._count(before, after, delta, numbers)
        return raw

    def decoded(self, raw: Array) -> Array:
        """Decode bytes of rows, as yielded by `rows()`, to floats."""
        return storages.decode(raw, self.storage, self.shape[1])

    def _count(self, before: Array, after: Array, delta: Array, numbers: Array) -> None:
        n, d_in = before.shape
        lost = after.astype(np.float64)
        lost -= before
        lost -= delta
        elements = storages.block_elements(self.storage)
        blocks = (n, -1, elements if elements > 1 else max(1, d_in))
        asked_squares, lost_squares = (
            np.einsum("nbi,nbi->nb", x.reshape(blocks), x.reshape(blocks)) for x in (delta, lost)
        )
        self._asked += float(asked_squares.sum())
        self._lost += float(lost_squares.sum())
        self._along += float(np.einsum("ni,ni->", lost, delta))
        self._weight += float(np.einsum("ni,ni->", before, before, dtype=np.float64))
        if lost_squares.size:
            errors = _relative(lost_squares, asked_squares)
            row, block = np.unravel_index(int(np.nanargmax(np.nan_to_num(errors, nan=np.inf))), errors.shape)
            if errors[row, block] > self._worst[0]:
                self._worst = (float(errors[row, block]), int(numbers[row]), int(block) * blocks[2])

    @property
    def report(self) -> MergeReport:
        error = float(_relative(np.array(self._lost), np.array(self._asked)))
        kept = 1 + self._along / self._asked if self._asked else 1.0
        worst, row, column = self._worst
        return MergeReport(
            self.name,
            self.storage,
            self.nbytes,
            error,
            kept,
            (row, column),
            max(0.0, worst),
            math.sqrt(self._asked),
            math.sqrt(self._weight),
        )


class RowsMerge(Merge):
    """Replaces rows of a weight, in the same storage format. The bytes of all other rows do not change.

    Args:
        read: a function; read(first, stop) returns the bytes (n, row_nbytes) of the rows W[first:stop].
    """

    def rows(self) -> Iterator[tuple[int, Array]]:
        assert isinstance(self.update, NewRows)
        for block in storages.row_blocks(*self.shape):
            raw = self._read(block.start, block.stop)
            places, values = self.update.within(block.start, block.stop)
            if len(places):
                raw = raw.copy()
                before = self.decoded(np.ascontiguousarray(raw[places]))
                delta = values.astype(np.float64) - before
                raw[places] = self._encoded(before, values, delta, block.start + places)
            yield block.start, raw


def merge_weight(
    name: str, weight: FrozenWeight, update: LoraDelta | NewRows, storage: str
) -> tuple[FrozenWeight, MergeReport]:
    """Merge an update into a copy of a weight. The weight is decoded a few rows at a time.

    Args:
        storage: the storage format of the result, or "same" for the format of `weight`. A float64 weight
            stays float64, and no other weight becomes float64.
    Raises:
        ValueError: `storage` changes a weight from or to float64; or one of the reasons in `Merge`.
    """
    storage = (
        weight.dtype if storage == "same" else _check.choice("merge", "dtype", storage, storages.STORAGES)
    )
    if storages.compute_dtype(storage) != weight.compute_dtype:
        raise ValueError(
            f"merge: {name}: dtype={storage!r}, but the layer computes in {weight.compute_dtype}"
        )
    if storage == weight.dtype and update.is_zero:
        return weight, MergeReport.unchanged(name, storage, weight.nbytes)
    merge = Merge(name, weight.shape, lambda i, j: weight.take(np.arange(i, j)), update, storage)
    out = np.empty((weight.shape[0], storages.row_nbytes(storage, weight.shape[1])), np.uint8)
    for first, raw in merge.rows():
        out[first : first + len(raw)] = raw
    return weight.like_rows(out, storage), merge.report


def _relative(lost: Array, asked: Array) -> Array:
    """Return the relative error √(lost / asked). If `lost` is 0, the error is 0.

    `lost` is the squared norm of the error, and `asked` is the squared norm of ΔW.
    """
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(lost == 0, 0.0, np.sqrt(lost / asked))
