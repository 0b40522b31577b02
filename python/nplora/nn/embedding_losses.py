"""Losses that train embeddings: ranking with in-batch negatives, triplet, cosine, CoSENT and Matryoshka.

An embedding loss is a callable (columns, targets) -> (loss, gradients). `columns` is a list of arrays (n, d)
of embeddings, such as the anchors and the positives. `gradients` is a list with the gradient of the loss with
respect to each of these arrays. Losses of float64 embeddings are computed in float64, all other losses in
float32.

    >>> import numpy as np
    >>> from nplora.nn.embedding_losses import RankingLoss
    >>> loss, gradients = RankingLoss()([np.eye(3), np.eye(3)])
    >>> loss < 1e-8
    True
"""

import dataclasses
from collections.abc import Sequence
from typing import Any, ClassVar, Protocol

import numpy as np
import numpy.typing as npt

from nplora import _check
from nplora.nn.module import quiet
from nplora.weights import FrozenWeight

Array = npt.NDArray[Any]

DISTANCES = ("euclidean", "cosine", "manhattan")
_LEAST_NORM = 1e-12  # as in torch.nn.functional.normalize
_ROWS = 512  # rows of similarities that are computed at once


class EmbeddingFunction(Protocol):
    """The type of embedding losses. The docstring of this module describes their arguments and results.

    Attributes:
        columns: the names of the columns. At least the first two columns are needed.
        needs_scores: whether `targets` must hold a score for each row.
    """

    @property
    def columns(self) -> tuple[str, ...]: ...

    @property
    def needs_scores(self) -> bool: ...

    def __call__(self, columns: Sequence[Array], targets: Array | None = None) -> tuple[float, list[Array]]:
        """Return the mean loss of the rows, and its gradient with respect to each column."""


@dataclasses.dataclass(frozen=True)
class RankingLoss:
    """Multiple negatives ranking (InfoNCE): each anchor must be nearest to its own positive.

    The loss is the cross entropy of softmax(scale · cosine(anchor, candidate)) over all candidates: the
    positives and the negatives of the whole batch (Henderson et al. 2017, section 4.4).

        >>> import numpy as np
        >>> from nplora.nn.embedding_losses import RankingLoss
        >>> anchors, positives = np.float32([[1, 0], [0, 1]]), np.float32([[1, 0], [1, 1]])
        >>> round(RankingLoss(scale=1.0)([anchors, positives])[0], 4)
        0.4791

    Args:
        scale: the number by which the cosines are multiplied, which is 1 / temperature.
        symmetric: also rank the anchors for each positive. The loss is then the mean of the two rankings'
            losses.
    Raises:
        ValueError: `scale` is not above 0.
    """

    scale: float = 20.0
    symmetric: bool = False

    columns: ClassVar[tuple[str, ...]] = ("anchors", "positives", "negatives")
    needs_scores: ClassVar[bool] = False

    def __post_init__(self) -> None:
        _above_zero("RankingLoss", "scale", self.scale)

    def __call__(self, columns: Sequence[Array], targets: Array | None = None) -> tuple[float, list[Array]]:
        """Return the mean of the anchors' losses, and the gradients of the columns.

        Args:
            columns: the anchors (n, d), the positives (n, d) and, optionally, the negatives (m, d). m may
                differ from n.
            targets: None, or a bool mask (n, n + m) over the candidates, which are the positives followed by
                the negatives. If mask[i, j] is True, candidate j is also correct for anchor i, so the loss of
                anchor i leaves it out. mask[i, i] has no effect: the positive of an anchor always counts.
        Raises:
            ValueError: the shapes do not fit each other.
        """
        given = _columns("RankingLoss", columns, 2, 3, equal=2)
        n, units = len(given[0]), [_normalized(x) for x in given]
        left_out = None if targets is None else _mask(targets, n, sum(map(len, given[1:])))
        with quiet():
            anchors, candidates = units[0][0], np.concatenate([unit for unit, _ in units[1:]])
            loss, da, dc = _ranked(anchors, candidates, self.scale, left_out)
            if self.symmetric:
                mirrored = None if left_out is None else left_out[:, :n].T
                other, dp, da_too = _ranked(candidates[:n], anchors, self.scale, mirrored)
                loss, da, dc = (loss + other) / 2, (da + da_too) / 2, dc / 2
                dc[:n] += dp / 2
            parts = np.split(dc, np.cumsum([len(x) for x in given[1:-1]]))
            return loss, [_normalized_backward(d, *unit) for d, unit in zip([da, *parts], units, strict=True)]


