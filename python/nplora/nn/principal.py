"""Initial factors from the principal part of a weight: PiSSA (Meng et al. 2024), OLoRA (Büyükakyüz 2024).

Both methods factor a part of the weight W and freeze the rest: W = W_rest + scale · A·B. The factors are the
same as in PEFT:

    - pissa: A = U √(S / scale),  B = √(S / scale) Vᵀ  with the singular value decomposition U S Vᵀ of W,
      cut to rank r.
    - olora: A = Q[:, :r],  B = R[:r]  with the QR decomposition W = Q R.

Both methods only multiply other matrices by W or Wᵀ. These products are computed in float32 (in float64 if
W is float64), and the whole weight is never decoded to a dense matrix.
"""

from __future__ import annotations

import contextlib
from typing import Any

import numpy as np
import numpy.typing as npt

from nplora.weights import FrozenWeight

Array = npt.NDArray[Any]

PRINCIPAL_INITS = ("pissa", "olora")

_OVERSAMPLING = 16  # additional directions, which make the first `rank` directions converge faster
_MOST_ITERATIONS = 60
_SETTLED = 1e-7  # a smaller relative change ends the search; about float32's rounding


def principal_factors(init: str, weight: FrozenWeight, rank: int, scale: float) -> tuple[Array, Array]:
    """Return A (d_out, r) and B (r, d_in) for `init` ("pissa" or "olora"), in the weight's `compute_dtype`.

    The same arguments always give the same factors, because the search for singular vectors starts from fixed
    random directions.

    Raises:
        ValueError: the weight holds NaN or an infinity, or values whose products overflow.
    """
    factors = None
    with contextlib.suppress(np.linalg.LinAlgError):  # the SVD raises this error for NaN
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
    """Return Q[:, :r] and R[:r] of W = Q R. The first r columns of W suffice, as R[:r] is Q[:, :r]ᵀ W."""
    first = np.eye(rank, weight.shape[1], dtype=weight.compute_dtype)
    q = np.linalg.qr(weight.matmul_unrounded(first).T)[0]
    return np.ascontiguousarray(q), weight.matmul_t_unrounded(q.T)


def randomized_svd(weight: FrozenWeight, rank: int) -> tuple[Array, Array, Array]:
    """Return U (d_out, rank), the `rank` largest singular values S, and Vᵀ (rank, d_in), in float64.

    The method is subspace iteration from a random start (Halko, Martinsson and Tropp 2011, algorithms 4.4 and
    5.1). The rows of each product with W or Wᵀ are made orthonormal before the next product. The iteration
    ends when the singular values have converged.
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
    """Return an orthonormal basis of the space that `rows` spans. The rows of the result are the basis."""
    return np.linalg.qr(rows.T.astype(np.float64))[0].T
