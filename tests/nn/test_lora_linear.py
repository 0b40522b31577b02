"""LoRALinear: the update, its variants, its gradients, and merging."""

import copy
import json
import pickle
import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import nplora
import reference
from nplora import LoRALinear

Array = np.ndarray[Any, Any]

D_OUT, D_IN, N = 12, 17, 9

VARIANTS: dict[str, dict[str, Any]] = {
    "LoRA": {},
    "rsLoRA": {"use_rslora": True},
    "DoRA": {"use_dora": True},
    "LoRA-FA": {"freeze_B": True},
    "dropout": {"dropout": 0.3},
    "bias": {"bias": np.linspace(-1, 1, D_OUT)},
    "everything": {"use_rslora": True, "use_dora": True, "dropout": 0.2, "bias": np.linspace(-1, 1, D_OUT)},
    "DoRA and LoRA-FA": {"use_dora": True, "freeze_B": True, "dropout": 0.1},
}


def layer_of(rng: np.random.Generator, dtype: str = "float64", **options: Any) -> LoRALinear:
    """A layer in the middle of its training: no factor is zero."""
    layer = LoRALinear(rng.standard_normal((D_OUT, D_IN)), rank=4, alpha=6, dtype=dtype, rng=1, **options)
    layer.A[...] = rng.standard_normal(layer.A.shape)
    layer.B[...] = rng.standard_normal(layer.B.shape)
    if layer.m is not None:
        layer.m[...] = rng.uniform(0.5, 2, D_OUT)
    return layer


def oracle(layer: LoRALinear, x: Array, saved: Any, norm: Array | None = None) -> Array:
    """What the layer should give in the pass of `saved`; a norm for DoRA, or that of its rows."""
    mask, W = mask_of(layer, saved), layer.weight.to_numpy()
    if layer.m is None:
        return reference.lora_forward(x, W, layer.A, layer.B, layer.scale, layer.bias, mask)[0]
    norm = norm_of(layer) if norm is None else norm
    return reference.dora_forward(x, W, layer.A, layer.B, layer.m, layer.scale, norm, layer.bias, mask)


def mask_of(layer: LoRALinear, saved: Any) -> Array:
    return reference.dropout_mask((N, D_IN), layer.dropout, saved.key)


def norm_of(layer: LoRALinear) -> Array:
    return reference.row_norms(reference.merge(layer.weight.to_numpy(), layer.A, layer.B, layer.scale))


# ---- start ----


def test_a_fresh_layer_answers_as_its_frozen_weight(rng: np.random.Generator) -> None:
    W, x = rng.standard_normal((D_OUT, D_IN)), rng.standard_normal((N, D_IN))
    layer = LoRALinear(W, rank=4)
    np.testing.assert_array_equal(layer(x), nplora.FrozenWeight(W).matmul(x))
    assert not layer.A.any()
    assert not layer.delta_weight().any()
    assert np.abs(layer.B).max() <= 1 / np.sqrt(D_IN)
    assert np.unique(layer.B).size > 50


def test_gaussian_factors_have_variance_one_over_rank() -> None:
    layer = LoRALinear(np.zeros((400, 500)), rank=16, init="gaussian", rng=0)
    for factor in (layer.A, layer.B):
        assert factor.mean() == pytest.approx(0, abs=0.01)
        assert factor.std() == pytest.approx(1 / 4, rel=0.02)


def test_the_scale_follows_alpha_and_rank() -> None:
    W = np.ones((20, 20))
    assert LoRALinear(W).scale == 2
    assert LoRALinear(W, rank=4, alpha=6).scale == 1.5
    assert LoRALinear(W, rank=4, alpha=6, use_rslora=True).scale == 3
    assert LoRALinear(W, rank=np.int64(4), alpha=np.float32(4)).scale == 1


def test_the_seed_decides_the_factors() -> None:
    W = np.ones((20, 20))
    one, same, other = (LoRALinear(W, rng=seed) for seed in (1, 1, 2))
    np.testing.assert_array_equal(one.B, same.B)
    assert one.dropout_stream == same.dropout_stream
    assert np.any(one.B != other.B)
    given = LoRALinear(W, rng=np.random.default_rng(1))
    np.testing.assert_array_equal(one.B, given.B)
    double = LoRALinear(W, rng=1, dtype="float64")
    np.testing.assert_array_equal(double.B.astype(np.float32), one.B)


def test_the_weight_is_copied_unless_it_is_frozen_already(rng: np.random.Generator) -> None:
    W = rng.standard_normal((D_OUT, D_IN)).astype(np.float32)
    fw = nplora.FrozenWeight(W)
    layer, sharing = LoRALinear(W), LoRALinear(fw)
    before = layer.merged_weight()
    W[...] = 0
    np.testing.assert_array_equal(layer.merged_weight(), before)
    assert sharing.weight is fw


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "float64"])
def test_factors_and_outputs_are_float32_unless_all_is_float64(dtype: str, rng: np.random.Generator) -> None:
    layer = LoRALinear(rng.standard_normal((D_OUT, D_IN)), rank=4, dtype=dtype, use_dora=True)
    y, saved = layer.forward(rng.standard_normal((N, D_IN)))
    expected = np.float64 if dtype == "float64" else np.float32
    assert layer.m is not None
    arrays = layer.A, layer.B, layer.m, layer.dA, layer.dB, layer.dm, y, layer.backward(y, saved)
    assert {a.dtype for a in arrays if a is not None} == {np.dtype(expected)}


