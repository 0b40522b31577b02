"""The gradients of the head without unlikely words, against float64 NumPy."""

import math
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

import nplora
import reference
from nplora import _core
from nplora.runtime.profile import Profiler

Array = NDArray[Any]

U = 2.0**-24
FACTOR = 0.25
FORMATS = ["float32", "bfloat16", "float16", "q8_0", "q4_1", "nf4"]


class Head:
    """Random rows with peaked softmaxes, a weight, and the results of the core for a bound."""

    def __init__(
        self, rng: np.random.Generator, n: int, vocab: int, d: int, storage: str = "float32"
    ) -> None:
        self.weight = nplora.FrozenWeight(0.5 + rng.standard_normal((vocab, d), np.float32), storage)
        self.w = self.weight.to_numpy().astype(np.float64)
        self.logits = (4 * rng.standard_normal((n, vocab))).astype(np.float32)
        self.targets = rng.integers(0, vocab, n)
        self.mean = self.w.mean(axis=0).astype(np.float32)

    @property
    def probabilities(self) -> Array:
        logits = self.logits.astype(np.float64)
        return np.asarray(np.exp(logits - np.logaddexp.reduce(logits, axis=1, keepdims=True)))

    def bound_near(self, wanted: float) -> float:
        """A bound in a wide gap between probabilities, so that rounding does not decide what is kept."""
        near = np.sort(np.log(self.probabilities.ravel()))
        near = near[np.abs(near - math.log(wanted)) < 1]
        if len(near) < 2:
            return wanted
        gap = int(np.diff(near).argmax())
        assert near[gap + 1] - near[gap] > 1e-5
        return math.exp((near[gap] + near[gap + 1]) / 2)

    def run(self, bound: float, weight: Any = None, *trained: Array) -> tuple[Array, Array, Array, Array]:
        n = len(self.logits)
        losses, skipped, kept = np.full(n, np.nan), np.full(n, np.nan), np.full(n, -1)
        dx, self.given = np.full((n, self.w.shape[1]), np.nan, np.float32), self.logits.copy()
        weight = self.weight.packed if weight is None else weight
        _core.filtered_cross_entropy(
            weight, self.given, self.targets, FACTOR, bound, self.mean, losses, skipped, kept, dx, *trained
        )
        return losses, skipped, kept, dx

    def kept(self, bound: float) -> Array:
        words = np.arange(self.w.shape[0])
        return np.asarray((self.probabilities >= bound) | (words == self.targets[:, None]))


def assert_right(head: Head, bound: float, results: tuple[Array, Array, Array, Array]) -> None:
    losses, skipped, counts, dx = results
    expected = np.empty(len(losses))
    _core.cross_entropy(head.logits.copy(), head.targets, FACTOR, expected, True)
    assert losses.tobytes() == expected.tobytes()  # the filter changes no loss
    p, kept = head.probabilities, head.kept(bound)
    vocab = len(head.w)
    flat = (p >= bound).sum(axis=1) > vocab // 4
    assert np.array_equal(counts, np.where(flat, vocab, kept.sum(axis=1)))
    assert np.array_equal(head.given[flat], head.logits[flat])
    assert np.isnan(dx[flat]).all()
    one_hot = np.arange(vocab) == head.targets[:, None]
    mass = np.where(kept, 0, p).sum(axis=1)
    # The relative error of a quotient of two sums of exponentials. The rounding of each logit's distance to
    # the largest logit, at most 2 * 20, is an error of its exponential.
    off = 2 * (reference.gamma(min(vocab, 2048) + 8) + 40 * U)
    assert (np.abs(skipped - mass)[~flat] <= off * mass[~flat]).all()
    exact = FACTOR * ((np.where(kept, p, 0) - one_hot) @ head.w + mass[:, None] * head.mean)
    size = FACTOR * (np.where(kept, p, 0) @ np.abs(head.w) + one_hot @ np.abs(head.w) + np.abs(head.mean))
    within = (off + reference.gamma(kept.sum(axis=1).max(initial=0) + 4)) * size
    assert (np.abs(dx - exact)[~flat] <= within[~flat]).all()
    # the documented bound on the error of dx
    dense = FACTOR * (p - one_hot) @ head.w
    widest = np.linalg.norm(head.w - head.mean, axis=1).max()
    error = np.linalg.norm(dx - dense, axis=1)[~flat]
    limit = FACTOR * mass * widest + np.linalg.norm(within, axis=1)
    assert (error <= limit[~flat]).all()


