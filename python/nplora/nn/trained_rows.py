"""Layers that train rows of a frozen embedding or head, as PEFT's `trainable_token_indices` does.

All rows can be trained too, as with PEFT's `modules_to_save`. A head that shares the embedding's weight also
shares the embedding's trained rows.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import numpy.typing as npt

from nplora import _check, _core
from nplora.lora.merging import Merge, MergeReport, merge_weight
from nplora.lora.new_rows import NewRows
from nplora.nn.embedding import Embedding, add_rows, token_ids
from nplora.nn.int8 import in_int8
from nplora.nn.linear import Linear, core_weight
from nplora.nn.low_rank import UnloadedLayer
from nplora.nn.module import AdapterLayer, Commit, Gradient, Parameter, Saved, SharedWeights, inferring
from nplora.weights import FrozenWeight, buffers

if TYPE_CHECKING:  # `import nplora` loads no formats
    from nplora.formats.tokenizer_json import AddedToken

Array = npt.NDArray[Any]


_MEAN_ROWS = 4096  # rows in memory at once while their mean is computed


@dataclasses.dataclass(frozen=True)
class Merged:
    """The result of a merge of trained rows.

    Attributes:
        rows: array (k, dim), the k trained rows after rounding. If all rows are trained, `rows` may be a
            FrozenWeight.
        storage: the storage format to which the rows were rounded; None: the rows were not rounded.
    """

    rows: FrozenWeight | Array
    storage: str | None


class TrainedRows:
    """Trained copies of some or all rows of a frozen weight, and trained rows for new tokens.

    The row of a new token starts as the mean of all rows of the weight. This row replaces a padding row of
    the weight, or follows the weight's last row. The weight itself never gets more rows.

        >>> import nplora, numpy as np
        >>> rows = nplora.nn.TrainedRows(nplora.FrozenWeight(np.eye(4)), [3, 1])
        >>> rows.value
        array([[0., 0., 0., 1.],
               [0., 1., 0., 0.]], dtype=float32)
        >>> nplora.nn.TrainedRows(nplora.FrozenWeight(np.eye(4)), [1, 4], size=5).value
        array([[0.  , 1.  , 0.  , 0.  ],
               [0.25, 0.25, 0.25, 0.25]], dtype=float32)

    Args:
        weight: the frozen weight. Each trained row starts as a copy of the weight's row, except for the rows
            of new tokens.
        ids: the indices of the trained rows, without duplicates; None: all rows.
        size: the number of rows, including rows after the weight's last row; None: the number of the weight's
            rows.
        tokens: the new tokens. An adapter's files contain the texts of these tokens.
    Attributes:
        value: the rows (k, dim), which optimisers update in place.
        grad: the gradient of `value`.
        merged: the rows after `merge` has rounded them; None if the rows are not merged.
    Raises:
        ValueError: `ids` is empty, contains an id twice or an id outside [0, size), or does not contain all
            rows after the weight's last row.
        TypeError: ids are not integers.
    """

    def __init__(
        self,
        weight: FrozenWeight,
        ids: npt.ArrayLike | None,
        size: int | None = None,
        tokens: Iterable[AddedToken] = (),
    ) -> None:
        stored = weight.shape[0]
        self.size = stored if size is None else size
        self.tokens = tuple(tokens)
        self.ids: Array | None = None
        if ids is not None:
            self.ids = _distinct(ids, self.size)
            if missing := np.setdiff1d(np.arange(stored, self.size), self.ids).tolist():
                raise ValueError(
                    f"TrainedRows: row {missing[0]} is beyond the weight's end, so ids must contain it"
                )
        new = {token.id for token in self.tokens} | set(range(stored, self.size))
        self._new = np.array(sorted(new), np.int64)
        self._mean = _mean_row(weight) if new else None
        self.value = np.ascontiguousarray(self.original(weight))
        self.grad = np.zeros_like(self.value)
        self.merged: Merged | None = None

    def original(self, weight: FrozenWeight) -> Array:
        """The initial values of the trained rows, in a new array."""
        if self._mean is None:
            return weight.to_numpy() if self.ids is None else np.array(weight.take(self.ids))
        ids = np.arange(self.size) if self.ids is None else self.ids
        values = np.array(weight.take(np.minimum(ids, weight.shape[0] - 1)))
        values[np.isin(ids, self._new)] = self._mean
        return values

    def beyond(self, weight: FrozenWeight) -> NewRows | None:
        """The rows beyond the weight's end, with their initial values; None if there are no such rows."""
        stored, dim = weight.shape
        if self.size == stored:
            return None
        assert self._mean is not None
        ids = np.arange(stored, self.size)
        return NewRows(ids, np.tile(self._mean, (len(ids), 1)), (self.size, dim))

    def whole(self, weight: FrozenWeight) -> FrozenWeight:
        """The weight with the trained rows in it.

        If a merge rounded the rows to a storage format, the result has this format. Otherwise the result has
        the format of `weight`, or float32 for a quantised weight.
        """
        if self.merged is not None and isinstance(self.merged.rows, FrozenWeight):
            return self.merged.rows
        rows = NewRows(self.ids, self.value, (self.size, weight.shape[1]))
        storage = None if self.merged is None else self.merged.storage
        spare = self.beyond(weight)
        if storage == weight.dtype and self.ids is not None and spare is None:
            return weight.with_rows(self.ids, self.value)
        table = weight.to_numpy()
        if spare is not None:
            table = np.concatenate([table, spare.values])
        if storage is None:
            return weight.like(rows.apply(table, 0))
        return merge_weight("merge", weight if spare is None else weight.like(table), rows, storage)[0]

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        if self.merged is not None:
            self.value = buffers.writable(self.value)
            self.value.flags.writeable = False  # a copied array is writable again