# ---- forward ----


@pytest.mark.parametrize("name", VARIANTS)
def test_forward_matches_the_oracle(name: str, rng: np.random.Generator) -> None:
    layer, x = layer_of(rng, **VARIANTS[name]), rng.standard_normal((N, D_IN))
    y, saved = layer.forward(x)
    np.testing.assert_allclose(y, oracle(layer, x, saved), rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("name", VARIANTS)
def test_inference_drops_nothing_and_equals_the_merged_weight(name: str, rng: np.random.Generator) -> None:
    layer, x = layer_of(rng, **VARIANTS[name]), rng.standard_normal((N, D_IN))
    stream = layer.dropout_stream
    y = layer(x)
    assert layer.dropout_stream == stream
    expected = x @ layer.merged_weight().T + (0 if layer.bias is None else layer.bias)
    np.testing.assert_allclose(y, expected, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("lead", [(), (1,), (0,), (2, 3), (2, 0)])
@pytest.mark.parametrize("name", ["LoRA", "DoRA", "everything"])
def test_any_leading_axes_work(name: str, lead: tuple[int, ...], rng: np.random.Generator) -> None:
    layer = layer_of(rng, **VARIANTS[name])
    x = rng.standard_normal((*lead, D_IN))
    y, saved = layer.forward(x)
    assert y.shape == layer(x).shape == (*lead, D_OUT)
    assert layer.backward(y, saved).shape == (*lead, D_IN)
    if not y.size:
        assert not any(p.grad.any() for p in layer.parameters())


def test_other_inputs_are_converted_and_left_alone(rng: np.random.Generator) -> None:
    layer = layer_of(rng, "float32")
    x = rng.integers(-3, 4, (N, D_IN))
    expected = layer(x.astype(np.float32))
    for given in (
        x,
        x.astype(np.int8),
        x.astype(np.float64),
        x.astype(">f4"),
        np.asfortranarray(x),
        x.tolist(),
    ):
        np.testing.assert_array_equal(layer(given), expected)
    np.testing.assert_array_equal(layer(np.repeat(x, 2, 0)[::2]), expected)


def test_every_pass_draws_another_dropout_mask_from_the_stream(rng: np.random.Generator) -> None:
    layer, x = layer_of(rng, dropout=0.5), rng.standard_normal((N, D_IN))
    start = layer.dropout_stream
    first, second = layer.forward(x)[0], layer.forward(x)[0]
    assert np.any(first != second)
    assert layer.dropout_stream == (start[0], 2)
    layer.dropout_stream = start
    np.testing.assert_array_equal(layer.forward(x)[0], first)


def test_scale_zero_leaves_the_factors_unread(rng: np.random.Generator) -> None:
    W, x = rng.standard_normal((D_OUT, D_IN)), rng.standard_normal((N, D_IN))
    for use_dora in (False, True):
        layer = LoRALinear(W, rank=4, alpha=0, use_dora=use_dora)
        layer.A[...], layer.B[...] = np.nan, np.inf
        y, saved = layer.forward(x)
        np.testing.assert_allclose(y, x @ W.T, rtol=1e-4, atol=1e-4)
        assert np.isfinite(layer.backward(y, saved)).all()
        assert not layer.dA.any()
        assert np.isfinite(layer.merged_weight()).all()


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("name", ["LoRA", "DoRA", "everything"])
def test_nan_and_infinity_propagate_without_a_warning(
    name: str, value: float, rng: np.random.Generator
) -> None:
    layer, x = layer_of(rng, **{**VARIANTS[name], "dropout": 0.0}), rng.standard_normal((N, D_IN))
    x[2, 3] = value
    y, saved = layer.forward(x)
    assert not np.isfinite(y[2]).any()
    assert np.isfinite(np.delete(y, 2, 0)).all()
    layer.backward(np.ones_like(y), saved)
    assert not any(np.isfinite(p.grad).all() for p in layer.parameters())
    layer.B[1, 2] = layer.A[3, 0] = value
    y, saved = layer.forward(x)
    assert not np.isfinite(y[:, 3]).any()
    assert not np.isfinite(layer.merged_weight()[3]).all()


# ---- backward ----


@pytest.mark.slow
@pytest.mark.parametrize("name", VARIANTS)
def test_gradients_match_central_differences(name: str, rng: np.random.Generator) -> None:
    layer, x = layer_of(rng, **VARIANTS[name]), rng.standard_normal((N, D_IN))
    y, saved = layer.forward(x)
    c = rng.standard_normal(y.shape)  # the loss is Σ c ∘ y
    dx = layer.backward(c, saved)
    norm = norm_of(layer)  # held fixed in the differences of DoRA
    pairs = [(x, dx), *[(p.value, p.grad) for p in layer.parameters()]]
    assert (
        reference.gradient_error(lambda: float((c * oracle(layer, x, saved, norm)).sum()), pairs, rng) <= 1e-6
    )


@pytest.mark.parametrize("name", ["LoRA", "rsLoRA", "LoRA-FA", "dropout", "bias"])
def test_gradients_match_differences_of_the_layer_itself(name: str, rng: np.random.Generator) -> None:
    layer, x = layer_of(rng, **VARIANTS[name]), rng.standard_normal((N, D_IN))
    stream = layer.dropout_stream
    y, saved = layer.forward(x)
    c = rng.standard_normal(y.shape)
    dx = layer.backward(c, saved)

    def loss() -> float:
        layer.dropout_stream = stream  # the same mask again
        return float((c * layer.forward(x)[0]).sum())

    pairs = [(x, dx), *[(p.value, p.grad) for p in layer.parameters()]]
    assert reference.gradient_error(loss, pairs, rng) <= 1e-6


@pytest.mark.parametrize("name", ["LoRA", "rsLoRA", "LoRA-FA", "dropout", "bias"])
def test_float32_stays_within_the_error_bound_of_the_oracle(name: str, rng: np.random.Generator) -> None:
    layer = layer_of(rng, "float32", **VARIANTS[name])
    x, dy = (
        rng.standard_normal((N, D_IN)).astype(np.float32),
        rng.standard_normal((N, D_OUT)).astype(np.float32),
    )
    y, saved = layer.forward(x)
    dx = layer.backward(dy, saved)
    mask, W, s = mask_of(layer, saved), layer.weight.to_numpy(), layer.scale
    expected = reference.lora_backward(dy, x, W, layer.A, layer.B, s, mask)
    bounds = reference.lora_backward(*map(np.abs, (dy, x, W, layer.A, layer.B)), s, mask)
    k = 2 * (N + D_IN + D_OUT + 4 + 3)
    for result, want, bound in zip((dx, layer.dA, layer.dB), expected, bounds, strict=True):
        assert result is None or np.all(np.abs(result - want) <= reference.gamma(k) * bound)
    want, _ = reference.lora_forward(x, W, layer.A, layer.B, s, layer.bias, mask)
    bias = None if layer.bias is None else np.abs(layer.bias)
    bound, _ = reference.lora_forward(*map(np.abs, (x, W, layer.A, layer.B)), s, bias, mask)
    assert np.all(np.abs(y - want) <= reference.gamma(k) * bound)


def test_gradients_add_up_until_they_are_zeroed(rng: np.random.Generator) -> None:
    layer, x = layer_of(rng, use_dora=True), rng.standard_normal((N, D_IN))
    y, saved = layer.forward(x)
    layer.backward(y, saved)
    once = [p.grad.copy() for p in layer.parameters()]
    layer.backward(y, saved)
    for p, gradient in zip(layer.parameters(), once, strict=True):
        np.testing.assert_allclose(p.grad, 2 * gradient, rtol=1e-12)
    layer.zero_grad()
    assert not any(p.grad.any() for p in layer.parameters())


@pytest.mark.parametrize("name", VARIANTS)
def test_the_input_gradient_is_skipped_on_request(name: str, rng: np.random.Generator) -> None:
    layer, x = layer_of(rng, **VARIANTS[name]), rng.standard_normal((N, D_IN))
    y, saved = layer.forward(x)
    layer.backward(y, saved)
    full = [p.grad.copy() for p in layer.parameters()]
    layer.zero_grad()
    assert layer.backward(y, saved, need_dx=False) is None
    for p, gradient in zip(layer.parameters(), full, strict=True):
        np.testing.assert_array_equal(p.grad, gradient)


def test_what_is_saved_is_counted_in_bytes(rng: np.random.Generator) -> None:
    x = rng.standard_normal((N, D_IN)).astype(np.float32)
    z, u = 4 * N * 4, 4 * N * D_OUT
    _, saved = layer_of(rng, "float32").forward(x)
    assert saved.x is not None
    assert np.shares_memory(saved.x, x)
    assert saved.nbytes == x.nbytes + z
    _, saved = layer_of(rng, "float32", freeze_B=True).forward(x)
    assert saved.x is None
    assert saved.nbytes == z
    _, saved = layer_of(rng, "float32", dropout=0.5).forward(x)
    assert saved.nbytes == x.nbytes + z, "a dropout mask is drawn again, never kept"
    _, saved = layer_of(rng, "float32", use_dora=True).forward(x)
    assert saved.nbytes == x.nbytes + z + u + 2 * 4 * D_OUT


def test_only_what_is_trained_is_a_parameter(rng: np.random.Generator) -> None:
    names = {
        name: [p.name for p in layer_of(rng, **options).parameters()] for name, options in VARIANTS.items()
    }
    assert names["LoRA"] == names["bias"] == ["A", "B"]
    assert names["DoRA"] == ["A", "B", "m"]
    assert names["LoRA-FA"] == ["A"]
    assert names["DoRA and LoRA-FA"] == ["A", "m"]
    layer = layer_of(rng, freeze_B=True, bias=np.ones(D_OUT))
    assert layer.dB is None
    assert layer.num_trainable == 4 * D_OUT
    assert layer.num_parameters == D_OUT * D_IN + 4 * (D_OUT + D_IN) + D_OUT


# ---- live arrays ----


def test_assignment_writes_into_the_live_arrays(rng: np.random.Generator) -> None:
    layer = layer_of(rng, "float32", use_dora=True)
    A, m, value = layer.A, layer.m, layer.parameters()[0].value
    layer.A = np.ones((D_OUT, 4))
    layer.A -= 0.25
    layer.m = np.full(D_OUT, 3)
    assert layer.A is A is value
    assert layer.m is m
    assert np.all(A == 0.75)
    assert np.all(layer.m == 3)


def test_assignment_of_another_shape_is_refused(rng: np.random.Generator) -> None:
    layer = layer_of(rng)
    before = layer.A.copy()
    with pytest.raises(ValueError, match=r"LoRALinear: A has shape \(4, 4\), expected \(12, 4\)"):
        layer.A = np.ones((4, 4))
    with pytest.raises(AttributeError, match="this layer has no m"):
        layer.m = np.ones(D_OUT)
    np.testing.assert_array_equal(layer.A, before)


def test_a_deep_copy_is_independent_but_shares_the_frozen_weight(rng: np.random.Generator) -> None:
    layer = layer_of(rng)
    twin = copy.deepcopy(layer)
    twin.A[...] = 0
    assert layer.A.any()
    assert twin.weight is layer.weight


# ---- DoRA ----


def test_row_norms_are_right_without_forming_the_product(rng: np.random.Generator) -> None:
    for dtype, tolerance in (("float64", 1e-13), ("float32", 1e-6), ("bfloat16", 1e-6)):
        W = rng.standard_normal((D_OUT, D_IN))
        layer = LoRALinear(
            W, rank=4, dtype=dtype, use_dora=True, init="gaussian", rng=1
        )  # m starts as the norms
        np.testing.assert_allclose(layer.m, norm_of(layer), rtol=tolerance)
        layer.m = np.ones(D_OUT)
        np.testing.assert_allclose(reference.row_norms(layer.merged_weight()), 1, rtol=tolerance)


def test_dora_starts_as_the_layer_without_it(rng: np.random.Generator) -> None:
    W, x = rng.standard_normal((D_OUT, D_IN)), rng.standard_normal((N, D_IN))
    for init in ("zero", "gaussian"):
        plain, dora = (
            LoRALinear(W, rank=4, init=init, dtype="float64", use_dora=on, rng=3) for on in (False, True)
        )
        np.testing.assert_allclose(dora(x), plain(x), rtol=1e-12)


def test_a_row_of_norm_zero_stays_zero(rng: np.random.Generator) -> None:
    W = rng.standard_normal((D_OUT, D_IN))
    W[3] = 0
    layer = LoRALinear(W, rank=4, use_dora=True)
    y, saved = layer.forward(rng.standard_normal((N, D_IN)))
    assert not y[:, 3].any()
    assert np.isfinite(layer.backward(y, saved)).all()
    assert all(np.isfinite(p.grad).all() for p in layer.parameters())


def test_the_delta_weight_is_what_was_added(rng: np.random.Generator) -> None:
    for name in ("LoRA", "rsLoRA", "everything"):
        layer = layer_of(rng, **VARIANTS[name])
        W = layer.weight.to_numpy()
        np.testing.assert_allclose(layer.delta_weight(), layer.merged_weight() - W, atol=1e-12)
    layer = layer_of(rng)
    np.testing.assert_allclose(layer.delta_weight(), layer.scale * layer.A @ layer.B, atol=1e-12)


# ---- merging ----


@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16", "float16"])
@pytest.mark.parametrize("name", VARIANTS)
def test_a_merged_layer_answers_with_the_merged_weight_alone(
    name: str, dtype: str, rng: np.random.Generator
) -> None:
    layer, x = layer_of(rng, dtype, **VARIANTS[name]), rng.standard_normal((N, D_IN))
    merged, before = nplora.FrozenWeight(layer.merged_weight(), dtype=dtype), layer(x)
    layer.merge()
    assert layer.merged
    bias = 0 if layer.bias is None else layer.bias
    np.testing.assert_array_equal(layer(x), merged.matmul(x) + bias)
    np.testing.assert_array_equal(layer.forward(x)[0], layer(x))
    layer.unmerge()
    assert not layer.merged
    np.testing.assert_array_equal(layer(x), before)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16", "float16"])
def test_a_thousand_merges_leave_the_frozen_weight_bit_identical(
    dtype: str, rng: np.random.Generator
) -> None:
    layer = layer_of(rng, dtype)
    before, original = layer.weight.to_numpy().tobytes(), layer.weight
    for _ in range(1000):
        layer.merge()
        layer.unmerge()
    assert layer.weight is original
    assert layer.weight.to_numpy().tobytes() == before


def test_a_merged_layer_refuses_to_train(rng: np.random.Generator) -> None:
    layer, x = layer_of(rng, use_dora=True), rng.standard_normal((N, D_IN))
    y, saved = layer.forward(x)
    before = layer.A.copy()
    layer.merge()
    for call, what in (
        (lambda: layer.backward(y, saved), "backward"),
        (layer.merge, "merge"),
        (lambda: layer.seed(1), "seed"),
    ):
        with pytest.raises(RuntimeError, match=f"LoRALinear.{what}: the layer is merged; call unmerge"):
            call()
    with pytest.raises(RuntimeError, match=r"AdamW\.step: parameter 'A' is read-only; is its layer merged"):
        nplora.AdamW().step(layer.parameters())
    with pytest.raises(ValueError, match="read-only"):
        layer.A -= 1
    with pytest.raises(ValueError, match="read-only"):
        layer.A = np.ones(layer.A.shape)
    merged_saved = layer.forward(x)[1]
    layer.unmerge()
    with pytest.raises(RuntimeError, match="the layer was merged when this forward pass ran"):
        layer.backward(y, merged_saved)
    with pytest.raises(RuntimeError, match=r"LoRALinear\.unmerge: the layer is not merged"):
        layer.unmerge()
    np.testing.assert_array_equal(layer.A, before)
    nplora.AdamW().step(layer.parameters())


@pytest.mark.parametrize("first_merge", [False, True])
def test_unloading_leaves_a_plain_linear_and_an_empty_layer(
    first_merge: bool, rng: np.random.Generator
) -> None:
    layer, x = layer_of(rng, **VARIANTS["everything"]), rng.standard_normal((N, D_IN))
    before = layer(x)
    if first_merge:
        layer.merge()
    linear = layer.merge_and_unload()
    assert type(linear) is nplora.Linear
    assert not linear.parameters()
    np.testing.assert_allclose(linear(x), before, rtol=1e-12)
    with pytest.raises(AttributeError, match=r"LoRALinear\.A: this layer was unloaded"):
        _ = layer.A
    with pytest.raises(AttributeError, match=r"LoRALinear\.__call__: this layer was unloaded"):
        layer(x)
    with pytest.raises(AttributeError, match=r"LoRALinear\.scale: this layer was unloaded"):
        _ = layer.scale
    with pytest.raises(AttributeError, match=r"LoRALinear\.A: this layer was unloaded"):
        layer.A = 1
    assert repr(layer) == repr(pickle.loads(pickle.dumps(layer))) == "LoRALinear(unloaded)"


def test_a_disabled_adapter_leaves_the_frozen_weight_alone(rng: np.random.Generator) -> None:
    layer, x = layer_of(rng, **VARIANTS["everything"]), rng.standard_normal((N, D_IN))
    expected = x @ layer.weight.to_numpy().T + layer.bias
    for merged in (False, True):
        if merged:
            layer.merge()
        with layer.disable_adapter() as same:
            assert same is layer
            np.testing.assert_allclose(layer(x), expected, rtol=1e-12)
            y, saved = layer.forward(x)
        assert np.any(np.abs(layer(x) - expected) > 0.1)
    layer.unmerge()
    np.testing.assert_allclose(layer.backward(y, saved), y @ layer.weight.to_numpy(), rtol=1e-12)
    assert not any(p.grad.any() for p in layer.parameters())


# ---- threads ----


@pytest.mark.usefixtures("thread_limit")
def test_a_step_is_the_same_to_the_bit_on_any_number_of_threads(rng: np.random.Generator) -> None:
    W, x, dy = (rng.standard_normal(s).astype(np.float32) for s in ((257, 311), (130, 311), (130, 257)))

    def step(threads: int) -> bytes:
        nplora.set_num_threads(threads)
        layer = LoRALinear(W, rank=8, dropout=0.1, use_dora=True, init="gaussian", rng=0)
        y, saved = layer.forward(x)
        arrays = [y, layer.backward(dy, saved), layer.dA, layer.dB, layer.dm, layer.merged_weight()]
        nplora.AdamW().step(layer.parameters())
        return b"".join(a.tobytes() for a in (*arrays, layer.A, layer.B, layer.m) if a is not None)

    assert len({step(threads) for threads in (1, 2, 3)}) == 1


# ---- refusals ----


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"rank": 0}, ValueError, "LoRALinear: rank is 0, expected at least 1"),
        ({"rank": -3}, ValueError, "rank is -3, expected at least 1"),
        ({"rank": True}, TypeError, "rank is True, expected an integer"),
        ({"rank": 4.0}, TypeError, "rank is 4.0, expected an integer"),
        ({"rank": None}, TypeError, "rank is None, expected an integer"),
        ({"alpha": np.nan}, ValueError, "alpha is nan, expected a finite number"),
        ({"alpha": np.inf}, ValueError, "alpha is inf, expected a finite number"),
        ({"alpha": "16"}, TypeError, "alpha is '16', expected a number"),
        ({"dropout": 1.0}, ValueError, "dropout is 1.0, expected at least 0 and below 1"),
        ({"dropout": -0.1}, ValueError, "dropout is -0.1"),
        ({"bias": np.ones(3)}, ValueError, r"bias has shape \(3,\), expected \(12,\)"),
        (
            {"init": "loftq"},
            ValueError,
            "init='loftq' is not available; possible: 'zero', 'gaussian', 'pissa', 'olora'",
        ),
        ({"dtype": "int8"}, ValueError, "dtype='int8' is not available; possible: 'float32'"),
        ({"compute": "int4"}, ValueError, "compute='int4' is not available; possible: 'float32', 'bfloat16'"),
        ({"W": np.ones(3)}, ValueError, "W has 1 axis, expected 2"),
        ({"W": np.ones((1, 2, 3))}, ValueError, "W has 3 axes, expected 2"),
        ({"W": np.ones((3, 3), np.int64)}, TypeError, "W has dtype int64, expected floats"),
    ],
)
def test_bad_settings_are_refused(options: dict[str, Any], error: type[Exception], message: str) -> None:
    arguments = {"W": np.ones((D_OUT, D_IN)), **options}
    with pytest.raises(error, match=message):
        LoRALinear(**arguments)


