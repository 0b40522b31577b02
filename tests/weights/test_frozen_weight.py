"""FrozenWeight: storage, products, and refused arguments."""

import copy
import pickle
import sys
from typing import Any

import numpy as np
import pytest

import nplora
import reference
from nplora import FrozenWeight, _core
from nplora.formats import safetensors

ml_dtypes = pytest.importorskip("ml_dtypes")

STORAGES = ["float32", "float64", "bfloat16", "float16"]


def weight(rng: np.random.Generator, shape: tuple[int, int] = (37, 53)) -> Any:
    return rng.standard_normal(shape)


def as_stored(W: Any, storage: str) -> Any:
    """W rounded to its storage format, in float64."""
    return (
        W.astype(np.float32 if storage != "float64" else np.float64)
        .astype(np.dtype(storage))
        .astype(np.float64)
    )


@pytest.mark.parametrize("storage", STORAGES)
def test_to_numpy_returns_the_stored_values(storage: str, rng: np.random.Generator) -> None:
    W = weight(rng)
    fw = FrozenWeight(W, dtype=storage)
    back = fw.to_numpy()
    assert back.dtype == (np.float64 if storage == "float64" else np.float32)
    np.testing.assert_array_equal(back, as_stored(W, storage))
    assert (fw.shape, fw.size, fw.dtype) == ((37, 53), 37 * 53, storage)
    assert fw.nbytes >= W.size * np.dtype(storage).itemsize


@pytest.mark.parametrize("storage", ["bfloat16", "float16"])
def test_sixteen_bits_take_half_the_memory(storage: str, rng: np.random.Generator) -> None:
    W = weight(rng, (256, 480))
    assert FrozenWeight(W, dtype=storage).nbytes <= 0.51 * FrozenWeight(W).nbytes


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("lead", [(), (1,), (7,), (0,), (2, 3), (2, 0, 3), (1, 1, 1, 4)])
def test_products_take_any_leading_axes(
    storage: str, lead: tuple[int, ...], rng: np.random.Generator
) -> None:
    W = weight(rng)
    fw, stored = FrozenWeight(W, dtype=storage), as_stored(W, storage)
    dtype = np.float64 if storage == "float64" else np.float32
    x, dy = rng.standard_normal((*lead, 53)).astype(dtype), rng.standard_normal((*lead, 37)).astype(dtype)
    y, dx = fw.matmul(x), fw.matmul_t(dy)
    assert y.shape == (*lead, 37)
    assert dx.shape == (*lead, 53)
    assert y.dtype == dx.dtype == dtype
    # A sum of k products takes at most 2 k roundings, in any order.
    bound = reference.gamma(2 * 53, dtype) * (np.abs(x).astype(np.float64) @ np.abs(stored).T)
    assert np.all(np.abs(y - x.astype(np.float64) @ stored.T) <= bound)
    bound = reference.gamma(2 * 37, dtype) * (np.abs(dy).astype(np.float64) @ np.abs(stored))
    assert np.all(np.abs(dx - dy.astype(np.float64) @ stored) <= bound)


def test_out_is_written_and_returned(rng: np.random.Generator) -> None:
    fw = FrozenWeight(weight(rng))
    x, out = rng.standard_normal((4, 53)), np.empty((4, 37), np.float32)
    assert fw.matmul(x, out=out) is out
    np.testing.assert_array_equal(out, fw.matmul(x))
    dx = np.empty((4, 53), np.float32)
    assert fw.matmul_t(out, out=dx) is dx
    np.testing.assert_array_equal(dx, fw.matmul_t(out))


def test_bfloat16_arrives_as_ml_dtypes_or_as_bit_patterns(rng: np.random.Generator) -> None:
    W = weight(rng).astype(ml_dtypes.bfloat16)
    for given in (W, W.view(np.uint16), np.asfortranarray(W)):
        fw = FrozenWeight(given, dtype="bfloat16")
        np.testing.assert_array_equal(fw.to_numpy(), W.astype(np.float32))
    np.testing.assert_array_equal(FrozenWeight(W).to_numpy(), W.astype(np.float32))
    np.testing.assert_array_equal(FrozenWeight(W, dtype="float64").to_numpy(), W.astype(np.float64))


