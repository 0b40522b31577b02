"""The low-rank update on plain arrays: forward, backward, merge."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import nplora
import reference

ml_dtypes = pytest.importorskip("ml_dtypes")

Array = np.ndarray[Any, Any]

N, D_OUT, D_IN, RANK = 11, 37, 53, 5


def problem(rng: np.random.Generator, dtype: Any = np.float32) -> dict[str, Array]:
    shapes = {"x": (N, D_IN), "W": (D_OUT, D_IN), "A": (D_OUT, RANK), "B": (RANK, D_IN), "bias": (D_OUT,)}
    shapes["dy"] = (N, D_OUT)
    return {name: rng.standard_normal(shape).astype(dtype) for name, shape in shapes.items()}


def magnitude(p: dict[str, Array]) -> dict[str, Array]:
    return {name: np.abs(value.astype(np.float64)) for name, value in p.items()}


# ---- forward and backward ----


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("wrap", [nplora.FrozenWeight, np.asarray])
def test_lora_forward_stays_within_the_error_bound(
    dtype: Any, wrap: Callable[..., Any], rng: np.random.Generator
) -> None:
    p, scale = problem(rng, dtype), 0.7
    W = wrap(p["W"], "float64") if dtype is np.float64 and wrap is nplora.FrozenWeight else wrap(p["W"])
    y, z = nplora.lora_forward(p["x"], W, p["A"], p["B"], scale, p["bias"])
    assert y.dtype == z.dtype == dtype
    expected_y, expected_z = reference.lora_forward(p["x"], p["W"], p["A"], p["B"], scale, p["bias"])
    a = magnitude(p)
    bound_y, bound_z = reference.lora_forward(a["x"], a["W"], a["A"], a["B"], scale, a["bias"])
    k = 2 * (D_IN + RANK + 2)
    assert np.all(np.abs(z - expected_z) <= reference.gamma(k, dtype) * bound_z)
    assert np.all(np.abs(y - expected_y) <= reference.gamma(k, dtype) * bound_y)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_lora_backward_stays_within_the_error_bound(dtype: Any, rng: np.random.Generator) -> None:
    p, scale = problem(rng, dtype), 0.7
    _, z = nplora.lora_forward(p["x"], p["W"], p["A"], p["B"], scale)
    results = nplora.lora_backward(p["dy"], p["x"], z, p["W"], p["A"], p["B"], scale)
    expected = reference.lora_backward(p["dy"], p["x"], p["W"], p["A"], p["B"], scale)
    a = magnitude(p)
    bounds = reference.lora_backward(a["dy"], a["x"], a["W"], a["A"], a["B"], scale)
    k = 2 * (N + D_IN + D_OUT + 2)
    for result, want, bound in zip(results, expected, bounds, strict=True):
        assert result.dtype == dtype
        assert np.all(np.abs(result - want) <= reference.gamma(k, dtype) * bound)


@pytest.mark.parametrize("n", [0, 1, 3, 9, 60])
@pytest.mark.parametrize("empty", ["d_out", "d_in", "neither"])
def test_empty_dimensions_work(n: int, empty: str, rng: np.random.Generator) -> None:
    d_out, d_in = (0 if empty == side else 5 for side in ("d_out", "d_in"))
    shapes = {"x": (n, d_in), "W": (d_out, d_in), "A": (d_out, 2), "B": (2, d_in), "dy": (n, d_out)}
    p = {name: rng.standard_normal(shape, dtype=np.float32) for name, shape in shapes.items()}
    y, z = nplora.lora_forward(p["x"], p["W"], p["A"], p["B"])
    np.testing.assert_allclose(z, p["x"] @ p["B"].T, atol=1e-5)
    np.testing.assert_allclose(y, p["x"] @ (p["W"] + p["A"] @ p["B"]).T, atol=1e-4)
    dx, dA, dB = nplora.lora_backward(p["dy"], p["x"], z, p["W"], p["A"], p["B"])
    np.testing.assert_allclose(dx, p["dy"] @ (p["W"] + p["A"] @ p["B"]), atol=1e-4)
    np.testing.assert_allclose(dA, p["dy"].T @ z, atol=1e-4)
    np.testing.assert_allclose(dB, (p["dy"] @ p["A"]).T @ p["x"], atol=1e-4)


@pytest.mark.parametrize("lead", [(), (0,), (1,), (2, 3), (2, 0, 3)])
def test_any_leading_axes_work(lead: tuple[int, ...], rng: np.random.Generator) -> None:
    p = problem(rng)
    x, dy = rng.standard_normal((*lead, D_IN)), rng.standard_normal((*lead, D_OUT))
    y, z = nplora.lora_forward(x, p["W"], p["A"], p["B"])
    assert (y.shape, z.shape) == ((*lead, D_OUT), (*lead, RANK))
    dx, dA, dB = nplora.lora_backward(dy, x, z, p["W"], p["A"], p["B"])
    assert (dx.shape, dA.shape, dB.shape) == ((*lead, D_IN), (D_OUT, RANK), (RANK, D_IN))
    if not y.size:
        assert not dA.any()
        assert not dB.any()


def test_small_integers_are_exact(rng: np.random.Generator) -> None:
    p = {name: rng.integers(-4, 5, v.shape).astype(np.float32) for name, v in problem(rng).items()}
    y, z = nplora.lora_forward(p["x"], p["W"], p["A"], p["B"], 2, p["bias"])
    np.testing.assert_array_equal(y, reference.lora_forward(p["x"], p["W"], p["A"], p["B"], 2, p["bias"])[0])
    results = nplora.lora_backward(p["dy"], p["x"], z, p["W"], p["A"], p["B"], 2)
    for result, want in zip(
        results, reference.lora_backward(p["dy"], p["x"], p["W"], p["A"], p["B"], 2), strict=True
    ):
        np.testing.assert_array_equal(result, want)


def test_z_is_computed_again_if_it_is_not_given(rng: np.random.Generator) -> None:
    p = problem(rng)
    _, z = nplora.lora_forward(p["x"], p["W"], p["A"], p["B"])
    given = nplora.lora_backward(p["dy"], p["x"], z, p["W"], p["A"], p["B"])
    again = nplora.lora_backward(p["dy"], p["x"], None, p["W"], p["A"], p["B"])
    for one, other in zip(given, again, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-5)


def test_gradients_in_out_are_added_to_and_dx_is_overwritten(rng: np.random.Generator) -> None:
    p = problem(rng)
    _, z = nplora.lora_forward(p["x"], p["W"], p["A"], p["B"])
    arguments = p["dy"], p["x"], z, p["W"], p["A"], p["B"]
    dx, dA, dB = nplora.lora_backward(*arguments)
    out = np.full_like(dx, np.nan), dA.copy(), dB.copy()
    results = nplora.lora_backward(*arguments, out=out)
    assert all(result is given for result, given in zip(results, out, strict=True))
    np.testing.assert_array_equal(out[0], dx)
    np.testing.assert_allclose(out[1], 2 * dA, rtol=1e-5)
    np.testing.assert_allclose(out[2], 2 * dB, rtol=1e-5)
    fresh = nplora.lora_backward(*arguments, out=(None, out[1], None))
    assert fresh[1] is out[1]
    np.testing.assert_array_equal(fresh[2], dB)


def test_the_frozen_product_is_skipped_on_request(rng: np.random.Generator) -> None:
    p = problem(rng)
    full = nplora.lora_backward(p["dy"], p["x"], None, p["W"], p["A"], p["B"])
    lean = nplora.lora_backward(p["dy"], p["x"], None, p["W"], p["A"], p["B"], need_dx=False)
    assert lean[0] is None
    np.testing.assert_array_equal(lean[1], full[1])
    np.testing.assert_array_equal(lean[2], full[2])


def test_out_receives_the_result(rng: np.random.Generator) -> None:
    p, out = problem(rng), np.empty((N, D_OUT), np.float32)
    y, _ = nplora.lora_forward(p["x"], p["W"], p["A"], p["B"], out=out)
    assert y is out
    np.testing.assert_array_equal(out, nplora.lora_forward(p["x"], p["W"], p["A"], p["B"])[0])


def test_scale_zero_leaves_the_factors_unread(rng: np.random.Generator) -> None:
    p = problem(rng)
    A, B = np.full_like(p["A"], np.nan), np.full_like(p["B"], np.inf)
    y, z = nplora.lora_forward(p["x"], p["W"], A, B, scale=0)
    np.testing.assert_array_equal(y, nplora.FrozenWeight(p["W"]).matmul(p["x"]))
    assert not z.any()
    for given in (z, None):
        dx, dA, dB = nplora.lora_backward(p["dy"], p["x"], given, p["W"], A, B, scale=0)
        np.testing.assert_array_equal(dx, nplora.FrozenWeight(p["W"]).matmul_t(p["dy"]))
        assert not dA.any()
        assert not dB.any()
    np.testing.assert_array_equal(nplora.merge_lora(p["W"].copy(), A, B, scale=0), p["W"])


@pytest.mark.parametrize("name", ["x", "A", "B", "W", "bias"])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_nan_and_infinity_propagate(name: str, value: float, rng: np.random.Generator) -> None:
    p = problem(rng)
    p[name].flat[3] = value
    y, z = nplora.lora_forward(p["x"], p["W"], p["A"], p["B"], 1, p["bias"])
    with np.errstate(invalid="ignore"):
        expected, expected_z = reference.lora_forward(p["x"], p["W"], p["A"], p["B"], 1, p["bias"])
        gradients = reference.lora_backward(p["dy"], p["x"], p["W"], p["A"], p["B"], 1)
    np.testing.assert_array_equal(np.isfinite(y), np.isfinite(expected))
    np.testing.assert_array_equal(np.isfinite(z), np.isfinite(expected_z))
    for result, want in zip(
        nplora.lora_backward(p["dy"], p["x"], z, p["W"], p["A"], p["B"]), gradients, strict=True
    ):
        np.testing.assert_array_equal(np.isfinite(result), np.isfinite(want))


@pytest.mark.usefixtures("thread_limit")
@pytest.mark.parametrize(
    ("dtype", "compute"), [("float32", "float32"), ("float32", "bfloat16"), ("float64", "float32")]
)
def test_results_are_the_same_to_the_bit_on_any_number_of_threads(
    dtype: str, compute: str, rng: np.random.Generator
) -> None:
    W, A, B = (rng.standard_normal(s).astype(dtype) for s in ((1021, 515), (1021, 11), (11, 515)))
    fw = nplora.FrozenWeight(W, compute=compute)
    for n in (1, 8, 200):
        x, dy = rng.standard_normal((n, 515)), rng.standard_normal((n, 1021))
        results = set()
        for threads in (1, 2, 3, 7):
            nplora.set_num_threads(threads)
            y, z = nplora.lora_forward(x, fw, A, B)
            gradients = nplora.lora_backward(dy, x, z, fw, A, B)
            merged = nplora.merge_lora(W.copy(), A, B)
            results.add(tuple(v.tobytes() for v in (y, z, *gradients, merged)))
        assert len(results) == 1, n


# ---- merge ----


def stored(W: Array, storage: str) -> Array:
    return W.astype(np.dtype(storage))


@pytest.mark.parametrize("storage", ["float32", "float64", "float16", "bfloat16"])
def test_merge_happens_in_the_callers_buffer(storage: str, rng: np.random.Generator) -> None:
    p = problem(rng)
    W = stored(p["W"], storage)
    before = W.astype(np.float64)
    assert nplora.merge_lora(W, p["A"], p["B"], 0.25) is W
    bound = reference.merge(np.abs(before), np.abs(p["A"]), np.abs(p["B"]), 0.25)
    u = float(ml_dtypes.finfo(W.dtype).eps) / 2  # rounded once at the end; float16's subnormals by 2^-25
    k = reference.gamma(2 * RANK + 2, np.float64 if storage == "float64" else np.float32)
    assert np.all(
        np.abs(W.astype(np.float64) - reference.merge(before, p["A"], p["B"], 0.25))
        <= (k + u) * bound + 2**-25
    )


def test_bit_patterns_of_bfloat16_merge_as_the_numbers_they_are(rng: np.random.Generator) -> None:
    p = problem(rng)
    W = p["W"].astype(ml_dtypes.bfloat16)
    bits = W.view(np.uint16).copy()
    nplora.merge_lora(W, p["A"], p["B"])
    assert nplora.merge_lora(bits, p["A"], p["B"], dtype="bfloat16") is bits
    np.testing.assert_array_equal(bits, W.view(np.uint16))


@pytest.mark.parametrize("storage", ["float32", "float64", "float16", "bfloat16"])
def test_rows_may_have_any_stride(storage: str, rng: np.random.Generator) -> None:
    p = problem(rng)
    dense = stored(p["W"], storage)
    big = np.zeros((2 * D_OUT, D_IN + 9), dense.dtype)
    window = big[::2, 4 : 4 + D_IN]
    window[...] = dense
    nplora.merge_lora(window, p["A"], p["B"])
    np.testing.assert_array_equal(window, nplora.merge_lora(dense, p["A"], p["B"]))
    assert not big[1::2].any()
    assert not big[:, :4].any()
    assert not big[:, 4 + D_IN :].any()


def test_factors_may_share_a_buffer_with_the_weight(rng: np.random.Generator) -> None:
    p = problem(rng)
    big = np.zeros((D_OUT, D_IN + RANK), np.float32)
    W, A = big[:, :D_IN], big[:, D_IN:]
    W[...], A[...] = p["W"], p["A"]
    nplora.merge_lora(W, A, p["B"])
    np.testing.assert_array_equal(W, nplora.merge_lora(p["W"].copy(), p["A"], p["B"]))
    np.testing.assert_array_equal(A, p["A"])


def test_unmerge_undoes_merge_up_to_rounding(rng: np.random.Generator) -> None:
    p = problem(rng, np.float64)
    W = p["W"].copy()
    nplora.unmerge_lora(nplora.merge_lora(W, p["A"], p["B"], 1.5), p["A"], p["B"], 1.5)
    np.testing.assert_allclose(W, p["W"], atol=1e-13)


def read_only(W: Array) -> Array:
    W.flags.writeable = False
    return W


def misaligned(W: Array) -> Array:
    raw = np.zeros(W.nbytes + 1, np.uint8)
    return raw[1:].view(W.dtype).reshape(W.shape)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (read_only, ValueError, "merge_lora: W is read-only"),
        (lambda W: W.astype(">f4"), TypeError, r"W is byte-swapped \(>f4\)"),
        (lambda W: W.astype(int), TypeError, "W has dtype int64, expected float32, float64, float16 or"),
        (lambda W: W.astype(np.uint16), TypeError, 'W holds bit patterns of bfloat16, pass dtype="bfloat16"'),
        pytest.param(
            lambda W: W.astype(np.longdouble),
            TypeError,
            "W has dtype",
            marks=pytest.mark.skipif(np.finfo(np.longdouble).bits == 64, reason="they are doubles here"),
        ),
        (lambda W: W.T.copy().T, ValueError, r"the rows of W are not contiguous .* is W transposed\?"),
        (lambda W: np.repeat(W, 2, 1)[:, ::2], ValueError, "the rows of W are not contiguous"),
        (lambda W: W[:, ::-1], ValueError, "the rows of W are not contiguous"),
        (lambda W: W[::-1], ValueError, "the rows of W run backwards or overlap"),
        (misaligned, ValueError, "W is not aligned"),
        (lambda W: W[0], ValueError, "W has 1 axis, expected 2"),
        (lambda W: W[None], ValueError, "W has 3 axes, expected 2"),
        (lambda W: W.tolist(), TypeError, "W is a list, expected a NumPy array"),
        (lambda W: nplora.FrozenWeight(W), TypeError, "W is a FrozenWeight"),
        (lambda W: W[:-1].copy(), ValueError, r"A has shape \(37, 5\), expected \(d_out=36, r\)"),
        (lambda W: W[:, :-1].copy(), ValueError, r"B has shape \(5, 53\), expected \(r=5, d_in=52\)"),
    ],
)  # fmt: skip
def test_weights_that_cannot_be_merged_in_place_are_refused_with_the_reason(
    make: Callable[[Array], Any], error: type[Exception], message: str, rng: np.random.Generator
) -> None:
    p = problem(rng)
    W = make(p["W"].copy())
    before = np.array(W) if isinstance(W, np.ndarray) else None
    for function in (nplora.merge_lora, nplora.unmerge_lora):
        with pytest.raises(error, match=message.replace("merge_lora", function.__name__)):
            function(W, p["A"], p["B"])
    if before is not None:
        np.testing.assert_array_equal(W, before)


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
@pytest.mark.parametrize("cut", [lambda W: W[:0], lambda W: W[:, :0].T, lambda W: W[::-1, :0]])
def test_a_weight_without_elements_has_nothing_to_merge(
    cut: Callable[[Array], Array], dtype: type[np.floating[Any]]
) -> None:
    W = cut(np.zeros((4, 5), dtype))
    A, B = np.ones((len(W), 2)), np.ones((2, W.shape[1]))
    nplora.merge_lora(W, A, B)
    nplora.unmerge_lora(W, A, B)


def test_overlapping_factors_are_refused(rng: np.random.Generator) -> None:
    W = rng.standard_normal((8, 8)).astype(np.float32)
    before, other = W.copy(), np.ones((8, 8), np.float32)
    for A, B, name in ((W[:, :2], other[:2], "A"), (other[:, :2], W[2:4], "B"), (W.T, other, "A")):
        with pytest.raises(ValueError, match=f"merge_lora: W overlaps {name} in memory"):
            nplora.merge_lora(W, A, B)
    np.testing.assert_array_equal(W, before)


@pytest.mark.parametrize("storage", ["float16", "bfloat16"])
@pytest.mark.parametrize("magnitude", [1.0, 2.0**-17], ids=["normal", "subnormal float16"])
def test_stochastic_rounding_is_unbiased(storage: str, magnitude: float, rng: np.random.Generator) -> None:
    """An update of a fifth of a step: nearest loses it in every element, the stochastic mean keeps it.

    With n independent elements, rounded up with probability 0.2, the mean is within 5 sqrt(0.2 * 0.8 / n)
    steps.
    """
    n = 400
    W = np.full((n, n), magnitude).astype(np.dtype(storage))
    step = float(np.nextafter(W[0, 0], W.dtype.type(np.inf)).astype(np.float64)) - magnitude
    A, B = np.full((n, 1), 0.2 * step), np.ones((1, n))
    lost = nplora.merge_lora(W.copy(), A, B)
    np.testing.assert_array_equal(lost, W)
    got = nplora.merge_lora(W.copy(), A, B, rounding="stochastic", rng=rng).astype(np.float64)
    assert set(np.unique((got - magnitude) / step)) == {0.0, 1.0}
    assert abs(np.mean(got - magnitude) / step - 0.2) < 5 * np.sqrt(0.2 * 0.8) / n
    down = nplora.unmerge_lora(W.copy(), A, B, rounding="stochastic", rng=rng).astype(np.float64)
    moved = (magnitude - down).mean() / step
    assert abs(moved - 0.2) < 5 * np.sqrt(0.2 * 0.8) / n


@pytest.mark.parametrize("storage", ["float16", "bfloat16"])
def test_stochastic_rounding_takes_the_neighbour_that_philox_chooses(
    storage: str, rng: np.random.Generator
) -> None:
    p = problem(rng)
    big = np.zeros((D_OUT, D_IN + 3), np.dtype(storage))
    W = big[:, :D_IN]
    W[...] = p["W"]
    exact = W.astype(np.float32)
    nplora.merge_lora(exact, p["A"], p["B"], 0.5)
    nplora.merge_lora(W, p["A"], p["B"], 0.5, rounding="stochastic", rng=5)
    key = int(np.random.default_rng(5).integers(2**64, dtype=np.uint64))
    words = reference.philox4x32(np.arange((W.size + 3) // 4, dtype=np.uint64), key).reshape(-1)[: W.size]
    dropped = {"float16": 13, "bfloat16": 16}[storage]
    bits = exact.view(np.uint32).astype(np.uint64)
    expected = (bits + (words >> (32 - dropped)).reshape(W.shape)) >> dropped << dropped
    normal = np.abs(exact) >= 2.0**-14
    assert normal.mean() > 0.99
    got = W.astype(np.float32).view(np.uint32)
    assert np.mean(got[normal] == expected[normal]) > 0.999  # wherever the sums have the same bits
    assert np.mean(got != exact.view(np.uint32)) > 0.9


def test_stochastic_rounding_depends_only_on_its_seed(thread_limit: None, rng: np.random.Generator) -> None:
    W = rng.standard_normal((501, 333)).astype(np.float16)
    A, B = rng.standard_normal((501, 7), np.float32), rng.standard_normal((7, 333), np.float32)

    def merged(seed: int) -> bytes:
        return nplora.merge_lora(W.copy(), A, B, rounding="stochastic", rng=seed).tobytes()

    results = set()
    for threads in (1, 2, 3, 7):
        nplora.set_num_threads(threads)
        results.add(merged(1))
    assert len(results) == 1
    assert merged(2) not in results


def test_stochastic_rounding_leaves_exact_values_unchanged(rng: np.random.Generator) -> None:
    special = np.array([[np.inf, -np.inf, np.nan, 65504.0, 0.0, 2.0**-24, 1.0]], np.float16)
    A, B = np.ones((1, 1)), np.zeros((1, special.shape[1]))
    for seed in range(20):
        got = nplora.merge_lora(special.copy(), A, B, rounding="stochastic", rng=seed)
        np.testing.assert_array_equal(got.view(np.uint16), special.view(np.uint16))
    huge = nplora.merge_lora(special.copy(), A, np.full_like(B, 15.0), rounding="stochastic", rng=0)
    assert huge[0, 3] == 65504  # rounded to nearest, because the neighbour above is infinity
    for dtype in (np.float32, np.float64):
        with pytest.raises(
            ValueError, match=r"rounding='stochastic' with a W of float(32|64), expected float16 or"
        ):
            nplora.merge_lora(np.eye(3, dtype=dtype), np.ones((3, 1)), np.ones((1, 3)), rounding="stochastic")


def test_merge_refuses_another_rounding_or_dtype(rng: np.random.Generator) -> None:
    p = problem(rng)
    with pytest.raises(ValueError, match="rounding='up' is not available; possible: 'nearest', 'stochastic'"):
        nplora.merge_lora(p["W"], p["A"], p["B"], rounding="up")
    with pytest.raises(ValueError, match="dtype='float16', but W has dtype float32"):
        nplora.merge_lora(p["W"], p["A"], p["B"], dtype="float16")
    nplora.merge_lora(p["W"], p["A"], p["B"], dtype="float32")


# ---- errors of all these functions ----


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": np.ones((2, 9))}, r"lora_forward: x has last axis 9, expected d_in=53"),
        ({"W": np.ones(3)}, "fw has 1 axis, expected 2"),
        ({"W": np.ones((1, 2, 3))}, "fw has 3 axes, expected 2"),
        ({"A": np.ones((9, 5))}, r"A has shape \(9, 5\), expected \(d_out=37, r\) with r at least 1"),
        ({"A": np.ones((37, 0))}, "with r at least 1"),
        ({"A": np.ones(37)}, r"A has shape \(37,\)"),
        ({"B": np.ones((4, 53))}, r"B has shape \(4, 53\), expected \(r=5, d_in=53\)"),
        ({"bias": np.ones(5)}, r"bias has shape \(5,\), expected \(37,\)"),
        ({"scale": np.nan}, "scale is nan, expected a finite number"),
        ({"out": np.ones((3, 37), np.float32)}, r"out has shape \(3, 37\), expected \(11, 37\)"),
    ],
)
def test_lora_forward_refuses_arguments_that_do_not_fit(
    change: dict[str, Any], message: str, rng: np.random.Generator
) -> None:
    p = {k: v for k, v in problem(rng).items() if k != "dy"} | {"scale": 1.0} | change
    p["fw"] = p.pop("W")
    with pytest.raises(ValueError, match=message):
        nplora.lora_forward(**p)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"dy": np.ones((N, 9))}, ValueError, "lora_backward: dy has last axis 9, expected d_out=37"),
        ({"x": np.ones((3, D_IN))}, ValueError, r"x has leading shape \(3,\), dy has \(11,\)"),
        ({"z": np.ones((N, 4))}, ValueError, r"z has shape \(11, 4\), expected \(11, 5\)"),
        ({"scale": True}, TypeError, "scale is True, expected a number"),
        ({"out": np.ones(3)}, TypeError, r"out is ndarray, expected a tuple \(dx, dA, dB\)"),
        ({"out": (None, np.ones((37, 5)), None)}, TypeError, "dA has dtype float64, expected float32"),
        ({"out": (None, None, np.ones((5, 3), np.float32))}, ValueError, r"dB has shape \(5, 3\)"),
    ],
)
def test_lora_backward_refuses_arguments_that_do_not_fit(
    change: dict[str, Any], error: type[Exception], message: str, rng: np.random.Generator
) -> None:
    p = {k: v for k, v in problem(rng).items() if k != "bias"} | {"z": None} | change
    p["fw"] = p.pop("W")
    with pytest.raises(error, match=message):
        nplora.lora_backward(**p)


def test_outputs_that_overlap_each_other_or_the_weight_are_refused(rng: np.random.Generator) -> None:
    W, A, B = (rng.standard_normal((4, 4), dtype=np.float32) for _ in range(3))
    x, dy = (rng.standard_normal((4, 4), dtype=np.float32) for _ in range(2))
    g = np.zeros((4, 4), np.float32)
    for out, message in (
        ((None, g, g), "dB overlaps dA"),
        ((g, g, None), "dA overlaps dx"),
        ((g, None, g), "dB overlaps dx"),
        ((W, None, None), "dx overlaps fw"),
    ):
        with pytest.raises(ValueError, match=message):
            nplora.lora_backward(dy, x, None, W, A, B, out=out)
    with pytest.raises(ValueError, match="out overlaps fw"):
        nplora.lora_forward(x, W, A, B, out=W)
    assert not g.any()


def test_bit_patterns_are_not_taken_for_integers() -> None:
    with pytest.raises(TypeError, match=r'fw has dtype uint16.*FrozenWeight\(fw, dtype="bfloat16"\)'):
        nplora.lora_forward(np.ones(2), np.full((2, 2), 0x3F80, np.uint16), np.ones((2, 1)), np.ones((1, 2)))


def test_a_scale_that_would_become_infinite_is_refused() -> None:
    W, A, B = np.ones((2, 2), np.float32), np.ones((2, 1)), np.ones((1, 2))
    with pytest.raises(ValueError, match="merge_lora: scale is 1e\\+300, beyond the range of float32"):
        nplora.merge_lora(W, A, B, 1e300)
    assert (W == 1).all()
    nplora.merge_lora(W.astype(np.float64), A, B, 1e300)


def test_ragged_operands_are_refused_by_name(rng: np.random.Generator) -> None:
    p, ragged = problem(rng), [[1.0], [1.0, 2.0]]
    for name in ("x", "fw", "A", "B"):
        arguments = {"x": p["x"], "fw": p["W"], "A": p["A"], "B": p["B"], name: ragged}
        with pytest.raises(ValueError, match=f"lora_forward: {name} is inhomogeneous"):
            nplora.lora_forward(**arguments)
    for name in ("A", "B"):
        arguments = {"W": p["W"], "A": p["A"], "B": p["B"], name: ragged}
        with pytest.raises(ValueError, match=f"merge_lora: {name} is inhomogeneous"):
            nplora.merge_lora(**arguments)