def _mean_row(weight: FrozenWeight) -> Array:
    """The mean of all rows, summed in float64 and in a fixed order."""
    count, dim = weight.shape
    total = np.zeros(dim)
    for first in range(0, count, _MEAN_ROWS):
        total += weight.take(np.arange(first, min(first + _MEAN_ROWS, count))).sum(axis=0, dtype=np.float64)
    return np.asarray(total / count, weight.compute_dtype)


def _distinct(ids: npt.ArrayLike, rows: int) -> Array:
    op = "TrainedRows"
    array = _check.in_range(op, "ids", _check.integers(op, "ids", ids).reshape(-1), rows)
    if not array.size:
        raise ValueError(f"{op}: ids is empty, expected at least one row")
    if (twice := repeated(array)) is not None:
        raise ValueError(f"{op}: row {twice} occurs twice in ids")
    return array


def repeated(ids: Array) -> int | None:
    """The smallest id that occurs more than once; None if there is none.

    >>> repeated(np.array([3, 1, 3])), repeated(np.array([3, 1]))
    (3, None)
    """
    values, counts = np.unique(ids, return_counts=True)
    return next(iter(values[counts > 1].tolist()), None)


@dataclasses.dataclass(frozen=True, slots=True)
class TrainedRowsSaved(Saved):
    """The values for `backward`: the token ids (n,) of an embedding, or the input (n, dim) of a head."""

    lead: tuple[int, ...]
    alone: bool = False  # the pass ran with the adapter disabled
    merged: bool = False
    x: Array | None = None


class _Terms(NamedTuple):
    """The arrays and the adapter's state that one pass uses.

    Attributes:
        weight: the weight.
        rows: new rows, each of which replaces a row of the weight or follows the weight's last row; None: no
            new rows.
        alone: whether the adapter is disabled, so that the pass ignores the trained values.
        merged: whether the rows are merged.
    """

    weight: FrozenWeight | Array
    rows: NewRows | None
    alone: bool
    merged: bool