@pytest.mark.slow
@pytest.mark.parametrize("storage", FORMATS)
@pytest.mark.parametrize(
    ("n", "vocab", "d"), [(1, 64, 32), (3, 65, 96), (5, 1000, 160), (40, 700, 64), (33, 5003, 576)]
)
def test_the_filter_matches_the_oracle(
    storage: str, n: int, vocab: int, d: int, rng: np.random.Generator
) -> None:
    head = Head(rng, n, vocab, d, storage)
    for wanted in (0.3, 1e-2, 1e-3, 1e-5):
        bound = head.bound_near(wanted)
        assert_right(head, bound, head.run(bound))


@pytest.mark.parametrize(("vocab", "d"), [(4, 1), (7, 5), (130, 47), (300, 49), (513, 97), (2100, 200)])
def test_the_filter_matches_the_oracle_in_awkward_shapes(
    vocab: int, d: int, rng: np.random.Generator
) -> None:
    head = Head(rng, 9, vocab, d)
    for weight in (None, np.ascontiguousarray(head.w.astype(np.float32))):  # packed, and as it lies
        bound = head.bound_near(5e-3)
        assert_right(head, bound, head.run(bound, weight))


def test_the_filter_skips_nothing_of_a_certain_word(rng: np.random.Generator) -> None:
    head = Head(rng, 2, 100, 16)
    head.logits[:, 7] = 60
    head.targets[:] = [7, 8]
    losses, skipped, _, dx = head.run(1e-6)
    assert (np.abs(skipped) <= 1e-6).all()
    np.testing.assert_allclose(losses, [0, 60 - head.logits[1, 8]], atol=1e-6)
    np.testing.assert_allclose(dx[0], 0, atol=1e-6)
    np.testing.assert_allclose(dx[1], FACTOR * (head.w[7] - head.w[8]), rtol=1e-5, atol=1e-6)


def test_a_row_with_many_likely_words_is_left_to_the_dense_product(rng: np.random.Generator) -> None:
    head = Head(rng, 4, 100, 16)
    head.logits[1:3] = 0
    _, skipped, kept, dx = head.run(1e-3)
    assert (kept == 100).tolist() == [False, True, True, False]
    assert (skipped[1:3] == 0).all()
    assert np.isnan(dx[1:3]).all()
    assert np.isfinite(dx[[0, 3]]).all()


def test_a_row_with_an_ignored_target_has_no_gradient(rng: np.random.Generator) -> None:
    head = Head(rng, 3, 100, 16)
    head.targets[1] = -100
    head.logits[1] = np.nan
    losses, skipped, kept, dx = head.run(1e-2)
    assert losses[1] == skipped[1] == kept[1] == 0
    assert (kept < 100).all()
    assert not dx[1].any()
    assert dx[[0, 2]].any(axis=1).all()


def test_nan_and_infinity_stay_in_their_row(rng: np.random.Generator) -> None:
    for value in (np.nan, np.inf):
        head = Head(rng, 3, 100, 16)
        head.logits[1, 3] = value
        losses, _, _, dx = head.run(1e-2)
        assert np.isnan(losses[1])
        assert np.isfinite(losses[[0, 2]]).all()
        assert np.isfinite(dx[[0, 2]]).all()
    head = Head(rng, 1, 100, 16)
    head.logits[0, ::2] = -np.inf  # words that are ruled out
    head.targets[0] = 1
    assert_right(head, 1e-2, head.run(1e-2))


def test_a_small_skipped_probability_is_exact(rng: np.random.Generator) -> None:
    head = Head(rng, 64, 5000, 8)
    head.logits *= 3
    bound = head.bound_near(1e-9)
    skipped = head.run(bound)[1]
    mass = np.where(head.kept(bound), 0, head.probabilities).sum(axis=1)
    assert (mass > 0).all()
    assert (mass < 1e-5).all()
    np.testing.assert_allclose(skipped, mass, rtol=1e-4)


