"""The weighted sum of several adapters as one adapter, in the space of the factors.

Per layer, with the scales s and weights w,

    Σ wᵢ sᵢ AᵢBᵢ = A·B     A = [A₁ A₂ …] (d_out, R),  B = [w₁s₁B₁; w₂s₂B₂; …] (R, d_in),  R = Σ rᵢ

exactly: weighting the factors themselves, as is often done, adds cross terms AᵢBⱼ. With A = Qₐ Rₐ and
Bᵀ = Q_b R_b, the singular values of A·B are those of Rₐ R_bᵀ (R, R), so the smallest rank that holds the sum,
and the best approximation of any lower one (Eckart and Young 1936), cost no matrix of the weight's shape.
"""

import math
import textwrap
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nplora import _check
from nplora.adapters.adapter import Adapter, Source, read_adapter
from nplora.formats import base_model, files, model_digest
from nplora.formats.errors import UnsupportedError, counted, in_places
from nplora.formats.files import StrPath
from nplora.lora.delta import LoraDelta
from nplora.lora.merging import weighted_mean

Array = NDArray[Any]

_TOLD = 3  # layers in a summary


class CombinedAdapter(Adapter):
    """What `combine` gives.

    Attributes:
        errors: layer -> ‖ΔW - exact ΔW‖ / ‖exact ΔW‖ in the Frobenius norm, by truncation; 0 where nothing
            was cut off. Factors are then rounded to float32.
        norms: layer -> ‖exact ΔW‖.
    """

    def __init__(
        self,
        deltas: Mapping[str, LoraDelta],
        errors: Mapping[str, float],
        norms: Mapping[str, float],
        base_model_name_or_path: str | None = None,
        task_type: str | None = None,
        base_digest: str | None = None,
    ) -> None:
        super().__init__("the combined adapter", deltas, base_model_name_or_path, task_type, base_digest)
        self.errors, self.norms = dict(errors), dict(norms)

    @property
    def error(self) -> float:
        """The relative error of all layers' ΔW together."""
        return math.sqrt(
            weighted_mean(self.norms.values(), [self.errors[name] ** 2 for name in self.norms], 0.0)
        )

    def table(self, layers: Iterable[str] | None = None) -> str:
        """A line for each layer."""
        names = list(self if layers is None else layers)
        width = max(map(len, names), default=0)
        return "\n".join(
            f"{name:<{width}}  rank {self[name].rank:>3}  relative error {self.errors[name]:.3g}"
            for name in names
        )

    def __str__(self) -> str:
        ranks = [update.rank for update in self.values()]
        rank = " to ".join(map(str, sorted({min(ranks), max(ranks)})))
        numbers = sum(update.A.size + update.B.size for update in self.values())
        size = f"{counted(len(self), 'layer')} of rank {rank}, {numbers:,} numbers"
        if not self.error:
            return f"{size}, nothing is cut off"
        worst = sorted(self, key=lambda name: self.errors[name], reverse=True)[:_TOLD]
        return (
            f"{size}, relative error {self.error:.3g} in all; the largest:\n"
            f"{textwrap.indent(self.table(worst), '  ')}"
        )


def combine(
    adapters: Iterable[tuple[Source, float]],
    rank: int | None = None,
    base: StrPath | None = None,
    any_base: bool = False,
) -> CombinedAdapter:
    """The adapter whose ΔW is Σ weight · ΔW of the adapters given, in every layer that any of them adapts.

    Their ranks, alphas, rules of scaling and targets may differ. The sum is computed in float64 and has, in
    each layer, the lowest rank that holds it exactly.

    Args:
        adapters: pairs of an adapter and its weight, any finite number. An adapter is what `read_adapter`
            takes: a PEFT directory, llama.cpp's file, a model, or what an earlier call returned.
        rank: cut the ranks to at most this, by the largest singular values; see `errors` of the result.
        base: as in `read_adapter`.
        any_base: add up adapters of different models too. Models differ where the digests of their norms do,
            which adapters of language models keep here, or without these the last parts of the names that
            adapters have for them; what is not known differs from nothing.
    Returns:
        a mapping of layers to their updates, with scale 1; `save(directory)` writes it for PEFT.
    Raises:
        UnsupportedError: an adapter has DoRA, whose rescaled rows do not add up.
        ValueError: there are no adapters, a weight is not finite, rank is below 1, or adapters are of
            different models or do not fit each other; all that does not fit is listed. The rest as in
            `read_adapter`.
        TypeError: adapters are no pairs.
    """
    limit = None if rank is None else _check.integer("combine", "rank", rank, least=1)
    files.require_named("combine", base=base)
    base_digest = None if base is None else base_model.digest_of(base, any_base)
    weighted = [
        (read_adapter(source, base, any_base=any_base), _check.number("combine", "weight", weight))
        for source, weight in _pairs(adapters)
    ]
    if not weighted:
        raise ValueError("combine: no adapters")
    for adapter, _ in weighted:
        if adapter.use_dora:
            raise UnsupportedError(
                f"combine: {adapter.source} has DoRA, which rescales the rows of W + ΔW by their norms: such "
                "updates do not add up; merge it into the model instead"
            )
    if not any_base:
        _require_one_base([adapter for adapter, _ in weighted], base, base_digest)
    _require_alike([adapter for adapter, _ in weighted])
    names = dict.fromkeys(name for adapter, _ in weighted for name in adapter)
    updates, errors, norms = {}, {}, {}
    for name in names:
        terms = [(adapter[name], weight) for adapter, weight in weighted if name in adapter]
        if not all(np.isfinite(factor).all() for update, _ in terms for factor in (update.A, update.B)):
            raise ValueError(f"combine: a factor of {name} holds NaN or an infinity")
        updates[name], errors[name], norms[name] = _sum(terms, limit)
    digests = {adapter.base_digest for adapter, _ in weighted}
    about = (
        _agreed(adapter.base_model_name_or_path for adapter, _ in weighted),
        _agreed(adapter.task_type for adapter, _ in weighted),
        _agreed(digests if any_base else digests - {None}),
    )
    return CombinedAdapter(updates, errors, norms, *about)