class TrainedRowsLayer(AdapterLayer):
    """Base class of `TrainedEmbedding` and `TrainedHead`.

        >>> import nplora, numpy as np
        >>> table = nplora.FrozenWeight(np.eye(3))
        >>> layer = nplora.nn.TrainedEmbedding(table, nplora.nn.TrainedRows(table, [2]))
        >>> isinstance(layer, nplora.nn.TrainedRowsLayer), layer.is_whole, layer.num_trainable
        (True, False, 3)

    Args:
        weight: the frozen weight (vocab, dim), which other layers may share.
        rows: the trained rows of the weight. The rows are a parameter of this layer, unless `is_tied` is set.
        is_tied: whether the rows belong to another layer with the same weight. A tied layer does not merge
            the rows.
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
        chosen = {"trained_rows": "all" if ids is None else ids.tolist(), "is_tied": self.is_tied}
        if self.rows.size > self.weight.shape[0]:
            chosen["size"] = self.rows.size
        if self.rows.tokens:
            chosen["added_tokens"] = {token.text: token.id for token in self.rows.tokens}
        return chosen

    def local_parameters(self) -> list[Parameter]:
        if self.is_tied:
            return []
        return [Parameter("weight" if self.is_whole else "rows", self.rows.value, self.rows.grad)]

    def local_frozen(self) -> list[FrozenWeight | Array]:
        return [self.weight]

    def reset(self, stream: np.random.SeedSequence) -> None:
        self.require_unmerged("reset")
        self.rows.value[...] = self.rows.original(self.weight)

    def _terms(self) -> _Terms:
        """Return the arrays and the state of the adapter for one pass.

        A pass calls this method only once, because another thread may merge or disable the layer meanwhile.
        """
        if not self.adapter_enabled:
            return _Terms(self.weight, self.rows.beyond(self.weight), True, False)
        merged = self.rows.merged
        current = self.rows.value if merged is None else merged.rows
        if self.is_whole:
            return _Terms(current, None, False, merged is not None)
        assert isinstance(current, np.ndarray)
        return _Terms(self.weight, self._replacing(current), False, merged is not None)

    def _replacing(self, values: Array) -> NewRows:
        return NewRows(self.rows.ids, values, (self.rows.size, self.weight.shape[1]))

    def _require_kept(self, op: str, saved: TrainedRowsSaved) -> None:
        if saved.merged:
            raise RuntimeError(f"{op}: the layer was merged when this forward pass ran")
        if saved.x is None and not saved.alone:
            raise RuntimeError(f"{op}: this forward pass ran in inference mode and saved nothing")
        _check.own(op, saved, self)

    # ---- merging ----

    def prepare_merge(self, name: str, dtype: str | None) -> tuple[Commit, MergeReport | None]:
        self.require_unmerged("merge")
        if self.is_tied:
            return _nothing, None
        report, storage = None, self.weight.dtype if dtype == "same" else dtype
        merged: FrozenWeight | Array = self.rows.value
        if storage is not None:
            is_longer = self.rows.size > self.weight.shape[0]
            keeps_weight = self.is_whole and not is_longer
            before = self.weight if keeps_weight else self.rows.original(self.weight)
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
        added = self.rows.size - self.weight.shape[0]
        extra = f" ({added} added)" if added else ""
        shown = f"{self.weight.shape}, dtype={self.weight.dtype!r}, {rows} trained{extra}{shared}"
        return f"{type(self).__name__}({shown})"


def _nothing() -> None:
    """Do nothing: a tied layer leaves the merge to the layer to which the rows belong."""


def _rounded(
    name: str, before: FrozenWeight | Array, values: Array, storage: str
) -> tuple[FrozenWeight | Array, MergeReport]:
    """Round trained rows to a storage format; return the rounded rows and a report.

    The rounded rows are a FrozenWeight if `before` is a FrozenWeight, and an array if `before` is an array.
    """
    update = NewRows(None, values, before.shape)
    if isinstance(before, FrozenWeight):
        return merge_weight(name, before, update, storage)
    merge = Merge(name, update.shape, lambda first, stop: before[first:stop], update, storage)
    rounded = [merge.decoded(raw) for _, raw in merge.rows()]
    return np.concatenate(rounded), merge.report


class TrainedEmbedding(TrainedRowsLayer):
    """An embedding y = E[ids] in which trained rows replace some or all rows of the frozen E.

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
        stored, dim = self.weight.shape
        flat, lead = token_ids("TrainedEmbedding.forward", ids, self.rows.size)
        weight, rows, alone, merged = self._terms()
        there = flat if rows is None or self.rows.size == stored else np.minimum(flat, stored - 1)
        y = weight.take(there) if isinstance(weight, FrozenWeight) else weight[there]
        if rows is not None:
            places, numbers = rows.found(flat)
            y[places] = rows.values[numbers]
        keep = None if inferring() or alone or merged else flat
        return y.reshape(*lead, dim), TrainedRowsSaved(lead, alone, merged, keep, layer=self)

    def backward(self, dy: npt.ArrayLike, saved: TrainedRowsSaved, need_dx: bool = True) -> None:
        """Add dy to the gradients of the trained rows. Return None, because ids have no gradient.

        Raises:
            ValueError: dy does not have the shape of y, or `saved` is from a pass of another layer.
            TypeError: `saved` is from another kind of layer.
            RuntimeError: the layer was merged during the forward pass, or that pass ran in inference mode.
        """
        op, dim = "TrainedEmbedding.backward", self.weight.shape[1]
        self.require_unmerged("backward")
        _check.saved(op, saved, TrainedRowsSaved)
        rows = _check.shaped(op, "dy", dy, (*saved.lead, dim), self.weight.compute_dtype).reshape(-1, dim)
        self._require_kept(op, saved)
        if saved.x is not None:
            places, numbers = self._replacing(self.rows.value).found(saved.x)
            add_rows(self.rows.grad, numbers, rows[places])

    def frozen(self) -> Embedding:
        return Embedding(self.weight)

    def unloaded(self, shared: SharedWeights) -> Embedding:
        return Embedding(self._whole(shared))


