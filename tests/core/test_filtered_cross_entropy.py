"""The gradient of the head's input without unlikely words, against float64 NumPy."""

import math
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

import nplora
import reference
from nplora import _core

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

    def run(self, bound: float, weight: Any = None) -> tuple[Array, Array, Array, Array]:
        n = len(self.logits)
        losses, skipped, is_flat = np.full(n, np.nan), np.full(n, np.nan), np.ones(n, np.bool_)
        dx, self.given = np.full((n, self.w.shape[1]), np.nan, np.float32), self.logits.copy()
        weight = self.weight.packed if weight is None else weight
        _core.filtered_cross_entropy(
            weight, self.given, self.targets, FACTOR, bound, self.mean, losses, skipped, is_flat, dx
        )
        return losses, skipped, is_flat, dx

    def kept(self, bound: float) -> Array:
        words = np.arange(self.w.shape[0])
        return np.asarray((self.probabilities >= bound) | (words == self.targets[:, None]))


def assert_right(head: Head, bound: float, results: tuple[Array, Array, Array, Array]) -> None:
    losses, skipped, is_flat, dx = results
    expected = np.empty(len(losses))
    _core.cross_entropy(head.logits.copy(), head.targets, FACTOR, expected, True)
    assert losses.tobytes() == expected.tobytes()  # the filter changes no loss
    p, kept = head.probabilities, head.kept(bound)
    vocab = len(head.w)
    flat = (p >= bound).sum(axis=1) > vocab // 4
    assert np.array_equal(is_flat, flat)
    assert np.array_equal(head.given[flat], head.logits[flat])
    assert np.isnan(dx[flat]).all()
    one_hot = np.arange(vocab) == head.targets[:, None]
    mass = np.where(kept, 0, p).sum(axis=1)
    off = 16 * U + reference.gamma(min(vocab, 2048) + 8) + 40 * U  # the error of a sum of exponentials
    assert (np.abs(skipped - mass)[~flat] <= off).all()
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
    _, skipped, is_flat, dx = head.run(1e-3)
    assert is_flat.tolist() == [False, True, True, False]
    assert (skipped[1:3] == 0).all()
    assert np.isnan(dx[1:3]).all()
    assert np.isfinite(dx[[0, 3]]).all()


def test_a_row_with_an_ignored_target_has_no_gradient(rng: np.random.Generator) -> None:
    head = Head(rng, 3, 100, 16)
    head.targets[1] = -100
    head.logits[1] = np.nan
    losses, skipped, is_flat, dx = head.run(1e-2)
    assert losses[1] == skipped[1] == 0
    assert not is_flat.any()
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


@pytest.mark.usefixtures("thread_limit")
@pytest.mark.parametrize("storage", ["float32", "q8_0"])
def test_the_bits_do_not_depend_on_threads(storage: str, rng: np.random.Generator) -> None:
    head, results = Head(rng, 200, 3000, 192, storage), []
    for threads in (1, 2, 5):
        nplora.set_num_threads(threads)
        results.append([array.tobytes() for array in head.run(1e-4)])
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
    head.targets[0] = 100
    with pytest.raises(ValueError, match="targets holds 100"):
        head.run(0.1)