def test_a_frozen_weight_keeps_its_own_storage() -> None:
    fw = nplora.FrozenWeight(np.ones((9, 9)), dtype="float16")
    assert LoRALinear(fw).weight is LoRALinear(fw, dtype=np.float16).weight is fw
    with pytest.raises(ValueError, match="dtype='float32', but W is a FrozenWeight stored as float16"):
        LoRALinear(fw, dtype="float32")


@pytest.mark.parametrize(
    ("dtype", "compute", "message"),
    [
        ("float32", "bfloat16", "computes in float32; pass W.with_compute('bfloat16') instead"),
        ("q8_0", "int8", "computes in float32; pass W.with_compute('int8') instead"),
        ("float64", "bfloat16",
         "computes in float64; pass FrozenWeight(W.to_numpy(), dtype='float32', compute='bfloat16') instead"),
        ("float32", "int8", "computes in float32; pass W.with_compute('int8') instead"),
        ("float64", "int8",
         "computes in float64; pass FrozenWeight(W.to_numpy(), dtype='float32', compute='int8') instead"),
    ],
)  # fmt: skip
def test_a_frozen_weight_keeps_its_own_arithmetic(dtype: str, compute: str, message: str) -> None:
    fw = nplora.FrozenWeight(np.ones((9, 64)), dtype=dtype)
    with pytest.raises(ValueError, match=f"LoRALinear: .*{re.escape(message)}$"):
        LoRALinear(fw, compute=compute)
    assert LoRALinear(fw, compute="float32").weight is fw
    if "with_compute" in message:
        rounded = fw.with_compute(compute)
        assert LoRALinear(rounded, compute=compute).weight is LoRALinear(rounded).weight is rounded
        for layer in (LoRALinear, nplora.Linear):
            with pytest.raises(ValueError, match=r"pass W\.with_compute\('float32'\) instead"):
                layer(rounded, compute="float32")


