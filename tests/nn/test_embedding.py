"""Embedding and LoRAEmbedding: rows of a table, and the gradients of trained values."""

import dataclasses
from typing import Any

import numpy as np
import pytest

import nplora
import reference
from nplora import Embedding, LoRAEmbedding

VOCAB, DIM, RANK = 11, 6, 3
IDS = np.array([[3, 0, 3], [10, 7, 3]])


def lora(rng: np.random.Generator, dtype: str = "float64", **options: Any) -> LoRAEmbedding:
    """A layer in the middle of its training."""
    layer = LoRAEmbedding(
        rng.standard_normal((VOCAB, DIM)), rank=RANK, alpha=5, dtype=dtype, rng=1, **options
    )
    layer.A[...], layer.B[...] = rng.standard_normal((VOCAB, RANK)), rng.standard_normal((RANK, DIM))
    return layer


@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16", "float16"])
def test_a_frozen_table_gives_its_rows(dtype: str, rng: np.random.Generator) -> None:
    pytest.importorskip("ml_dtypes")  # NumPy then knows "bfloat16"
    W = rng.standard_normal((VOCAB, DIM))
    layer = Embedding(W, dtype=dtype)
    table = W if dtype == "float64" else W.astype(np.float32).astype(np.dtype(dtype)).astype(np.float32)
    y, saved = layer.forward(IDS)
    np.testing.assert_array_equal(y, table[IDS])
    assert layer.backward(y, saved) is None
    assert layer.parameters() == []
    assert saved.nbytes == 0
    assert layer.num_parameters == VOCAB * DIM


@pytest.mark.parametrize("ids", [3, [], [[]], [1, 2], np.zeros((2, 0, 3), int), np.uint8([5]), IDS])
def test_ids_of_any_shape_work(ids: Any, rng: np.random.Generator) -> None:
    table, shape = rng.standard_normal((VOCAB, DIM)), (*np.shape(ids), DIM)
    for layer in (Embedding(table), Embedding(table, trainable=True), LoRAEmbedding(table, rank=RANK)):
        y, saved = layer.forward(ids)
        assert y.shape == layer(ids).shape == shape
        np.testing.assert_array_equal(y, table.astype(np.float32)[np.asarray(ids, int)])
        layer.backward(y, saved)


def test_gradients_of_a_trained_table_match_central_differences(rng: np.random.Generator) -> None:
    layer = Embedding(rng.standard_normal((VOCAB, DIM)), dtype="float64", trainable=True)
    y, saved = layer.forward(IDS)
    c = rng.standard_normal(y.shape)
    layer.backward(c, saved)
    pairs = [(p.value, p.grad) for p in layer.parameters()]
    assert [p.name for p in layer.parameters()] == ["weight"]
    assert reference.gradient_error(lambda: float((c * layer(IDS)).sum()), pairs, rng) <= 1e-6
    assert not np.delete(pairs[0][1], [0, 3, 7, 10], axis=0).any()


@pytest.mark.parametrize("use_rslora", [False, True])
def test_gradients_of_the_update_match_central_differences(
    use_rslora: bool, rng: np.random.Generator
) -> None:
    layer = lora(rng, use_rslora=use_rslora)
    y, saved = layer.forward(IDS)
    c = rng.standard_normal(y.shape)
    assert layer.backward(c, saved) is None
    pairs = [(p.value, p.grad) for p in layer.parameters()]
    assert reference.gradient_error(lambda: float((c * layer(IDS)).sum()), pairs, rng) <= 1e-6


def test_a_frozen_b_has_no_gradient_and_changes_no_other(rng: np.random.Generator) -> None:
    layer, frozen = lora(np.random.default_rng(5)), lora(np.random.default_rng(5), freeze_B=True)
    c = rng.standard_normal((*IDS.shape, DIM))
    for one in (layer, frozen):
        saved = one.forward(IDS)[1]
        one.backward(c, saved)
    assert layer.dA.any()
    np.testing.assert_array_equal(frozen.dA, layer.dA)
    assert frozen.dB is None
    assert [parameter.name for parameter in frozen.parameters()] == ["A"]
    assert saved.nbytes < layer.forward(IDS)[1].nbytes
    with pytest.raises(ValueError, match="saved no rows of A, which the gradient of B needs"):
        layer.backward(c, dataclasses.replace(layer.forward(IDS)[1], rows=None))


def test_gradients_add_up(rng: np.random.Generator) -> None:
    layer = lora(rng)
    y, saved = layer.forward(IDS)
    layer.backward(y, saved)
    once = [p.grad.copy() for p in layer.parameters()]
    layer.backward(y, saved)
    for p, gradient in zip(layer.parameters(), once, strict=True):
        np.testing.assert_allclose(p.grad, 2 * gradient, rtol=1e-12)


@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16"])
def test_the_update_is_added_to_the_rows(dtype: str, rng: np.random.Generator) -> None:
    layer = lora(rng, dtype)
    E = layer.weight.to_numpy().astype(np.float64)
    exact = reference.merge(E, layer.A, layer.B, layer.scale)[IDS]
    bound = reference.merge(np.abs(E), np.abs(layer.A), np.abs(layer.B), layer.scale)[IDS]
    error = np.abs(layer.forward(IDS)[0] - exact)
    assert np.all(error <= reference.gamma(2 * RANK + 3, layer.A.dtype) * bound)
    np.testing.assert_allclose(layer.merged_weight()[IDS], exact, rtol=1e-5, atol=1e-5)


