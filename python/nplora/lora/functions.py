"""LoRA on plain arrays: forward, backward and merge. (The layers in `nplora.nn` hold their own arrays.)"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from nplora import _check, _core
from nplora.weights import FrozenWeight, buffers

Array = npt.NDArray[Any]


def lora_forward(
    x: npt.ArrayLike,
    fw: FrozenWeight | npt.ArrayLike,
    A: npt.ArrayLike,
    B: npt.ArrayLike,
    scale: float = 1.0,
    bias: npt.ArrayLike | None = None,
    out: Array | None = None,
) -> tuple[Array, Array]:
    """Apply a frozen weight plus its low-rank update.

    z = x Bᵀ;  y = x Wᵀ + scale · z Aᵀ [+ bias]      (Hu et al. 2021, eq. 3, with the names A and B swapped)

    Args:
        x: array (..., d_in).
        fw: the frozen weight, a FrozenWeight or an array (d_out, d_in). All arithmetic is float64 if the
            weight is float64, else float32.
        A, B: arrays (d_out, r) and (r, d_in).
        scale: the number that multiplies the product A·B. If scale is 0, A and B are not read.
        bias: array (d_out,) or None.
        out: C-contiguous array (..., d_out) to write y to. This array must not overlap any input.
    Returns:
        y (..., d_out) and z (..., r). `lora_backward` takes z.
    Raises:
        ValueError: a shape does not fit, or scale is not finite.
        TypeError: an array does not hold numbers, or `out` has the wrong dtype.

    >>> x, W = np.ones((1, 2)), np.eye(2)
    >>> y, z = lora_forward(x, W, A=[[2.0], [0.0]], B=[[1.0, 1.0]], scale=0.5)
    >>> y, z
    (array([[3., 1.]]), array([[2.]]))
    """
    op = "lora_forward"
    w, d_out, d_in, dtype = _operand(op, fw)
    rows, lead = _check.rows(op, "x", x, d_in, "d_in", dtype)
    a, b = _check.factors(op, A, B, d_out, d_in, dtype)
    added = None if bias is None else _check.shaped(op, "bias", bias, (d_out,), dtype)
    readers = [("x", rows), ("A", a), ("B", b), *_arrays(("bias", added), ("fw", w))]
    y = buffers.output(op, "out", out, (*lead, d_out), dtype, *readers)
    z = buffers.empty((*lead, a.shape[1]), dtype)
    scale = _check.scale(op, scale, dtype)
    n = len(rows)
    y_rows, z_rows = y.reshape(n, d_out), z.reshape(n, a.shape[1])
    part = _core.ForwardPart(
        weight=w, a=a, b=b, scale=scale, dropout=0.0, key=0, bias=added, y=y_rows, z=z_rows
    )
    _core.lora_forward(rows, [part])
    return y, z


def lora_backward(
    dy: npt.ArrayLike,
    x: npt.ArrayLike,
    z: npt.ArrayLike | None,
    fw: FrozenWeight | npt.ArrayLike,
    A: npt.ArrayLike,
    B: npt.ArrayLike,
    scale: float = 1.0,
    out: tuple[Array | None, Array | None, Array | None] | None = None,
    need_dx: bool = True,
) -> tuple[Array | Any, Array, Array]:  # Any: see module.Gradient
    """Compute the gradients of `lora_forward`. The gradient of W is not computed.

    dz = scale · dy A;  dx = dy W + dz B;  dA += scale · dyᵀ z;  dB += dzᵀ x
    for the forward pass  z = x Bᵀ;  y = x Wᵀ + scale · z Aᵀ

    Args:
        dy: array (..., d_out).
        x: array (..., d_in), the input of the forward pass.
        z: array (..., r), the second result of `lora_forward`. If None, z is computed again.
        fw, A, B, scale: as in the forward pass.
        out: a tuple (dx, dA, dB) of arrays for the results; for each None, a new array is created. dx is
            overwritten, but the gradients are ADDED to dA and dB.
        need_dx: whether to compute dx. If False, the product of dy and the frozen weight is skipped.
    Returns:
        dx (..., d_in) (None if need_dx is False), dA (d_out, r), dB (r, d_in).
    Raises:
        ValueError: a shape does not fit, or scale is not finite.
        TypeError: an array does not hold numbers, or an array in `out` has the wrong dtype.

    >>> x, W, A, B = np.ones((1, 2)), np.eye(2), np.array([[2.0], [0.0]]), np.array([[1.0, 1.0]])
    >>> y, z = lora_forward(x, W, A, B)
    >>> dx, dA, dB = lora_backward(np.array([[1.0, 0.0]]), x, z, W, A, B)
    >>> dx, dA, dB
    (array([[3., 2.]]), array([[2.],
           [0.]]), array([[2., 2.]]))
    """
    op = "lora_backward"
    w, d_out, d_in, dtype = _operand(op, fw)
    dy_rows, lead = _check.rows(op, "dy", dy, d_out, "d_out", dtype)
    x_rows, x_lead = _check.rows(op, "x", x, d_in, "d_in", dtype)
    if x_lead != lead:
        raise ValueError(f"{op}: x has leading shape {x_lead}, dy has {lead}")
    a, b = _check.factors(op, A, B, d_out, d_in, dtype)
    n, rank = len(dy_rows), a.shape[1]
    scale = _check.scale(op, scale, dtype)
    if z is None:
        z_rows = buffers.empty((n, rank), dtype)
        _core.matmul(b, x_rows, None, z_rows)
    else:
        z_rows = _check.shaped(op, "z", z, (*lead, rank), dtype).reshape(n, rank)

    taken = [("dy", dy_rows), ("x", x_rows), ("z", z_rows), ("A", a), ("B", b), *_arrays(("fw", w))]
    dx_out, da_out, db_out = _triple(op, out)
    dx = buffers.output(op, "dx", dx_out, (*lead, d_in), dtype, *taken) if need_dx else None
    taken += _arrays(("dx", dx))
    da = (
        np.zeros(a.shape, dtype)
        if da_out is None
        else buffers.output(op, "dA", da_out, a.shape, dtype, *taken)
    )
    taken.append(("dA", da))
    db = (
        np.zeros(b.shape, dtype)
        if db_out is None
        else buffers.output(op, "dB", db_out, b.shape, dtype, *taken)
    )
    dx_rows = None if dx is None else dx.reshape(n, d_in)
    part = _core.BackwardPart(
        weight=w, a=a, b=b, scale=scale, dropout=0.0, key=0, dy=dy_rows, z=z_rows, da=da, db=db
    )
    _core.lora_backward(x_rows, dx_rows, [part])
    return dx, da, db


def merge_lora(
    W: Array,
    A: npt.ArrayLike,
    B: npt.ArrayLike,
    scale: float = 1.0,
    *,
    dtype: str | None = None,
    rounding: str = "nearest",
    rng: np.random.Generator | int | None = None,
) -> Array:
    """Add a low-rank update to a weight in place: W += scale · A·B.

    All arguments are checked before W is written. No temporary array of W's size is made.

    Args:
        W: array (d_out, d_in) of float32, float64, float16 or bfloat16 (an ml_dtypes array, or uint16 bit
            patterns with dtype="bfloat16"). Each row must be contiguous, but there may be gaps between the
            rows.
        A, B: arrays (d_out, r) and (r, d_in) that do not overlap W.
        scale: the number that multiplies the product A·B. If scale is 0, A and B are not read.
        dtype: the name of W's format. This argument is only needed if W holds bit patterns.
        rounding: how sums are rounded to W's format. Sums are float32, or float64 for a float64 W.

            - "nearest": to nearest, ties to even. In float16, sums above 65504 become infinite, and
              `unmerge_lora` cannot restore the original values of W.
            - "stochastic", for float16 and bfloat16: up or down at random, so that the expected value is the
              exact sum. So updates that are smaller than W's precision add up over many merges, instead of
              being lost. Sums beyond the largest finite number are rounded to nearest.
        rng: a random generator or a seed, for "stochastic". The same seed gives the same bits with any number
            of threads.
    Returns:
        W.
    Raises:
        TypeError: W is not an array, is byte-swapped, or has none of the formats above.
        ValueError: W is read-only, is not aligned, or overlaps A or B; a row of W is not contiguous, or two
            rows overlap; a shape does not fit; scale is not finite; or "stochastic" is used with float32 or
            float64.

    >>> W = np.eye(2, dtype=np.float32)
    >>> merge_lora(W, A=[[2.0], [0.0]], B=[[1.0, 1.0]], scale=0.5)
    array([[2., 1.],
           [0., 1.]], dtype=float32)
    """
    return _merge("merge_lora", W, A, B, scale, 1, dtype, rounding, rng)


def unmerge_lora(
    W: Array,
    A: npt.ArrayLike,
    B: npt.ArrayLike,
    scale: float = 1.0,
    *,
    dtype: str | None = None,
    rounding: str = "nearest",
    rng: np.random.Generator | int | None = None,
) -> Array:
    """Subtract a low-rank update from a weight in place: W -= scale · A·B.

    This function reverses `merge_lora` up to rounding. (A layer's `unmerge` restores the weight exactly.)
    Arguments, result and errors are the same as for `merge_lora`.

    >>> W = np.eye(2, dtype=np.float32)
    >>> A, B = [[2.0], [0.0]], [[1.0, 1.0]]
    >>> unmerge_lora(merge_lora(W, A, B), A, B)
    array([[1., 0.],
           [0., 1.]], dtype=float32)
    """
    return _merge("unmerge_lora", W, A, B, scale, -1, dtype, rounding, rng)


def _merge(
    op: str,
    W: Array,
    A: npt.ArrayLike,
    B: npt.ArrayLike,
    scale: float,
    sign: int,
    dtype: str | None,
    rounding: str,
    rng: np.random.Generator | int | None,
) -> Array:
    _check.choice(op, "rounding", rounding, ("nearest", "stochastic"))
    readers = [(name, _check.as_array(op, name, value)) for name, value in (("A", A), ("B", B))]
    target, storage = _check.merge_target(op, W, dtype, *readers)
    factor_dtype = np.float64 if storage == "float64" else np.float32
    a, b = _check.factors(op, A, B, target.shape[0], target.shape[1], factor_dtype)
    key = None
    if rounding == "stochastic":
        if target.itemsize != 2:
            raise ValueError(
                f"{op}: rounding='stochastic' with a W of {storage}, expected float16 or bfloat16"
            )
        key = int(_check.generator(op, rng).integers(2**64, dtype=np.uint64))
    _core.merge_lora(target, a, b, sign * _check.scale(op, scale, factor_dtype), storage, key)
    return W


def _operand(op: str, fw: FrozenWeight | npt.ArrayLike) -> tuple[_core.Weight, int, int, np.dtype[Any]]:
    """Return (the weight in a form for the C++ core, d_out, d_in, the dtype of the computation)."""
    if isinstance(fw, FrozenWeight):
        return fw.packed, *fw.shape, fw.compute_dtype
    given = _check.as_array(op, "fw", fw)
    if given.dtype == np.uint16:
        raise TypeError(f'{op}: fw has dtype uint16; pass bit patterns as FrozenWeight(fw, dtype="bfloat16")')
    _check.matrix(op, "fw", given)
    array = _check.floats(op, "fw", given, np.float64 if given.dtype == np.float64 else np.float32)
    return array, array.shape[0], array.shape[1], array.dtype


def _arrays(*named: tuple[str, object]) -> list[tuple[str, Array]]:
    """From the pairs (name, value) of the inputs, return those whose value is an array."""
    return [(name, value) for name, value in named if isinstance(value, np.ndarray)]


def _triple(
    op: str, out: tuple[Array | None, Array | None, Array | None] | None
) -> tuple[Array | None, Array | None, Array | None]:
    if out is None:
        return None, None, None
    if not isinstance(out, tuple | list) or len(out) != 3:
        raise TypeError(f"{op}: out is {type(out).__name__}, expected a tuple (dx, dA, dB)")
    return out[0], out[1], out[2]
