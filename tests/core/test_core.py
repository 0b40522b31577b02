"""The core's operations against float64 NumPy: every storage, compute type and path, on awkward shapes."""

import subprocess
import sys

import numpy as np
import pytest
from numpy.typing import NDArray

from nplora import _core

Array = NDArray[np.floating]

# (n, d_out, d_in, r): empty sides, one row, both sides of the small path, panels that do not divide evenly.
SHAPES = [
    *[(0, 5, 4, 2), (5, 0, 4, 1), (5, 4, 0, 1), (3, 5, 6, 0), (1, 1, 1, 1), (1, 100, 200, 8), (5, 7, 3, 2)],
    *[(8, 577, 97, 3), (9, 97, 577, 3), (16, 48, 48, 8), (17, 49, 97, 4), (33, 100, 577, 9)],
    *[(300, 130, 700, 60), (70, 1531, 241, 13), (40, 0, 4, 1), (40, 4, 0, 1), (600, 0, 4, 1), (600, 4, 0, 1)],
]
KINDS = [
    *[(storage, "float") for storage in ("float64", "float32", "bfloat16", "float16", "array")],
    *[(storage, "bfloat16") for storage in ("float32", "bfloat16", "float16")],
]
SCALE = 0.7
KEY = 12345


def to_bfloat16(x: Array) -> Array:
    """x rounded to bfloat16, as float64."""
    bits, out = np.empty(x.shape, np.uint16), np.empty(x.shape, np.float32)
    _core.narrow(np.ascontiguousarray(x, np.float32), "bfloat16", bits)
    _core.widen(bits, "bfloat16", out)
    return out.astype(np.float64)


class Case:
    """One set of inputs, and the values that the products use, in float64."""

    def __init__(self, shape: tuple[int, int, int, int], storage: str, compute: str, dropout: float) -> None:
        n, d_out, d_in, r = shape
        rng = np.random.default_rng(0)
        self.dtype = np.float64 if storage == "float64" else np.float32
        sizes = {
            "w": (d_out, d_in),
            "x": (n, d_in),
            "a": (d_out, r),
            "b": (r, d_in),
            "bias": (d_out,),
            "dy": (n, d_out),
        }
        self.arrays = {name: rng.standard_normal(size).astype(self.dtype) for name, size in sizes.items()}
        w = self.arrays["w"]
        self.weight: _core.PackedWeight | Array = (
            w if storage == "array" else _core.PackedWeight(w, storage, compute)
        )
        self.w = np.empty_like(w)
        if isinstance(self.weight, _core.PackedWeight):
            self.weight.unpack(self.w)
        else:
            self.w[:] = w
        self.dropout = dropout
        self.mask = np.empty((n, d_in), self.dtype)
        _core.dropout(np.ones_like(self.mask), dropout, KEY, self.mask)
        # A few rows are always computed in float: forward up to 8 rows, backward up to 4.
        self.rounded_forward = compute == "bfloat16" and n > 8
        self.rounded = compute == "bfloat16" and n > 4

    def seen(self, name: str, rounded: bool) -> Array:
        value = self.w if name == "w" else self.arrays[name]
        return to_bfloat16(value) if rounded else value.astype(np.float64)

    def bound(self, products: Array, depth: int) -> Array:
        """gamma_k sum |a| |b|: each fused step errs by at most half a unit in the last place of its sum."""
        eps = float(np.finfo(self.dtype).eps)
        # vdpbf16ps rounds both products of a pair and treats subnormals as zero.
        return 2 * (depth + 4) * eps * products + (1e-30 if self.rounded else 0)

    def assert_close(
        self, got: Array, expected: Array, magnitude: Array, depth: int, off: Array | float = 0.0
    ) -> None:
        assert np.isfinite(got).all()
        assert (np.abs(got - expected) <= self.bound(magnitude, depth) + 1.01 * off).all()


