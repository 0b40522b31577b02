"""Confidence intervals and paired tests over examples.

The bootstrap repeatedly draws n examples from the n examples, with replacement, and computes the metric of
the drawn examples (Efron and Tibshirani 1993, chapter 13: percentile intervals). The paired test repeatedly
chooses examples at random, exchanges the values that the two systems have in these examples, and computes the
difference between the systems (Noreen 1989, approximate randomisation). All random numbers come from the raw
output of PCG64 with a fixed seed, so that the results are the same in every run and with every version of
NumPy.

If all examples are right, or all are wrong, a bootstrap interval has width 0. So if a metric counts each
example as right or wrong, its intervals come from formulas: Wilson's (1927), and for a difference Newcombe's
(1998, paired data, method 10).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]

RESAMPLES = 2000
# Random permutations for each comparison. The least p is 1 / (1 + number of permutations). So it stays below
# 1 / 200 when Holm's method multiplies it by the number of comparisons.
_PER_COMPARISON = 200
LEVEL = 0.95  # the level of the confidence intervals
_SEED = 0
_TOGETHER = 1 << 22  # maximum size of an array that has a row for each permutation
_ROUNDING = 1e-12  # relative; two differences closer than this count as equal


@dataclass(frozen=True)
class Measured:
    """A metric of one system, example by example. The metric is sum(values) / sum(weights).

    Attributes:
        name: the metric.
        values, weights: float64 (examples,). For a loss, `values` has the summed loss of each example, and
            `weights` has the number of tokens of each example.
        lower_is_better: whether a lower value is better; None: neither lower nor higher values are better.
        failed: the number of examples that could not be scored.
        error: the first error of the metric; empty if all examples were scored.
        is_rate: whether the metric is a share of right examples or tokens. An example whose tokens are all
            right has a value equal to its weight.
        exact: the value of the metric, if the caller has computed it; it may differ from sum(values) /
            sum(weights) by rounding. None: the value is sum(values) / sum(weights).
    """

    name: str
    values: Array
    weights: Array
    lower_is_better: bool | None = False
    failed: int = 0
    exact: float | None = None
    error: str = ""
    is_rate: bool = False

    @property
    def value(self) -> float:
        return (
            self.exact if self.exact is not None else float(self.values.sum() / max(1.0, self.weights.sum()))
        )

    @property
    def is_binary(self) -> bool:
        """Whether the metric is a rate, and each example is right or wrong as a whole."""
        return self.is_rate and bool(((self.values == 0) | (self.values == self.weights)).all())

    @property
    def is_constant(self) -> bool:
        """Whether the metric has the same value in each example."""
        largest = int(np.argmax(self.weights))  # a weight of 0 says nothing about the value
        return bool((self.values * self.weights[largest] == self.values[largest] * self.weights).all())


class Interval(NamedTuple):
    """A confidence interval."""

    low: float
    high: float


def interval(measured: Measured) -> Interval | None:
    """The interval of a metric; None if there are fewer than two examples, or if a value is not finite."""
    if not _can_resample(measured):
        return None
    if measured.is_binary:
        return _wilson(measured)
    values, weights = _resampled(measured.values, measured.weights)
    return _percentiles(values / weights)


def difference_interval(one: Measured, other: Measured) -> Interval | None:
    """The interval of the difference `one` - `other`. A bootstrap draws the same examples for both."""
    if not (_can_resample(one) and _can_resample(other)):
        return None
    if one.is_binary and other.is_binary:
        return _newcombe(one, other)
    if one.is_binary and other.is_constant:
        low, high = _wilson(one)
        return Interval(low - other.value, high - other.value)
    if one.is_constant and other.is_binary:
        low, high = _wilson(other)
        return Interval(one.value - high, one.value - low)
    values, weights, others, other_weights = _resampled(one.values, one.weights, other.values, other.weights)
    return _percentiles(values / weights - others / other_weights)


def paired_p(pairs: Sequence[tuple[Measured, Measured]]) -> list[float | None]:
    """For each pair of systems, the two-sided p-value of the paired permutation test, or None.

    All systems were measured on the same examples. The result for a pair is None if there are fewer than two
    examples, or if a value is not finite. A permutation exchanges the values of the two systems in some of
    the examples. If there are few examples, all permutations are tried. If there are many examples, random
    permutations are tried (the more pairs, the more permutations), and the permutation that exchanges nothing
    is added. So p is never 0 (Phipson and Smyth 2010).
    """
    usable = [place for place, pair in enumerate(pairs) if all(map(_can_resample, pair))]
    result = list[float | None]([None] * len(pairs))
    if not usable:
        return result
    differences = np.stack([pairs[place][0].values - pairs[place][1].values for place in usable], axis=1)
    total = differences.sum(axis=0)
    enough = np.abs(total) - _ROUNDING * np.abs(differences).sum(axis=0)
    n, count = len(differences), max(RESAMPLES, _PER_COMPARISON * len(pairs))
    is_complete = 2**n <= count
    swaps = _all_swaps(n, len(usable)) if is_complete else _swaps(n, count, len(usable))
    hits = np.zeros(len(usable), np.int64)
    for swapped in swaps:
        hits += np.count_nonzero(np.abs(total - 2 * (swapped @ differences)) >= enough, axis=0)
    p = hits / 2**n if is_complete else (1 + hits) / (1 + count)
    for place, value in zip(usable, p.tolist(), strict=True):
        result[place] = value
    return result


def adjusted(found: Sequence[float | None]) -> list[float | None]:
    """Adjust p-values for the number of comparisons (Holm 1979). The adjusted value of None is None.

    If all systems are equal, the probability that at least one adjusted p-value is below 0.05 is at most 5 %.
    """
    ascending = sorted((p, place) for place, p in enumerate(found) if p is not None)
    result, largest = list[float | None]([None] * len(found)), 0.0
    for rank, (p, place) in enumerate(ascending):
        result[place] = largest = max(largest, min(1.0, (len(found) - rank) * p))
    return result


def _can_resample(measured: Measured) -> bool:
    return len(measured.values) > 1 and bool(np.isfinite(measured.values).all())


def _effective_number(measured: Measured) -> float:
    """Kish's effective number of examples: if all weights are equal, the number of examples."""
    return float(measured.weights.sum() ** 2 / (measured.weights**2).sum())