def test_a_fresh_layer_starts_as_its_table_with_pefts_factors(rng: np.random.Generator) -> None:
    table = rng.standard_normal((500, 400))
    layer = LoRAEmbedding(table, rank=16, rng=0)
    np.testing.assert_array_equal(layer(np.arange(500)), table.astype(np.float32))
    assert not layer.A.any()
    assert layer.B.std() == pytest.approx(1, rel=0.03)
    assert layer.scale == 1
    assert [p.name for p in layer.parameters()] == ["A", "B"]
    assert (layer.A.shape, layer.B.shape) == ((500, 16), (16, 400))


def test_merging_works_as_in_a_linear_layer(rng: np.random.Generator) -> None:
    layer = lora(rng)
    before, table = layer(IDS), layer.weight.to_numpy()
    y, saved = layer.forward(IDS)
    layer.merge()
    np.testing.assert_allclose(layer(IDS), before, rtol=1e-12)
    with pytest.raises(RuntimeError, match=r"LoRAEmbedding\.backward: the layer is merged"):
        layer.backward(y, saved)
    merged_saved = layer.forward(IDS)[1]
    with layer.disable_adapter():
        np.testing.assert_array_equal(layer(IDS), table[IDS])
    layer.unmerge()
    np.testing.assert_array_equal(layer(IDS), before)
    with pytest.raises(RuntimeError, match="merged when this forward pass ran"):
        layer.backward(y, merged_saved)
    plain = layer.merge_and_unload()
    assert type(plain) is Embedding
    np.testing.assert_allclose(plain(IDS), before, rtol=1e-12)


def test_a_disabled_adapter_has_no_gradient(rng: np.random.Generator) -> None:
    layer = lora(rng)
    with layer.disable_adapter():
        y, saved = layer.forward(IDS)
        layer.backward(y, saved)
    assert not any(p.grad.any() for p in layer.parameters())


def test_scale_zero_leaves_the_factors_unread(rng: np.random.Generator) -> None:
    layer = LoRAEmbedding(rng.standard_normal((VOCAB, DIM)), rank=RANK, alpha=0)
    layer.A[...], layer.B[...] = np.nan, np.nan
    y, saved = layer.forward(IDS)
    assert np.isfinite(y).all()
    layer.backward(y, saved)
    assert not layer.dA.any()


@pytest.mark.usefixtures("thread_limit")
def test_a_step_is_the_same_to_the_bit_on_any_number_of_threads(rng: np.random.Generator) -> None:
    table, ids = rng.standard_normal((500, 257)), rng.integers(0, 500, (40, 50))
    results = set()
    for threads in (1, 2, 3):
        nplora.set_num_threads(threads)
        layer = LoRAEmbedding(table, rank=8, init="gaussian", rng=0)
        y, saved = layer.forward(ids)
        layer.backward(y, saved)
        results.add((y.tobytes(), *(p.grad.tobytes() for p in layer.parameters())))
    assert len(results) == 1


@pytest.mark.parametrize("make", [Embedding, lambda W: LoRAEmbedding(W, rank=2)])
@pytest.mark.parametrize(
    ("ids", "error", "message"),
    [
        ([3, 11], ValueError, r"Embedding\.forward: ids holds 11, expected integers from 0 to 10"),
        ([-1, 3], ValueError, "ids holds -1, expected integers from 0 to 10"),
        ([1.0], TypeError, "ids has dtype float64, expected integers"),
        ([True], TypeError, "ids has dtype bool, expected integers"),
    ],
)
def test_bad_ids_are_refused(make: Any, ids: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        make(np.ones((VOCAB, DIM)))(ids)


@pytest.mark.parametrize("make", [Embedding, lambda W: LoRAEmbedding(W, rank=2)])
def test_a_gradient_of_another_shape_is_refused(make: Any) -> None:
    layer = make(np.ones((VOCAB, DIM)))
    y, saved = layer.forward(IDS)
    with pytest.raises(
        ValueError, match=r"Embedding\.backward: dy has shape \(1, 3, 6\), expected \(2, 3, 6\)"
    ):
        layer.backward(y[:1], saved)


def test_bad_settings_are_refused() -> None:
    for W in (np.ones(3), np.ones((1, 2, 3))):
        with pytest.raises(ValueError, match=r"ax[ie]s, expected 2"):
            LoRAEmbedding(W, rank=2)
    with pytest.raises(ValueError, match="LoRAEmbedding: rank is 0"):
        LoRAEmbedding(np.ones((4, 4)), rank=0)
    with pytest.raises(ValueError, match="trainable=True, expected dtype='float32' or 'float64'"):
        Embedding(np.ones((4, 4)), dtype="bfloat16", trainable=True)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_nan_and_infinity_propagate_without_a_warning(value: float, rng: np.random.Generator) -> None:
    for layer in (Embedding(np.ones((VOCAB, DIM)), trainable=True), lora(rng, "float32")):
        y, saved = layer.forward(IDS)
        dy = np.full(y.shape, value)
        dy[0, 0] = -value  # the same id has both
        layer.backward(dy, saved)
        layer.backward(-dy, saved)
        assert not np.isfinite(layer.parameters()[0].grad[IDS]).any()
    layer.A[...], layer.B[...] = 1, np.inf
    table = np.ones((VOCAB, DIM))
    table[3] = -np.inf
    opposite = LoRAEmbedding(table, rank=RANK)
    opposite.A[...], opposite.B[...] = 1, value
    assert np.isnan(opposite(IDS)[0, 0]).all()


@pytest.mark.parametrize("make", [Embedding, lambda W: LoRAEmbedding(W, rank=2)])
def test_unsigned_ids_out_of_range_are_named_as_they_are(make: Any) -> None:
    with pytest.raises(ValueError, match="ids holds 18446744073709551615"):
        make(np.ones((VOCAB, DIM)))(np.array([2**64 - 1], np.uint64))