class TrainedHead(TrainedRowsLayer):
    """A linear layer y = x Wᵀ + bias in which trained rows replace some or all rows of the frozen W.

    >>> import nplora, numpy as np
    >>> weight = nplora.FrozenWeight(np.eye(3))
    >>> head = nplora.nn.TrainedHead(weight, nplora.nn.TrainedRows(weight, [2]))
    >>> head.rows.value[...] = 5
    >>> head([1, 2, 3])
    array([ 1.,  2., 30.], dtype=float32)
    """

    int8 = True  # as in LoRALinear

    def __init__(
        self, weight: FrozenWeight, rows: TrainedRows, is_tied: bool = False, bias: Array | None = None
    ) -> None:
        super().__init__(weight, rows, is_tied)
        if bias is not None and rows.size > weight.shape[0]:
            raise ValueError("TrainedHead: rows beyond the weight's end have no bias, expected bias=None")
        self.bias = bias

    def local_frozen(self) -> list[FrozenWeight | Array]:
        return [self.weight, *([] if self.bias is None else [self.bias])]

    def forward(self, x: npt.ArrayLike) -> tuple[Array, TrainedRowsSaved]:
        """Return y (..., vocab) for x (..., dim), and the values that `backward` needs.

        Raises:
            ValueError: the last axis of x is not dim.
        """
        dim, dtype = self.weight.shape[1], self.weight.compute_dtype
        inputs, lead = _check.rows("TrainedHead.forward", "x", x, dim, "dim", dtype)
        weight, rows, alone, merged = self._terms()
        y = buffers.empty((len(inputs), weight.shape[0]), dtype)
        _core.matmul(core_weight(weight), inputs, self.bias, y, in_int8(self))
        if rows is not None:
            own = np.empty((len(inputs), len(rows.values)), dtype)
            bias = None if self.bias is None else self.bias[rows.ids]
            _core.matmul(rows.values, inputs, bias, own)
            y = _widened(y, self.rows.size)
            y[:, rows.ids] = own
        keep = None if inferring() or alone or merged else inputs
        return y.reshape(*lead, self.rows.size), TrainedRowsSaved(lead, alone, merged, keep, layer=self)

    def backward(
        self, dy: npt.ArrayLike, saved: TrainedRowsSaved, need_dx: bool = True, overwrite_dy: bool = False
    ) -> Gradient:
        """Add to the gradients of the trained rows; return dx (..., dim), or None if need_dx is False.

        Args:
            overwrite_dy: whether `backward` may overwrite dy. If not, and only some rows are trained,
                `backward` makes a copy of dy.
        Raises:
            ValueError: dy does not have the shape of y, or `saved` is from a pass of another layer.
            TypeError: `saved` is from another kind of layer.
            RuntimeError: the layer was merged during the forward pass, or that pass ran in inference mode.
        """
        op, (stored, dim), dtype = "TrainedHead.backward", self.weight.shape, self.weight.compute_dtype
        size = self.rows.size
        self.require_trainable("backward")
        _check.saved(op, saved, TrainedRowsSaved)
        dlogits = _check.shaped(op, "dy", dy, (*saved.lead, size), dtype).reshape(math.prod(saved.lead), size)
        self._require_kept(op, saved)
        alone = saved.x is None
        rows = self.rows.beyond(self.weight) if alone else self._replacing(self.rows.value)
        if self.is_whole and not alone:
            rows = None
        own = dlogits if rows is None else np.ascontiguousarray(dlogits[:, rows.ids])
        if saved.x is not None:
            _core.add_outer(own, saved.x, 1.0, self.rows.grad)
        if not need_dx:
            return None
        dx = buffers.empty((len(dlogits), dim), dtype)
        if rows is None:
            _core.matmul_t(core_weight(self.weight if alone else self.rows.value), dlogits, dx, False)
            return dx.reshape(*saved.lead, dim)
        rest = dlogits
        if size > stored:
            rest = np.ascontiguousarray(dlogits[:, :stored])
        elif not overwrite_dy:
            rest = dlogits.copy()
        ids = np.asarray(rows.ids)
        rest[:, ids[ids < stored]] = 0  # the frozen copies of these rows were not used
        _core.matmul_t(core_weight(self.weight), rest, dx, False)
        more = np.empty_like(dx)
        _core.matmul_t(rows.values, own, more)
        dx += more
        return dx.reshape(*saved.lead, dim)

    def frozen(self) -> Linear:
        return Linear(self.weight, self.bias)

    def unloaded(self, shared: SharedWeights) -> Linear:
        return Linear(self._whole(shared), self.bias)


def _widened(y: Array, size: int) -> Array:
    """Return y (n, vocab) extended to `size` columns. The values in the added columns are not set."""
    if y.shape[1] == size:
        return y
    wide = buffers.empty((len(y), size), y.dtype)
    wide[:, : y.shape[1]] = y
    return wide
