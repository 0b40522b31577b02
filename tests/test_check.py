"""Checks of user input that no other test reaches."""

from fractions import Fraction
from typing import Any

import numpy as np
import pytest

from nplora import _check


@pytest.mark.parametrize("value", [1, 1.5, np.float32(2), np.int8(3), Fraction(1, 2)])
def test_any_real_number_is_a_number(value: Any) -> None:
    assert _check.number("op", "n", value) == float(value)


@pytest.mark.parametrize("value", [True, np.True_, "1", None, 1j, [1.0], np.ones(1)])
def test_other_things_are_not_numbers(value: Any) -> None:
    with pytest.raises(TypeError, match=r"op: n is .*, expected a number"):
        _check.number("op", "n", value)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, np.float32("nan")])
def test_a_number_is_finite(value: Any) -> None:
    with pytest.raises(ValueError, match=r"op: n is .*, expected a finite number"):
        _check.number("op", "n", value)


@pytest.mark.parametrize(
    "value", [None, object(), [[1], [1, 2]], "text", [1 + 1j], np.array(["2020"], "M8[Y]")]
)
def test_arrays_without_real_numbers_are_refused(value: Any) -> None:
    with pytest.raises(
        (TypeError, ValueError),
        match=r"op: x (has dtype .*, expected real numbers|is None, expected an array|is inhomogeneous)",
    ):
        _check.floats("op", "x", value, np.float32)


@pytest.mark.parametrize("value", ["text", b"text", None, {"text"}, ["text", 1], iter(["text"])])
def test_texts_must_be_in_a_list(value: Any) -> None:
    assert _check.texts("op", "t", ["a", "b"]) == ("a", "b")
    with pytest.raises(TypeError, match=r"^op: t is .*, expected a list of texts$"):
        _check.texts("op", "t", value)


def test_an_array_that_fits_is_not_copied() -> None:
    x = np.ones((3, 4), np.float32)
    assert _check.floats("op", "x", x, np.float32) is x
    rows, lead = _check.rows("op", "x", x, 4, "d", np.float32)
    assert np.shares_memory(rows, x)
    assert lead == (3,)


def test_an_unaligned_array_is_copied_to_an_aligned_one() -> None:
    x = np.zeros(17, np.uint8)[1:].view(np.float32)
    assert not x.flags.aligned
    assert _check.floats("op", "x", x, np.float32).flags.aligned


def test_overlap_is_exact_if_it_is_easy_to_find_and_assumed_otherwise() -> None:
    x = np.zeros((8, 8))
    assert not _check.overlap(x[:, :4], x[:, 4:])
    assert _check.overlap(x[:, :5], x[:, 4:])
    # Two lattices in one buffer, whose common points are hard to find.
    flat = np.zeros(10**6, np.uint8)
    shape, strides = (30, 30, 30, 30), (12345, 2341, 271, 23)
    hard = np.lib.stride_tricks.as_strided(flat, shape, strides)
    other = np.lib.stride_tricks.as_strided(flat[1:], shape, (12211, 2203, 307, 29))
    assert _check.overlap(hard, other)


def test_a_subclass_is_treated_as_the_array_it_is() -> None:
    with pytest.warns(PendingDeprecationWarning):
        matrix = np.matrix([[1.0, 2.0]])
    assert type(_check.floats("op", "x", matrix, np.float32)) is np.ndarray


@pytest.mark.parametrize("value", [10**400, -(10**400), 10**5000, Fraction(10**400)], ids=range(4))
def test_a_number_fits_float64(value: Any) -> None:
    with pytest.raises(ValueError, match="op: n is beyond the range of float64"):
        _check.number("op", "n", value)


def test_ragged_lists_are_refused_by_the_name_of_the_argument() -> None:
    for check in (lambda v: _check.floats("op", "x", v, np.float32), lambda v: _check.integers("op", "x", v)):
        with pytest.raises(ValueError, match="op: x is inhomogeneous"):
            check([[1], [1, 2]])


def test_unsigned_integers_beyond_int64_are_reported_unchanged() -> None:
    with pytest.raises(ValueError, match=r"op: n holds 18446744073709551615, expected at most 2\*\*63 - 1"):
        _check.integers("op", "n", np.array([3, 2**64 - 1], np.uint64))
    np.testing.assert_array_equal(_check.integers("op", "n", np.array([3], np.uint64)), [3])


@pytest.mark.parametrize(("seed", "error"), [("a", TypeError), (-1, ValueError), (1.5, TypeError)])
def test_a_seed_is_an_integer_of_at_least_zero(seed: Any, error: type[Exception]) -> None:
    with pytest.raises(error, match=r"op: rng is .*, expected a numpy Generator, an integer of at least 0"):
        _check.generator("op", seed)
    given = np.random.default_rng(3)
    assert _check.generator("op", given) is given
    assert _check.generator("op", 3).integers(99) == np.random.default_rng(3).integers(99)
    _check.generator("op", None)


@pytest.mark.parametrize(("shape", "words"), [((), "0 axes"), ((2,), "1 axis"), ((1, 2, 3), "3 axes")])
def test_axes_are_counted_in_words(shape: tuple[int, ...], words: str) -> None:
    with pytest.raises(ValueError, match=rf"^op: W has {words}, expected 2 \(d_out, d_in\)$"):
        _check.matrix("op", "W", np.ones(shape))
