"""The weighted sum of several updates of one weight, computed from their factors.

Update i has the factors Aᵢ and Bᵢ of rank rᵢ, the scale sᵢ and the weight wᵢ. The factors A and B of the sum
have rank R:

    Σ wᵢ sᵢ AᵢBᵢ = A·B     A = [A₁ A₂ …] (d_out, R),  B = [w₁s₁B₁; w₂s₂B₂; …] (R, d_in),  R = Σ rᵢ

A·B is the exact sum. If all Aᵢ and all Bᵢ were added up instead, as is often done, the product would contain
cross terms AᵢBⱼ. With the QR decompositions A = Qₐ Rₐ and Bᵀ = Q_b R_b, A·B has the same singular values as
Rₐ R_bᵀ (R, R). The singular values give the rank of the sum and its best approximation of any lower rank
(Eckart and Young 1936). No matrix of shape (d_out, d_in) is needed.
"""

from collections.abc import Sequence

import numpy as np

from nplora.lora.delta import LoraDelta


def weighted_sum(
    name: str, terms: Sequence[tuple[LoraDelta, float]], limit: int | None
) -> tuple[LoraDelta, float, float]:
    """Compute the weighted sum of several updates ΔW, and reduce the rank of the sum to at most `limit`.

    Args:
        name: the layer's name, for messages.
        terms: pairs of an update and its weight in the sum. All updates are for the same layer, without DoRA.
        limit: the largest rank of the result, or None for the rank of the exact sum.
    Returns:
        a tuple: the sum as a LoraDelta with scale 1 and float32 factors; the relative error ‖sum - exact sum‖
        / ‖exact sum‖ due to the lower rank; and ‖exact sum‖. All norms are Frobenius norms.
    Raises:
        ValueError: a factor holds NaN or an infinity, or the sum is too large for float32.
    """
    with np.errstate(over="ignore", invalid="ignore"):
        a = np.concatenate([update.A for update, _ in terms], axis=1, dtype=np.float64)
        b = np.concatenate([weight * update.scale * update.B.astype(np.float64) for update, weight in terms])
    if not (np.isfinite(a).all() and np.isfinite(b).all()):
        raise ValueError(f"combine: a factor of {name} holds NaN or an infinity")
    q_a, r_a = np.linalg.qr(a)
    q_b, r_b = np.linalg.qr(b.T)
    u, s, vt = np.linalg.svd(r_a @ r_b.T)
    # Rounding errors change singular values by up to this much. Smaller singular values are treated as 0.
    noise = np.linalg.norm(r_a) * np.linalg.norm(r_b) * max(a.shape + b.shape) * np.finfo(np.float64).eps
    s = np.where(s > noise, s, 0)
    exact = max(1, np.count_nonzero(s))
    kept = exact if limit is None else min(exact, limit)
    root = np.sqrt(s[:kept])
    total = float(np.linalg.norm(s[:exact]))
    error = float(np.linalg.norm(s[kept:exact])) / total if total else 0.0
    with np.errstate(over="ignore"):
        left = (q_a @ (u[:, :kept] * root)).astype(np.float32)
        right = ((root[:, None] * vt[:kept]) @ q_b.T).astype(np.float32)
    if not (np.isfinite(left).all() and np.isfinite(right).all()):
        raise ValueError(f"combine: the sum of {name} is too large for float32")
    first = terms[0][0]
    return LoraDelta(left, right, 1.0, None, first.embedding, kernel=first.kernel), error, total
