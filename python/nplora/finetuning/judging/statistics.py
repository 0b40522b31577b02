"""Confidence intervals and paired tests over examples.

The bootstrap repeatedly draws n examples from the n examples, with replacement, and computes the metric of
the drawn examples (Efron and Tibshirani 1993, chapter 13: percentile intervals). The paired test repeatedly
chooses examples at random, exchanges the values that the two systems have in these examples, and computes the
difference between the systems (Noreen 1989, approximate randomisation). All random numbers come from the raw
output of PCG64 with a fixed seed, so that the results are the same in every run and with every version of
NumPy.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]

RESAMPLES = 2000
LEVEL = 0.95  # the level of the confidence intervals
_SEED = 0
_ROUNDING = 1e-12  # relative; two differences closer than this count as equal


@dataclass(frozen=True)
class Measured:
    """A metric of one system, example by example. The metric is sum(values) / sum(weights).

    Attributes:
        name: the metric.
        values, weights: float64 (examples,). For a loss, `values` has the summed loss of each example, and
            `weights` has the number of tokens of each example.
        lower_is_better: whether a lower metric is better.
        failed: the number of examples that could not be scored.
        error: the first error of the metric; empty if all examples were scored.
        exact: the value of the metric, if the caller has computed it; it may differ from sum(values) /
            sum(weights) by rounding. None: the value is sum(values) / sum(weights).
    """

    name: str
    values: Array
    weights: Array
    lower_is_better: bool = False
    failed: int = 0
    exact: float | None = None
    error: str = ""

    @property
    def value(self) -> float:
        return (
            self.exact if self.exact is not None else float(self.values.sum() / max(1.0, self.weights.sum()))
        )


class Interval(NamedTuple):
    """A confidence interval."""

    low: float
    high: float


def interval(measured: Measured) -> Interval | None:
    """The bootstrap interval of a metric. None if there are fewer than two examples, or NaN or infinity."""
    if not _can_resample(measured):
        return None
    values, weights = _resampled(measured.values, measured.weights)
    return _percentiles(values / weights)


def difference_interval(one: Measured, other: Measured) -> Interval | None:
    """The bootstrap interval of the difference `one` - `other`. Each draw uses the same examples for both."""
    if not (_can_resample(one) and _can_resample(other)):
        return None
    values, weights, others, other_weights = _resampled(one.values, one.weights, other.values, other.weights)
    return _percentiles(values / weights - others / other_weights)


def paired_p(one: Measured, other: Measured) -> float | None:
    """The two-sided p-value of the paired permutation test. The result is None as in `interval`.

    A permutation exchanges the values of the two systems in some of the examples. If there are few examples,
    all permutations are tried. If there are many examples, a random sample of permutations is tried, and the
    permutation that exchanges nothing is added. So p is never 0 (Phipson and Smyth 2010).
    """
    if not (_can_resample(one) and _can_resample(other)):
        return None
    differences = one.values - other.values
    observed, total = abs(differences.sum()), differences.sum()
    enough = observed - _ROUNDING * np.abs(differences).sum()
    n = len(differences)
    if 2**n <= RESAMPLES:
        swapped = (np.arange(2**n)[:, None] >> np.arange(n)) & 1
        return float(np.mean(np.abs(total - 2 * swapped @ differences) >= enough))
    hits = sum(abs(total - 2 * differences[swap].sum()) >= enough for swap in _swaps(n))
    return (1 + int(hits)) / (1 + RESAMPLES)


def _can_resample(measured: Measured) -> bool:
    return len(measured.values) > 1 and bool(np.isfinite(measured.values).all())


def _percentiles(found: Array) -> Interval:
    tail = (1 - LEVEL) / 2
    low, high = np.quantile(found, [tail, 1 - tail])
    return Interval(float(low), float(high))


def _resampled(*columns: Array) -> Array:
    """Draw `RESAMPLES` samples of the examples. Return the sum of each column over each sample.

    Each column is an array (n,). The result has shape (number of columns, RESAMPLES).
    """
    table = np.stack(columns, axis=1)
    return np.stack([counts @ table for counts in _draws(len(table))], axis=1)


def _draws(n: int) -> Iterator[Array]:
    """Draw `RESAMPLES` samples. For each, yield an array (n,): how often it has each of the n examples."""
    stream = np.random.PCG64(np.random.SeedSequence(_SEED))
    for _ in range(RESAMPLES):
        drawn = ((stream.random_raw(n) >> np.uint64(32)) * np.uint64(n)) >> np.uint64(32)
        yield np.bincount(drawn.astype(np.intp), minlength=n).astype(np.float64)


def _swaps(n: int) -> Iterator[Array]:
    """For each random permutation, yield a bool array (n,), which marks the examples to exchange."""
    stream = np.random.PCG64(np.random.SeedSequence(_SEED, spawn_key=(1,)))
    for _ in range(RESAMPLES):
        raw = stream.random_raw(-(-n // 64)).astype("<u8")
        yield np.unpackbits(raw.view(np.uint8), count=n).astype(np.bool_)
