"""Layers that train rows of a frozen embedding or head, as PEFT's `trainable_token_indices` does.

All rows can be trained too, as with PEFT's `modules_to_save`. A head that shares the embedding's weight
shares the trained rows with it.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np
import numpy.typing as npt

from nplora import _check, _core
from nplora.lora.merging import Merge, MergeReport, merge_weight
from nplora.lora.new_rows import NewRows
from nplora.nn.embedding import Embedding, add_rows, token_ids
from nplora.nn.linear import Linear, core_weight
from nplora.nn.low_rank import UnloadedLayer
from nplora.nn.module import AdapterLayer, Commit, Gradient, Parameter, Saved, SharedWeights, inferring
from nplora.weights import FrozenWeight, buffers

Array = npt.NDArray[Any]


@dataclasses.dataclass(frozen=True)
class Merged:
    """Merged rows: some rows as values (k, dim), or all of them as a weight; and their storage format."""

    rows: FrozenWeight | Array
    storage: str | None


class TrainedRows:
    """The trained copies of rows of a frozen weight.

        >>> import nplora, numpy as np
        >>> rows = nplora.nn.TrainedRows(nplora.FrozenWeight(np.eye(4)), [3, 1])
        >>> rows.value
        array([[0., 0., 0., 1.],
               [0., 1., 0., 0.]], dtype=float32)

    Args:
        weight: the weight. The trained rows start with its values.
        ids: the numbers of the rows, each once, or None for all rows.
    Attributes:
        value: the rows (k, dim), which optimisers update in place.
        grad: the gradient of `value`.
        merged: the rows as a merge rounded them, or None if they are not merged.
    Raises:
        ValueError: an id is not a row of the weight, or occurs twice, or there are no ids.
        TypeError: ids are not integers.
    """

    def __init__(self, weight: FrozenWeight, ids: npt.ArrayLike | None) -> None:
        self.ids: Array | None = None
        if ids is not None:
            self.ids = _distinct(ids, weight.shape[0])
            self._order = np.argsort(self.ids)
            self._sorted = self.ids[self._order]
        self.value = np.ascontiguousarray(self.original(weight))
        self.grad = np.zeros_like(self.value)
        self.merged: Merged | None = None

    def original(self, weight: FrozenWeight) -> Array:
        """The frozen weight's values of these rows, in a new array."""
        return weight.to_numpy() if self.ids is None else np.array(weight.take(self.ids))

    def found(self, ids: Array) -> tuple[Array, Array]:
        """The places in `ids` (n,) whose row is trained, and the number of that row in `value`."""
        if self.ids is None:
            return np.arange(len(ids)), ids
        near = np.minimum(np.searchsorted(self._sorted, ids), len(self._sorted) - 1)
        places = np.flatnonzero(self._sorted[near] == ids)
        return places, self._order[near[places]]

    def whole(self, weight: FrozenWeight) -> FrozenWeight:
        """The weight with the trained rows in it.

        The storage format is that of the merge, or else that of `weight`, but float32 for a quantised weight.
        """
        if self.merged is not None and isinstance(self.merged.rows, FrozenWeight):
            return self.merged.rows
        rows = NewRows(self.ids, self.value, weight.shape)
        storage = None if self.merged is None else self.merged.storage
        if storage is None:
            return weight.like(rows.apply(weight.to_numpy(), 0))
        if storage == weight.dtype and self.ids is not None:
            return weight.with_rows(self.ids, self.value)
        return merge_weight("merge", weight, rows, storage)[0]

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        if self.merged is not None:
            self.value.flags.writeable = False  # a copied array is writable again


def _distinct(ids: npt.ArrayLike, rows: int) -> Array:
    op = "TrainedRows"
    array = _check.in_range(op, "ids", _check.integers(op, "ids", ids).reshape(-1), rows)
    if not array.size:
        raise ValueError(f"{op}: ids is empty, expected at least one row")
    values, counts = np.unique(array, return_counts=True)
    if (counts > 1).any():
        raise ValueError(f"{op}: row {values[counts > 1][0]} occurs twice in ids")
    return array