def _wilson(measured: Measured) -> Interval:
    p, n, z = measured.value, _effective_number(measured), NormalDist().inv_cdf((1 + LEVEL) / 2)
    centre, half = p + z**2 / (2 * n), z * math.sqrt(p * (1 - p) / n + (z / (2 * n)) ** 2)
    return Interval(max(0.0, (centre - half) / (1 + z**2 / n)), min(1.0, (centre + half) / (1 + z**2 / n)))


def _newcombe(one: Measured, other: Measured) -> Interval:
    """Newcombe's interval: the intervals of both systems, combined by the correlation of the systems.

    If the correlation is positive, a correction for continuity reduces this correlation.
    """
    p, q, difference = one.value, other.value, one.value - other.value
    first, second = _wilson(one), _wilson(other)
    both = float(one.weights[(one.values != 0) & (other.values != 0)].sum() / one.weights.sum())
    covariance, variances = both - p * q, p * (1 - p) * q * (1 - q)
    if covariance > 0:
        covariance = max(0.0, covariance - 1 / (2 * _effective_number(one)))
    phi = covariance / math.sqrt(variances) if variances else 0.0

    def joined(a: float, b: float) -> float:
        return math.sqrt(max(0.0, a * a - 2 * phi * a * b + b * b))

    return Interval(
        difference - joined(p - first.low, second.high - q),
        difference + joined(first.high - p, q - second.low),
    )


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
    """Draw `RESAMPLES` samples. For each sample, yield an array (n,): how often each example was drawn."""
    stream = np.random.PCG64(np.random.SeedSequence(_SEED))
    for _ in range(RESAMPLES):
        drawn = ((stream.random_raw(n) >> np.uint64(32)) * np.uint64(n)) >> np.uint64(32)
        yield np.bincount(drawn.astype(np.intp), minlength=n).astype(np.float64)


def _all_swaps(n: int, pairs: int) -> Iterator[Array]:
    """Yield all permutations of n examples, in arrays of the form that `_swaps` yields."""
    most = max(1, _TOGETHER // max(n, pairs))
    for begin in range(0, 2**n, most):
        numbers = np.arange(begin, min(begin + most, 2**n))
        yield ((numbers[:, None] >> np.arange(n)) & 1).astype(np.float64)


def _swaps(n: int, count: int, pairs: int) -> Iterator[Array]:
    """Draw `count` random permutations of n examples.

    Yield arrays (rows, n) of 0 and 1: each row is a permutation, and 1 marks the examples to exchange. The
    number of rows is limited so that these arrays, and arrays (rows, pairs), are small.
    """
    stream, words = np.random.PCG64(np.random.SeedSequence(_SEED, spawn_key=(1,))), -(-n // 64)
    most = max(1, min(100, _TOGETHER // max(n, pairs)))
    for begin in range(0, count, most):
        rows = min(most, count - begin)
        raw = stream.random_raw(rows * words).astype("<u8").reshape(rows, words)
        yield np.unpackbits(raw.view(np.uint8), axis=1, count=n).astype(np.float64)
