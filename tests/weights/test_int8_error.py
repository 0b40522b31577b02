"""Int8Error: the measured error of int8 products, and the bound that it never exceeds."""

import tracemalloc
from typing import Any

import numpy as np
import pytest

from nplora import FrozenWeight
from nplora.weights.int8_error import Int8Error, sample_nbytes

Array = np.ndarray[Any, Any]
FORMATS = ("q4_1", "q4_k", "q8_0", "nf4", "bfloat16", "float32")


def normal(*shape: int, seed: int = 0) -> Array:
    return np.random.default_rng(seed).standard_normal(shape, np.float32)


def with_outliers(x: Array) -> Array:
    """A copy of x with columns of outliers, a row of outliers, zero rows, zero columns and tiny rows."""
    x = x.copy()
    x[:, 3 % x.shape[1]] *= 1000
    x[:, 5 % x.shape[1]] = 0
    x[1] *= 10
    x[2] = 0
    x[3] *= 1e-38
    x[4, ::2] *= 1e-5
    return x


def holds(error: Int8Error) -> bool:
    return bool(np.all(error.errors <= error.bounds)) and error.measured <= error.bound


def errors_of(weight: FrozenWeight, x: Array, dy: Array, samples: int = 10_000) -> list[Int8Error]:
    return [
        weight.int8_error(x, samples=samples),
        weight.int8_error(dy, transposed=True, samples=samples),
        weight.int8_error(dy, transposed=True, dither_key=7, samples=samples),
    ]


@pytest.mark.parametrize("storage", FORMATS)
@pytest.mark.parametrize("changed", [np.copy, with_outliers])
def test_no_error_exceeds_its_bound(storage: str, changed: Any) -> None:
    weight = FrozenWeight(changed(normal(75, 512, seed=1)), storage, "int8")
    for error in errors_of(weight, changed(normal(40, 512)), changed(normal(40, 75, seed=2))):
        assert holds(error)
        assert 0 < error.measured < error.bound < np.inf


@pytest.mark.parametrize(("d_out", "d_in"), [(1, 1), (5, 3), (33, 65), (97, 47), (31, 200), (49, 129)])
def test_the_bound_holds_for_odd_shapes(d_out: int, d_in: int) -> None:
    weight = FrozenWeight(normal(d_out, d_in), compute="int8")
    for error in errors_of(weight, normal(11, d_in, seed=1), normal(11, d_out, seed=2)):
        assert holds(error)


@pytest.mark.parametrize("depth", [4032, 4033, 9000])
def test_the_bound_holds_where_a_long_depth_is_cut(depth: int) -> None:
    wide, high = (FrozenWeight(normal(*shape), compute="int8") for shape in ((9, depth), (depth, 9)))
    assert all(map(holds, errors_of(wide, normal(9, depth, seed=1), normal(9, 9, seed=2))))
    assert all(map(holds, errors_of(high, normal(9, 9, seed=1), with_outliers(normal(9, depth, seed=2)))))


@pytest.mark.parametrize(("depth", "lost"), [(4032, 4031), (4033, 2111), (9000, 3071)])
def test_values_beside_a_large_one_vanish_and_the_bound_is_tight(depth: int, lost: int) -> None:
    """One value of dy is so large that the others in its part become 0. Its own element of W is 0."""
    dy, W = np.ones((16, depth), np.float32), np.ones((depth, 2), np.float32)
    dy[:, 0], W[0, 1] = 1e6, 0
    error = FrozenWeight(W, compute="int8").int8_error(dy, transposed=True)
    assert holds(error)
    assert error.errors[:, 1] == pytest.approx(lost, rel=1e-4)
    assert error.bounds[:, 1] == pytest.approx(lost, rel=0.01 * depth / lost)


@pytest.mark.parametrize("depth", [64, 200])
def test_values_beside_a_large_one_vanish_in_its_group_of_x(depth: int) -> None:
    x, W = np.ones((16, depth), np.float32), np.ones((3, depth), np.float32)
    x[:, 0], W[:, 0] = 1e6, 0
    error = FrozenWeight(W, compute="int8").int8_error(x)
    assert holds(error)
    assert error.errors == pytest.approx(63, rel=1e-4)