@dataclasses.dataclass(frozen=True, slots=True)
class TrainedRowsSaved(Saved):
    """What `backward` needs: the token ids (n,) of an embedding, or the input (n, dim) of a head."""

    lead: tuple[int, ...]
    alone: bool = False  # the pass ran with the adapter disabled
    merged: bool = False
    x: Array | None = None


class TrainedRowsLayer(AdapterLayer):
    """Base class of `TrainedEmbedding` and `TrainedHead`.

        >>> import nplora, numpy as np
        >>> table = nplora.FrozenWeight(np.eye(3))
        >>> layer = nplora.nn.TrainedEmbedding(table, nplora.nn.TrainedRows(table, [2]))
        >>> isinstance(layer, nplora.nn.TrainedRowsLayer), layer.is_whole, layer.num_trainable
        (True, False, 3)

    Args:
        weight: the frozen weight (vocab, dim), which is shared.
        rows: its trained rows. They are a parameter of this layer, unless `is_tied`.
        is_tied: whether the rows belong to another layer with the same weight. That layer also merges them.
    """

    def __init__(self, weight: FrozenWeight, rows: TrainedRows, is_tied: bool = False) -> None:
        self.weight, self.rows, self.is_tied = weight, rows, is_tied
        self.dropout_stream = 0, 0

    dropout = 0.0

    @property
    def is_whole(self) -> bool:
        """Whether all rows are trained."""
        return self.rows.ids is None

    @property
    def merged(self) -> bool:
        return self.rows.merged is not None

    def settings(self) -> dict[str, Any]:
        ids = self.rows.ids
        return {"trained_rows": "all" if ids is None else ids.tolist(), "is_tied": self.is_tied}

    def local_parameters(self) -> list[Parameter]:
        if self.is_tied:
            return []
        return [Parameter("weight" if self.is_whole else "rows", self.rows.value, self.rows.grad)]

    def local_frozen(self) -> list[FrozenWeight | Array]:
        return [self.weight]

    def reset(self, stream: np.random.SeedSequence) -> None:
        self.require_unmerged("reset")
        self.rows.value[...] = self.rows.original(self.weight)

    def require_trainable(self, what: str) -> None:
        super().require_trainable(what)
        if self.weight.compute == "int8":
            raise RuntimeError(f"{type(self).__name__}.{what}: compute='int8' is for inference")

    def _terms(self) -> tuple[FrozenWeight | Array, Array | None, bool]:
        """The weight of a pass, the rows to replace in its products, and whether they are merged.

        A pass calls this method only once, because another thread may merge or disable the layer meanwhile.
        """
        if not self.adapter_enabled:
            return self.weight, None, False
        merged = self.rows.merged
        current = self.rows.value if merged is None else merged.rows
        if self.is_whole:
            return current, None, merged is not None
        assert isinstance(current, np.ndarray)
        return self.weight, current, merged is not None

    def _require_kept(self, op: str, saved: TrainedRowsSaved) -> None:
        if saved.merged:
            raise RuntimeError(f"{op}: the layer was merged in this forward pass")
        if saved.x is None and not saved.alone:
            raise RuntimeError(f"{op}: this forward pass ran in inference mode and kept nothing")
        _check.own(op, saved, self)

    # ---- merging ----

    def prepare_merge(self, name: str, dtype: str | None) -> tuple[Commit, MergeReport | None]:
        self.require_unmerged("merge")
        if self.is_tied:
            return _nothing, None
        report, storage = None, self.weight.dtype if dtype == "same" else dtype
        merged: FrozenWeight | Array = self.rows.value
        if storage is not None:
            before = self.weight if self.is_whole else self.rows.original(self.weight)
            merged, report = _rounded(name or type(self).__name__, before, self.rows.value, storage)

        def commit() -> None:
            self.rows.merged = Merged(merged, storage)
            self.rows.value.flags.writeable = False

        return commit, report

    def prepare_unmerge(self) -> Commit:
        if not self.merged:
            raise RuntimeError(f"{type(self).__name__}.unmerge: the layer is not merged")

        if self.is_tied:
            return _nothing

        def commit() -> None:
            self.rows.merged = None
            self.rows.value.flags.writeable = True

        return commit

    def _whole(self, shared: SharedWeights) -> FrozenWeight:
        """The weight with the trained rows in it. A tied head gets the same object as the embedding."""
        if id(self.rows) not in shared:
            shared[id(self.rows)] = self.rows.whole(self.weight)
        return shared[id(self.rows)]

    def discard(self) -> None:
        vars(self).clear()
        vars(self)["_was"] = type(self).__name__
        object.__setattr__(self, "__class__", UnloadedLayer)

    def __repr__(self) -> str:
        rows = "all rows" if self.rows.ids is None else f"{len(self.rows.ids)} rows"
        shared = ", shared with the embedding" if self.is_tied else ""
        return (
            f"{type(self).__name__}({self.weight.shape}, dtype={self.weight.dtype!r}, {rows} trained{shared})"
        )


