"""The merge gate: a merged model becomes the output only if it preserves the adapter's effect.

Two measures decide: the share of ΔW that rounding keeps, and the loss on held-out data.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from nplora import _check
from nplora.adapters.merged_tensors import MergedTensors, merge_of, possible_storages
from nplora.adapters.sources import Source
from nplora.formats import files, model_directory
from nplora.formats.files import StrPath
from nplora.lora.delta import LoraDelta
from nplora.lora.model_merge import HeldOutLoss, least_kept
from nplora.lora.new_rows import NewRows
from nplora.models.model_files import ModelFiles
from nplora.weights import storages

Array = NDArray[Any]

# A check takes the path of a model, and an adapter or None. The check returns the model's loss on held-out
# data, with the adapter applied but not merged.
Check: TypeAlias = Callable[[StrPath, Source | None], float]

# The largest accepted rise of the held-out loss, in nats per token. A rise of 0.02 raises the perplexity by
# 2 %. On SmolLM2, a merge in Q8_0 raises the loss by 0.002. The types that lose the update raise the loss by
# at least 0.04.
TOLERANCE = 0.02
_ENOUGH = 0.9  # the share of ΔW that a merge must keep, unless the caller accepts less
# How many elements are sampled to estimate how much of ΔW another storage type would keep.
_SAMPLED_ELEMENTS = 1 << 20  # elements of all tensors together
_LEAST_SAMPLED = 1 << 14  # at least this many elements of each tensor


@dataclass
class MergeGate:
    """Decides whether a merged model may become the output file.

    Attributes:
        base: the path of the base model.
        lossy: accept a merge that keeps little of ΔW.
        check: a function that measures the loss, or None.
        tolerance: the largest accepted rise of the loss.
        before: the base model's loss with the adapter applied but not merged; None if it is not measured.
    Raises:
        TypeError: the check is not a function, or the tolerance is not a number.
        ValueError: the tolerance is negative or not finite.
    """

    base: StrPath
    lossy: bool
    check: Check | None
    tolerance: float
    before: float | None = None

    def __post_init__(self) -> None:
        if self.check is not None and not callable(self.check):
            raise TypeError(
                f"merge: check is {_check.kind(self.check)}, expected a function; "
                "nplora.finetuning.held_out_loss(data) makes such a function"
            )
        given, self.tolerance = self.tolerance, _check.number("merge", "tolerance", self.tolerance)
        if self.tolerance < 0:
            raise ValueError(f"merge: tolerance is {given!r}, expected a number of at least 0")

    def measure(self, adapter: Source) -> None:
        """Measure the base model's loss with the adapter applied but not merged.

        Raises:
            FloatingPointError: the loss is not finite.
        """
        if self.check is not None:
            with _loadable_base(self.base) as model:
                self.before = self.check(model, adapter)
            if not math.isfinite(self.before):
                raise FloatingPointError(
                    f"merge: the held-out loss before the merge is {self.before}, expected a finite number"
                )

    def judge(self, merged: MergedTensors, written: list[Path]) -> Verdict:
        """Measure a merge while its files still have temporary names.

        Raises:
            CorruptError: another program wrote to the base.
        """
        for stamp in merged.model.mapped:
            stamp.require_unchanged()
        kept = least_kept(merge.report for merge in merged.merges.values())
        loss = self._loss(merged, written)
        return Verdict(kept, self.lossy or kept >= _ENOUGH, loss)

    def refusal(self, verdict: Verdict, merged: MergedTensors, output: StrPath) -> ValueError:
        """The error for a merge that fails a check, with a storage type that passes, if there is one."""
        problems = list[str]()
        kinds = ", ".join(dict.fromkeys(merge.storage for merge in merged.merges.values()))
        if not verdict.keeps_delta:
            problems.append(
                f"rounding to {kinds} would keep {verdict.kept:.1%} of the adapter's change (ΔW), expected "
                f"at least {_ENOUGH:.0%}"
            )
        if verdict.loss is not None:
            problems.append(_problem(verdict.loss, kinds))
        remedy = self._remedy(merged, output)
        without = "" if verdict.loss is None or verdict.loss.is_kept else " without --check"
        return ValueError(
            f"merge: {', and '.join(problems)}; {remedy}; --lossy (lossy=True){without} merges anyway"
        )

    def _loss(self, merged: MergedTensors, written: list[Path]) -> HeldOutLoss | None:
        if self.check is None or self.before is None:
            return None
        with _loadable(merged, self.base, written) as path:
            return HeldOutLoss(self.before, self.check(path, None), self.tolerance)

    def _remedy(self, merged: MergedTensors, output: StrPath) -> str:
        """Suggest the smallest type that keeps enough of ΔW and, if there is a check, passes the check."""
        for storage, kept in _candidates(merged):
            named = f"--dtype {storage} keeps about {kept:.0%}"
            if self.check is None:
                return named
            loss = self._trial(dataclasses.replace(merged, dtype=storage), output)
            if loss is None:
                return f"{named} of ΔW (estimated)"
            if loss.is_kept:
                return f"{named} of ΔW, and its loss is {loss.merged:.4f} (measured)"
        if self.check is None:
            return "no other type keeps enough of ΔW"
        return (
            "no type that the file can hold keeps the loss within the tolerance: "
            "use the adapter without merging it"
        )

    def _trial(self, merged: MergedTensors, output: StrPath) -> HeldOutLoss | None:
        """Write a trial merge, measure its loss and remove the file.

        Return None if the file cannot be written.
        """
        try:
            with files.written(merged.loadable_files(output)) as written:
                return self._loss(merged, written)
        except (OSError, ValueError):
            return None


@dataclass(frozen=True)
class Verdict:
    """How much of an adapter a merge keeps.

    Attributes:
        kept: the share of ΔW that the merge keeps.
        keeps_delta: whether `kept` is at least 90 %, or the caller accepts any share.
        loss: the held-out losses before and after the merge; None if they are not measured.
    """

    kept: float
    keeps_delta: bool
    loss: HeldOutLoss | None

    @property
    def passes(self) -> bool:
        return self.keeps_delta and (self.loss is None or self.loss.is_kept)


def _problem(loss: HeldOutLoss, kinds: str) -> str:
    if loss.is_kept:
        return f"the held-out loss stays within the tolerance ({loss.on_the_fly:.4f} -> {loss.merged:.4f})"
    return (
        f"the held-out loss would go from {loss.on_the_fly:.4f} to {loss.merged:.4f} in {kinds}, expected a "
        f"rise of at most tolerance={loss.tolerance:g}"
    )


# ---- other storage types ----


def _candidates(merged: MergedTensors) -> Iterator[tuple[str, float]]:
    """The larger storage types that keep enough of ΔW, smallest first, with the estimated share that each
    type keeps.

    A type counts as larger if the merged tensors would need more bytes than in the refused merge. For a float
    type, the same number of bytes is enough.
    """
    merges, model = merged.merges, merged.model
    shapes = [merge.shape for merge in merges.values()]

    def size(storage: str) -> int:
        return sum(rows * storages.row_nbytes(storage, d_in) for rows, d_in in shapes)

    present = sum(merge.nbytes for merge in merges.values())
    for storage in sorted(possible_storages(model, [d_in for _, d_in in shapes]), key=size):
        if size(storage) > present or (size(storage) == present and storage in storages.FLOATS):
            kept = _estimated_kept(model, {name: merge.update for name, merge in merges.items()}, storage)
            if kept >= _ENOUGH:
                yield storage, kept


def _estimated_kept(model: ModelFiles, updates: Mapping[str, LoraDelta | NewRows], storage: str) -> float:
    """Estimate the share of ΔW that a storage type keeps, from evenly spaced rows of each tensor.

    The share is 0 if a sum exceeds the type's range.
    """
    elements = max(_LEAST_SAMPLED, _SAMPLED_ELEMENTS // max(1, len(updates)))
    reports = []
    for name, update in updates.items():
        count = max(1, elements // max(1, update.shape[1]))
        merge = merge_of(model.tensors[name], update, storage, _sampled(update, count))
        try:
            for _ in merge.rows():
                pass
        except ValueError:
            return 0.0
        reports.append(merge.report)
    return least_kept(reports)


def _sampled(update: LoraDelta | NewRows, count: int) -> Array:
    """The indices of about `count` evenly spaced rows of an update.

    If the update replaces only some rows of the weight, return the indices of the first `count` replaced
    rows.
    """
    if isinstance(update, NewRows) and update.ids is not None:
        return np.sort(update.ids)[:count]
    d_out = update.shape[0]
    return np.arange(0, d_out, max(1, -(-d_out // count)))


# ---- models to load ----


@contextlib.contextmanager
def _loadable_base(base: StrPath) -> Iterator[StrPath]:
    """Yield a path from which `load_model` can read the base model."""
    if Path(base).is_dir() or files.suffix(base) != ".safetensors":
        yield Path(base).parent if model_directory.is_index(base) else base
    else:
        with model_directory.linked(Path(base).parent, Path(base)) as directory:
            yield directory


@contextlib.contextmanager
def _loadable(merged: MergedTensors, base: StrPath, written: list[Path]) -> Iterator[Path]:
    """Yield a path from which `load_model` can read the new model.

    Args:
        written: the new files with their temporary names, in the order of `merged.new_files`.
    """
    weights, source = written[0], model_directory.of(base)
    if merged.model.suffix == ".gguf":
        yield weights
        return
    changed = dict[str, Path]()
    if merged.vocabulary is not None:
        names = [Path(file.path).name for file in model_directory.companions(source, source)]
        changed = dict(zip(names, written[1:], strict=True))
    with model_directory.linked(source, weights, changed) as directory:
        yield directory