def test_a_layer_that_computes_in_bfloat16_stays_near_and_keeps_its_compute_when_merged(
    rng: np.random.Generator,
) -> None:
    W, x = rng.standard_normal((D_OUT, D_IN)), rng.standard_normal((40, D_IN))
    for options in ({}, {"use_dora": True}):
        layer, exact = (
            LoRALinear(W, rank=4, init="gaussian", compute=compute, rng=1, **options)
            for compute in ("bfloat16", "float32")
        )
        size = np.abs(x) @ (np.abs(W) + layer.scale * np.abs(layer.A) @ np.abs(layer.B)).T
        bound = 4.1 * 2.0**-8 * size  # x, B, z and A are rounded, each once
        assert np.all(np.abs(layer(x) - exact(x)) <= bound)
        assert np.any(layer(x) != exact(x))
        merged = layer.merge_and_unload()
        assert merged.weight.compute == "bfloat16"
        assert np.all(np.abs(merged(x) - exact(x)) <= bound)


def test_a_rank_above_both_axes_works_with_a_warning() -> None:
    with pytest.warns(UserWarning, match=r"LoRALinear: rank 9 is above min\(d_out, d_in\) = 3") as caught:
        layer = LoRALinear(np.ones((3, 5)), rank=9)
    assert caught[0].filename == __file__
    assert layer(np.ones(5)).shape == (3,)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda layer, x, s: layer(x[:, :-1]), r"LoRALinear\.forward: x has last axis 16, expected d_in=17"),
        (lambda layer, x, s: layer(3.0), "x is a single number"),
        (lambda layer, x, s: layer.backward(x, s), r"backward: dy has shape \(9, 17\), expected \(9, 12\)"),
        (lambda layer, x, s: layer.backward(np.ones((3, D_OUT)), s), r"dy has shape \(3, 12\), expected"),
    ],
)
def test_operands_of_another_shape_are_refused(
    call: Callable[[LoRALinear, Array, Any], Any], message: str, rng: np.random.Generator
) -> None:
    layer, x = layer_of(rng), rng.standard_normal((N, D_IN))
    saved = layer.forward(x)[1]
    with pytest.raises(ValueError, match=message):
        call(layer, x, saved)
    assert not layer.dA.any()