@dataclasses.dataclass(frozen=True)
class TripletLoss:
    """The mean of max(0, d(anchor, positive) - d(anchor, negative) + margin) over triplets.

        >>> import numpy as np
        >>> from nplora.nn.embedding_losses import TripletLoss
        >>> a, p, n = np.float32([[0, 0]]), np.float32([[3, 4]]), np.float32([[6, 8]])
        >>> round(TripletLoss(margin=7.0)([a, p, n])[0], 4)
        2.0

    Args:
        margin: the loss of a triplet is 0 if d(anchor, negative) is larger than d(anchor, positive) by at
            least `margin`.
        distance: "euclidean", "cosine" (1 - cosine) or "manhattan".
    Raises:
        ValueError: `margin` is not above 0, or the distance is unknown.
    """

    margin: float = 5.0
    distance: str = "euclidean"

    columns: ClassVar[tuple[str, ...]] = ("anchors", "positives", "negatives")
    needs_scores: ClassVar[bool] = False

    def __post_init__(self) -> None:
        _above_zero("TripletLoss", "margin", self.margin)
        _check.choice("TripletLoss", "distance", self.distance, DISTANCES)

    def __call__(self, columns: Sequence[Array], targets: Array | None = None) -> tuple[float, list[Array]]:
        """The mean loss over the triplets, and the gradients of the three columns (n, d).

        Raises:
            ValueError: the shapes do not fit each other.
        """
        anchors, positives, negatives = _columns("TripletLoss", columns, 3, 3, equal=3)
        with quiet():
            near, near_a, near_p = _distance(self.distance, anchors, positives)
            far, far_a, far_n = _distance(self.distance, anchors, negatives)
            excess = near - far + near.dtype.type(self.margin)
            active = np.where(excess > 0, 1 / max(1, len(excess)), 0).astype(near.dtype)[:, None]
            loss = _mean(np.where(excess > 0, excess, excess * 0))  # keeps NaN
            return loss, [active * (near_a - far_a), active * near_p, -active * far_n]


@dataclasses.dataclass(frozen=True)
class CosineLoss:
    """The mean of (cosine(a, b) - score)² over pairs of texts.

    >>> import numpy as np
    >>> from nplora.nn.embedding_losses import CosineLoss
    >>> CosineLoss()([np.float32([[1, 0]]), np.float32([[0, 2]])], np.float32([0.5]))[0]
    0.25
    """

    columns: ClassVar[tuple[str, ...]] = ("first", "second")
    needs_scores: ClassVar[bool] = True

    def __call__(self, columns: Sequence[Array], targets: Array | None = None) -> tuple[float, list[Array]]:
        """The mean loss over the pairs, and the gradients of both columns (n, d).

        Args:
            targets: the scores (n,): the cosines that the pairs should have.
        Raises:
            ValueError: the shapes do not fit each other, or there are no scores.
        """
        cosines, first, second, scores = _scored("CosineLoss", columns, targets)
        with quiet():
            error = cosines - scores
            slope = (2 / max(1, len(error)) * error).astype(error.dtype)[:, None]
            return _mean(error * error), [slope * first, slope * second]


