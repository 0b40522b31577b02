"""Int8Error: how much rounding to int8 changes a product, measured and bounded for some of its elements.

The scheme is described in docs/kernels.md, "Products in int8". It replaces the factors x_k and w_k of a sum
by multiples of their scales, x̂_k and ŵ_k. The function `rounding_errors` gives limits e_k >= |x̂_k - x_k| and
d_k >= |ŵ_k - w_k|. They are half a scale if codes are rounded to nearest, and a whole scale if codes are
rounded stochastically.

forward:   y = Σ x_k w_k is computed as Σ x̂_k ŵ_k. The error of a summand is (x̂ - x) w + x̂ (ŵ - w). So
           |Δy| <= Σ_k e_k |w_k| + (|x_k| + e_k) d_k.
backward:  dx = Σ dy_i w_i is computed as Σ t̂_i c_i. Here w_i is an element of row i of W, s_i is the scale of
           this row, ŵ_i = s_i c_i, and t_i = dy_i s_i. If e_i is a limit of |t̂_i - t_i|, then
           |Δdx| <= Σ_i e_i |c_i| + |dy_i| d_i.

Codes are multiplied and summed in integers, without error. The sums of G groups are then converted to
float32, multiplied by scales and added. A result goes through at most 3 G + 6 roundings. They add at most
γ Σ |x̂_k| |ŵ_k| to the error, where γ is about (3 G + 6) · 2^-24.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np
import numpy.typing as npt

from nplora import _core

Array = npt.NDArray[Any]

SAMPLES = 16  # the default for the largest number of rows, and of outputs, in a sample
_GROUP = 64  # in a row of x, this many neighbouring values have one scale
_DEPTH, _DEPTH_UNIT = 4032, 192  # a longer row of dy is cut; the length of a part is a multiple of 192
_LEAST_ROWS = _core.constants.small_batch + 1  # products with fewer rows do not use this scheme
_UNIT = 2.0**-24  # the unit roundoff of float32
# A code is the rounded product of x and 1 / s. The product and 1 / s are computed in float32. So before the
# product is rounded to an integer, it differs from x / s by less than 127 · 4 · 2^-24 < 2^-15.
_CODE_ERROR = 2.0**-15
_UNDERFLOW = 2.0**-126  # a float32 product below this may lose all its bits
_MOST_DECODED = 1 << 20  # the most values of W that are decoded at once for a backward product


@dataclasses.dataclass(frozen=True)
class Int8Error:
    """The error of a sample of a product's elements, against the product in float64.

    Attributes:
        measured: ‖ŷ - y‖ / ‖y‖. The norms are over the sample. ŷ is the int8 product, and y is the product of
            the same arrays in float64.
        bound: a limit that `measured` cannot exceed, whatever the signs of the rounding errors.
        rows, outputs: the indices of the sampled rows of x, and of the sampled elements in each row of y.
        errors: array (rows, outputs), |ŷ - y| of each sampled element.
        bounds: array (rows, outputs), the limits of `errors`.

    >>> import nplora, numpy as np
    >>> rng = np.random.default_rng(0)
    >>> weight = nplora.FrozenWeight(rng.standard_normal((64, 128)), compute="int8")
    >>> error = weight.int8_error(rng.standard_normal((32, 128)))
    >>> error
    Int8Error(measured=0.0098, bound=0.21, of 16 rows and 16 outputs)
    >>> bool(np.all(error.errors <= error.bounds))
    True
    """

    measured: float
    bound: float
    rows: Array
    outputs: Array
    errors: Array
    bounds: Array

    def __repr__(self) -> str:
        sample = f"of {len(self.rows)} rows and {len(self.outputs)} outputs"
        return f"Int8Error(measured={self.measured:.2g}, bound={self.bound:.2g}, {sample})"


def measure(packed: _core.PackedWeight, x: Array, samples: int) -> Int8Error:
    """The error of x Wᵀ for at most `samples` rows of x and rows of W."""
    d_out, d_in = packed.shape
    rows, outputs = sample(len(x), samples), sample(d_out, samples)
    some = _with_enough_rows(x[rows])
    y = np.empty((len(some), d_out), np.float32)
    _core.matmul(packed, some, None, y)
    w, some = np.empty((len(outputs), d_in), np.float32), some[: len(rows)]
    packed.gather_rows(outputs, w)
    with np.errstate(invalid="ignore", over="ignore"):
        got, exact = y[: len(rows), outputs], some.astype(np.float64) @ w.T.astype(np.float64)
        return _compared(rows, outputs, got, exact, forward_bounds(some, w))


def measure_t(packed: _core.PackedWeight, dy: Array, samples: int, dither_key: int | None) -> Int8Error:
    """The error of the product dy W, for at most `samples` rows of dy and at most `samples` columns of W.

    All of W is decoded once.
    """
    d_out, d_in = packed.shape
    rows, outputs = sample(len(dy), samples), sample(d_in, samples)
    some = _with_enough_rows(dy[rows])
    dx = np.empty((len(some), d_in), np.float32)
    part = _core.BackwardPart(
        weight=packed, a=np.empty((d_out, 0), np.float32), b=np.empty((0, d_in), np.float32), scale=0.0,
        dropout=0.0, key=0, dy=some, z=None, da=None, db=None,
    )  # fmt: skip
    _core.lora_backward(None, dx, [part], True, dither_key)
    some = some[: len(rows)]
    with np.errstate(invalid="ignore", over="ignore"):
        w, largest = _columns(packed, outputs)
        got, exact = dx[: len(rows), outputs], some.astype(np.float64) @ w
        bounds = backward_bounds(some, w, largest, stochastic=dither_key is not None)
        return _compared(rows, outputs, got, exact, bounds)


def sample_nbytes(d_out: int, d_in: int, samples: int = SAMPLES) -> int:
    """The most bytes that `measure` takes for its arrays."""
    return samples * (4 * d_out + 10 * 8 * d_in)


def sample(count: int, most: int) -> Array:
    """Indices below `count` in ascending order: all of them, or `most` that are drawn with a fixed seed.

    >>> sample(3, 16), len(sample(100, 16))
    (array([0, 1, 2]), 16)
    """
    if count <= most:
        return np.arange(count, dtype=np.int64)
    return np.sort(np.random.default_rng(count).choice(count, most, replace=False)).astype(np.int64)


def forward_bounds(x: Array, w: Array) -> Array:
    """Bounds (n, m) of the errors of x wᵀ, for float32 arrays x (n, d_in) and w (m, d_in)."""
    groups = math.ceil(x.shape[1] / _GROUP)
    e, d = rounding_errors(x, _GROUP, False), rounding_errors(w, max(1, w.shape[1]), False)
    x, w = np.abs(x, dtype=np.float64), np.abs(w, dtype=np.float64)
    magnitudes = (x + e) @ (w + d).T  # of the rounded factors
    quantisation = e @ w.T + (x + e) @ d.T
    largest = w.max(axis=1, initial=0)
    bounds: Array = quantisation + _float_error(groups, magnitudes, groups * (1 + largest))
    return bounds


def backward_bounds(dy: Array, w: Array, largest: Array, stochastic: bool) -> Array:
    """Bounds (n, m) of the errors of dy w, for some columns w (d_out, m) of W.

    Args:
        dy: float32 array (n, d_out).
        largest: float32 array (d_out,), the largest magnitude of each row of W.
        stochastic: whether dy is rounded stochastically.
    """
    depth = len(w)
    group = part_length(depth)
    scales = code_scales(largest)[:, None]
    w_errors = _steps(scales, np.abs(w), False)
    codes = np.divide(np.abs(w) + w_errors, scales, out=np.zeros_like(w), where=scales != 0)
    t = dy * scales[:, 0].astype(np.float32)
    exact = np.abs(dy, dtype=np.float64) * scales[:, 0]
    e = rounding_errors(t, group, stochastic) + _UNIT * exact + _UNDERFLOW * (exact > 0)
    quantisation = e @ codes + np.abs(dy, dtype=np.float64) @ w_errors
    groups = math.ceil(depth / group)
    bounds: Array = quantisation + _float_error(groups, (exact + e) @ codes, groups)
    return bounds


def rounding_errors(x: Array, group: int, stochastic: bool) -> Array:
    """Bounds (n, cols) of |x̂ - x|. In each row of x, `group` neighbouring values have one scale."""
    magnitudes = np.abs(x, dtype=np.float64)
    largest = np.maximum.reduceat(magnitudes, np.arange(0, x.shape[1], group), axis=1)
    scales = np.repeat(code_scales(largest), group, axis=1)[:, : x.shape[1]]
    return _steps(scales, magnitudes, stochastic)


def part_length(depth: int) -> int:
    """In a backward product with `depth` rows of W, the number of values in a row of dy with one scale.

    >>> part_length(75), part_length(5000)
    (192, 2688)
    """
    parts = max(1, math.ceil(depth / _DEPTH))
    return max(1, math.ceil(depth / parts / _DEPTH_UNIT)) * _DEPTH_UNIT


def code_scales(largest: Array) -> Array:
    """The scales that the core gives to values with these largest magnitudes.

    A scale is 0 if the values are tiny, and NaN if a value is NaN or infinite.
    """
    scales = (np.asarray(largest, np.float32) / np.float32(127)).astype(np.float64)
    return np.where(np.isfinite(largest), np.where(largest < 2.0**-119, 0, scales), np.nan)


def _steps(scales: Array, magnitudes: Array, stochastic: bool) -> Array:
    """The largest rounding error of values with these magnitudes.

    A value is rounded by at most half a step. A value below half a step becomes 0, and then its error is its
    magnitude. Stochastic rounding can move a value by almost a whole step, but leaves 0 unchanged.
    """
    if stochastic:
        steps = scales * (1 + _CODE_ERROR) * (magnitudes != 0)
    else:
        steps = np.minimum(scales * (0.5 + _CODE_ERROR), magnitudes * (1 + 4 * _CODE_ERROR))
    found: Array = np.where(scales == 0, magnitudes, steps)
    return found


def _float_error(groups: int, magnitudes: Array, products: int | Array) -> Array:
    """A bound of the errors of float32 sums. At most `products` products of a sum can underflow."""
    roundings = (3 * groups + 6) * _UNIT
    bounds: Array = roundings / (1 - roundings) * magnitudes + _UNDERFLOW * products * (magnitudes != 0)
    return bounds


def _columns(packed: _core.PackedWeight, outputs: Array) -> tuple[Array, Array]:
    """Return columns of W, float64 (d_out, m), and the largest magnitude of each row of W, float32."""
    d_out, d_in = packed.shape
    columns, largest = np.empty((d_out, len(outputs))), np.empty(d_out, np.float32)
    count = max(1, _MOST_DECODED // max(1, d_in))
    for first in range(0, d_out, count):
        ids = np.arange(first, min(first + count, d_out), dtype=np.int64)
        decoded = np.empty((len(ids), d_in), np.float32)
        packed.gather_rows(ids, decoded)
        columns[ids], largest[ids] = decoded[:, outputs], np.abs(decoded).max(axis=1, initial=0)
    return columns, largest


def _with_enough_rows(x: Array) -> Array:
    """Return x with rows of zeros added, so that its products are computed in the scheme for many rows."""
    missing = max(0, _LEAST_ROWS - len(x))
    return np.concatenate([x, np.zeros((missing, x.shape[1]), x.dtype)])


def _compared(rows: Array, outputs: Array, got: Array, exact: Array, bounds: Array) -> Int8Error:
    errors, norm = np.abs(got - exact), float(np.linalg.norm(exact))
    measured, bound = (_relative(float(np.linalg.norm(each)), norm) for each in (errors, bounds))
    return Int8Error(measured, bound, rows, outputs, errors, bounds)


def _relative(error: float, norm: float) -> float:
    return 0.0 if error == 0 else error / norm if norm else math.inf