@pytest.mark.parametrize(
    "layer",
    [
        LoRALinear(np.ones((3, 4)), 2),
        nplora.LoRAEmbedding(np.ones((3, 4)), 2),
        nplora.Linear(np.ones((3, 4))),
        nplora.Embedding(np.ones((3, 4))),
        nplora.LayerNorm(np.ones(4)),
        nplora.ReLU(),
        nplora.Sequential(nplora.ReLU()),
    ],
    ids=lambda layer: type(layer).__name__,
)
def test_what_no_forward_pass_kept_is_refused(layer: nplora.Module) -> None:
    name = type(layer).__name__
    for saved in (None, (np.ones((1, 3)), None), np.ones(3)):
        with pytest.raises(
            TypeError, match=f"^{name}.backward: saved is of type .*, expected .*Saved, which the"
        ):
            layer.backward(np.ones((1, 3)), saved)


@pytest.mark.parametrize(
    ("layer", "other", "x", "dim", "wrong"),
    [
        (
            nplora.Linear(np.ones((3, 4)), trainable=True),
            nplora.Linear(np.ones((3, 5)), trainable=True),
            np.ones((2, 5)),
            3,
            "x is ",
        ),
        (nplora.LayerNorm(np.ones(4)), nplora.LayerNorm(np.ones(1)), np.ones((2, 1)), 4, "normalised x is "),
        (
            nplora.LoRAEmbedding(np.ones((3, 4)), 2),
            nplora.LoRAEmbedding(np.ones((3, 4)), 3),
            np.zeros(2, int),
            4,
            r"A\[ids\] is ",
        ),
        (
            nplora.LoRAEmbedding(np.ones((3, 4)), 2),
            nplora.LoRAEmbedding(np.ones((9, 4)), 2),
            np.array([0, 8]),
            4,
            "array of ids holds 8, expected integers from 0 to 2$",
        ),
        (
            nplora.Embedding(np.ones((3, 4)), trainable=True),
            nplora.Embedding(np.ones((9, 4)), trainable=True),
            np.array([0, 8]),
            4,
            "array of ids holds 8, expected integers from 0 to 2$",
        ),
    ],
    ids=["Linear", "LayerNorm", "LoRAEmbedding of another rank", "LoRAEmbedding", "Embedding"],
)
def test_the_pass_of_another_layer_is_refused(
    layer: nplora.Module, other: nplora.Module, x: Array, dim: int, wrong: str
) -> None:
    refusal = rf"^{type(layer).__name__}\.backward: saved is from another layer: its {wrong}"
    with pytest.raises(ValueError, match=refusal):
        layer.backward(np.ones((2, dim)), other.forward(x)[1])
    assert not any(parameter.grad.any() for parameter in layer.local_parameters())


