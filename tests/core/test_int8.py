"""compute="int8": a few rows of x in 8 bits, rounded as in NumPy; cases that use bfloat16; refusals."""

import copy
import pickle
from typing import Any

import numpy as np
import pytest

import nplora
from nplora import FrozenWeight, LoRALinear
from nplora.nn.module import inference
from nplora.weights.storages import BLOCKS

Array = np.ndarray[Any, Any]
GGUF_BLOCKS = sorted(set(BLOCKS) - {"nf4"})
ROWS = (1, 2, 3, 4)  # a small batch on every instruction set


def normal(*shape: int, seed: int = 0) -> Array:
    return np.random.default_rng(seed).standard_normal(shape, np.float32)


def rounded(x: Array) -> Array:
    """x rounded as int8 stores it: 127 steps up to the largest magnitude of each 32 values."""
    strips = x.astype(np.float64).reshape(len(x), -1, 32)
    scale = np.abs(strips).max(axis=2, keepdims=True) / 127
    return (np.rint(strips / np.where(scale == 0, 1, scale)) * scale).reshape(x.shape)


def bound(x: Array, W: Array) -> Array:
    """The error of sums of float32 products. Codes of 4 and 5 bits are summed with an offset of 8 or 16."""
    return 2.0**-24 * 64 * np.abs(x) @ (np.abs(W) + np.abs(W).max()).T


@pytest.mark.parametrize("storage", GGUF_BLOCKS)
@pytest.mark.parametrize("rows", ROWS)
def test_a_few_rows_are_rounded_to_eight_bits_and_no_further(storage: str, rows: int) -> None:
    x, fw = normal(rows, 512), FrozenWeight(normal(70, 512, seed=1), storage, "int8")
    W = fw.to_numpy().astype(np.float64)
    got = fw.matmul(x)
    assert np.all(np.abs(got - rounded(x) @ W.T) <= bound(x, W))
    assert not np.allclose(got, x.astype(np.float64) @ W.T, rtol=0, atol=bound(x, W).max())


@pytest.mark.parametrize("rows", range(1, 11))
def test_explain_says_up_to_how_many_rows_are_int8(rows: int) -> None:
    W, x = normal(70, 512, seed=1), normal(rows, 512)
    fw = FrozenWeight(W, "q5_0", "int8")
    got = fw.matmul(x)
    as_blocks = "W in its own blocks" in LoRALinear(fw, rank=1).explain(rows)
    assert as_blocks == (rows <= 8)
    W = fw.to_numpy().astype(np.float64)
    assert as_blocks == bool(np.all(np.abs(got - rounded(x) @ W.T) <= bound(x, W)))


@pytest.mark.slow
@pytest.mark.parametrize("storage", GGUF_BLOCKS)
def test_the_error_of_rounding_x_is_below_one_percent(storage: str) -> None:
    x, W = normal(4, 1024), normal(256, 1024, seed=1)
    exact = FrozenWeight(W, storage).matmul(x)
    error = FrozenWeight(W, storage, "int8").matmul(x) - exact
    assert np.linalg.norm(error) < 0.01 * np.linalg.norm(exact)


def test_blocks_of_zeros_and_of_tiny_numbers_give_zero_and_a_nan_stays() -> None:
    fw = FrozenWeight(normal(5, 64), "q4_0", "int8")
    x = np.zeros((3, 64), np.float32)
    x[1, :32] = 1e-40
    x[2, 40] = np.nan
    y = fw.matmul(x)
    assert np.all(y[:2] == 0)
    assert np.all(np.isnan(y[2]))


@pytest.mark.parametrize("storage", ["float32", "float16", "bfloat16", "nf4"])
def test_other_storage_computes_few_rows_in_float32(storage: str) -> None:
    W, x = normal(96, 256), normal(3, 256, seed=1)
    int8, float32 = (FrozenWeight(W, storage, compute) for compute in ("int8", "float32"))
    assert np.array_equal(int8.matmul(x), float32.matmul(x))
    assert not int8.meets_int8


def test_a_float64_weight_is_refused() -> None:
    with pytest.raises(
        ValueError, match=r"computes in float64, got compute='int8'; use dtype='float32' instead$"
    ):
        FrozenWeight(normal(4, 32).astype(np.float64), "float64", "int8")


@pytest.mark.usefixtures("thread_limit")
def test_results_do_not_depend_on_the_number_of_threads() -> None:
    fw, x = FrozenWeight(normal(3000, 512), "q4_k", "int8"), normal(2, 512, seed=1)
    results = set()
    for threads in (1, 2, 3, 7):
        nplora.set_num_threads(threads)
        results.add(fw.matmul(x).tobytes())
    assert len(results) == 1


def test_copies_compute_the_same_results() -> None:
    fw = FrozenWeight(normal(8, 256), "q5_k", "int8")
    for other in (copy.deepcopy(fw), pickle.loads(pickle.dumps(fw)), fw.like(normal(8, 256))):
        assert other.compute == "int8"
    assert "compute='int8'" in repr(fw)


def test_unrounded_products_are_not_rounded() -> None:
    W, x = normal(40, 256), normal(6, 256, seed=1)
    int8, exact = FrozenWeight(W, "q4_k", "int8"), FrozenWeight(W, "q4_k")
    assert np.array_equal(int8.matmul_unrounded(x[:4]), exact.matmul(x[:4]))
    wanted = np.concatenate([exact.matmul(x[:4]), exact.matmul(x[4:])])
    assert np.allclose(int8.matmul_unrounded(x), wanted, rtol=0, atol=1e-4)


@pytest.mark.parametrize("compute", ["float32", "bfloat16", "int8"])
@pytest.mark.parametrize("lead", [(), (0,), (3,), (5, 2), (2, 0, 3)])
def test_unrounded_products_take_rows_of_any_shape(compute: str, lead: tuple[int, ...]) -> None:
    fw = FrozenWeight(normal(40, 256), "q4_k", compute)
    x, dy = normal(*lead, 256), normal(*lead, 40)
    W = fw.to_numpy().astype(np.float64)
    for got, wanted in ((fw.matmul_unrounded(x), x @ W.T), (fw.matmul_t_unrounded(dy), dy @ W)):
        assert got.shape == wanted.shape
        assert np.allclose(got, wanted, rtol=0, atol=1e-3)  # bfloat16 would be off by 0.05


def test_an_adapter_and_a_bias_are_added_in_float32() -> None:
    fw, x = FrozenWeight(normal(70, 256), "q4_1", "int8"), normal(3, 256, seed=1)
    layer = LoRALinear(fw, rank=4, bias=normal(70, seed=5))
    layer.A[...] = normal(70, 4, seed=2)
    update = layer.scale * (x.astype(np.float64) @ layer.B.T.astype(np.float64)) @ layer.A.T
    wanted = fw.matmul(x).astype(np.float64) + update + layer.bias
    assert np.allclose(layer(x), wanted, rtol=1e-5, atol=1e-4)


def test_explain_says_which_rows_are_int8() -> None:
    layer = LoRALinear(FrozenWeight(normal(8, 64), "q4_1", "int8"), rank=2)
    with inference():
        text = layer.explain(1, training=False)
        assert text.startswith("computes in: int8, summed in integers and float32, with W in its own blocks")
        assert layer.explain(100, training=False).startswith("computes in: bfloat16")
    assert layer.explain(100).startswith("computes in: int8, summed in integers and float32; the update")
    plain = LoRALinear(FrozenWeight(normal(8, 64), "float32", "int8"), rank=2)
    assert plain.explain(1).startswith("computes in: float32")
    assert plain.explain(100).startswith("computes in: int8")