@pytest.mark.slow
@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize(("storage", "compute"), KINDS)
@pytest.mark.parametrize("shape", SHAPES)
def test_lora_forward_and_backward_match_the_oracle(
    shape: tuple[int, int, int, int], storage: str, compute: str, dropout: float
) -> None:
    n, d_out, d_in, r = shape
    case = Case(shape, storage, compute, dropout)
    x, a, b, bias, dy = (case.arrays[name] for name in ("x", "a", "b", "bias", "dy"))
    y, z = np.full((n, d_out), np.nan, case.dtype), np.full((n, r), np.nan, case.dtype)
    update = {"weight": case.weight, "a": a, "b": b, "scale": SCALE, "dropout": dropout, "key": KEY}
    _core.lora_forward(x, [_core.ForwardPart(**update, bias=bias, y=y, z=z)])

    dropped = (x * case.mask).astype(np.float64)
    rounded = case.rounded_forward
    x64, w64, b64 = (case.seen(name, rounded) for name in ("x", "w", "b"))
    low = to_bfloat16(dropped) if rounded else dropped
    a64 = a.astype(np.float64)
    case.assert_close(z, low @ b64.T, np.abs(low) @ np.abs(b64.T), d_in)
    magnitude = (
        np.abs(x64) @ np.abs(w64.T) + SCALE * (np.abs(low) @ np.abs(b64.T)) @ np.abs(a64.T) + np.abs(bias)
    )
    # For many rows, z and scale A are rounded to bfloat16 too.
    unit = 2.0**-8 if rounded else 0.0
    off = 2 * unit * SCALE * np.abs(low @ b64.T) @ np.abs(a64.T)
    case.assert_close(y, x64 @ w64.T + SCALE * (low @ b64.T) @ a64.T + bias, magnitude, d_in + r, off)

    dx, da, db = np.full((n, d_in), np.nan, case.dtype), np.ones_like(a), np.ones_like(b)
    _core.lora_backward(x, dx, [_core.BackwardPart(**update, dy=dy, z=z, da=da, db=db)])
    unit = 2.0**-8 if case.rounded else 0.0
    dy64, a64, w64, b64 = (case.seen(name, case.rounded) for name in ("dy", "a", "w", "b"))
    low = to_bfloat16(dropped) if case.rounded else dropped
    z64 = to_bfloat16(z) if case.rounded else z.astype(np.float64)
    # dz is rounded to bfloat16 too. Its sums may be on either side of a rounding boundary.
    dz, dz_magnitude = SCALE * dy64 @ a64, SCALE * np.abs(dy64) @ np.abs(a64)
    off = unit * (np.abs(dz) @ np.abs(b64)) * case.mask
    magnitude = np.abs(dy64) @ np.abs(w64) + (dz_magnitude @ np.abs(b64)) * case.mask
    case.assert_close(dx, dy64 @ w64 + (dz @ b64) * case.mask, magnitude, 2 * d_out + r, off)
    case.assert_close(da, 1 + SCALE * dy64.T @ z64, 1 + SCALE * np.abs(dy64.T) @ np.abs(z64), n)
    off = unit * np.abs(dz).T @ np.abs(low)
    case.assert_close(db, 1 + dz.T @ low, 1 + dz_magnitude.T @ np.abs(low), n + d_out, off)


@pytest.mark.parametrize(("storage", "compute"), KINDS)
def test_small_integers_are_exact(storage: str, compute: str) -> None:
    rng = np.random.default_rng(1)
    dtype = np.float64 if storage == "float64" else np.float32
    n, d_out, d_in = 37, 61, 103
    x, w, dy = (rng.integers(-8, 9, size).astype(dtype) for size in ((n, d_in), (d_out, d_in), (n, d_out)))
    weight = w if storage == "array" else _core.PackedWeight(w, storage, compute)
    y, dx = np.empty((n, d_out), dtype), np.empty((n, d_in), dtype)
    _core.matmul(weight, x, None, y)
    _core.matmul_t(weight, dy, dx)
    assert np.array_equal(y, x @ w.T)
    assert np.array_equal(dx, dy @ w)