def test_backward_after_inference_is_refused(rng: np.random.Generator) -> None:
    class Peek(nplora.Module):
        def __init__(self) -> None:
            self.layer = layer_of(rng)

        def forward(self, x: Any) -> tuple[Array, Any]:
            y, self.saved = self.layer.forward(x)
            return y, self.saved

    net = Peek()
    y = net(rng.standard_normal((N, D_IN)))
    assert net.saved.nbytes == 0
    with pytest.raises(RuntimeError, match="this forward pass ran in inference mode and saved nothing"):
        net.layer.backward(y, net.saved)


@pytest.mark.parametrize("rank", [2**16 + 1, 10**9, 2**63])
def test_a_rank_that_would_take_all_memory_is_refused(rank: int) -> None:
    for make in (LoRALinear, nplora.LoRAEmbedding):
        with pytest.raises(ValueError, match=f"^{make.__name__}: rank is {rank}, expected at most 65536$"):
            make(np.ones((3, 4)), rank)


@pytest.mark.parametrize("use_rslora", [False, True])
def test_scale_follows_alpha(use_rslora: bool) -> None:
    layer = nplora.LoRALinear(np.eye(4), rank=4, alpha=8, use_rslora=use_rslora, init="gaussian", rng=0)
    before = layer.delta_weight()
    layer.alpha = 4
    assert layer.scale == (2 if use_rslora else 1)
    np.testing.assert_allclose(layer.delta_weight(), before / 2, rtol=1e-6)
    with pytest.raises(ValueError, match="alpha is nan"):
        layer.alpha = float("nan")
    layer.merge()
    with pytest.raises(RuntimeError, match="merged"):
        layer.alpha = 2


