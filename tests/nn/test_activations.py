"""Activations: values, gradients, and extreme inputs."""

import warnings
from typing import Any

import numpy as np
import pytest

import reference
from nplora import GELU, Module, ReLU, SiLU, Tanh

ACTIVATIONS: dict[str, tuple[Module, Any]] = {
    "relu": (ReLU(), lambda x: np.where(x > 0, x, 0)),
    "gelu": (GELU(), reference.gelu),
    "gelu_tanh": (GELU("tanh"), lambda x: reference.gelu(x, "tanh")),
    "silu": (SiLU(), reference.silu),
    "tanh": (Tanh(), np.tanh),
}
every_activation = pytest.mark.parametrize("name", ACTIVATIONS)


@every_activation
@pytest.mark.parametrize("shape", [(), (7,), (0,), (3, 5), (2, 0, 4), (2, 3, 4)])
def test_values_match_the_oracle(name: str, shape: tuple[int, ...], rng: np.random.Generator) -> None:
    module, oracle = ACTIVATIONS[name]
    x = 3 * rng.standard_normal(shape)
    y, _ = module.forward(x)
    assert y.shape == shape
    assert y.dtype == np.float64
    np.testing.assert_allclose(y, oracle(x), rtol=1e-12, atol=1e-14)
    single = module(x.astype(np.float32))
    assert single.dtype == np.float32
    # Φ and σ lie in [0, 1] and are right to a few units in the last place of 1; x multiplies that.
    np.testing.assert_allclose(single, oracle(x.astype(np.float32).astype(np.float64)), rtol=2e-6, atol=1e-6)


@every_activation
def test_gradients_match_central_differences(name: str, rng: np.random.Generator) -> None:
    module, _ = ACTIVATIONS[name]
    x = rng.standard_normal((4, 5))
    x += np.sign(x) * 0.01  # away from the corner of ReLU
    y, saved = module.forward(x)
    c = rng.standard_normal(y.shape)
    dx = module.backward(c, saved)
    assert reference.gradient_error(lambda: float((c * module(x)).sum()), [(x, dx)], rng) <= 1e-6
    assert module.backward(c, saved, need_dx=False) is None


@every_activation
def test_nan_and_infinity_propagate_without_a_warning(name: str) -> None:
    module, _ = ACTIVATIONS[name]
    x = np.array([np.nan, np.inf, -1e30, 1e30, 0, -100, 100], np.float32)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        y, saved = module.forward(x)
        dx = module.backward(np.ones_like(x), saved)
    assert np.isnan(y[0])
    assert np.isfinite(y[2:]).all()
    assert np.isfinite(dx[2:]).all()
    if name != "tanh":
        assert y[1] == np.inf


def test_a_dropped_gradient_is_zero_even_where_it_is_infinite() -> None:
    module = ReLU()
    _, saved = module.forward(np.array([-1.0, 0.0, 1.0, np.nan]))
    np.testing.assert_array_equal(module.backward(np.full(4, np.inf), saved), [0, 0, np.inf, np.inf])


@every_activation
def test_integers_and_halves_become_float32(name: str) -> None:
    module, _ = ACTIVATIONS[name]
    for x in ([-1, 0, 2], np.array([-1, 0, 2], np.int8), np.array([-1, 0, 2], np.float16)):
        assert module(x).dtype == np.float32


def test_relu_and_tanh_keep_what_the_next_layer_keeps_anyway(rng: np.random.Generator) -> None:
    x = rng.standard_normal(5)
    for module in (ReLU(), Tanh()):
        y, saved = module.forward(x)
        assert saved.array is y
    assert GELU().forward(x)[1].array is x


def test_bad_arguments_are_refused() -> None:
    with pytest.raises(
        ValueError, match="GELU: approximate='sigmoid' is not available; possible: 'none', 'tanh'"
    ):
        GELU("sigmoid")
    _, saved = SiLU().forward(np.ones((2, 3)))
    with pytest.raises(ValueError, match=r"SiLU\.backward: dy has shape \(3, 2\), expected \(2, 3\)"):
        SiLU().backward(np.ones((3, 2)), saved)
    with pytest.raises(TypeError, match=r"Tanh\.forward: x has dtype complex128"):
        Tanh()(np.ones(2, complex))


@every_activation
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_a_single_number_keeps_its_dtype(name: str, dtype: Any) -> None:
    module, _ = ACTIVATIONS[name]
    y, saved = module.forward(np.array(0.5, dtype))
    dx = module.backward(np.array(2.0, dtype), saved)
    for value in (y, dx):
        assert isinstance(value, np.ndarray)
        assert (value.shape, value.dtype) == ((), dtype)


@every_activation
def test_an_infinite_gradient_propagates_without_a_warning(name: str) -> None:
    module, _ = ACTIVATIONS[name]
    x = np.array([-np.inf, -30, 0, 30, np.inf], np.float32)
    for value in (np.inf, -np.inf, np.nan):
        _, saved = module.forward(x)
        assert not np.isfinite(module.backward(np.full_like(x, value), saved)).all()


def test_a_ragged_list_is_refused() -> None:
    with pytest.raises(ValueError, match=r"ReLU\.forward: x is inhomogeneous"):
        ReLU()([[1.0], [1.0, 2.0]])
