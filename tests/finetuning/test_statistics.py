"""Confidence intervals and paired tests of evaluations, held against SciPy and against closed forms."""

import itertools
import math
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from nplora.finetuning.comparison import _differences, _p_values
from nplora.finetuning.judging import statistics
from nplora.finetuning.judging.statistics import Measured, difference_interval, interval, paired_p

Array = npt.NDArray[np.float64]

# The difference between two bootstraps with different draws: the standard error of a 2.5 % quantile of
# RESAMPLES draws from a normal distribution is sqrt(.025 * .975 / RESAMPLES) / density = 0.06 standard errors
# of the metric. Four of these, for two draws.
_QUANTILE_ERROR = 4 * math.sqrt(2) * math.sqrt(0.025 * 0.975 / statistics.RESAMPLES) / 0.0584


def one_p(one: Measured, other: Measured) -> float | None:
    [p] = paired_p([(one, other)])
    return p


def measured(values: Any, weights: Any = None) -> Measured:
    values = np.asarray(values, np.float64)
    return Measured("m", values, np.ones(len(values)) if weights is None else np.asarray(weights, np.float64))


def rate(right: Any, weights: Any = None) -> Measured:
    """A rate of examples that are right or wrong as a whole."""
    weights = np.ones(len(right)) if weights is None else np.asarray(weights, np.float64)
    return Measured("acc", np.asarray(right) * weights, weights, is_rate=True)


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


@pytest.mark.parametrize("right", [0, 1, 7, 19, 20])
def test_the_interval_of_a_share_of_right_answers_is_that_of_wilson(right: int) -> None:
    scipy_stats = pytest.importorskip("scipy.stats")
    expected = scipy_stats.binomtest(right, 20).proportion_ci(method="wilson")
    found = interval(rate([True] * right + [False] * (20 - right)))
    assert found == pytest.approx((expected.low, expected.high), abs=1e-12)


def test_the_interval_of_a_rate_of_weighted_examples_counts_them_by_their_weights() -> None:
    """Kish's effective number of examples, (sum of w)² / sum of w², in the formula of Wilson."""
    weights = np.array([1.0, 1, 2, 6])
    n, z = 10**2 / 42, 1.959963984540054
    for right, p in (([1, 1, 1, 1], 1.0), ([1, 0, 1, 0], 0.3)):
        centre, half = p + z**2 / 2 / n, z * math.sqrt(p * (1 - p) / n + z**2 / 4 / n**2)
        expected = (centre - half) / (1 + z**2 / n), (centre + half) / (1 + z**2 / n)
        assert interval(rate(right, weights)) == pytest.approx(expected, abs=1e-12)


def test_other_values_are_resampled() -> None:
    values = [1.0, 0.5, 1.0, 0.0, 1.0, 1.0]
    assert interval(rate(values)) == interval(measured(values))
    assert interval(measured([0.0] * 20)) == (0, 0)  # no rate: a margin may be 0 for all


@pytest.mark.slow
@pytest.mark.parametrize(
    "shares", [(0.9, 0.05, 0.05, 0.0), (0.0, 0.97, 0.0, 0.03), (0.3, 0.3, 0.1, 0.3), (0.5, 0.1, 0.0, 0.4)]
)
def test_the_interval_of_a_difference_of_rates_holds_the_truth(shares: tuple[float, ...]) -> None:
    """The shares of examples in which both systems are right, only one, only the other, or none.

    The share of intervals with the truth is 95 % on average over all rates. It falls to 91 % if few answers
    differ. The bootstrap reaches 86 % there, because without a difference its interval has no width.
    """
    rng, hits = np.random.default_rng(2), 0
    for _ in range(1000):
        kind = rng.choice(4, 20, p=shares)
        found = difference_interval(rate(kind <= 1), rate(kind % 2 == 0))
        assert found is not None
        hits += found.low <= shares[1] - shares[2] <= found.high
    assert hits / 1000 >= 0.9


