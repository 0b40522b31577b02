"""Confidence intervals and paired tests of evaluations, held against SciPy and against closed forms."""

import itertools
import math
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from nplora.finetuning.judging import statistics
from nplora.finetuning.judging.statistics import Measured, difference_interval, interval, paired_p

Array = npt.NDArray[np.float64]

# The difference between two bootstraps with different draws: the standard error of a 2.5 % quantile of
# RESAMPLES draws from a normal distribution is sqrt(.025 * .975 / RESAMPLES) / density = 0.06 standard errors
# of the metric. Four of these, for two draws.
_QUANTILE_ERROR = 4 * math.sqrt(2) * math.sqrt(0.025 * 0.975 / statistics.RESAMPLES) / 0.0584


def measured(values: Any, weights: Any = None) -> Measured:
    values = np.asarray(values, np.float64)
    return Measured("m", values, np.ones(len(values)) if weights is None else np.asarray(weights, np.float64))


@pytest.fixture
def losses() -> tuple[Array, Array, Array]:
    """Summed losses of two systems on the same examples, and the tokens of each example."""
    rng = np.random.default_rng(3)
    tokens = rng.integers(1, 30, 150).astype(np.float64)
    one = tokens * rng.gamma(4, 0.5, 150)
    return one, one + tokens * rng.normal(-0.1, 0.3, 150), tokens


def test_a_metric_is_the_ratio_of_sums() -> None:
    assert measured([1.0, 5.0], [2.0, 1.0]).value == 2.0


def test_the_interval_of_a_ratio_is_that_of_scipy(losses: tuple[Array, Array, Array]) -> None:
    scipy_stats = pytest.importorskip("scipy.stats")
    one, _, tokens = losses
    found = interval(measured(one, tokens))
    expected = scipy_stats.bootstrap(
        (one, tokens),
        lambda x, w, axis=-1: x.sum(axis) / w.sum(axis),
        paired=True,
        vectorized=True,
        method="percentile",
        n_resamples=20_000,
        rng=np.random.default_rng(0),
    )
    assert found is not None
    bound = _QUANTILE_ERROR * expected.standard_error
    assert found.low == pytest.approx(expected.confidence_interval.low, abs=bound)
    assert found.high == pytest.approx(expected.confidence_interval.high, abs=bound)
    assert found.high - found.low > 10 * bound / 3  # the bound can tell a wrong interval


def test_the_interval_of_a_mean_has_its_closed_form() -> None:
    values = np.random.default_rng(0).standard_normal(400)
    found, error = interval(measured(values)), values.std() / math.sqrt(len(values))
    assert found is not None
    for side, bound in ((-1, found.low), (1, found.high)):
        assert bound == pytest.approx(values.mean() + side * 1.96 * error, abs=_QUANTILE_ERROR * error)


def test_a_difference_is_resampled_in_pairs(losses: tuple[Array, Array, Array]) -> None:
    """Its interval is much narrower than that of independent systems would be."""
    scipy_stats = pytest.importorskip("scipy.stats")
    one, other, tokens = losses
    found = difference_interval(measured(other, tokens), measured(one, tokens))
    expected = scipy_stats.bootstrap(
        (other - one, tokens),
        lambda x, w, axis=-1: x.sum(axis) / w.sum(axis),
        paired=True,
        vectorized=True,
        method="percentile",
        n_resamples=20_000,
        rng=np.random.default_rng(0),
    )
    assert found is not None
    bound = _QUANTILE_ERROR * expected.standard_error
    assert found.low == pytest.approx(expected.confidence_interval.low, abs=bound)
    assert found.high == pytest.approx(expected.confidence_interval.high, abs=bound)
    alone = interval(measured(one, tokens))
    assert alone is not None
    assert found.high - found.low < 0.5 * (alone.high - alone.low)


@pytest.mark.parametrize("n", [2, 5, 10])
def test_few_examples_are_permuted_exactly(n: int) -> None:
    rng = np.random.default_rng(n)
    one, other = rng.integers(0, 2, n).astype(np.float64), rng.standard_normal(n)
    d = one - other
    signs = np.array(list(itertools.product([1, -1], repeat=n)))
    expected = np.mean(np.abs(signs @ d) >= abs(d.sum()) - 1e-9)
    assert paired_p(measured(one), measured(other)) == pytest.approx(expected, abs=1e-12)


def test_few_examples_have_the_p_value_of_scipy() -> None:
    scipy_stats = pytest.importorskip("scipy.stats")
    one = np.array([1, 1, 0, 1, 1, 0, 1, 1], np.float64)
    other = np.array([0, 1, 0, 0, 0, 0, 1, 0], np.float64)
    expected = scipy_stats.permutation_test(
        (one, other), lambda x, y, axis=-1: (x - y).sum(axis), permutation_type="samples", vectorized=True
    )
    assert paired_p(measured(one), measured(other)) == pytest.approx(expected.pvalue)


@pytest.mark.slow
@pytest.mark.parametrize("shift", [0.0, 0.03, 0.08])
def test_many_examples_have_the_p_value_of_scipy(losses: tuple[Array, Array, Array], shift: float) -> None:
    scipy_stats = pytest.importorskip("scipy.stats")
    one, other, tokens = losses
    other = other + (0.1 - shift) * tokens
    expected = scipy_stats.permutation_test(
        (one, other),
        lambda x, y, axis=-1: (x - y).sum(axis),
        permutation_type="samples",
        vectorized=True,
        n_resamples=20_000,
        rng=np.random.default_rng(0),
    ).pvalue
    error = math.sqrt(expected * (1 - expected) / statistics.RESAMPLES)
    found = paired_p(measured(one, tokens), measured(other, tokens))
    assert found == pytest.approx(expected, abs=5 * error + 1 / statistics.RESAMPLES)


@pytest.mark.slow
def test_the_p_value_of_equal_systems_is_uniform() -> None:
    rng = np.random.default_rng(7)
    pairs = ((rng.standard_normal(40), rng.standard_normal(40)) for _ in range(30))
    found = [paired_p(measured(one), measured(other)) for one, other in pairs]
    assert 0.35 < np.mean([p for p in found if p is not None]) < 0.65
    assert sum(p is not None and p < 0.05 for p in found) <= 6  # 1.5 expected


def test_a_large_difference_is_never_impossible() -> None:
    p = paired_p(measured(np.zeros(100)), measured(np.ones(100)))
    assert p == 1 / (1 + statistics.RESAMPLES)


def test_all_is_deterministic(losses: tuple[Array, Array, Array]) -> None:
    one, other, tokens = (measured(values) for values in losses)
    assert interval(one) == interval(one)
    assert difference_interval(one, other) == difference_interval(one, other)
    assert paired_p(one, tokens) == paired_p(one, tokens)


def test_draws_are_uniform_and_of_the_number_of_examples() -> None:
    counts = sum(statistics._draws(7))
    assert np.sum(counts) == 7 * statistics.RESAMPLES
    assert np.abs(counts - statistics.RESAMPLES).max() < 5 * math.sqrt(statistics.RESAMPLES)
    swaps = np.array(list(statistics._swaps(70)))
    assert np.abs(swaps.mean(axis=0) - 0.5).max() < 5 * 0.5 / math.sqrt(statistics.RESAMPLES)


@pytest.mark.parametrize("values", [[], [1.0], [1.0, math.nan], [math.inf, 1.0]])
def test_too_few_examples_and_values_that_are_not_finite_have_no_interval(values: list[float]) -> None:
    found, other = measured(values), measured(np.ones(len(values)))
    assert interval(found) is None
    assert difference_interval(found, other) is None
    assert paired_p(other, found) is None