def test_scale_zero_leaves_the_factors_unread() -> None:
    x, w = np.ones((3, 4), np.float32), np.ones((5, 4), np.float32)
    a, b = np.full((5, 2), np.nan, np.float32), np.full((2, 4), np.nan, np.float32)
    y, z = np.empty((3, 5), np.float32), np.empty((3, 2), np.float32)
    update = {"weight": w, "a": a, "b": b, "scale": 0.0, "dropout": 0.0, "key": 0}
    _core.lora_forward(x, [_core.ForwardPart(**update, bias=None, y=y, z=z)])
    assert (y == 4).all()
    assert (z == 0).all()
    dx, da, db = np.empty_like(x), np.zeros_like(a), np.zeros_like(b)
    _core.lora_backward(x, dx, [_core.BackwardPart(**update, dy=y, z=z, da=da, db=db)])
    assert (dx == 20).all()
    assert not da.any()
    assert not db.any()
    _core.merge_lora(w, a, b, 0.0, "float32")
    assert (w == 1).all()


@pytest.mark.parametrize("n", [1, 40])
def test_nan_and_infinity_reach_the_outputs_that_they_touch(n: int) -> None:
    x, w = np.ones((n, 70), np.float32), np.ones((60, 70), np.float32)
    x[0, 3], w[5, 69] = np.inf, np.nan
    y = np.empty((n, 60), np.float32)
    _core.matmul(w, x, None, y)
    assert np.isnan(y[:, 5]).all()
    assert np.isposinf(np.delete(y[0], 5)).all()
    assert (np.delete(y[1:], 5, axis=1) == 70).all()


@pytest.mark.parametrize("storage", ["float64", "float32", "bfloat16", "float16"])
@pytest.mark.parametrize("shape", [(1, 1), (5, 48), (7, 97), (100, 130)])
def test_a_packed_weight_unpacks_to_the_original(storage: str, shape: tuple[int, int]) -> None:
    w = (
        np.random.default_rng(0)
        .standard_normal(shape)
        .astype(np.float64 if storage == "float64" else np.float32)
    )
    if storage in ("bfloat16", "float16"):
        bits = np.empty(shape, np.uint16)
        _core.narrow(w, storage, bits)
        w = bits
    packed = _core.PackedWeight(w, storage)
    out = np.empty_like(w)
    packed.unpack(out)
    assert np.array_equal(out, w)
    assert packed.nbytes == w.nbytes


@pytest.mark.parametrize("rows", [slice(None), slice(None, None, 2)])
@pytest.mark.parametrize("storage", ["float64", "float32", "bfloat16", "float16"])
@pytest.mark.parametrize(("d_out", "d_in", "r"), [(1, 1, 1), (9, 50, 3), (70, 1301, 65)])
def test_merge_rounds_the_exact_sum_once(storage: str, d_out: int, d_in: int, r: int, rows: slice) -> None:
    rng = np.random.default_rng(2)
    dtype = np.float64 if storage == "float64" else np.float32
    a, b = rng.standard_normal((d_out, r)).astype(dtype), rng.standard_normal((r, d_in)).astype(dtype)
    w = rng.standard_normal((2 * d_out, d_in)).astype(dtype)
    before = w.astype(np.float64)
    buffer = w
    if dtype == np.float32 and storage != "float32":
        buffer = np.empty(w.shape, np.uint16)
        _core.narrow(w, storage, buffer)
        _core.widen(buffer, storage, w)
        before = w.astype(np.float64)
    target = buffer[rows][:d_out]
    _core.merge_lora(target, a, b, SCALE, storage)
    after = buffer
    if buffer.dtype == np.uint16:
        after = np.empty(w.shape, np.float32)
        _core.widen(buffer, storage, after)
    touched = np.zeros(len(w), bool)
    touched[np.arange(len(w))[rows][:d_out]] = True
    assert np.array_equal(after[~touched], before[~touched])
    expected = before[touched] + SCALE * a.astype(np.float64) @ b.astype(np.float64)
    magnitude = np.abs(before[touched]) + SCALE * np.abs(a).astype(np.float64) @ np.abs(b)
    eps = {"float64": 2.0**-52, "float32": 2.0**-23, "bfloat16": 2.0**-7, "float16": 2.0**-10}[storage]
    bound = eps / 2 * np.abs(expected) + (r + 2) * float(np.finfo(dtype).eps) * magnitude
    assert (np.abs(after[touched] - expected) <= bound).all()