def _nothing() -> None:
    """Commit nothing: another layer merges the rows that this layer shares with it."""


def _rounded(
    name: str, before: FrozenWeight | Array, values: Array, storage: str
) -> tuple[FrozenWeight | Array, MergeReport]:
    """Round trained rows to a storage format: some rows as decoded values, or all of them as a weight."""
    update = NewRows(None, values, before.shape)
    if isinstance(before, FrozenWeight):
        return merge_weight(name, before, update, storage)
    merge = Merge(name, update.shape, lambda first, stop: before[first:stop], update, storage)
    rounded = [merge.decoded(raw) for _, raw in merge.rows()]
    return np.concatenate(rounded), merge.report


class TrainedEmbedding(TrainedRowsLayer):
    """An embedding with some rows that are trained: y = E[ids], with trained copies of these rows.

    >>> import nplora, numpy as np
    >>> table = nplora.FrozenWeight(np.eye(3))
    >>> layer = nplora.nn.TrainedEmbedding(table, nplora.nn.TrainedRows(table, [2]))
    >>> layer.rows.value[...] = 5
    >>> layer([0, 2])
    array([[1., 0., 0.],
           [5., 5., 5.]], dtype=float32)
    """

    def forward(self, ids: npt.ArrayLike) -> tuple[Array, TrainedRowsSaved]:
        """Return y (..., dim) for integer ids (...), and the values that `backward` needs.

        Raises:
            TypeError: ids are not integers.
            ValueError: an id is not in [0, vocab).
        """
        vocab, dim = self.weight.shape
        flat, lead = token_ids("TrainedEmbedding.forward", ids, vocab)
        weight, rows, merged = self._terms()
        y = weight.take(flat) if isinstance(weight, FrozenWeight) else weight[flat]
        if rows is not None:
            places, numbers = self.rows.found(flat)
            y[places] = rows[numbers]
        alone = weight is self.weight and rows is None
        keep = None if inferring() or alone or merged else flat
        return y.reshape(*lead, dim), TrainedRowsSaved(lead, alone, merged, keep, layer=self)

    def backward(self, dy: npt.ArrayLike, saved: TrainedRowsSaved, need_dx: bool = True) -> None:
        """Add dy to the gradients of the trained rows. Return None, because ids have no gradient.

        Raises:
            ValueError: dy does not have the shape of y, or `saved` is from a pass of another layer.
            TypeError: `saved` is from another kind of layer.
            RuntimeError: the layer was merged in the forward pass, or that pass ran in inference mode.
        """
        op, dim = "TrainedEmbedding.backward", self.weight.shape[1]
        self.require_unmerged("backward")
        _check.saved(op, saved, TrainedRowsSaved)
        rows = _check.shaped(op, "dy", dy, (*saved.lead, dim), self.weight.compute_dtype).reshape(-1, dim)
        self._require_kept(op, saved)
        if saved.x is not None:
            places, numbers = self.rows.found(saved.x)
            add_rows(self.rows.grad, numbers, rows[places])

    def frozen(self) -> Embedding:
        return Embedding(self.weight)

    def unloaded(self, shared: SharedWeights) -> Embedding:
        return Embedding(self._whole(shared))


