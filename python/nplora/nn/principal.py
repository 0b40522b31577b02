"""Initial factors from the principal part of a weight: PiSSA (Meng et al. 2024), OLoRA (Büyükakyüz 2024).

Both factor a part of W and freeze the rest: W = W_rest + scale · A·B. As in PEFT,

    pissa   scale · A·B is the best approximation of W of rank r:  A = U √(S / scale),  B = √(S / scale) Vᵀ
    olora   A = Q[:, :r],  B = R[:r]  with  W = Q R

Only products with the weight are computed, in float32 for every storage. It is never a dense matrix.
"""

from __future__ import annotations

import contextlib
from typing import Any

import numpy as np
import numpy.typing as npt

from nplora.weights import FrozenWeight

Array = npt.NDArray[Any]

PRINCIPAL_INITS = ("pissa", "olora")

_OVERSAMPLING = 16  # directions beyond the rank; they take up the tail, so the others converge faster
_MOST_ITERATIONS = 60
_SETTLED = 1e-7  # the relative change by one iteration that ends the search; float32's rounding


def principal_factors(init: str, weight: FrozenWeight, rank: int, scale: float) -> tuple[Array, Array]:
    """A (d_out, r) and B (r, d_in) for this `init`, in the dtype that the weight computes in.

    They depend on the weight alone, because the search begins with the same random directions every time.

    Raises:
        ValueError: the weight holds NaN or an infinity, or values whose products overflow.
    """
    factors = None
    with contextlib.suppress(np.linalg.LinAlgError):  # the SVD raises it for NaN
        factors = _olora(weight, rank) if init == "olora" else _pissa(weight, rank, scale)
    if factors is None or not all(np.isfinite(factor).all() for factor in factors):
        raise ValueError(
            f"init={init!r}: the weight {weight.shape} holds NaN, an infinity or values that are too large"
        )
    return factors


def _pissa(weight: FrozenWeight, rank: int, scale: float) -> tuple[Array, Array]:
    u, s, vt = randomized_svd(weight, rank)
    root = np.sqrt(s / scale)
    dtype = weight.compute_dtype
    return (u * root).astype(dtype), (root[:, None] * vt).astype(dtype)


def _olora(weight: FrozenWeight, rank: int) -> tuple[Array, Array]:
    """Q[:, :r] spans the first r columns of W, so only these are decomposed; R[:r] = Q[:, :r]ᵀ W."""
    first = np.eye(rank, weight.shape[1], dtype=weight.compute_dtype)
    q = np.linalg.qr(weight.matmul_unrounded(first).T)[0]
    return np.ascontiguousarray(q), weight.matmul_t_unrounded(q.T)


def randomized_svd(weight: FrozenWeight, rank: int) -> tuple[Array, Array, Array]:
    """The `rank` largest singular values S with U (d_out, rank) and Vᵀ (rank, d_in), float64.

    Subspace iteration from a random start, orthonormal after every product (Halko, Martinsson and Tropp 2011,
    algorithms 4.4 and 5.1), until the singular values settle.
    """
    d_out, d_in = weight.shape
    width = min(rank + _OVERSAMPLING, d_out, d_in)
    directions: Array = np.random.default_rng(0).standard_normal((width, d_in), dtype=np.float32)
    before = np.zeros(rank)
    for _ in range(_MOST_ITERATIONS):
        q = _orthonormal(weight.matmul_unrounded(directions))  # rows span the range of W
        p, r = np.linalg.qr(weight.matmul_t_unrounded(q).T.astype(np.float64))  # Qᵀ W = Rᵀ Pᵀ
        u, s, vt = np.linalg.svd(r.T)
        directions = p.T
        if (np.abs(s[:rank] - before) <= _SETTLED * s[0]).all():
            break
        before = s[:rank]
    return q.T @ u[:, :rank], s[:rank], vt[:rank] @ p.T


def _orthonormal(rows: Array) -> Array:
    """An orthonormal basis of the rows' span, as rows."""
    return np.linalg.qr(rows.T.astype(np.float64))[0].T