def _pairs(adapters: Iterable[tuple[Source, float]]) -> list[tuple[Source, float]]:
    listed = list(adapters) if isinstance(adapters, Iterable) else [adapters]
    if isinstance(adapters, str | Adapter) or not all(
        isinstance(p, tuple | list) and len(p) == 2 for p in listed
    ):
        raise TypeError(f"combine: adapters is {adapters!r}, expected a list of pairs (adapter, weight)")
    return [(source, weight) for source, weight in listed]


def _require_one_base(adapters: list[Adapter], base: StrPath | None, base_digest: str | None) -> None:
    told = [(a.source, a.base_model_name_or_path, a.base_digest) for a in adapters]
    known = {digest for *_, digest in told}
    names = {_last_part(name) for _, name, _ in told} if None in known else set()
    if base is not None and base_digest is not None and len(known - {None}) == 1 and base_digest not in known:
        theirs = next(model_digest.described(name, digest) for _, name, digest in told if digest is not None)
        raise ValueError(
            f"combine: the base {model_digest.described(files.name(base), base_digest)} is another model "
            f"than the adapters' ({theirs}): give that one; {model_digest.TAKEN}"
        )
    if base is not None:
        told.append((files.name(base), None, base_digest))
    if max(len(found - {None}) for found in ({digest for *_, digest in told}, names)) > 1:
        bases = "".join(f"\n  {source}: {model_digest.described(*about)}" for source, *about in told)
        raise ValueError(f"combine: the adapters are of different models ({model_digest.TAKEN}):{bases}")


def _last_part(name: str | None) -> str | None:
    """Of a path or a name on Hugging Face: the rest of it may differ between two places of one model."""
    return Path(name or "").name.casefold() or None


def _require_alike(adapters: list[Adapter]) -> None:
    """Each layer has one shape and one kind in all of them."""
    first: dict[str, tuple[str, LoraDelta]] = {}
    problems = []
    for adapter in adapters:
        for name, update in adapter.items():
            source, other = first.setdefault(name, (adapter.source, update))
            if (update.shape, update.embedding) != (other.shape, other.embedding):
                problems.append(f"{name}: {_kind(other)} in {source}, {_kind(update)} in {adapter.source}")
    if problems:
        raise ValueError(f"combine: the adapters do not fit each other {in_places(problems)}")


def _kind(update: LoraDelta) -> str:
    return f"{'an embedding' if update.embedding else 'a linear layer'} {update.shape}"


def _agreed(words: Iterable[str | None]) -> str | None:
    found = set(words)
    return found.pop() if len(found) == 1 else None


def _sum(terms: list[tuple[LoraDelta, float]], limit: int | None) -> tuple[LoraDelta, float, float]:
    """The update of Σ weight · scale · A·B, the relative error of cutting it to rank `limit`, its norm."""
    a = np.concatenate([update.A for update, _ in terms], axis=1, dtype=np.float64)
    b = np.concatenate([weight * update.scale * update.B.astype(np.float64) for update, weight in terms])
    q_a, r_a = np.linalg.qr(a)
    q_b, r_b = np.linalg.qr(b.T)
    u, s, vt = np.linalg.svd(r_a @ r_b.T)
    # Rounding moves singular values by so much; what is below is 0 in the exact sum.
    noise = np.linalg.norm(r_a) * np.linalg.norm(r_b) * max(a.shape + b.shape) * np.finfo(np.float64).eps
    s = np.where(s > noise, s, 0)
    exact = max(1, np.count_nonzero(s))
    kept = exact if limit is None else min(exact, limit)
    root = np.sqrt(s[:kept])
    total = float(np.linalg.norm(s[:exact]))
    error = float(np.linalg.norm(s[kept:exact])) / total if total else 0.0
    left, right = q_a @ (u[:, :kept] * root), (root[:, None] * vt[:kept]) @ q_b.T
    update = LoraDelta(left.astype(np.float32), right.astype(np.float32), 1.0, None, terms[0][0].embedding)
    return update, error, total