def test_any_float_array_is_accepted_and_copied(rng: np.random.Generator) -> None:
    W = weight(rng)
    swapped, tall = W.astype(">f4"), np.repeat(W, 2, axis=0)
    for given in (W, W.tolist(), np.asfortranarray(W), swapped, W.astype(np.longdouble), tall[::2]):
        np.testing.assert_array_equal(FrozenWeight(given).to_numpy(), W.astype(np.float32))
    half = W.astype(np.float16)
    for given in (half, half.astype(">f2"), half.T.copy().T):
        np.testing.assert_array_equal(
            FrozenWeight(given, dtype="float16").to_numpy(), half.astype(np.float32)
        )
    single = W.astype(np.float32)
    fw = FrozenWeight(single)
    single[:] = 0
    assert fw.to_numpy().any()


def test_numpy_dtypes_are_accepted(rng: np.random.Generator) -> None:
    W = weight(rng)
    assert FrozenWeight(W, dtype=np.float16).dtype == "float16"
    assert FrozenWeight(W, dtype=np.dtype(np.float64)).dtype == "float64"
    assert FrozenWeight(W, dtype=ml_dtypes.bfloat16).dtype == "bfloat16"


@pytest.mark.parametrize("shape", [(0, 5), (5, 0), (0, 0), (1, 1), (1, 200), (200, 1)])
def test_thin_and_empty_weights_work(shape: tuple[int, int]) -> None:
    fw = FrozenWeight(np.ones(shape))
    np.testing.assert_array_equal(fw.matmul(np.ones((3, shape[1]))), np.full((3, shape[0]), shape[1]))
    np.testing.assert_array_equal(fw.matmul_t(np.ones((3, shape[0]))), np.full((3, shape[1]), shape[0]))


def test_bfloat16_products_round_their_operands_and_sum_in_float32(rng: np.random.Generator) -> None:
    W, x = weight(rng).astype(np.float32), rng.standard_normal((40, 53)).astype(np.float32)
    fw = FrozenWeight(W, compute="bfloat16")
    assert (fw.dtype, fw.compute) == ("float32", "bfloat16")
    assert fw.like(W).compute == pickle.loads(pickle.dumps(fw)).compute == "bfloat16"
    np.testing.assert_array_equal(fw.to_numpy(), W)
    error = np.abs(fw.matmul(x) - x.astype(np.float64) @ W.T.astype(np.float64))
    # Each operand is off by 2^-9 of its value, so each product by a little over 2^-8.
    bound = (2.001 * 2**-9 + reference.gamma(2 * 53)) * (np.abs(x).astype(np.float64) @ np.abs(W).T)
    assert np.all(error <= bound)
    assert FrozenWeight(W).compute == "float32"
    assert FrozenWeight(W, "float64").compute == "float64"


def test_small_integers_are_exact(rng: np.random.Generator) -> None:
    W, x = rng.integers(-8, 9, (40, 70)).astype(float), rng.integers(-8, 9, (33, 70)).astype(float)
    for storage in STORAGES:
        np.testing.assert_array_equal(FrozenWeight(W, dtype=storage).matmul(x), x @ W.T)


def test_nan_and_infinity_propagate() -> None:
    W, x = np.ones((3, 4)), np.ones((2, 4))
    W[1, 2], x[0, 0] = np.nan, np.inf
    y = FrozenWeight(W).matmul(x)
    np.testing.assert_array_equal(y, [[np.inf, np.nan, np.inf], [4, np.nan, 4]])


def test_take_gathers_rows(rng: np.random.Generator) -> None:
    W = weight(rng)
    for storage in STORAGES:
        rows = FrozenWeight(W, dtype=storage).take(np.array([3, 0, 3, 36]))
        np.testing.assert_array_equal(rows, as_stored(W, storage)[[3, 0, 3, 36]])


def test_copies_share_and_pickles_carry_the_values(rng: np.random.Generator) -> None:
    for storage in STORAGES:
        fw = FrozenWeight(weight(rng), dtype=storage)
        assert copy.deepcopy(fw) is fw
        loaded = pickle.loads(pickle.dumps(fw))
        assert loaded.dtype == storage
        np.testing.assert_array_equal(loaded.to_numpy(), fw.to_numpy())