@pytest.mark.parametrize("name", ["rank", "scale", "use_rslora", "use_dora", "freeze_B", "weight", "bias"])
def test_what_would_have_half_an_effect_cannot_be_set(name: str) -> None:
    layer = nplora.LoRALinear(np.eye(4), rank=2)
    with pytest.raises(AttributeError, match=name):
        setattr(layer, name, getattr(layer, name))


def test_repr_shows_the_options() -> None:
    layer = nplora.LoRALinear(np.eye(4), rank=2, dropout=0.1, use_dora=True)
    options = "rank=2, alpha=16, dtype='float32', dropout=0.1, use_dora=True, num_trainable=20"
    assert repr(layer) == f"LoRALinear((4, 4), {options})"
    layer.dropout = 0.0
    assert "dropout" not in repr(layer)
    layer.merge()
    assert "merged=True" in repr(layer)
    rounded = nplora.LoRALinear(np.eye(4), rank=2, init="pissa", compute="bfloat16")
    assert "compute='bfloat16', init='pissa', num_trainable=16)" in repr(rounded)
    plain = nplora.Linear(np.eye(4), compute="int8")
    assert repr(plain) == "Linear((4, 4), dtype='float32', compute='int8', trainable=False)"
    with pytest.raises(ValueError, match="dropout"):
        layer.dropout = 1.0


def test_settings_say_what_the_layer_computes(rng: np.random.Generator) -> None:
    W = rng.standard_normal((D_OUT, D_IN))
    assert LoRALinear(W).settings() == {
        "rank": 8,
        "alpha": 16.0,
        "use_rslora": False,
        "use_dora": False,
        "dropout": 0.0,
        "freeze_B": False,
        "compute": "float32",
    }
    layer = LoRALinear(
        W, 4, 6, compute="bfloat16", dropout=0.5, use_rslora=True, use_dora=True, freeze_B=True
    )
    assert list(layer.settings().values()) == [4, 6.0, True, True, 0.5, True, "bfloat16"]
    layer.alpha, layer.dropout = 7, 0.25
    assert (layer.settings()["alpha"], layer.settings()["dropout"]) == (7.0, 0.25)
    assert json.loads(json.dumps(layer.settings())) == layer.settings()
    assert nplora.LoRAEmbedding(W, rank=2, dtype="float64").settings()["compute"] == "float64"


