"""WordFilter: computes the gradients of the head without the unlikely words of the vocabulary."""

from __future__ import annotations

import statistics
import time
from collections import deque
from typing import Any, NamedTuple, TypeGuard

import numpy as np
import numpy.typing as npt

from nplora import _check, _core
from nplora.nn import Linear, TrainedHead
from nplora.nn.linear import core_weight
from nplora.nn.module import Module
from nplora.weights import FrozenWeight, buffers

Array = npt.NDArray[Any]

_TIMES = 32  # the number of calls whose times are kept
FLAT_ROWS = 32  # the maximum number of rows of logits that are copied at once


class SkippedWords(NamedTuple):
    """What a filter skipped in some rows of x.

    Attributes:
        rows: the number of rows.
        probability: the total probability of the skipped words, summed over the rows.
        kept: the share of the vocabulary that was kept, summed over the rows. A row that was computed without
            the filter adds 1.
    """

    rows: int
    probability: float
    kept: float


class WordFilter:
    """Computes gradients without the unlikely words of the vocabulary (Wijmans et al. 2024).

    The gradient of the head's input x is dx = factor · (Σ p_w W_w - W_target), a sum over all words w of the
    vocabulary. Here p_w is the probability of the word w, and W_w is row w of the head's weight W. The filter
    keeps the words with p_w >= `bound`, and the target. For each skipped word, the filter replaces the term
    p_w W_w of the sum by p_w μ, where μ is the mean of all rows of the frozen W. So the factors p_w in the
    sum still add up to 1. The error has the bound

        ‖error of dx‖ <= factor · m · max_w ‖W_w - μ‖,

    where m is the total probability of the skipped words. The bound follows from the triangle inequality,
    because the error is factor · Σ_skipped p_w (W_w - μ). The filter does not change the bits of the losses.
    If more than a quarter of the words have p_w >= `bound` for a row of x, the gradients of this row are
    computed without the filter.

    If all rows of W are trained (`modules_to_save`), the filter also computes the gradient of W. μ is still
    the mean row of the weight before training. Each row of x adds p_w x to the gradients of its kept words
    only (and (p_w - 1) x to that of the target). Summed over the rows i of x, the error has the bound

        ‖error of dW‖ <= factor · Σ_i √(bound · m_i) ‖x_i‖    (Frobenius norm),

    because the squares of a row's skipped probabilities add up to at most `bound` · m_i. This error is small
    beside the gradient of the whole W. But a word that is skipped in all rows of x gets no gradient at all,
    and optimisers such as AdamW make large steps even for tiny gradients. So such a word moves less than
    without the filter.

    If the head shares the embedding's weight and both are trained, the filter computes the head's part of the
    gradient. The embedding's part is exact.

    The filter does not apply to a head with a low-rank adapter, to a head of which only some rows are
    trained, or to a head that computes in float64. Such heads are computed without the filter: the filter
    cannot compute the gradients of adapter factors or of single rows, which are other products.

        >>> import nplora
        >>> from nplora.models import WordFilter
        >>> lm = nplora.load_model("model.gguf")
        >>> lm.add_lora(rank=2)
        >>> lm.model.word_filter = WordFilter(1e-6)
        >>> loss = lm.train_step([[1, 2, 3]], [[1, 2, 3]], optimizer=nplora.AdamW(lr=1e-3))
        >>> lm.model.word_filter.take_skipped().rows      # one for each target
        2

    Args:
        bound: the filter skips words with a probability below this number, which is above 0 and below 1.
    Raises:
        ValueError: `bound` is out of range.
    """

    def __init__(self, bound: float) -> None:
        self.bound = _check.probability("WordFilter", "bound", bound)
        if bound == 0:
            raise ValueError("WordFilter: bound is 0, expected a value above 0")
        self._mean: tuple[FrozenWeight, Array] | None = None  # a weight and its mean row
        self._skipped = _NOTHING
        self._times: deque[tuple[int, float]] = deque(maxlen=_TIMES)  # rows and seconds of the last calls

    def applies(self, head: Module) -> TypeGuard[Linear | TrainedHead]:
        """Whether the filter can compute the gradients of this head."""
        if isinstance(head, TrainedHead):
            return head.is_whole and head.adapter_enabled and head.weight.compute_dtype == np.float32
        return (
            type(head) is Linear
            and isinstance(head.weight, FrozenWeight)
            and head.weight.compute_dtype == np.float32
        )

    def gradient(
        self,
        head: Linear | TrainedHead,
        x: Array,
        logits: Array,
        targets: Array,
        factor: float,
        losses: Array,
        weights: Array | None = None,
    ) -> Array:
        """Return dx (n, d) for the head's input x (n, d). Write the losses to `losses`, float64 (n,).

        The gradient of a trained head is added to `head.rows.grad`. No target may be IGNORED.

        Args:
            logits: the logits (n, words) of x, which are overwritten.
            weights: float32 (n,), by which the gradients of the rows are multiplied; None: 1.
        """
        started = time.perf_counter()
        frozen = weight = head.weight
        assert isinstance(frozen, FrozenWeight)
        own: tuple[Array, Array] | None = None  # the weighted x, and the gradient of the head's weight
        if isinstance(head, TrainedHead):
            weight = head.rows.value
            own = x if weights is None else x * weights[:, None], head.rows.grad
        dx = buffers.empty((len(logits), weight.shape[1]), np.float32)
        skipped, kept = np.empty(len(logits)), np.empty(len(logits), np.int64)
        _core.filtered_cross_entropy(
            core_weight(weight), logits, targets, factor, self.bound, self._mean_of(frozen), losses, skipped,
            kept, dx, *(own or ()),
        )  # fmt: skip
        words = logits.shape[1]
        flat = np.flatnonzero(kept == words)
        for start in range(0, len(flat), FLAT_ROWS):
            chosen = flat[start : start + FLAT_ROWS]
            rows = logits[chosen]
            _core.cross_entropy(rows, targets[chosen], factor, np.empty(len(rows)), True)
            if own is not None:
                _core.add_outer(rows, own[0][chosen], 1.0, own[1])
            dense = np.empty((len(rows), dx.shape[1]), np.float32)
            _core.matmul_t(core_weight(weight), rows, dense, False)
            dx[chosen] = dense
        if weights is not None:
            dx *= weights[:, None]
        before = self._skipped
        self._skipped = SkippedWords(
            before.rows + len(logits),
            before.probability + float(skipped.sum()),
            before.kept + float(kept.sum()) / words,
        )
        self._times.append((len(logits), time.perf_counter() - started))
        return dx

    def usual_time(self) -> tuple[int, float]:
        """Return the largest number of rows in the last calls of `gradient`, and the usual seconds for this
        number: the number times the median of the seconds per row.

        Raises:
            ValueError: `gradient` was not called yet.
        """
        if not self._times:
            raise ValueError("WordFilter.usual_time: no gradient was computed yet")
        rows = max(rows for rows, _ in self._times)
        return rows, rows * statistics.median(seconds / count for count, seconds in self._times)

    def take_skipped(self) -> SkippedWords:
        """Return what was skipped in all rows of x whose gradients were computed since the last call of
        `take_skipped`.
        """
        taken, self._skipped = self._skipped, _NOTHING
        return taken

    def _mean_of(self, weight: FrozenWeight) -> Array:
        """Return the mean (d,) of all rows of a weight. The mean is stored for the next call."""
        if self._mean is None or self._mean[0] is not weight:
            ones, total = (
                np.ones((1, weight.shape[0]), np.float32),
                np.empty((1, weight.shape[1]), np.float32),
            )
            _core.matmul_t(weight.packed, ones, total)
            self._mean = weight, total[0] / np.float32(weight.shape[0])
        return self._mean[1]


_NOTHING = SkippedWords(0, 0.0, 0.0)