@pytest.mark.usefixtures("thread_limit")
def test_products_are_the_same_to_the_bit_on_any_number_of_threads(rng: np.random.Generator) -> None:
    fw = FrozenWeight(weight(rng, (311, 517)), dtype="bfloat16")
    x, dy = rng.standard_normal((129, 517)), rng.standard_normal((129, 311))
    results = set()
    for threads in (1, 2, 3):
        nplora.set_num_threads(threads)
        results.add((fw.matmul(x).tobytes(), fw.matmul_t(dy).tobytes()))
    assert len(results) == 1


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((np.ones(3),), ValueError, r"FrozenWeight: W has 1 axis, expected 2 axes \(d_out, d_in\)"),
        ((np.ones((1, 2, 3)),), ValueError, "W has 3 axes"),
        ((np.float32(1),), ValueError, "W has 0 axes"),
        (("q4_0",), TypeError, r"W is a str, expected an array \(d_out, d_in\)$"),
        (
            (safetensors.Tensor("w", "float32", np.ones((2, 2), "f4")),),
            TypeError,
            "W is a Tensor, expected an array",
        ),
        ((np.ones((2, 2), int),), TypeError, "W has dtype int64, expected floats$"),
        ((np.ones((2, 2), bool),), TypeError, "W has dtype bool"),
        ((np.ones((2, 2), complex),), TypeError, "W has dtype complex128"),
        ((np.ones((2, 2), np.uint16),), TypeError, 'W holds bit patterns of bfloat16, pass dtype="bfloat16"'),
        ((np.ones((2, 2), np.uint16), "float16"), TypeError, "W has dtype uint16"),
        (([["a", "b"]],), TypeError, "W has dtype <U1"),
        (
            (np.ones((2, 2)), "iq2_xs"),
            ValueError,
            "dtype='iq2_xs' is not available; possible: 'float32', 'float64'",
        ),
        (
            (np.ones((2, 2)), "float32", "int4"),
            ValueError,
            "compute='int4' is not available; possible: 'float32', 'bfloat16', 'int8'",
        ),
        (
            (np.ones((2, 2)), "float64", "bfloat16"),
            ValueError,
            "a float64 weight computes in float64, got compute='bfloat16'",
        ),
    ],
)
def test_bad_weights_are_refused(arguments: tuple[Any, ...], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        FrozenWeight(*arguments)


def test_bad_operands_are_refused() -> None:
    fw = FrozenWeight(np.ones((3, 4)))
    with pytest.raises(ValueError, match=r"FrozenWeight\.matmul: x has last axis 5, expected d_in=4"):
        fw.matmul(np.ones((2, 5)))
    with pytest.raises(ValueError, match=r"FrozenWeight\.matmul_t: dy has last axis 4, expected d_out=3"):
        fw.matmul_t(np.ones((2, 4)))
    with pytest.raises(ValueError, match="x is a single number"):
        fw.matmul(1.0)
    with pytest.raises(TypeError, match="x has dtype complex128"):
        fw.matmul(np.ones(4, complex))


def test_bad_outputs_are_refused_and_left_alone() -> None:
    fw, x = FrozenWeight(np.ones((4, 4))), np.ones((2, 4), np.float32)
    read_only = np.zeros((2, 4), np.float32)
    read_only.flags.writeable = False
    bad: list[tuple[Any, type[Exception], str]] = [
        (np.zeros((2, 4)), TypeError, "out has dtype float64, expected float32"),
        (np.zeros((2, 5), np.float32), ValueError, r"out has shape \(2, 5\), expected \(2, 4\)"),
        (np.zeros((4, 2), np.float32).T, ValueError, "out is not C-contiguous"),
        (np.zeros((2, 4), ">f4"), TypeError, "out is byte-swapped"),
        (read_only, ValueError, "out is read-only"),
        (x, ValueError, "out overlaps x in memory"),
        ([[0.0] * 4] * 2, TypeError, "out is a list"),
    ]
    for out, error, message in bad:
        with pytest.raises(error, match=message):
            fw.matmul(x, out=out)
        assert not np.any(out) or out is x
    assert np.all(x == 1)


def test_repr_names_shape_and_storage() -> None:
    assert repr(FrozenWeight(np.ones((2, 3)), "float16")).startswith(
        "FrozenWeight(shape=(2, 3), dtype='float16'"
    )


def test_numpy_reads_a_frozen_weight_as_its_matrix() -> None:
    W = np.arange(6, dtype=np.float32).reshape(2, 3)
    weight = nplora.FrozenWeight(W, "bfloat16")
    np.testing.assert_array_equal(np.asarray(weight), W)
    assert np.asarray(weight, np.float64).dtype == np.float64


@pytest.mark.parametrize(
    ("storage", "fits", "too_large"),
    [
        ("float16", 65519.99, 65520.0),
        ("bfloat16", 3.396177e38, 3.3961776e38),
        ("float32", 3.4028235677973362e38, 3.4028235677973366e38),
    ],
)
def test_values_that_become_infinite_are_counted_in_a_warning(
    storage: str, fits: float, too_large: float
) -> None:
    W = np.array([[fits, -fits, np.inf], [np.nan, 0.0, 1.0]])
    assert np.isinf(FrozenWeight(W, storage).to_numpy()).sum() == 1, "infinity itself is not an overflow"
    W[1] = too_large, -too_large, -np.inf
    message = rf"FrozenWeight: 2 finite values of W, the largest {too_large:.6g}, are infinite in {storage}"
    with pytest.warns(UserWarning, match=message.replace("+", r"\+")) as caught:
        stored = FrozenWeight(W, storage)
    assert caught[0].filename == __file__
    assert np.isinf(stored.to_numpy()).sum() == 4


def test_a_dtype_of_none_is_float32_everywhere() -> None:
    W = np.ones((8, 8))
    for make in (nplora.FrozenWeight, nplora.Linear, nplora.Embedding, nplora.LoRALinear):
        weight = make(W, dtype=None)  # type: ignore[arg-type]
        assert getattr(weight, "weight", weight).dtype == "float32"
    assert nplora.LayerNorm(np.ones(2), dtype=None).weight.dtype == np.float32
    assert nplora.RMSNorm(np.ones(2), dtype=np.float64).weight.dtype == np.float64
    fw = FrozenWeight(W, "float16")
    assert nplora.Linear(fw, dtype=None).weight is fw


@pytest.mark.parametrize("dtype", [5, object(), [1]])
def test_an_invalid_dtype_is_refused_with_the_name_of_the_argument(dtype: Any) -> None:
    with pytest.raises(TypeError, match=r"FrozenWeight: dtype is .*, expected one of 'float32', 'float64'"):
        FrozenWeight(np.ones((2, 2)), dtype)
    with pytest.raises(TypeError, match="Linear: dtype is "):
        nplora.Linear(FrozenWeight(np.ones((2, 2))), dtype=dtype)
    with pytest.raises(TypeError, match="RMSNorm: dtype is "):
        nplora.RMSNorm(np.ones(2), dtype=dtype)


def test_take_accepts_any_integers_in_range(rng: np.random.Generator) -> None:
    fw = FrozenWeight(weight(rng))
    W = fw.to_numpy()
    for ids in ([3, 0], np.array([3, 0], np.int32), np.array([[3, 0]], np.uint8), 5, []):
        np.testing.assert_array_equal(fw.take(ids), W[np.asarray(ids, int)])
    for bad, error, message in (
        ([37], ValueError, "ids holds 37, expected integers from 0 to 36"),
        (np.array([2**64 - 1], np.uint64), ValueError, "ids holds 18446744073709551615"),
        ([0.5], TypeError, "ids has dtype float64, expected integers"),
        ([[1], [1, 2]], ValueError, "ids is inhomogeneous"),
    ):
        with pytest.raises(error, match=rf"FrozenWeight\.take: {message}"):
            fw.take(bad)


def test_a_ragged_weight_is_refused() -> None:
    with pytest.raises(ValueError, match="FrozenWeight: W is inhomogeneous"):
        FrozenWeight([[1.0], [1.0, 2.0]])


@pytest.mark.usefixtures("thread_limit")
def test_impossible_numbers_of_threads_are_refused() -> None:
    with pytest.raises(ValueError, match="set_num_threads: n is 1180591620717411303424, expected at most"):
        nplora.set_num_threads(2**70)
    nplora.set_num_threads(2**31 - 1)


def test_arrays_that_do_not_fit_are_refused_by_the_core_and_others_kept_alive() -> None:
    """Every overload is tried. Those that do not fit must leave no trace."""
    of_array, of_blocks = _core.PackedWeight.of_array, _core.PackedWeight.of_blocks
    for dtype, storage in ((np.float32, "float32"), (np.float64, "float64"), (np.uint16, "bfloat16")):
        array = np.ones((3, 4), dtype)
        count = sys.getrefcount(array)
        weight = of_array(array, storage, "float")
        assert weight.shape == (3, 4)
        assert sys.getrefcount(array) == count + 1
        del weight
        assert sys.getrefcount(array) == count
        with pytest.raises(TypeError):
            of_blocks(array, "q8_0", 32, "float")
    with pytest.raises(TypeError):
        of_array(np.ones((3, 4), int), "float32", "float")
