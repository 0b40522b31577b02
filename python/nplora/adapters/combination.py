"""The weighted sum of several adapters as one adapter, in the space of the factors.

Per layer, with the scales s and weights w,

    Σ wᵢ sᵢ AᵢBᵢ = A·B     A = [A₁ A₂ …] (d_out, R),  B = [w₁s₁B₁; w₂s₂B₂; …] (R, d_in),  R = Σ rᵢ

exactly: weighting the factors themselves, as is often done, adds cross terms AᵢBⱼ. With A = Qₐ Rₐ and
Bᵀ = Q_b R_b, the singular values of A·B are those of Rₐ R_bᵀ (R, R), so the smallest rank that holds the sum,
and the best approximation of any lower one (Eckart and Young 1936), cost no matrix of the weight's shape.
"""

import heapq
import math
import textwrap
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nplora import _check
from nplora.adapters import sources
from nplora.adapters.content import AdapterContent
from nplora.adapters.sources import Source
from nplora.formats import files
from nplora.formats.errors import UnsupportedError, counted, in_places
from nplora.formats.files import StrPath
from nplora.lora.delta import LoraDelta
from nplora.lora.merging import weighted_mean
from nplora.models import base_model, model_digest

Array = NDArray[Any]

_SHOWN = 3  # layers in a summary


@dataclass(eq=False, repr=False)
class Combination(AdapterContent):
    """A weighted sum of adapters.

    Attributes:
        errors: layer -> ‖ΔW - exact ΔW‖ / ‖exact ΔW‖ in the Frobenius norm, by truncation; 0 where nothing
            was cut off. Factors are then rounded to float32.
        norms: layer -> ‖exact ΔW‖.
    """

    errors: dict[str, float] = field(default_factory=dict)
    norms: dict[str, float] = field(default_factory=dict)

    @property
    def error(self) -> float:
        """The relative error of all layers' ΔW together."""
        squares = [self.errors[name] ** 2 for name in self.norms]
        return math.sqrt(weighted_mean(self.norms.values(), squares, 0.0))

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
        worst = self.table(heapq.nlargest(_SHOWN, self, key=self.errors.__getitem__))
        return f"{size}, relative error {self.error:.3g} in all; the largest:\n{textwrap.indent(worst, '  ')}"


def combine(
    adapters: Iterable[tuple[Source, float]],
    rank: int | None = None,
    base: StrPath | None = None,
    any_base: bool = False,
) -> Combination:
    """As `Adapter.combine`."""
    limit = None if rank is None else _check.integer("combine", "rank", rank, least=1)
    files.require_named("combine", base=base)
    base_digest = None if base is None else base_model.digest_of(base, any_base)
    weighted = [
        (sources.low_rank(source, base, any_base=any_base), _check.number("combine", "weight", weight))
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
    contents = [adapter for adapter, _ in weighted]
    if not any_base:
        _require_one_base(contents, base, base_digest)
    _require_alike(contents)
    deltas, errors, norms = {}, {}, {}
    for name in dict.fromkeys(name for adapter in contents for name in adapter):
        terms = [(adapter[name], weight) for adapter, weight in weighted if name in adapter]
        deltas[name], errors[name], norms[name] = _sum(name, terms, limit)
    digests = {adapter.base_digest for adapter in contents}
    return Combination(
        "the combined adapter",
        deltas,
        _agreed(adapter.base_model_name_or_path for adapter in contents),
        _agreed(adapter.task_type for adapter in contents),
        _agreed(digests if any_base else digests - {None}),
        errors=errors,
        norms=norms,
    )


def _pairs(adapters: Iterable[tuple[Source, float]]) -> list[tuple[Source, float]]:
    listed = list(adapters) if isinstance(adapters, Iterable) else [adapters]
    if isinstance(adapters, str | AdapterContent) or not all(
        isinstance(p, tuple | list) and len(p) == 2 for p in listed
    ):
        raise TypeError(f"combine: adapters is {adapters!r}, expected a list of pairs (adapter, weight)")
    return [(source, weight) for source, weight in listed]


def _require_one_base(adapters: list[AdapterContent], base: StrPath | None, base_digest: str | None) -> None:
    bases = [(a.source, a.base_model_name_or_path, a.base_digest) for a in adapters]
    known = {digest for *_, digest in bases}
    names = {_last_part(name) for _, name, _ in bases} if None in known else set()
    if base is not None and base_digest is not None and len(known - {None}) == 1 and base_digest not in known:
        theirs = next(model_digest.described(name, digest) for _, name, digest in bases if digest is not None)
        raise ValueError(
            f"combine: the base {model_digest.described(files.name(base), base_digest)} is another model "
            f"than the adapters' ({theirs}): give that one; {model_digest.TAKEN}"
        )
    if base is not None:
        bases.append((files.name(base), None, base_digest))
    if max(len(found - {None}) for found in ({digest for *_, digest in bases}, names)) > 1:
        lines = "".join(f"\n  {source}: {model_digest.described(*about)}" for source, *about in bases)
        raise ValueError(f"combine: the adapters are of different models ({model_digest.TAKEN}):{lines}")


def _last_part(name: str | None) -> str | None:
    """The end of a path or of a name on Hugging Face. The rest may differ between two copies of a model."""
    return Path(name or "").name.casefold() or None


def _require_alike(adapters: list[AdapterContent]) -> None:
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


def _sum(
    name: str, terms: list[tuple[LoraDelta, float]], limit: int | None
) -> tuple[LoraDelta, float, float]:
    """The update of Σ weight · scale · A·B, the relative error of cutting it to rank `limit`, its norm."""
    with np.errstate(over="ignore", invalid="ignore"):
        a = np.concatenate([update.A for update, _ in terms], axis=1, dtype=np.float64)
        b = np.concatenate([weight * update.scale * update.B.astype(np.float64) for update, weight in terms])
    if not (np.isfinite(a).all() and np.isfinite(b).all()):
        raise ValueError(f"combine: a factor of {name} holds NaN or an infinity")
    q_a, r_a = np.linalg.qr(a)
    q_b, r_b = np.linalg.qr(b.T)
    u, s, vt = np.linalg.svd(r_a @ r_b.T)
    # Rounding moves singular values by this much; what is below is 0 in the exact sum.
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
        raise ValueError(f"combine: the sum of {name} is beyond float32")
    return LoraDelta(left, right, 1.0, None, terms[0][0].embedding), error, total
