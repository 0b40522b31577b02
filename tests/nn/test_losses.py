"""Losses: values, gradients, counts, and errors."""

from typing import Any

import numpy as np
import pytest

import reference
from nplora.nn import losses

LABELS = np.array([0, 4, -100, 2, 2, -100, 3])


def problem(name: str, rng: np.random.Generator) -> tuple[Any, Any]:
    p = 2 * rng.standard_normal((7, 5))
    return p, LABELS if name == "cross_entropy" else rng.uniform(size=(7, 5))


every_loss = pytest.mark.parametrize("name", ["mse", "huber", "bce", "cross_entropy"])


@every_loss
def test_values_match_the_oracle(name: str, rng: np.random.Generator) -> None:
    p, t = problem(name, rng)
    loss, gradient = losses.get(name)(p, t)
    assert isinstance(loss, float)
    assert loss == pytest.approx(getattr(reference, name)(p, t), rel=1e-13)
    assert (gradient.shape, gradient.dtype) == (p.shape, p.dtype)
    single, gradient = losses.get(name)(p.astype(np.float32), t)
    assert single == pytest.approx(loss, rel=1e-5)
    assert gradient.dtype == np.float32


@every_loss
def test_gradients_match_central_differences(name: str, rng: np.random.Generator) -> None:
    p, t = problem(name, rng)
    _, gradient = losses.get(name)(p, t)
    assert reference.gradient_error(lambda: losses.get(name)(p, t)[0], [(p, gradient)], rng) <= 1e-6


@every_loss
def test_extreme_predictions_stay_finite(name: str) -> None:
    p = np.array([[1e4, -1e4], [-1e4, 1e4]])
    t = np.array([1, 1]) if name == "cross_entropy" else np.array([[0.0, 1.0], [1.0, 0.0]])
    loss, gradient = losses.get(name)(p, t)
    assert loss > 1000
    assert np.isfinite(gradient).all()


@every_loss
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_nan_and_infinity_make_the_loss_non_finite(name: str, value: float, rng: np.random.Generator) -> None:
    p, t = problem(name, rng)
    p[3, 1] = value
    loss, gradient = losses.get(name)(p, t)
    assert not np.isfinite(loss)
    if np.isnan(value):
        assert np.isnan(gradient[3, 1])


@every_loss
def test_nothing_to_learn_from_is_a_loss_of_zero(name: str) -> None:
    p = np.ones((0, 3))
    t = np.ones(0, int) if name == "cross_entropy" else p
    loss, gradient = losses.get(name)(p, t)
    assert (loss, gradient.shape, losses.get(name).count(p, t)) == (0.0, (0, 3), 0)


def test_ignored_rows_have_no_part_in_the_loss() -> None:
    p = np.array([[1.0, 2.0], [np.nan, np.inf], [0.5, -1.0]])
    t = np.array([1, -100, 0])
    loss, gradient = losses.cross_entropy(p, t)
    expected, kept = losses.cross_entropy(p[[0, 2]], t[[0, 2]])
    assert loss == expected
    np.testing.assert_array_equal(gradient, [kept[0], [0, 0], kept[1]])
    assert losses.cross_entropy(p, np.full(3, -100)) == (0.0, pytest.approx(np.zeros((3, 2))))
    loss, _ = losses.CrossEntropy(ignore_index=1)(p[[0, 2]], t[[0, 2]])
    assert loss == losses.cross_entropy(p[[2]], t[[2]])[0]


def test_class_weights_multiply_the_loss_of_their_rows(rng: np.random.Generator) -> None:
    p, _ = problem("cross_entropy", rng)
    weights = (0.5, 0.0, 3.0, 1.0, 2.0)
    loss = losses.CrossEntropy(class_weights=weights)
    found, gradient = loss(p, LABELS)
    rows = [
        (weights[label], losses.cross_entropy(row, label)[0])
        for row, label in zip(p, LABELS, strict=True)
        if label >= 0
    ]
    assert found == pytest.approx(sum(weight * value for weight, value in rows) / len(rows), rel=1e-12)
    assert reference.gradient_error(lambda: loss(p, LABELS)[0], [(p, gradient)], rng) <= 1e-6
    assert losses.CrossEntropy(class_weights=(1,) * 5)(p, LABELS)[0] == losses.cross_entropy(p, LABELS)[0]
    assert repr(losses.cross_entropy) == "CrossEntropy(ignore_index=-100)"
    with pytest.raises(ValueError, match="2 class weights, expected one for each of the 5 classes"):
        losses.CrossEntropy(class_weights=(1.0, 2.0))(p, LABELS)
    with pytest.raises(ValueError, match="a class weight is -1"):
        losses.CrossEntropy(class_weights=(1.0, -1.0))


def test_logits_of_any_leading_axes_are_taken(rng: np.random.Generator) -> None:
    p, t = rng.standard_normal((2, 3, 4)), np.array([[0, 1, 2], [3, -100, 0]])
    loss, gradient = losses.cross_entropy(p, t)
    flat, flat_gradient = losses.cross_entropy(p.reshape(6, 4), t.reshape(6))
    assert loss == flat
    np.testing.assert_array_equal(gradient.reshape(6, 4), flat_gradient)
    assert losses.cross_entropy(p[0, 0], 2)[1].shape == (4,)


