"""WordFilter: computes the gradient of the head's input without the unlikely words of the vocabulary."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from nplora import _check, _core
from nplora.nn import Linear
from nplora.nn.module import Module
from nplora.weights import FrozenWeight, buffers

Array = npt.NDArray[Any]

FLAT_ROWS = 32  # the maximum number of rows of logits that are copied at once


class WordFilter:
    """Computes a gradient without the unlikely words of the vocabulary (Wijmans et al. 2024).

    The gradient of the head's input x is dx = factor · (Σ p_w W_w - W_target), a sum over all words w of the
    vocabulary. Here p_w is the probability of the word w, and W_w is row w of the head's weight W. The filter
    keeps the words with p_w >= `bound`, and the target. For each skipped word, the filter replaces the term
    p_w W_w of the sum by p_w μ, where μ is the mean of all rows of W. So the factors p_w in the sum still add
    up to 1. The error has the bound

        ‖error of dx‖ <= factor · m · max_w ‖W_w - μ‖,

    where m is the total probability of the skipped words. The bound follows from the triangle inequality,
    because the error is factor · Σ_skipped p_w (W_w - μ). The filter does not change the bits of the losses.
    If more than a quarter of the words have p_w >= `bound` for a row of x, the gradient of this row is
    computed without the filter.

    The filter applies only to a frozen head that does not compute in float64. A head that is trained, or has
    an adapter, is computed without the filter.

        >>> import nplora
        >>> from nplora.models import WordFilter
        >>> lm = nplora.load_model("model.gguf")
        >>> lm.add_lora(rank=2)
        >>> lm.model.word_filter = WordFilter(1e-6)
        >>> loss = lm.train_step([[1, 2, 3]], [[1, 2, 3]], optimizer=nplora.AdamW(lr=1e-3))
        >>> len(lm.model.word_filter.take_skipped())      # one for each target
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
        self._skipped: list[Array] = []

    def applies(self, head: Module) -> bool:
        """Whether the filter can compute the gradient of this head's input."""
        return (
            type(head) is Linear
            and isinstance(head.weight, FrozenWeight)
            and head.weight.compute_dtype == np.float32
        )

    def gradient(self, head: Linear, logits: Array, targets: Array, factor: float, losses: Array) -> Array:
        """Return dx (n, d) for `logits` (n, words), and write the losses to `losses`, float64 (n,).

        No target may be IGNORED. `logits` is overwritten.
        """
        weight = head.weight
        assert isinstance(weight, FrozenWeight)
        dx = buffers.empty((len(logits), weight.shape[1]), np.float32)
        skipped, is_flat = np.empty(len(logits)), np.empty(len(logits), np.bool_)
        _core.filtered_cross_entropy(
            weight.packed, logits, targets, factor, self.bound, self._mean_of(weight), losses, skipped,
            is_flat, dx,
        )  # fmt: skip
        flat = np.flatnonzero(is_flat)
        for start in range(0, len(flat), FLAT_ROWS):
            chosen = flat[start : start + FLAT_ROWS]
            rows = logits[chosen]
            _core.cross_entropy(rows, targets[chosen], factor, np.empty(len(rows)), True)
            dense = np.empty((len(rows), dx.shape[1]), np.float32)
            _core.matmul_t(weight.packed, rows, dense, False)
            dx[chosen] = dense
        self._skipped.append(skipped)
        return dx

    def take_skipped(self) -> Array:
        """Return the total probability of the skipped words, float64, for each row of x whose gradient was
        computed since the last call of `take_skipped`.
        """
        taken, self._skipped = self._skipped, []
        return np.concatenate([np.empty(0), *taken])

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