@pytest.mark.parametrize(("n", "vocab", "d"), [(1, 4, 1), (9, 130, 47), (40, 700, 64), (300, 2100, 500)])
def test_the_gradient_of_a_trained_weight_matches_the_oracle(
    n: int, vocab: int, d: int, rng: np.random.Generator
) -> None:
    head = Head(rng, n, vocab, d)
    if n > 2:
        head.logits[1] = 0  # a flat row
        head.targets[2] = -100
    x, dweight = rng.standard_normal((n, d), np.float32), rng.standard_normal((vocab, d), np.float32)
    before, bound = dweight.astype(np.float64), head.bound_near(5e-3)
    head.targets[:] = np.where(head.targets < 0, -100, head.targets)
    plain = head.run(bound)
    results = head.run(bound, None, x, dweight)
    for with_weight, alone in zip(results, plain, strict=True):
        assert with_weight.tobytes() == alone.tobytes()
    skipped, counts = results[1:3]
    used = ((counts < vocab) & (head.targets >= 0))[:, None]
    one_hot = np.arange(vocab) == head.targets[:, None]
    dlogits = FACTOR * (np.where(head.kept(bound), head.probabilities, 0) - one_hot) * used
    exact = before + dlogits.T @ x.astype(np.float64)
    size = np.abs(before) + (np.abs(dlogits) + 2 * FACTOR * one_hot * used).T @ np.abs(x.astype(np.float64))
    off = reference.gamma(n + 4) + reference.gamma(min(vocab, 2048) + 8) + 60 * U
    assert (np.abs(dweight - exact) <= off * size).all()
    # the documented bound on the error of the gradient
    whole = before + (FACTOR * (head.probabilities - one_hot) * used).T @ x.astype(np.float64)
    limit = FACTOR * (np.sqrt(bound * skipped) * np.linalg.norm(x, axis=1)).sum()
    assert np.linalg.norm(dweight - whole) <= limit + np.linalg.norm(off * size)


def test_a_profile_counts_the_products_with_kept_words(rng: np.random.Generator) -> None:
    head, profiler = Head(rng, 9, 500, 40), Profiler()
    x, dweight = rng.standard_normal((9, 40), np.float32), np.zeros((500, 40), np.float32)
    for trained, products in (((), 1), ((x, dweight), 2)):
        profiler.start()
        kept = head.run(1e-2, None, *trained)[2]
        profiler.stop()
        assert (kept < 500).all()
        found = profiler.totals.pop(("", "loss"))
        assert found.operations == {"float32": products * 2 * kept.sum() * 40}


@pytest.mark.usefixtures("thread_limit")
@pytest.mark.parametrize("storage", ["float32", "q8_0"])
def test_the_bits_do_not_depend_on_threads(storage: str, rng: np.random.Generator) -> None:
    head, results = Head(rng, 200, 3000, 192, storage), []
    x = rng.standard_normal((200, 192), np.float32)
    for threads in (1, 2, 5):
        nplora.set_num_threads(threads)
        dweight = np.zeros((3000, 192), np.float32)
        results.append([array.tobytes() for array in (*head.run(1e-4, None, x, dweight), dweight)])
    assert results[0] == results[1] == results[2]


def test_a_row_has_the_same_bits_alone(rng: np.random.Generator) -> None:
    head = Head(rng, 40, 3000, 192)
    dx = head.run(1e-4)[3]
    head.logits, head.targets = head.logits[17:18], head.targets[17:18]
    assert np.array_equal(head.run(1e-4)[3][0], dx[17])


def test_wrong_arguments_are_refused(rng: np.random.Generator) -> None:
    head = Head(rng, 2, 100, 16)
    with pytest.raises(ValueError, match="bound must be above 0"):
        head.run(0.0)
    with pytest.raises(ValueError, match="logits must have shape"):
        head.run(0.1, np.zeros((99, 16), np.float32))
    with pytest.raises(ValueError, match="dx must have shape"):
        head.run(0.1, np.zeros((100, 17), np.float32))
    with pytest.raises(ValueError, match="does not fit"):
        head.run(0.1, nplora.FrozenWeight(np.zeros((100, 16)), "float64").packed)
    x, dweight = np.zeros((2, 16), np.float32), np.zeros((100, 16), np.float32)
    with pytest.raises(ValueError, match="x and dweight must both be given"):
        head.run(0.1, None, x)
    with pytest.raises(ValueError, match="x must have shape"):
        head.run(0.1, None, x[:1], dweight)
    with pytest.raises(ValueError, match="dweight must have shape"):
        head.run(0.1, None, x, dweight[:, :8].copy())
    head.targets[0] = 100
    with pytest.raises(ValueError, match="targets holds 100"):
        head.run(0.1)