def test_the_interval_of_a_difference_of_rates_is_that_of_newcombe() -> None:
    """Newcombe 1998, table III: of 50 pairs, 36 are right in both, 12 and 2 in one of them."""
    one = np.repeat([True, True, False], [36, 12, 2])
    other = np.repeat([True, False, True], [36, 12, 2])
    assert difference_interval(rate(one), rate(other)) == pytest.approx((0.0569, 0.3404), abs=5e-5)


def test_the_difference_of_a_rate_and_a_constant_is_the_interval_of_the_rate_shifted() -> None:
    """The model without an adapter prefers neither answer: 0.5 in each pair."""
    half = rate([0.5] * 20)
    for right in (rate([True] * 20), rate([True] * 14 + [False] * 6)):
        alone, above = interval(right), difference_interval(right, half)
        below = difference_interval(half, right)
        assert alone is not None
        assert above == pytest.approx((alone.low - 0.5, alone.high - 0.5))
        assert below == pytest.approx((0.5 - alone.high, 0.5 - alone.low))
        assert above is not None
        assert above.high - above.low > 0.1


def test_a_weight_of_zero_does_not_make_a_metric_constant() -> None:
    assert not rate([0.0, 1.0, 0.0, 1.0], [0, 1, 1, 1]).is_constant
    assert rate([0.5] * 4, [0, 1, 2, 3]).is_constant


def test_all_permutations_are_tried_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(5)
    pairs = [(measured(rng.normal(0.4, 1, 9)), measured(rng.normal(0, 1, 9))) for _ in range(12)]
    whole = paired_p(pairs)
    monkeypatch.setattr(statistics, "_TOGETHER", 100)
    assert max(len(part) for part in statistics._all_swaps(9, 12)) == 8
    assert max(len(part) for part in statistics._swaps(9, 50, 12)) == 8
    assert paired_p(pairs) == whole


def test_the_difference_of_all_and_none_has_a_width() -> None:
    found = difference_interval(rate([True] * 20), rate([False] * 20))
    assert found is not None
    assert 0.7 < found.low < 0.85
    assert found.high == 1


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
    assert one_p(measured(one), measured(other)) == pytest.approx(expected, abs=1e-12)


def test_few_examples_have_the_p_value_of_scipy() -> None:
    scipy_stats = pytest.importorskip("scipy.stats")
    one = np.array([1, 1, 0, 1, 1, 0, 1, 1], np.float64)
    other = np.array([0, 1, 0, 0, 0, 0, 1, 0], np.float64)
    expected = scipy_stats.permutation_test(
        (one, other), lambda x, y, axis=-1: (x - y).sum(axis), permutation_type="samples", vectorized=True
    )
    assert one_p(measured(one), measured(other)) == pytest.approx(expected.pvalue)


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
    found = one_p(measured(one, tokens), measured(other, tokens))
    assert found == pytest.approx(expected, abs=5 * error + 1 / statistics.RESAMPLES)


@pytest.mark.slow
def test_the_p_value_of_equal_systems_is_uniform() -> None:
    rng = np.random.default_rng(7)
    pairs = ((rng.standard_normal(40), rng.standard_normal(40)) for _ in range(30))
    found = [one_p(measured(one), measured(other)) for one, other in pairs]
    assert 0.35 < np.mean([p for p in found if p is not None]) < 0.65
    assert sum(p is not None and p < 0.05 for p in found) <= 6  # 1.5 expected


@pytest.mark.slow
@pytest.mark.parametrize("adapters", [2, 8])
def test_equal_adapters_are_rarely_said_to_differ(adapters: int) -> None:
    """The best of them too, which was chosen because it looks good.

    With Holm's method, at most 5 % of the experiments say of any two systems that they differ. The standard
    error of the share is 1.5 %. Without the method, 8 adapters say so in more than half of the experiments.
    """
    rng, experiments, wrong = np.random.default_rng(11), 200, 0
    for _ in range(experiments):
        hard = rng.standard_normal(30)  # an example that is hard for one system is hard for all
        names = ("base", *map(str, range(adapters)))
        systems = {name: measured(hard + rng.standard_normal(30)) for name in names}
        wrong += any(p is not None and p < 0.05 for p in _p_values(systems).values())
    assert wrong <= 0.08 * experiments


