"""compute="int8" for many rows: the scheme in NumPy, whose integer codes must be the same."""

import math
import re
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest

import nplora
import reference
from nplora import FrozenWeight, LoRALinear
from nplora.nn.stack import stack_backward, stack_forward
from nplora.weights.storages import BLOCKS, FLOATS

Array = np.ndarray[Any, Any]
STORAGES = sorted((set(FLOATS) | set(BLOCKS)) - {"float64"})
ROWS = (9, 16, 63, 64, 130)
GROUP, DEPTH, UNIT = 64, 4032, 192


def normal(*shape: int, seed: int = 0) -> Array:
    return np.random.default_rng(seed).standard_normal(shape, np.float32)


def coded(x: Array, group: int) -> tuple[Array, Array]:
    """Codes and scales of the rows of x, a list of groups of columns: (n, cols) and (n, groups)."""
    codes, scales = np.zeros(x.shape), np.zeros((len(x), -(-x.shape[1] // group)))
    for i in range(scales.shape[1]):
        columns = slice(i * group, (i + 1) * group)
        largest = np.abs(x[:, columns]).max(axis=1).astype(np.float32)
        scale = largest / np.float32(127)
        ok = np.isfinite(largest) & (largest >= 2.0**-119)
        inverse = np.where(ok, np.float32(1) / np.where(ok, scale, 1), 0).astype(np.float32)
        product = np.where(ok[:, None], x[:, columns], 0) * inverse[:, None]
        assert product.dtype == np.float32
        codes[:, columns] = np.rint(product)
        scales[:, i] = np.where(np.isfinite(largest), np.where(ok, scale, 0), np.nan)
    return codes, scales


def products(x: Array, W: Array) -> tuple[Array, Array]:
    """x Wᵀ in the scheme, with sums in float64, and a bound of the error of float32 sums."""
    (x_codes, x_scales), (w_codes, w_scales) = coded(x, GROUP), coded(W, W.shape[1])
    return _sums(x_codes, x_scales, GROUP, w_codes.T, w_scales[:, 0])


def transposed_products(dy: Array, W: Array) -> tuple[Array, Array]:
    w_codes, w_scales = coded(W, W.shape[1])
    blocks = math.ceil(len(W) / DEPTH)
    group = math.ceil(math.ceil(len(W) / blocks) / UNIT) * UNIT
    codes, scales = coded(dy * w_scales[:, 0].astype(np.float32), group)
    return _sums(codes, scales, group, w_codes, np.ones(W.shape[1]))


def _sums(codes: Array, scales: Array, group: int, other: Array, factors: Array) -> tuple[Array, Array]:
    total, magnitude = (np.zeros((len(codes), other.shape[1])) for _ in range(2))
    for i in range(scales.shape[1]):
        columns = slice(i * group, (i + 1) * group)
        part = scales[:, i, None] * (codes[:, columns] @ other[columns])
        total, magnitude = total + part, magnitude + np.abs(part)
    bound = 2.0**-24 * (2 * scales.shape[1] + 4) * magnitude * np.abs(factors)
    return total * factors, bound + 1e-37


def agree(got: Array, wanted: tuple[Array, Array]) -> bool:
    return bool(np.all(np.abs(got - wanted[0]) <= wanted[1]))


def multiplied(fw: FrozenWeight, x: Array, dy: Array) -> tuple[Array, Array]:
    """Both products with W. They must have the same bits if the codes of W are kept."""
    y, dx = fw.matmul(x), fw.matmul_t(dy)
    kept = fw.with_compute("float32").with_compute("int8")
    kept.keep_int8()
    assert kept.keeps_int8
    assert not fw.keeps_int8
    assert np.array_equal(kept.matmul(x), y, equal_nan=True)
    assert np.array_equal(kept.matmul_t(dy), dx, equal_nan=True)
    return y, dx


@pytest.mark.slow
@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("rows", ROWS)
def test_products_are_those_of_the_scheme(storage: str, rows: int) -> None:
    x, dy = normal(rows, 512), normal(rows, 75, seed=2)
    fw = FrozenWeight(normal(75, 512, seed=1), storage, "int8")
    W = fw.to_numpy()
    y, dx = multiplied(fw, x, dy)
    assert agree(y, products(x, W))
    assert agree(dx, transposed_products(dy, W))


@pytest.mark.parametrize("d_out", [1, 3, 31, 32, 33, 49, 100])
@pytest.mark.parametrize("d_in", [1, 2, 5, 47, 48, 63, 65, 97, 200])
def test_shapes_without_a_common_factor(d_out: int, d_in: int) -> None:
    x, dy, W = normal(11, d_in), normal(11, d_out, seed=1), normal(d_out, d_in, seed=2)
    y, dx = multiplied(FrozenWeight(W, compute="int8"), x, dy)
    assert agree(y, products(x, W))
    assert agree(dx, transposed_products(dy, W))


@pytest.mark.parametrize("depth", [4032, 4033, 9000])
def test_a_long_depth_is_cut(depth: int) -> None:
    x, W = normal(9, depth), normal(5, depth, seed=1)
    assert agree(multiplied(FrozenWeight(W, compute="int8"), x, normal(9, 5))[0], products(x, W))
    dy, W = normal(9, depth), normal(depth, 5, seed=1)
    assert agree(multiplied(FrozenWeight(W, compute="int8"), normal(9, 5), dy)[1], transposed_products(dy, W))


@pytest.mark.parametrize("sign", [1, -1])
def test_sums_of_the_largest_codes_do_not_overflow(sign: int) -> None:
    """All codes are 127 or -127. Without cuts of the depth, a sum would be 2^20 * 127 * 127, above 2^33.

    In a forward pass, a group has only 64 codes, so its sum cannot overflow.
    """
    depth = 2**20
    ones = np.ones((9, depth), np.float32)
    dx = FrozenWeight(np.full((depth, 1), sign, np.float32), compute="int8").matmul_t(ones)
    assert dx == pytest.approx(sign * depth, rel=1e-4)


def test_a_backward_pass_without_int8_has_the_bits_of_bfloat16() -> None:
    results = []
    for compute in ("int8", "bfloat16"):
        layer = LoRALinear(FrozenWeight(normal(70, 96), "q8_0", compute), rank=3, rng=0)
        layer.A[...] = 0.1
        x = normal(20, 96, seed=1)
        _, saved = stack_forward([layer], x)
        dx = stack_backward([layer], [normal(20, 70, seed=2)], saved, int8=False)
        results.append((dx, layer.dA, layer.dB))
    for int8, bfloat16 in zip(*results, strict=True):
        assert np.array_equal(int8, bfloat16)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_values_that_are_not_finite_stay(value: float) -> None:
    x, dy, W = normal(20, 128), normal(20, 40, seed=1), normal(40, 128, seed=2)
    fw = FrozenWeight(W, compute="int8")
    x[3, 70] = dy[4, 9] = value
    y, dx = fw.matmul(x), fw.matmul_t(dy)
    assert not np.isfinite(y[3]).any()
    assert not np.isfinite(dx[4]).any()
    assert np.isfinite(np.delete(y, 3, 0)).all()
    assert np.isfinite(np.delete(dx, 4, 0)).all()
    W[7, 5] = value
    y, dx = multiplied(FrozenWeight(W, compute="int8"), normal(20, 128), normal(20, 40))
    assert not np.isfinite(y[:, 7]).any()
    assert not np.isfinite(dx[:, 5]).any()


def test_zeros_and_tiny_numbers_give_zero() -> None:
    x, W = np.zeros((9, 128), np.float32), normal(40, 128)
    x[1] = 1e-40
    W[3] = 0
    W[4] = 1e-42
    fw = FrozenWeight(W, compute="int8")
    assert np.all(fw.matmul(x) == 0)
    assert np.all(fw.matmul_t(np.eye(40, dtype=np.float32)[[0, 3, 4, 3, 4, 3]])[1:] == 0)


@pytest.mark.parametrize("largest", [2.0**-119, 2.0**108 * 1.99])
def test_values_within_the_limits_neither_vanish_nor_overflow(largest: float) -> None:
    """Without the scales of W, the largest sum is 4032 * 127 * 2^109, just below 2^128."""
    x, W = np.full((9, DEPTH), largest, np.float32), np.full((5, DEPTH), 1 / largest, np.float32)
    assert FrozenWeight(W, compute="int8").matmul(x) == pytest.approx(DEPTH, rel=1e-5)


@pytest.mark.usefixtures("thread_limit")
def test_results_do_not_depend_on_threads_or_on_other_rows() -> None:
    fw = FrozenWeight(normal(900, 512), "q4_k", "int8")
    x, dy = normal(300, 512, seed=1), normal(300, 900, seed=2)
    results = set()
    for threads in (1, 2, 3, 7):
        nplora.set_num_threads(threads)
        y, dx = multiplied(fw, x, dy)
        results.add(y.tobytes() + dx.tobytes())
    assert len(results) == 1
    assert np.array_equal(fw.matmul(x[50:70]), fw.matmul(x)[50:70])
    assert np.array_equal(fw.matmul_t(dy[50:70]), fw.matmul_t(dy)[50:70])


@pytest.mark.parametrize("rows", [1, 4, 5, 8, 9, 40])
@pytest.mark.parametrize("storage", ["q4_1", "bfloat16"])
def test_a_layer_computes_the_same_with_kept_codes(storage: str, rows: int) -> None:
    results = []
    for keeps in (False, True):
        weights = [FrozenWeight(normal(n, 96, seed=n), storage, "int8") for n in (70, 33)]
        layers = [LoRALinear(weight, rank=3, rng=0) for weight in weights]
        for layer in layers:
            layer.A[...] = 0.1
            if keeps:
                layer.weight.keep_int8()
        ys, saved = stack_forward(layers, normal(rows, 96))
        dx = stack_backward(layers, [normal(rows, n) for n in (70, 33)], saved, dither_key=5)
        results.append([*ys, dx, *(layer.dA for layer in layers), *(layer.dB for layer in layers)])
    for converted, kept in zip(*results, strict=True):
        assert np.array_equal(converted, kept)


@pytest.mark.parametrize("shape", [(1, 1), (32, 64), (33, 65), (0, 5), (5, 0)])
def test_kept_codes_take_a_byte_for_each_element(shape: tuple[int, int]) -> None:
    fw = FrozenWeight(normal(*shape), compute="int8")
    for _ in range(2):
        fw.keep_int8()
        assert fw.keeps_int8
    d_out, d_in = shape
    assert fw.int8_nbytes == math.ceil(d_out / 32) * 32 * math.ceil(d_in / 4) * 4
    multiplied(fw.with_compute("float32").with_compute("int8"), normal(9, d_in), normal(9, d_out))
    for _ in range(2):
        fw.drop_int8()
        assert not fw.keeps_int8


@pytest.mark.parametrize("compute", ["float32", "bfloat16"])
def test_only_a_weight_in_int8_keeps_codes(compute: str) -> None:
    fw = FrozenWeight(normal(8, 64), compute=compute)
    message = f"compute='{compute}', expected 'int8'; use weight.with_compute('int8')"
    with pytest.raises(ValueError, match=re.escape(message)):
        fw.keep_int8()
    with pytest.raises(ValueError, match="the weight does not compute in int8"):
        fw.packed.keep_int8()
    assert not fw.keeps_int8


def test_codes_may_be_kept_and_dropped_during_products() -> None:
    fw, x, dy = FrozenWeight(normal(900, 512), "q4_k", "int8"), normal(40, 512), normal(40, 900)
    wanted = fw.matmul(x), fw.matmul_t(dy)

    def call(i: int) -> tuple[Array, Array]:
        fw.keep_int8() if i % 2 else fw.drop_int8()
        return fw.matmul(x), fw.matmul_t(dy)

    with ThreadPoolExecutor(8) as pool:
        for found in pool.map(call, range(64)):
            assert np.array_equal(found[0], wanted[0])
            assert np.array_equal(found[1], wanted[1])


# ---- stochastic rounding of dy ----


def dithered_codes(values: Array, key: int) -> Array:
    """Rows of values, in units of their scales, rounded up or down by the random bits of the core."""
    n, cols = values.shape
    element = np.arange(n)[:, None] * (-(-cols // 64) * 64) + np.arange(cols)
    counter = (element // 64 * 16 + element % 16).astype(np.uint64)
    words = reference.philox4x32(counter.ravel(), key).reshape(*counter.shape, 4)
    chosen = np.take_along_axis(words, (element // 16 % 4)[..., None], axis=2)[..., 0]
    bits = chosen.astype(np.int64) & (2**23 - 1)
    fixed = np.clip(np.trunc(values.astype(np.float64) * 2**23), -127 * 2**23, 127 * 2**23)
    codes: Array = np.floor((fixed + bits) / 2**23)
    return codes


def backward(layers: list[nplora.Linear], dys: list[Array], **options: Any) -> Array:
    _, saved = stack_forward(layers, np.zeros((len(dys[0]), layers[0].shape[1]), np.float32))
    dx: Array = stack_backward(layers, dys, saved, **options)
    return dx


def test_dithered_codes_are_those_of_philox() -> None:
    """The layers of a stack draw with keys that follow each other."""
    sizes, key = (64, 200), 2**64 - 1
    weights = [normal(n, 96, seed=n) for n in sizes]
    layers = [nplora.Linear(FrozenWeight(W, "float32", "int8")) for W in weights]
    dys = [normal(30, n, seed=1 + n) ** 3 for n in sizes]
    total, magnitude = np.zeros((30, 96)), np.zeros((30, 96))
    for i, (dy, W) in enumerate(zip(dys, weights, strict=True)):
        w_codes, w_scales = coded(W, 96)
        folded = dy * w_scales[:, 0].astype(np.float32)
        scale = np.abs(folded).max(axis=1, keepdims=True) / np.float32(127)
        codes = dithered_codes(folded * (np.float32(1) / scale), (key + i) % 2**64)
        total += scale * (codes @ w_codes)
        magnitude += np.abs(scale * (codes @ w_codes))
    dx = backward(layers, dys, dither_key=key)
    assert np.all(np.abs(dx - total) <= 8 * 2.0**-24 * magnitude + 1e-30)
    assert not np.array_equal(dx, backward(layers, dys))


def test_a_gradient_of_logits_survives_in_the_mean_of_its_dithered_products() -> None:
    """dy is p - onehot, where no p reaches half a code. Rounded to nearest, all p become 0 together."""
    words, n = 800, 12
    rng = np.random.default_rng(0)
    W = rng.standard_normal((words, 64)).astype(np.float32) + 1  # so that the mean row matters
    dy = rng.dirichlet(np.full(words, 50.0), n).astype(np.float32)
    assert dy.max() < 0.5 / 127
    dy[np.arange(n), rng.integers(0, words, n)] -= 1
    layer, exact = nplora.Linear(FrozenWeight(W, "float32", "int8")), dy.astype(np.float64) @ W
    error = lambda dx: np.linalg.norm(dx - exact) / np.linalg.norm(exact)  # noqa: E731
    runs = [backward([layer], [dy], dither_key=key) for key in range(64)]
    assert error(backward([layer], [dy])) > 0.3
    assert error(np.mean(runs, axis=0)) < 0.05
    assert error(runs[0]) > 2 * error(np.mean(runs, axis=0))  # the runs differ
    assert np.array_equal(runs[5], backward([layer], [dy], dither_key=5))


def test_dithered_products_have_the_same_bits_with_any_number_of_threads() -> None:
    layer, dy = nplora.Linear(FrozenWeight(normal(999, 700), "float32", "int8")), normal(600, 999, seed=1)
    results = set()
    for threads in (1, 2, 5):
        nplora.set_num_threads(threads)
        results.add(backward([layer], [dy], dither_key=3).tobytes())
    assert len(results) == 1


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_a_layer_adds_its_update_as_with_bfloat16(dropout: float) -> None:
    """y, dx, dA and dB differ from those of bfloat16 by the products with W alone."""
    x, dy, W = normal(40, 192), normal(40, 96, seed=1), normal(96, 192, seed=2)
    found = {}
    for compute in ("int8", "bfloat16"):
        layer = LoRALinear(FrozenWeight(W, "q8_0", compute), rank=5, init="gaussian", dropout=dropout, rng=0)
        y, saved = layer.forward(x)
        dx = layer.backward(dy, saved)
        assert dx is not None
        frozen = layer.weight.matmul(x), layer.weight.matmul_t(dy)
        found[compute] = y - frozen[0], dx - frozen[1], layer.dA, layer.dB
    for int8, bfloat16 in zip(found["int8"], found["bfloat16"], strict=True):
        assert np.allclose(int8, bfloat16, rtol=0, atol=2e-4 * np.abs(bfloat16).max())


def test_a_stack_reads_x_once_and_sums_dx_over_its_layers() -> None:
    x, dys = normal(30, 96), [normal(30, n, seed=n) for n in (64, 33)]
    layers = [LoRALinear(FrozenWeight(normal(n, 96, seed=n), "float32", "int8"), 2, rng=0) for n in (64, 33)]
    ys, saved = stack_forward(layers, x)
    for y, layer in zip(ys, layers, strict=True):
        assert np.array_equal(y, layer.forward(x)[0])
    dx = stack_backward(layers, dys, saved)
    wanted = sum(layer.weight.matmul_t(dy) for layer, dy in zip(layers, dys, strict=True))
    assert np.allclose(dx, wanted, rtol=0, atol=1e-3)


@pytest.mark.parametrize("storage", ["float32", "q4_1"])
def test_layers_compute_many_rows_in_bfloat16_unless_they_train(storage: str) -> None:
    """W is not rounded once more for an answer of the model."""
    x, W = normal(40, 64), normal(33, 64, seed=1)
    for make in (lambda w: LoRALinear(w, 2, rng=0), nplora.Linear):
        int8, bfloat16 = (make(FrozenWeight(W, storage, compute)) for compute in ("int8", "bfloat16"))
        assert np.array_equal(int8(x), bfloat16(x))
        assert not np.array_equal(int8.forward(x)[0], bfloat16.forward(x)[0])


def test_the_nearest_choice_for_a_float64_weight_is_named() -> None:
    words = "a float64 weight computes in float64, got compute='int8'; use dtype='float32' instead"
    with pytest.raises(ValueError, match=f"FrozenWeight: {re.escape(words)}$"):
        LoRALinear(normal(8, 64), rank=2, dtype="float64", compute="int8")