@dataclasses.dataclass(frozen=True)
class CoSENTLoss:
    """log(1 + Σ exp(scale · (cos_i - cos_j))), where the sum is over all rows i, j with score_i < score_j.

    Here cos_i is the cosine of the two embeddings in row i. Only the order of the scores matters (Su 2022,
    "CoSENT").

        >>> import numpy as np
        >>> from nplora.nn.embedding_losses import CoSENTLoss
        >>> a, b = np.float32([[1, 0], [1, 0]]), np.float32([[1, 0], [0, 1]])
        >>> CoSENTLoss()([a, b], np.float32([1, 0]))[0] < 1e-8
        True

    Args:
        scale: the number by which the cosines are multiplied.
    Raises:
        ValueError: `scale` is not above 0.
    """

    scale: float = 20.0

    columns: ClassVar[tuple[str, ...]] = ("first", "second")
    needs_scores: ClassVar[bool] = True

    def __post_init__(self) -> None:
        _above_zero("CoSENTLoss", "scale", self.scale)

    def __call__(self, columns: Sequence[Array], targets: Array | None = None) -> tuple[float, list[Array]]:
        """The loss of the whole batch, and the gradients of both columns (n, d).

        Args:
            targets: the scores (n,). Only the order of the scores matters.
        Raises:
            ValueError: the shapes do not fit each other, or there are no scores.
        """
        cosines, first, second, scores = _scored("CoSENTLoss", columns, targets)
        with quiet():
            order = np.argsort(scores, kind="stable")
            ranked = scores[order]
            x = np.where(np.isnan(ranked), np.nan, self.scale * cosines[order].astype(np.float64))
            least, most = np.searchsorted(ranked, ranked), np.searchsorted(ranked, ranked, "right")
            # below[j] = log Σ exp(x_i) over the i with a lower score; above[i] = log Σ exp(-x_j) over the j
            # with a higher score. Sums from the left and from the right need no array (n, n).
            below = np.append(-np.inf, np.logaddexp.accumulate(x))[least]
            above = np.append(np.logaddexp.accumulate(-x[::-1])[::-1], -np.inf)[most]
            loss = np.logaddexp.reduce(below - x, initial=0.0) + 0 * x.sum()  # keeps NaN
            slope = np.empty_like(cosines)
            slope[order] = self.scale * (np.exp(x + above - loss) - np.exp(below - x - loss))
            return float(loss), [slope[:, None] * first, slope[:, None] * second]


@dataclasses.dataclass(frozen=True)
class MatryoshkaLoss:
    """Adds up the weighted results of one loss for several widths of the embeddings (Kusupati et al. 2022).

    At width k, the loss is computed from only the first k values of each embedding, which are normalised to
    length 1. After training, the first k values are a good embedding by themselves.

        >>> import numpy as np
        >>> from nplora.nn.embedding_losses import CosineLoss, MatryoshkaLoss
        >>> loss = MatryoshkaLoss(CosineLoss(), dims=(4, 2))
        >>> round(loss([np.ones((1, 4)), np.ones((1, 4))], np.zeros(1))[0], 6)
        2.0

    Args:
        loss: the loss that is computed at each width.
        dims: the widths.
        weights: the weight of each width; None: all 1.
    Raises:
        ValueError: there are no widths, a width is below 1 or given twice, or a weight is below 0.
    """

    loss: EmbeddingFunction
    dims: tuple[int, ...]
    weights: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        op = "MatryoshkaLoss"
        dims = tuple(_check.integer(op, "a width of dims", dim, least=1) for dim in self.dims)
        if not dims or len(set(dims)) < len(dims):
            raise ValueError(f"{op}: dims is {self.dims}, expected at least one width, and no width twice")
        weights = (1.0,) * len(dims) if self.weights is None else tuple(self.weights)
        if len(weights) != len(dims):
            raise ValueError(f"{op}: {len(weights)} weights for {len(dims)} dims, expected one for each")
        for weight in weights:
            _check.at_least(op, "a weight", weight, 0)
        object.__setattr__(self, "dims", dims)
        object.__setattr__(self, "weights", weights)

    @property
    def columns(self) -> tuple[str, ...]:
        return self.loss.columns

    @property
    def needs_scores(self) -> bool:
        return self.loss.needs_scores

    def __call__(self, columns: Sequence[Array], targets: Array | None = None) -> tuple[float, list[Array]]:
        """The weighted sum of the losses, and the gradients of the columns.

        Raises:
            ValueError: a width in `dims` is above the width of the embeddings, or `loss` raises ValueError.
        """
        given = _columns("MatryoshkaLoss", columns, 1, len(columns), equal=1)
        width, total, gradients = given[0].shape[1], 0.0, [np.zeros_like(x) for x in given]
        if max(self.dims) > width:
            raise ValueError(
                f"MatryoshkaLoss: dims contains {max(self.dims)}, but the embeddings have {width} values"
            )
        assert self.weights is not None
        for dim, weight in zip(self.dims, self.weights, strict=True):
            units = [_normalized(np.ascontiguousarray(x[:, :dim])) for x in given]
            value, slopes = self.loss([unit for unit, _ in units], targets)
            total += weight * value
            for gradient, slope, unit in zip(gradients, slopes, units, strict=True):
                gradient[:, :dim] += gradient.dtype.type(weight) * _normalized_backward(slope, *unit)
        return total, gradients


