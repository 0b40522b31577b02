"""Linear: frozen, or trained as a whole."""

from typing import Any

import numpy as np
import pytest

import nplora
import reference
from nplora import Linear

D_OUT, D_IN, N = 7, 5, 4


@pytest.mark.parametrize("trainable", [False, True])
@pytest.mark.parametrize("lead", [(), (N,), (0,), (2, 3)])
def test_forward_and_backward_match_numpy(
    trainable: bool, lead: tuple[int, ...], rng: np.random.Generator
) -> None:
    W, bias = rng.standard_normal((D_OUT, D_IN)), rng.standard_normal(D_OUT)
    layer = Linear(W, bias, dtype="float64", trainable=trainable)
    x, dy = rng.standard_normal((*lead, D_IN)), rng.standard_normal((*lead, D_OUT))
    y, saved = layer.forward(x)
    np.testing.assert_allclose(y, x @ W.T + bias, atol=1e-13)
    np.testing.assert_array_equal(layer(x), y)
    np.testing.assert_allclose(layer.backward(dy, saved), dy @ W, atol=1e-13)
    assert layer.backward(dy, saved, need_dx=False) is None
    assert saved.nbytes == (x.nbytes if trainable else 0)


def test_gradients_match_central_differences(rng: np.random.Generator) -> None:
    layer = Linear(rng.standard_normal((D_OUT, D_IN)), np.ones(D_OUT), dtype="float64", trainable=True)
    x = rng.standard_normal((N, D_IN))
    y, saved = layer.forward(x)
    c = rng.standard_normal(y.shape)
    dx = layer.backward(c, saved)
    pairs = [(x, dx), *[(p.value, p.grad) for p in layer.parameters()]]
    assert len(pairs) == 3
    assert reference.gradient_error(lambda: float((c * layer(x)).sum()), pairs, rng) <= 1e-6


def test_only_a_trainable_layer_has_parameters() -> None:
    W, bias = np.ones((D_OUT, D_IN)), np.ones(D_OUT)
    assert Linear(W, bias).parameters() == []
    assert [p.name for p in Linear(W, bias, trainable=True).parameters()] == ["weight", "bias"]
    assert [p.name for p in Linear(W, trainable=True).parameters()] == ["weight"]
    for trainable in (False, True):
        assert Linear(W, bias, trainable=trainable).num_parameters == D_OUT * D_IN + D_OUT


def test_what_is_trained_is_a_copy(rng: np.random.Generator) -> None:
    fw, bias = nplora.FrozenWeight(rng.standard_normal((D_OUT, D_IN))), np.ones(D_OUT, np.float32)
    layer, before = Linear(fw, bias, trainable=True), fw.to_numpy()
    for p in layer.parameters():
        p.value[...] = 0
    np.testing.assert_array_equal(fw.to_numpy(), before)
    assert np.all(bias == 1)
    assert Linear(fw).weight is fw


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"W": np.ones(3)}, "W has 1 axis"),
        ({"bias": np.ones(3)}, r"Linear: bias has shape \(3,\), expected \(7,\)"),
        ({"dtype": "float16", "trainable": True}, "trainable=True, expected dtype='float32' or 'float64'"),
        ({"compute": "float16"}, "compute='float16' is not available"),
    ],
)
def test_bad_settings_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Linear(**{"W": np.ones((D_OUT, D_IN)), **arguments})


def test_operands_of_another_shape_are_refused() -> None:
    layer = Linear(np.ones((D_OUT, D_IN)), trainable=True)
    y, saved = layer.forward(np.ones((N, D_IN)))
    with pytest.raises(ValueError, match=r"Linear\.forward: x has last axis 4, expected d_in=5"):
        layer(np.ones((N, 4)))
    with pytest.raises(ValueError, match=r"Linear\.backward: dy has shape \(3, 7\), expected \(4, 7\)"):
        layer.backward(y[:3], saved)
    assert layer.dweight is not None
    assert not layer.dweight.any()


def test_a_trained_weight_does_not_compute_in_bfloat16() -> None:
    W = np.ones((D_OUT, D_IN))
    with pytest.raises(ValueError, match="Linear: compute='bfloat16' with trainable=True"):
        Linear(W, compute="bfloat16", trainable=True)
    assert Linear(nplora.FrozenWeight(W, compute="bfloat16"), trainable=True).parameters()
    frozen = Linear(W, compute="bfloat16").weight
    assert isinstance(frozen, nplora.FrozenWeight)
    assert frozen.compute == "bfloat16"


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_nan_and_infinity_propagate_without_a_warning(value: float) -> None:
    layer = Linear(np.ones((D_OUT, D_IN)), np.ones(D_OUT), trainable=True)
    y, saved = layer.forward(np.ones((N, D_IN)))
    dy = np.full(y.shape, value)
    dy[0] = -value
    assert not np.isfinite(layer.backward(dy, saved)).any()
    assert all(not np.isfinite(p.grad).any() for p in layer.parameters())