@pytest.mark.parametrize("method", ["merge", "merge_and_unload"])
@pytest.mark.parametrize(("dtype", "limit"), [("float16", 65504.0), ("bfloat16", 3e38), ("float32", 3e38)])
def test_a_merge_that_would_become_infinite_changes_nothing(method: str, dtype: str, limit: float) -> None:
    model = nplora.Sequential(
        *(LoRALinear(np.full((4, 4), value), rank=2, dtype=dtype) for value in (1.0, limit))
    )
    first, layer = model
    assert isinstance(layer, LoRALinear)
    layer.A[...], layer.B[...] = 1, limit / 64  # ΔW = 8 · 2 · limit / 64
    with pytest.raises(ValueError, match=f"LoRALinear.merge: 16 finite values become infinite in {dtype}"):
        getattr(model, method)()
    assert list(model) == [first, layer]
    assert not any(part.merged for part in model.adapter_layers().values())
    assert layer.A.flags.writeable
    layer.B[...] = np.nan  # what is not finite before may be so afterwards
    layer.merge()
    assert np.isnan(layer(np.ones(4))).all()


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer))])
def test_factors_are_read_only_while_merged_in_a_copy_too(clone: Any, rng: np.random.Generator) -> None:
    layer = layer_of(rng, use_dora=True)
    layer.merge()
    twin = clone(layer)
    for merged in (layer, twin):
        for name in ("A", "B", "m"):
            assert not getattr(merged, name).flags.writeable
            with pytest.raises(ValueError, match="read-only"):
                getattr(merged, name)[...] = 0
    twin.unmerge()
    twin.A[...], twin.B[...], twin.m[...] = 0, 0, 0
    assert layer.A.all()
    layer.unmerge()
    layer.m *= 2
    assert clone(layer).A.flags.writeable


def test_a_merged_layer_is_unmerged_although_its_arrays_cannot_become_writable(
    rng: np.random.Generator,
) -> None:
    """With NumPy 2.5 or later, an array that was pickled while read-only stays read-only after loading."""
    layer = layer_of(rng, use_dora=True)
    layer.merge()
    state = dict(layer.__getstate__())
    for name in ("A", "B", "m"):
        array = state[name]
        state[name] = np.frombuffer(array.tobytes(), array.dtype).reshape(array.shape)
    twin = object.__new__(type(layer))
    twin.__setstate__(state)
    assert not twin.A.flags.writeable
    twin.unmerge()
    twin.A[...], twin.B[...], twin.m[...] = 0, 0, 0
    assert layer.A.all()


def test_dora_norms_do_not_depend_on_what_the_products_compute_in(rng: np.random.Generator) -> None:
    W = rng.standard_normal((40, 256))
    for rank in (8, 9, 24):
        one, other = (
            LoRALinear(W, rank, use_dora=True, init="gaussian", compute=compute, rng=1)
            for compute in ("bfloat16", "float32")
        )
        assert one.m is not None
        np.testing.assert_allclose(one.m, other.m, rtol=1e-6)  # float32; bfloat16 is off by 1e-4


@pytest.mark.parametrize("seed", ["a", -1, 1.5])
def test_a_bad_seed_is_refused_by_the_name_of_the_layer(seed: Any) -> None:
    for make in (LoRALinear, nplora.LoRAEmbedding):
        with pytest.raises((TypeError, ValueError), match=rf"{make.__name__}: rng is "):
            make(np.ones((9, 9)), rng=seed)


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_an_infinite_gradient_propagates_without_a_warning(
    name: str, value: float, rng: np.random.Generator
) -> None:
    layer = layer_of(rng, "float32", **VARIANTS[name])
    y, saved = layer.forward(rng.standard_normal((N, D_IN)))
    dy = np.full(y.shape, value)
    dy[0] = -value
    assert not np.isfinite(layer.backward(dy, saved)).all()
    assert not np.isfinite(layer.dA).all()
    layer.B[0], layer.B[1] = value, -value
    layer.forward(rng.standard_normal((N, D_IN)))
    layer.merged_weight(), layer.delta_weight()


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_dora_over_an_infinite_weight_propagates_without_a_warning(
    value: float, rng: np.random.Generator
) -> None:
    W = rng.standard_normal((D_OUT, D_IN))
    W[0, 0] = value
    layer = LoRALinear(W, rank=4, use_dora=True, init="gaussian", rng=1)
    assert np.isnan(layer.delta_weight()[0]).any()
    layer.A[0] = -np.sign(layer.B[:, 0])  # ‖W‖² is infinite, and so is the cross term, the other way
    assert np.isnan(layer.forward(rng.standard_normal((N, D_IN)))[0][:, 0]).all()
    layer.A[1], layer.B[0, 0] = [1, -1, 1, 1], value
    layer.B[1, 0] = -value
    y, saved = layer.forward(rng.standard_normal((N, D_IN)))
    assert np.isnan(y[:, 1]).all()
    layer.backward(y, saved)
    assert np.isnan(layer.merged_weight()[1]).any()
    huge = LoRALinear(np.full((D_OUT, D_IN), 3e38), 4, 0, use_dora=True)  # its norms overflow float32
    assert np.isinf(huge.m).all()