_BY_NAME = {
    "ranking": RankingLoss,
    "triplet": TripletLoss,
    "cosine": CosineLoss,
    "cosent": CoSENTLoss,
}
NAMES = tuple(_BY_NAME)


def get(op: str, loss: str | EmbeddingFunction) -> EmbeddingFunction:
    """Return the loss with this name. If `loss` is a loss already, return it unchanged.

    Raises:
        ValueError: no loss has this name.
        TypeError: `loss` is neither a name nor a loss.
    """
    if isinstance(loss, str):
        made: EmbeddingFunction = _BY_NAME[_check.choice(op, "loss", loss, NAMES)]()
        return made
    if not callable(loss) or not hasattr(loss, "columns") or isinstance(loss, type):
        raise TypeError(f"{op}: loss is {_check.kind(loss)}, expected a name or a loss such as RankingLoss()")
    return loss


def innermost(loss: EmbeddingFunction) -> EmbeddingFunction:
    """Return the loss that a `MatryoshkaLoss` computes at each width. Return any other loss unchanged."""
    while isinstance(loss, MatryoshkaLoss):
        loss = loss.loss
    return loss


# ---- the parts ----


def _ranked(
    queries: Array, candidates: Array, scale: float, left_out: Array | None
) -> tuple[float, Array, Array]:
    """Return the mean of the queries' cross entropies, and the gradients of `queries` and `candidates`.

    The correct candidate for query i is candidate i. Let q be the queries and c the candidates:
    s = scale · q cᵀ, loss = mean(log Σ exp(s) - s_ii), ds = (softmax(s) - I) / n.
    """
    n, dtype = len(queries), queries.dtype
    weight = FrozenWeight(candidates, dtype=dtype.name)
    total, dq, dc = 0.0, np.empty_like(queries), np.zeros_like(candidates)
    for begin in range(0, n, _ROWS):
        rows = slice(begin, min(begin + _ROWS, n))
        own = np.arange(rows.start, rows.stop)
        scores = weight.matmul(queries[rows]) * dtype.type(scale)
        if left_out is not None:
            hidden = left_out[rows].copy()
            hidden[own - begin, own] = False
            scores[hidden] = -np.inf
        scores -= scores.max(axis=1, keepdims=True)
        right = scores[own - begin, own].astype(np.float64)
        np.exp(scores, out=scores)
        sums = scores.sum(axis=1, keepdims=True)
        total += float((np.log(sums[:, 0], dtype=np.float64) - right).sum())
        scores /= sums
        scores[own - begin, own] -= 1
        scores *= dtype.type(scale / n)
        dq[rows] = weight.matmul_t(scores)
        dc += FrozenWeight(queries[rows], dtype=dtype.name).matmul_t(np.ascontiguousarray(scores.T))
    return total / max(1, n), dq, dc