def test_rows_are_gathered_in_any_order_and_refused_out_of_range() -> None:
    w = np.random.default_rng(0).standard_normal((10, 97)).astype(np.float32)
    packed = _core.PackedWeight(w, "float32")
    ids = np.array([9, 0, 3, 3], np.int64)
    out = np.empty((4, 97), np.float32)
    packed.gather_rows(ids, out)
    assert np.array_equal(out, w[ids])
    for bad in (10, -1):
        with pytest.raises(IndexError, match=f"row {bad} is out of range for a weight of 10 rows"):
            packed.gather_rows(np.array([bad], np.int64), out[:1])


def test_row_norms_are_summed_in_double() -> None:
    w = np.random.default_rng(0).standard_normal((7, 1000)).astype(np.float32)
    out = np.empty(7)
    _core.PackedWeight(w, "float32").row_sums_of_squares(out)
    np.testing.assert_allclose(out, (w.astype(np.float64) ** 2).sum(1), rtol=1e-13)


def test_a_weight_without_columns_takes_no_time() -> None:
    w = np.empty((min(10**11, sys.maxsize // 4), 0), np.float32)
    assert _core.PackedWeight(w, "float32").nbytes == 0


def test_misaligned_arrays_are_refused() -> None:
    w = np.ones((3, 4), np.float32)
    odd = np.zeros(65, np.uint8)[1:].view(np.float32).reshape(4, 4)
    with pytest.raises(ValueError, match="aligned"):
        _core.matmul(w, odd, None, np.empty((4, 3), np.float32))
    with pytest.raises(ValueError, match="aligned"):
        _core.merge_lora(odd, np.ones((4, 1), np.float32), np.ones((1, 4), np.float32), 1.0, "float32")


def test_an_optimiser_refuses_the_same_buffer_twice() -> None:
    p, g = np.ones(10, np.float32), np.ones(10, np.float32)
    for twice in ((p, p), (p[:6], p[5:]), (p[5:], p[:6])):
        parameters = tuple(("", array, g[: len(array)]) for array in twice)
        with pytest.raises(ValueError, match="overlap"):
            _core.sgd_step(parameters, None, 0.1, 0.1, np.zeros(2, bool), 0.0, 0.0, False, 1.0, None)
    assert (p == 1).all()


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_a_backward_pass_computes_only_the_requested_gradients(dtype: type) -> None:
    rng = np.random.default_rng(3)
    x, w, a, b, dy = (
        rng.integers(-8, 9, size).astype(dtype) for size in ((7, 5), (6, 5), (6, 2), (2, 5), (7, 6))
    )
    z = x @ b.T
    part = _core.BackwardPart(
        weight=w,
        a=a,
        b=b,
        scale=1.0,
        dropout=0.0,
        key=0,
        dy=dy,
        z=z,
        da=np.zeros_like(a),
        db=np.zeros_like(b),
    )
    _core.lora_backward(None, None, [part._replace(db=None)])
    np.testing.assert_array_equal(part.da, dy.T @ z)
    _core.lora_backward(x, None, [part._replace(z=None, da=None)])
    np.testing.assert_array_equal(part.db, (dy @ a).T @ x)
    dx = np.empty_like(x)
    _core.lora_backward(None, dx, [part._replace(z=None, da=None, db=None)])
    np.testing.assert_array_equal(dx, dy @ w + dy @ a @ b)
    with pytest.raises(ValueError, match="z is needed for the gradient of a"):
        _core.lora_backward(x, dx, [part._replace(z=None)])
    with pytest.raises(ValueError, match="x is needed for the gradient of b"):
        _core.lora_backward(None, dx, [part])


def test_an_error_in_a_stack_names_the_wrong_field() -> None:
    x, w = np.ones((3, 4), np.float32), np.ones((5, 4), np.float32)
    a, b, y = np.ones((5, 2), np.float32), np.ones((2, 4), np.float32), np.ones((3, 5), np.float32)
    update = {"weight": w, "a": a, "b": b, "scale": 1.0, "dropout": 0.0, "key": 0}
    forward = _core.ForwardPart(**update, bias=None, y=np.zeros_like(y), z=None)
    for name, bad in (
        ("a", a.astype(np.float64)),
        ("b", None),
        ("key", -1),
        ("y", y.T.copy().T),
        ("weight", 3),
    ):
        with pytest.raises(TypeError, match=f"ForwardPart: {name} does not have the expected type"):
            _core.lora_forward(x, [forward._replace(**{name: bad})])
    with pytest.raises(TypeError, match="expected a ForwardPart"):
        _core.lora_forward(x, [tuple(forward)[:-1]])
    assert not forward.y.any()
    backward = _core.BackwardPart(**update, dy=y, z=np.ones((3, 2), np.float32), da=None, db=None)
    with pytest.raises(TypeError, match="BackwardPart: dy does not have the expected type"):
        _core.lora_backward(x, None, [backward._replace(dy=y.astype(np.float16))])
    with pytest.raises(TypeError, match="expected a BackwardPart"):
        _core.lora_backward(x, None, [None])


def test_explain_refuses_impossible_numbers_of_rows() -> None:
    weight = _core.PackedWeight(np.ones((3, 4), np.float32), "float32")
    for rows in (0, sys.maxsize + 1, 2 * sys.maxsize + 1):
        with pytest.raises(ValueError, match=f"explain: rows is {rows}, expected at least 1"):
            _core.explain(weight, rows, 1, False, True)
    assert set(_core.explain(weight, 1, 0, False, True)) == {"computes in", "forward", "backward"}


@pytest.mark.parametrize("kind", [_core.PackedWeight, _core.InferenceLayer])
def test_no_object_is_made_without_its_constructor(kind: type) -> None:
    with pytest.raises(TypeError, match=r"__init__\(\): incompatible constructor arguments"):
        kind.__new__(kind)
    for base in (object, kind.__base__):
        with pytest.raises(TypeError, match="is not safe"):
            base.__new__(kind)
    with pytest.raises(TypeError, match="is not an acceptable base type"):
        type("Derived", (kind,), {})


def test_a_constructor_that_runs_again_changes_nothing() -> None:
    weight = _core.PackedWeight(np.full((3, 4), 2, np.float32), "float32")
    weight.__init__(np.ones((9, 9), np.float32), "bfloat16")
    out = np.empty((3, 4), np.float32)
    weight.unpack(out)
    assert weight.storage == "float32"
    np.testing.assert_array_equal(out, np.full((3, 4), 2))


IN_SUBINTERPRETER = """
import sys
try:
    import _interpreters as interpreters
except ImportError:
    import _xxsubinterpreters as interpreters
attempt = f'''
import sys
sys.path[:] = {sys.path!r}
try:
    import nplora
except ImportError as error:
    print(error, flush=True)
'''
for first in (True, False):
    interpreters.run_string(interpreters.create(), attempt)
    import nplora  # the main interpreter may have it, before and after
print(nplora.__version__)
"""


def test_a_subinterpreter_is_refused_with_the_reason() -> None:
    run = subprocess.run(
        [sys.executable, "-c", IN_SUBINTERPRETER], capture_output=True, text=True, timeout=30, check=True
    )
    *refusals, version = run.stdout.splitlines()
    assert len(refusals) == 2
    assert all("subinterpreter" in line for line in refusals)
    assert version == _core.config()["version"]
