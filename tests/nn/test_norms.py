"""LayerNorm and RMSNorm: values, gradients, and trained weights."""

from typing import Any

import numpy as np
import pytest

import reference
from nplora import LayerNorm, RMSNorm

D = 8


def layers(rng: np.random.Generator, trainable: bool = True, dtype: str = "float64") -> list[Any]:
    weight, bias = rng.standard_normal(D), rng.standard_normal(D)
    return [
        LayerNorm(weight, bias, 1e-3, trainable, dtype),
        LayerNorm(weight, None, 1e-3, trainable, dtype),
        RMSNorm(weight, 1e-3, trainable, dtype),
    ]


def oracle(layer: Any, x: Any) -> Any:
    if isinstance(layer, RMSNorm):
        return reference.rms_norm(x, layer.weight, layer.eps)
    bias = np.zeros(D) if layer.bias is None else layer.bias
    return reference.layer_norm(x, layer.weight, bias, layer.eps)


@pytest.mark.parametrize("lead", [(), (4,), (0,), (2, 3)])
def test_values_match_the_oracle(lead: tuple[int, ...], rng: np.random.Generator) -> None:
    x = rng.standard_normal((*lead, D))
    for layer in layers(rng):
        y, saved = layer.forward(x)
        np.testing.assert_allclose(y, oracle(layer, x), rtol=1e-12, atol=1e-12)
        np.testing.assert_array_equal(layer(x), y)
        assert layer.backward(y, saved).shape == x.shape
    for layer in layers(rng, dtype="float32"):
        y = layer(x)
        assert y.dtype == np.float32
        np.testing.assert_allclose(y, oracle(layer, x), rtol=1e-4, atol=1e-5)


def test_gradients_match_central_differences(rng: np.random.Generator) -> None:
    for layer in layers(rng):
        x = rng.standard_normal((4, D))
        y, saved = layer.forward(x)
        c = rng.standard_normal(y.shape)
        dx = layer.backward(c, saved)
        pairs = [(x, dx), *[(p.value, p.grad) for p in layer.parameters()]]
        assert (
            reference.gradient_error(lambda c=c, x=x, layer=layer: float((c * layer(x)).sum()), pairs, rng)
            <= 1e-6
        )
        before = [p.grad.copy() for p in layer.parameters()]
        assert layer.backward(c, saved, need_dx=False) is None
        for p, gradient in zip(layer.parameters(), before, strict=True):
            np.testing.assert_allclose(p.grad, 2 * gradient, rtol=1e-12)


def test_only_a_trainable_norm_has_parameters(rng: np.random.Generator) -> None:
    assert [[p.name for p in layer.parameters()] for layer in layers(rng)] == [
        ["weight", "bias"],
        ["weight"],
        ["weight"],
    ]
    for layer in layers(rng, trainable=False):
        assert layer.parameters() == []
    for trainable in (False, True):
        assert [layer.num_parameters for layer in layers(rng, trainable)] == [2 * D, D, D]


def test_the_callers_weights_are_copied() -> None:
    weight = np.ones(D, np.float32)
    layer = RMSNorm(weight, trainable=True)
    layer.weight[...] = 5
    assert np.all(weight == 1)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_nan_and_infinity_stay_in_their_row(value: float, rng: np.random.Generator) -> None:
    for layer in layers(rng):
        x = rng.standard_normal((3, D))
        x[1, 2] = value
        y, saved = layer.forward(x)
        assert np.isnan(y[1]).any()
        assert np.isfinite(y[[0, 2]]).all()
        dx = layer.backward(np.ones_like(y), saved)
        assert np.isnan(dx[1]).any()
        assert np.isfinite(dx[[0, 2]]).all()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: LayerNorm(np.ones((2, 2))), "LayerNorm: weight has 2 axes, expected 1"),
        (lambda: LayerNorm(np.ones(3), np.ones(4)), r"bias has shape \(4,\), expected \(3,\)"),
        (lambda: RMSNorm(np.ones(3), eps=-1), "RMSNorm: eps is -1, expected at least 0"),
        (lambda: RMSNorm(np.ones(3), dtype="float16"), "dtype='float16' is not available"),
        (lambda: RMSNorm(np.ones(3))(np.ones((2, 4))), r"RMSNorm\.forward: x has last axis 4, expected d=3"),
        (
            lambda: RMSNorm(np.ones(3)).backward(
                np.ones((1, 3)), RMSNorm(np.ones(3)).forward(np.ones((2, 3)))[1]
            ),
            r"RMSNorm\.backward: dy has shape \(1, 3\), expected \(2, 3\)",
        ),
    ],
)
def test_bad_arguments_are_refused(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("eps", [0, 1e-5])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_rows_of_zeros_and_infinite_gradients_propagate_without_a_warning(eps: float, value: float) -> None:
    x = np.zeros((2, D))
    for layer in (LayerNorm(np.ones(D), np.ones(D), eps, True), RMSNorm(np.ones(D), eps, True)):
        y, saved = layer.forward(x)
        assert np.isfinite(y).all() == (eps > 0)
        dx = layer.backward(np.array([[value, -value, 1, 1, 1, 1, 1, 1]] * 2), saved)
        assert not np.isfinite(dx).all()
        assert not np.isfinite(layer.dweight).all()
