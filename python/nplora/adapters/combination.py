"""The weighted sum of adapters as one adapter. `nplora.lora.weighted_sum` computes the sum for a layer."""

import heapq
import math
import textwrap
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from nplora import _check
from nplora.adapters import sources
from nplora.adapters.content import AdapterContent
from nplora.adapters.fitting import kind
from nplora.adapters.sources import Source
from nplora.formats import files
from nplora.formats.errors import UnsupportedError, counted, in_places
from nplora.formats.files import StrPath
from nplora.lora.delta import LoraDelta
from nplora.lora.merging import weighted_mean
from nplora.lora.weighted_sum import weighted_sum
from nplora.models import base_model, model_digest

T = TypeVar("T")

_SHOWN = 3  # layers in a summary


@dataclass(eq=False, repr=False)
class Combination(AdapterContent):
    """A weighted sum of adapters.

    Attributes:
        errors: for each layer, the relative error ‖ΔW - exact ΔW‖ / ‖exact ΔW‖ (Frobenius norm) that
            truncation to a lower rank causes; 0 without truncation. This error does not include the rounding
            of the factors to float32.
        norms: for each layer, the Frobenius norm of the exact ΔW.
    """

    errors: dict[str, float] = field(default_factory=dict)
    norms: dict[str, float] = field(default_factory=dict)

    @property
    def error(self) -> float:
        """The relative error over all layers, as if the ΔW of all layers formed one array."""
        squares = [self.errors[name] ** 2 for name in self.norms]
        return math.sqrt(weighted_mean(self.norms.values(), squares, 0.0))

    def table(self, layers: Iterable[str] | None = None) -> str:
        """A text table of the ranks and relative errors, with one line for each layer."""
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
            return f"{size}, nothing is truncated"
        worst = self.table(heapq.nlargest(_SHOWN, self, key=self.errors.__getitem__))
        table = textwrap.indent(worst, "  ")
        return (
            f"{size}, relative error {self.error:.3g} over all layers; layers with the largest errors:\n"
            f"{table}"
        )


def combine(
    adapters: Iterable[tuple[Source, float]],
    rank: int | None = None,
    base: StrPath | None = None,
    any_base: bool = False,
) -> Combination:
    """See `Adapter.combine`."""
    limit = None if rank is None else _check.integer("combine", "rank", rank, least=1)
    files.require_named("combine", base=base)
    base_digest = None if base is None else base_model.digest_of(base, any_base)
    weighted = [
        (sources.read_any(source, base, any_base=any_base), _check.number("combine", "weight", weight))
        for source, weight in _pairs(adapters)
    ]
    if not weighted:
        raise ValueError("combine: got no adapters, expected at least one")
    for adapter, _ in weighted:
        adapter.require_low_rank("merge this adapter into the model instead")
        adapter.require_always_active("combine")
        if adapter.use_dora:
            raise UnsupportedError(
                f"combine: {adapter.source} uses DoRA, which rescales the rows of W + ΔW, so its update "
                "cannot be added to other updates; merge this adapter into the model instead"
            )
    contents = [adapter for adapter, _ in weighted]
    if not any_base:
        _require_one_base(contents, base, base_digest)
    _require_alike(contents)
    deltas, errors, norms = {}, {}, {}
    for name in dict.fromkeys(name for adapter in contents for name in adapter):
        terms = [(adapter[name], weight) for adapter, weight in weighted if name in adapter]
        deltas[name], errors[name], norms[name] = weighted_sum(name, terms, limit)
    digests = {adapter.base_digest for adapter in contents}
    return Combination(
        "the combined adapter",
        deltas,
        _agreed(adapter.base_model_name_or_path for adapter in contents),
        _agreed(adapter.task_type for adapter in contents),
        _agreed(digests if any_base else digests - {None}),
        chat_template=_agreed(adapter.chat_template for adapter in contents),
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
            f"combine: base is {model_digest.described(files.name(base), base_digest)}, but the adapters "
            f"belong to another model ({theirs}); pass that model as base, or {model_digest.TAKEN}"
        )
    if base is not None:
        bases.append((files.name(base), None, base_digest))
    if max(len(found - {None}) for found in ({digest for *_, digest in bases}, names)) > 1:
        lines = "".join(f"\n  {source}: {model_digest.described(*about)}" for source, *about in bases)
        raise ValueError(f"combine: the adapters belong to different models ({model_digest.TAKEN}):{lines}")


def _last_part(name: str | None) -> str | None:
    """The last part of a path or Hugging Face Hub name, usually the same for all copies of a model."""
    return Path(name or "").name.casefold() or None


def _require_alike(adapters: list[AdapterContent]) -> None:
    """Raise ValueError if two adapters disagree on the shape or the kind (such as linear) of a layer."""
    first: dict[str, tuple[str, LoraDelta]] = {}
    problems = []
    for adapter in adapters:
        for name, update in adapter.items():
            source, other = first.setdefault(name, (adapter.source, update))
            if _kind(update) != _kind(other):
                problems.append(f"{name}: {_kind(other)} in {source}, {_kind(update)} in {adapter.source}")
    if problems:
        raise ValueError(f"combine: the adapters do not fit each other {in_places(problems)}")


def _kind(update: LoraDelta) -> str:
    shape = update.shape if update.kernel is None else (len(update.A), *update.kernel)
    return f"{kind(update.embedding, update.kernel)} {shape}"


def _agreed(values: Iterable[T | None]) -> T | None:
    """Return the common value if all `values` are equal, else None."""
    found = set(values)
    return found.pop() if len(found) == 1 else None
