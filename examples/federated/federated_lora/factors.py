"""LoRA factors as Flower's arrays, and the error of an aggregate.

W is (d_out, d_in), A is (d_out, r), B is (r, d_in), and the update of W is scale · A·B. No record holds
weights of the base model.
"""

import dataclasses
import hashlib
from collections.abc import Iterable, Sequence

import numpy as np
from flwr.app import Array, ArrayRecord

from nplora.adapters import Adapter, LoraDelta


def record_of(adapter: Adapter, letters: str) -> ArrayRecord:
    """Factors as arrays named like "model.layers.0.mlp.up_proj.A", sorted. `letters` is "A" or "AB".

    Flower's clipping pairs the arrays of two records by their order.
    """
    return ArrayRecord(
        {
            f"{name}.{letter}": Array(getattr(adapter[name], letter))
            for name in sorted(adapter)
            for letter in letters
        }
    )


def digest_of(start: Adapter) -> str:
    """A digest of the base model and of the initial factors. It is the same for all clients of a run."""
    digest = hashlib.sha256(f"{start.base_digest} {next(iter(start.values())).scale}".encode())
    for key, array in record_of(start, "AB").items():
        digest.update(f"{key} {array.shape}".encode() + array.data)
    return digest.hexdigest()


def adapter_with(base: Adapter, record: ArrayRecord) -> Adapter:
    """A copy of `base` with the factors of a record. Factors that the record lacks stay."""
    deltas = {name: _with_factors(name, delta, record) for name, delta in base.items()}
    return dataclasses.replace(base, deltas=deltas)


def _with_factors(name: str, delta: LoraDelta, record: ArrayRecord) -> LoraDelta:
    a, b = (
        record[f"{name}.{letter}"].numpy() if f"{name}.{letter}" in record else getattr(delta, letter)
        for letter in "AB"
    )
    if (len(a), b.shape[1]) != delta.shape:
        raise ValueError(f"{name}: the factors {a.shape} and {b.shape} do not fit a weight {delta.shape}")
    return LoraDelta(a, b, delta.scale)  # the scale is the same for every rank


def relative_error(aggregate: Adapter, clients: Sequence[tuple[Adapter, float]]) -> float:
    """‖aggregate − Σ weight · ΔW‖ / ‖Σ weight · ΔW‖, in the Frobenius norm over all layers, in float64."""
    different = wanted = 0.0
    for name, delta in aggregate.items():
        terms = [(adapter[name], weight) for adapter, weight in clients]
        different += _norm([*terms, (delta, -1.0)]) ** 2
        wanted += _norm(terms) ** 2
    return float(np.sqrt(different / wanted)) if wanted else 0.0


def _norm(terms: Iterable[tuple[LoraDelta, float]]) -> float:
    """The Frobenius norm of Σ weight · scale · A·B, without a matrix of W's size."""
    pairs = [(weight * d.scale * d.A.astype(np.float64), d.B.astype(np.float64)) for d, weight in terms]
    left = np.linalg.qr(np.concatenate([a for a, _ in pairs], axis=1), mode="r")
    right = np.linalg.qr(np.concatenate([b for _, b in pairs]).T, mode="r")
    return float(np.linalg.norm(left @ right.T))