def test_errors_are_those_of_the_products_against_float64() -> None:
    weight = FrozenWeight(normal(75, 512), "q4_k", "int8")
    x, dy, W = normal(40, 512, seed=1), normal(40, 75, seed=2), weight.to_numpy().astype(np.float64)
    for error, got, exact in (
        (weight.int8_error(x), weight.matmul(x), x @ W.T),
        (weight.int8_error(dy, transposed=True), weight.matmul_t(dy), dy @ W),
    ):
        some = np.ix_(error.rows, error.outputs)
        assert error.errors.shape == error.bounds.shape == (16, 16)
        assert np.allclose(error.errors, np.abs(got - exact)[some], rtol=1e-9, atol=1e-12)
        wanted = np.linalg.norm((got - exact)[some]) / np.linalg.norm(exact[some])
        assert error.measured == pytest.approx(wanted)


def test_the_bound_of_random_data_is_not_far_from_the_error() -> None:
    """Rounding errors have random signs, so the error grows with √d_in, and the bound with d_in."""
    for d_in in (64, 128):
        weight = FrozenWeight(normal(128, d_in), compute="int8")
        forward, backward, stochastic = errors_of(weight, normal(64, d_in, seed=1), normal(64, 128, seed=2))
        assert 5 < forward.bound / forward.measured < 30
        assert 5 < backward.bound / backward.measured < 30
        assert 5 < stochastic.bound / stochastic.measured < 30


def test_the_errors_of_codes_with_the_worst_signs_reach_half_the_bound() -> None:
    """All values of x and W are near the middle of two codes, except one that sets the scale."""
    values = np.full((9, 64), 80.497, np.float32)
    values[:, 0] = 127
    error = FrozenWeight(values, compute="int8").int8_error(values)
    assert 0.5 < error.measured / error.bound <= 1


def test_few_rows_are_measured_in_the_arithmetic_of_many() -> None:
    weight, x = FrozenWeight(normal(75, 512), "q8_0", "int8"), normal(40, 512, seed=1)
    few, many = weight.int8_error(x[:3], samples=40), weight.int8_error(x, samples=40)
    # In the exact products, NumPy's order of summation may depend on the number of rows.
    np.testing.assert_allclose(few.errors, many.errors[:3], rtol=1e-9)
    one = weight.int8_error(x[0])
    assert one.errors.shape == (1, 16)


@pytest.mark.parametrize("rows", [0, 20])
def test_zeros_have_no_error_and_no_bound(rows: int) -> None:
    weight = FrozenWeight(normal(75, 64), compute="int8")
    for error in errors_of(weight, np.zeros((rows, 64)), np.zeros((rows, 75))):
        assert error.measured == error.bound == 0


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_values_that_are_not_finite_have_no_finite_error(value: float) -> None:
    weight, x, dy = FrozenWeight(normal(75, 64), compute="int8"), normal(20, 64), normal(20, 75)
    x[:, 3] = dy[:, 3] = value
    for error in errors_of(weight, x, dy):
        assert not np.isfinite(error.measured)
        assert not np.isfinite(error.bound)


@pytest.mark.parametrize("shape", [(75, 512), (512, 75), (5000, 64), (1, 2048)])
def test_a_measurement_takes_no_more_memory_than_is_said(shape: tuple[int, int]) -> None:
    weight, x = FrozenWeight(normal(*shape), compute="int8"), normal(16, shape[1])
    weight.int8_error(x)
    tracemalloc.start()
    weight.int8_error(x)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < sample_nbytes(*shape) + 40_000  # the objects of Python


def test_arguments_that_have_no_int8_error_are_refused() -> None:
    x = normal(20, 64)
    with pytest.raises(ValueError, match="int8_error: the weight has compute='bfloat16', expected 'int8'"):
        FrozenWeight(normal(75, 64), compute="bfloat16").int8_error(x)
    weight = FrozenWeight(normal(75, 64), compute="int8")
    with pytest.raises(ValueError, match="x has last axis 64, expected d_out=75"):
        weight.int8_error(x, transposed=True)
    with pytest.raises(ValueError, match="samples is 0"):
        weight.int8_error(x, samples=0)
    with pytest.raises(ValueError, match="dither_key"):
        weight.int8_error(x, dither_key=1)