class TrainedHead(TrainedRowsLayer):
    """A linear layer with some rows that are trained: y = x Wᵀ + bias, with trained copies of these rows.

    >>> import nplora, numpy as np
    >>> weight = nplora.FrozenWeight(np.eye(3))
    >>> head = nplora.nn.TrainedHead(weight, nplora.nn.TrainedRows(weight, [2]))
    >>> head.rows.value[...] = 5
    >>> head([1, 2, 3])
    array([ 1.,  2., 30.], dtype=float32)
    """

    def __init__(
        self, weight: FrozenWeight, rows: TrainedRows, is_tied: bool = False, bias: Array | None = None
    ) -> None:
        super().__init__(weight, rows, is_tied)
        self.bias = bias

    def local_frozen(self) -> list[FrozenWeight | Array]:
        return [self.weight, *([] if self.bias is None else [self.bias])]

    def forward(self, x: npt.ArrayLike) -> tuple[Array, TrainedRowsSaved]:
        """Return y (..., vocab) for x (..., dim), and the values that `backward` needs.

        Raises:
            ValueError: the last axis of x is not dim.
        """
        (vocab, dim), dtype = self.weight.shape, self.weight.compute_dtype
        inputs, lead = _check.rows("TrainedHead.forward", "x", x, dim, "dim", dtype)
        weight, rows, merged = self._terms()
        y = buffers.empty((len(inputs), vocab), dtype)
        _core.matmul(core_weight(weight), inputs, self.bias, y)
        if rows is not None:
            own = np.empty((len(inputs), len(rows)), dtype)
            bias = None if self.bias is None else self.bias[self.rows.ids]
            _core.matmul(rows, inputs, bias, own)
            y[:, self.rows.ids] = own
        alone = weight is self.weight and rows is None
        keep = None if inferring() or alone or merged else inputs
        return y.reshape(*lead, vocab), TrainedRowsSaved(lead, alone, merged, keep, layer=self)

    def backward(
        self, dy: npt.ArrayLike, saved: TrainedRowsSaved, need_dx: bool = True, overwrite_dy: bool = False
    ) -> Gradient:
        """Add to the gradients of the trained rows; return dx (..., dim), or None if need_dx is False.

        Args:
            overwrite_dy: dy may be changed. Otherwise a copy of dy is needed if only some rows are trained.
        Raises:
            ValueError: dy does not have the shape of y, or `saved` is from a pass of another layer.
            TypeError: `saved` is from another kind of layer.
            RuntimeError: the layer was merged in the forward pass, or that pass ran in inference mode; or
                the weight computes in int8.
        """
        op, (vocab, dim), dtype = "TrainedHead.backward", self.weight.shape, self.weight.compute_dtype
        self.require_trainable("backward")
        _check.saved(op, saved, TrainedRowsSaved)
        rows = _check.shaped(op, "dy", dy, (*saved.lead, vocab), dtype).reshape(math.prod(saved.lead), vocab)
        self._require_kept(op, saved)
        own = rows
        if saved.x is not None:
            own = rows if self.is_whole else np.ascontiguousarray(rows[:, self.rows.ids])
            _core.add_outer(own, saved.x, 1.0, self.rows.grad)
        if not need_dx:
            return None
        dx = buffers.empty((len(rows), dim), dtype)
        if self.is_whole or saved.x is None:
            _core.matmul_t(core_weight(self.weight if saved.x is None else self.rows.value), rows, dx)
            return dx.reshape(*saved.lead, dim)
        rest = rows if overwrite_dy else rows.copy()
        rest[:, self.rows.ids] = 0  # the frozen copies of these rows were not used
        _core.matmul_t(core_weight(self.weight), rest, dx)
        more = np.empty_like(dx)
        _core.matmul_t(self.rows.value, own, more)
        dx += more
        return dx.reshape(*saved.lead, dim)

    def frozen(self) -> Linear:
        return Linear(self.weight, self.bias)

    def unloaded(self, shared: SharedWeights) -> Linear:
        return Linear(self._whole(shared), self.bias)