def _distance(name: str, x: Array, y: Array) -> tuple[Array, Array, Array]:
    """Return the distance between x[i] and y[i] for each i, and its derivatives with respect to x and y."""
    if name == "cosine":
        cosines, dx, dy = _cosine(x, y)
        return 1 - cosines, -dx, -dy
    difference = x - y
    if name == "manhattan":
        slope = np.sign(difference)
        return np.abs(difference).sum(axis=1), slope, -slope
    lengths = np.sqrt((difference * difference).sum(axis=1))
    slope = difference / np.where(lengths == 0, 1, lengths)[:, None]
    return lengths, slope, -slope


def _cosine(x: Array, y: Array) -> tuple[Array, Array, Array]:
    """Return the cosine of x[i] and y[i] for each i, and its derivatives with respect to x and y."""
    (u, lengths_x), (v, lengths_y) = _normalized(x), _normalized(y)
    cosines = (u * v).sum(axis=1)
    return cosines, _normalized_backward(v, u, lengths_x), _normalized_backward(u, v, lengths_y)


def _normalized(x: Array) -> tuple[Array, Array]:
    """The rows of x divided by their lengths, and the lengths (n, 1)."""
    with quiet():
        lengths = np.sqrt((x * x).sum(axis=1, keepdims=True))
        lengths = np.maximum(lengths, x.dtype.type(_LEAST_NORM))
        return x / lengths, lengths


def _normalized_backward(du: Array, u: Array, lengths: Array) -> Array:
    """The gradient of x, given the gradient du of u = x / |x|: dx = (du - u (u · du)) / |x|."""
    return np.asarray((du - u * (u * du).sum(axis=1, keepdims=True)) / lengths)


def _mean(values: Array) -> float:
    return float(values.sum(dtype=np.float64)) / max(1, len(values))


# ---- checks ----


def _columns(op: str, columns: Sequence[Array], least: int, most: int, equal: int) -> list[Array]:
    """Return the columns with one dtype. Check that the first `equal` columns have equally many rows."""
    if not least <= len(columns) <= most:
        wanted = f"{least}" if least == most else f"{least} to {most}"
        raise ValueError(f"{op}: {len(columns)} columns of embeddings, expected {wanted}")
    exact = all(np.asarray(x).dtype == np.float64 for x in columns)
    dtype = np.float64 if exact else np.float32
    given = [_check.floats(op, f"columns[{i}]", x, dtype) for i, x in enumerate(columns)]
    shapes = [x.shape for x in given]
    fits = all(len(shape) == 2 and shape[1:] == shapes[0][1:] for shape in shapes)
    if not fits or len({shape[0] for shape in shapes[:equal]}) > 1:
        raise ValueError(
            f"{op}: columns have shapes {', '.join(map(str, shapes))}, expected (n, d) with the same d "
            f"for all columns, and the same n for the first {equal} columns"
        )
    return given


def _scored(op: str, columns: Sequence[Array], targets: Array | None) -> tuple[Array, Array, Array, Array]:
    """Return the cosines (n,) of two columns, the gradients of both columns, and the scores."""
    x, y = _columns(op, columns, 2, 2, equal=2)
    if targets is None:
        raise ValueError(f"{op}: targets is None, expected a score for each pair")
    scores = _check.shaped(op, "targets", targets, (len(x),), x.dtype)
    cosines, dx, dy = _cosine(x, y)
    return cosines, dx, dy, scores


def _mask(targets: Array, n: int, m: int) -> Array:
    mask = np.asarray(targets)
    if mask.dtype != np.bool_ or mask.shape != (n, m):
        raise ValueError(
            f"RankingLoss: targets is {mask.dtype} {mask.shape}, expected bool ({n}, {m}): "
            "True leaves a candidate out of an anchor's loss"
        )
    return mask


def _above_zero(op: str, name: str, value: float) -> None:
    if _check.number(op, name, value) <= 0:
        raise ValueError(f"{op}: {name} is {value}, expected above 0")