def test_p_values_of_several_comparisons_are_adjusted_by_holm() -> None:
    """The p-values of all pairs of systems, in ascending order, are multiplied by 6, 5, 4 and so on."""
    rng = np.random.default_rng(5)
    values = {"base": rng.standard_normal(40)}
    for name, shift in (("good", 0.5), ("better", 0.9), ("same", 0.0)):
        values[name] = values["base"] + shift + 0.8 * rng.standard_normal(40)
    systems = {name: [measured(each)] for name, each in values.items()}
    pairs = list(itertools.combinations(values, 2))
    plain = np.array([one_p(systems[one][0], systems[other][0]) for one, other in pairs], np.float64)
    expected, largest = dict[frozenset[str], float](), 0.0
    for rank, index in enumerate(np.argsort(plain)):
        largest = max(largest, min(1.0, plain[index] * (len(pairs) - rank)))
        expected[frozenset(pairs[index])] = largest
    found = _differences(systems)
    assert len(found) == 5
    for one in found:
        assert one.p == pytest.approx(expected[frozenset((one.one, one.other))])
        assert (one.is_better is not None) == (one.p is not None and one.p < 0.05)
    assert {one.is_better for one in found} >= {True, None}


def test_many_comparisons_still_show_a_large_difference() -> None:
    """The least p-value must be below 0.05 after its multiplication by the number of pairs."""
    adapters = {str(n): [measured(np.ones(40) + 0.01 * n)] for n in range(19)}
    found = _differences({"base": [measured(np.zeros(40))], **adapters})
    assert found[0].comparisons == 20 * 19 / 2
    assert all(one.is_better for one in found if one.other == "base")


@pytest.mark.parametrize(("adapters", "few"), [(1, 5), (2, 6), (7, 10)])
def test_the_number_of_examples_that_are_too_few_depends_on_the_comparisons(adapters: int, few: int) -> None:
    """n examples have 2^n permutations, so p is at least 2 / 2^n, times the number of pairs of systems."""
    for count in (few, few + 1):
        losses = {str(n): [measured(np.zeros(count) + 0.1 * n)] for n in range(adapters)}
        found = _differences({"base": [measured(np.ones(count))], **losses})[0]
        least = 2 / 2**count * (adapters + 1) * adapters / 2
        assert (least < 0.05) == (count > few)
        assert (found.is_better is not None) == (count > few)
        assert str(found).startswith(f"{few} examples are too few to tell '0'") == (count == few)


def test_a_large_difference_is_never_impossible() -> None:
    p = one_p(measured(np.zeros(100)), measured(np.ones(100)))
    assert p == 1 / (1 + statistics.RESAMPLES)


def test_all_is_deterministic(losses: tuple[Array, Array, Array]) -> None:
    one, other, tokens = (measured(values) for values in losses)
    assert interval(one) == interval(one)
    assert difference_interval(one, other) == difference_interval(one, other)
    assert one_p(one, tokens) == one_p(one, tokens)


def test_draws_are_uniform_and_of_the_number_of_examples() -> None:
    counts = sum(statistics._draws(7))
    assert np.sum(counts) == 7 * statistics.RESAMPLES
    assert np.abs(counts - statistics.RESAMPLES).max() < 5 * math.sqrt(statistics.RESAMPLES)
    swaps = np.concatenate(list(statistics._swaps(70, statistics.RESAMPLES, 1)))
    assert np.abs(swaps.mean(axis=0) - 0.5).max() < 5 * 0.5 / math.sqrt(statistics.RESAMPLES)


@pytest.mark.parametrize("values", [[], [1.0], [1.0, math.nan], [math.inf, 1.0]])
def test_too_few_examples_and_values_that_are_not_finite_have_no_interval(values: list[float]) -> None:
    found, other = measured(values), measured(np.ones(len(values)))
    assert interval(found) is None
    assert difference_interval(found, other) is None
    assert one_p(other, found) is None