def test_counts_weight_batches_so_that_parts_add_up_to_the_whole(rng: np.random.Generator) -> None:
    for name in ("mse", "huber", "bce", "cross_entropy"):
        loss, (p, t) = losses.get(name), problem(name, rng)
        whole, gradient = loss(p, t)
        parts = [(loss(p[s], t[s]), loss.count(p[s], t[s])) for s in (slice(0, 2), slice(2, 7))]
        total = loss.count(p, t)
        assert sum(n for _, n in parts) == total
        assert whole == pytest.approx(sum(value * n for (value, _), n in parts) / total, rel=1e-12)
        pieces = np.concatenate([part * (n / total) for (_, part), n in parts])
        np.testing.assert_allclose(gradient, pieces, rtol=1e-12, atol=1e-15)
    assert losses.cross_entropy.count(np.ones((7, 5)), LABELS) == 5


def test_delta_says_where_huber_turns_linear() -> None:
    p, t = np.array([0.5, 3.0]), np.zeros(2)
    assert losses.Huber(2.0)(p, t)[0] == pytest.approx(reference.huber(p, t, 2.0))
    np.testing.assert_allclose(losses.Huber(2.0)(p, t)[1], [0.25, 1.0])
    with pytest.raises(ValueError, match="huber: delta is 0, expected above 0"):
        losses.Huber(0)


@pytest.mark.parametrize(
    ("name", "prediction", "target", "message"),
    [
        ("mse", np.ones((3, 1)), np.ones(3), r"mse: target has shape \(3,\), prediction has \(3, 1\)"),
        ("bce", np.ones(2), [0.5, 1.5], "bce: target runs from 0.5 to 1.5, expected from 0 to 1"),
        ("bce", np.ones(2), [-1, 1], "bce: target runs from -1 to 1, expected from 0 to 1"),
        (
            "cross_entropy",
            np.ones((2, 3)),
            [0, 3],
            "cross_entropy: labels holds 3, expected integers from 0 to 2",
        ),
        ("cross_entropy", np.ones((2, 3)), [0, -1], "labels holds -1, expected integers from 0 to 2"),
        ("cross_entropy", np.ones((2, 3)), [0.0, 1.0], "labels have dtype float64, expected integers"),
        ("cross_entropy", np.ones((2, 3)), [True, False], "labels have dtype bool, expected integers"),
        (
            "cross_entropy",
            np.ones((2, 3)),
            [0, 1, 2],
            r"labels have shape \(3,\), logits \(..., C\) have \(2, 3\)",
        ),
        ("cross_entropy", np.ones((2, 3)), np.ones((2, 3), int), r"labels have shape \(2, 3\)"),
        ("cross_entropy", 1.0, 1, r"logits \(..., C\) have \(\)"),
    ],
)
def test_bad_targets_are_refused(name: str, prediction: Any, target: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        losses.get(name)(prediction, target)


def test_a_callable_is_taken_with_rows_as_its_count() -> None:
    loss = losses.get(lambda p, t: (np.float32(3), p - t))
    value, gradient = loss(np.ones((4, 2)), 0.5)
    assert (value, type(value)) == (3.0, float)
    np.testing.assert_array_equal(gradient, np.full((4, 2), 0.5))
    assert loss.count(np.ones((4, 2)), None) == 4
    assert losses.get(losses.mse) is losses.mse


@pytest.mark.parametrize(
    ("function", "error", "message"),
    [
        (lambda p, t: 3.0, TypeError, r"loss: the function returned float, expected \(loss, dprediction\)"),
        (lambda p, t: (p, 3.0), TypeError, r"loss: the function returned \(ndarray, float\), expected"),
        (lambda p, t: (None, p), TypeError, r"loss: the function returned \(NoneType, ndarray\), expected"),
        (lambda p, t: (3.0, p, p), TypeError, r"loss: the function returned tuple of 3, expected \(loss,"),
        (lambda p, t: (3.0, p[:1]), ValueError, r"loss: dprediction has shape \(1, 2\), expected \(4, 2\)"),
    ],
)
def test_a_callable_that_returns_something_else_is_refused(
    function: Any, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        losses.get(function)(np.ones((4, 2)), None)


def test_a_loss_that_returns_something_else_is_named() -> None:
    def mine(p: Any, t: Any) -> Any:
        return p

    class Mine:
        def __call__(self, p: Any, t: Any) -> Any:
            return p

    with pytest.raises(TypeError, match=r"loss: the function mine returned ndarray"):
        losses.get(mine)(np.ones(2), None)
    with pytest.raises(TypeError, match=r"loss: Mine returned ndarray"):
        losses.get(Mine())(np.ones(2), None)
    assert losses.get(lambda p, t: (np.array(3.0), p))(np.ones(2), None)[0] == 3


def test_an_unknown_loss_is_refused() -> None:
    with pytest.raises(
        ValueError, match="loss='l1' is not available; possible: 'mse', 'cross_entropy', 'bce', 'huber'"
    ):
        losses.get("l1")
    with pytest.raises(TypeError, match="loss is a int, expected a name or a callable"):
        losses.get(3)  # type: ignore[arg-type]


def test_a_non_finite_loss_is_a_floating_point_error() -> None:
    assert issubclass(losses.NonFiniteLossError, FloatingPointError)
