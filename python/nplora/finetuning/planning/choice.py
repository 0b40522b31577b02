"""Which way of computing a step fits into the memory there is, and what would where none does."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from nplora.finetuning.data import EVALUATION_TOKENS
from nplora.finetuning.planning.memory import Adapters, Candidate, Memory, Pass, predicted
from nplora.finetuning.planning.resident import available_memory, current_memory, peak_memory, unread
from nplora.finetuning.planning.speed import Speed, measured
from nplora.formats.errors import counted
from nplora.lm import LanguageModel
from nplora.models.packing import cut
from nplora.runtime import get_num_threads

Array = npt.NDArray[Any]

_LEAST_PIECE = 32  # tokens: smaller pieces gain little and lose speed
# What a process has before a run differs a little from one to the next. A plan leaves so much of its budget,
# which the run may take up when it goes on in another process; so does the budget that an error suggests.
_SPARE = 1.02


class BudgetError(ValueError):
    """No way of computing a step fits into the memory that is allowed; the message says what would."""


@dataclass(frozen=True)
class Wishes:
    """What is fixed: the arithmetic; that activations are computed again; what batches may be cut into.

    `goes_on`: the run has begun, and may take up what its plan, if it had one, has spared.
    """

    compute: str | None = None
    checkpoint_blocks: bool = False
    pieces: tuple[int | None, ...] | None = None
    goes_on: bool = False


@dataclass(frozen=True)
class Work:
    """What a run reads.

    Attributes:
        batches: the tokens and the targets of each of their sequences.
        steps, accumulate: of the run, and batches of a step.
        evaluated: tokens of the largest batch that is evaluated, 0 without any.
        prefix_tokens: for which a `PrefixCache` holds rows in memory.
    """

    batches: list[tuple[Array, Array]]
    steps: int
    accumulate: int = 1
    evaluated: int = 0
    prefix_tokens: int = 0

    def passes(self, micro_tokens: int | None) -> Iterator[Pass]:
        """What the batches are cut into."""
        for lengths, targets in self.batches:
            for first, last in itertools.pairwise(cut(lengths, micro_tokens)):
                piece = lengths[first:last]
                yield Pass(int(piece.sum()), int(targets[first:last].sum()), int(piece.max(initial=0)))

    def largest(self, micro_tokens: int | None) -> Pass:
        """The most tokens, targets and tokens of a sequence that a pass has: they need not be of one."""
        passes = list(self.passes(micro_tokens))
        return Pass(*(max(getattr(one, name) for one in passes) for name in ("tokens", "targets", "longest")))

    def shortened(self, length: int) -> Work:
        """The same with longer sequences cut."""
        cut_off = [(np.minimum(n, length), np.minimum(learned, length)) for n, learned in self.batches]
        evaluated = min(self.evaluated, max(EVALUATION_TOKENS, length))
        return dataclasses.replace(self, batches=cut_off, evaluated=evaluated)

    @property
    def longest(self) -> int:
        return max(int(lengths.max(initial=0)) for lengths, _ in self.batches)

    @property
    def batch_tokens(self) -> int:
        """Of the largest batch."""
        return max(int(lengths.sum()) for lengths, _ in self.batches)


@dataclass(frozen=True)
class Other:
    """A way that was not chosen, with the bytes at its peak and the seconds of a step."""

    way: Candidate
    size: int
    seconds: float

    def __str__(self) -> str:
        return f"{self.way}: {_need(self.size)}, {self.seconds:.2f} s a step"


@dataclass(frozen=True)
class Plan:
    """How a step is computed, and what it is predicted to take.

    Attributes:
        chosen: the way.
        memory: bytes at the peak of the process, term by term.
        seconds: of an average step.
        steps: of the run.
        others: ways that do not fit, are slower or less exact.
        limit: the most bytes that were planned with: the budget, less what it spares; infinite without one.
        available: the bytes that machine and container left to the process, None where they did not tell.
    """

    chosen: Candidate
    memory: Memory
    seconds: float
    steps: int
    others: tuple[Other, ...] = ()
    limit: float = math.inf
    available: int | None = None

    def __str__(self) -> str:
        nearest = self._nearest()
        lines, rest = self._lines(nearest), len(self.others) - len(nearest)
        if rest:
            lines.append(f"and {counted(rest, 'other way')}: nplora plan --verbose tells all")
        return "\n".join(lines)

    def table(self) -> str:
        """The same with a line for every other way."""
        return "\n".join(self._lines(self.others))

    def _lines(self, others: Iterable[Other]) -> list[str]:
        return [
            f"{self.chosen}: {_need(self.memory.total)} at most, {self.seconds:.2f} s a step, "
            f"{counted(self.steps, 'step')} in {_time(self.steps * self.seconds)}",
            str(self.memory),
            *filter(None, [shortage(self.memory, self.available)]),
            *(f"{'too large' if other.size > self.limit else 'or'}: {other}" for other in others),
        ]

    def _nearest(self) -> list[Other]:
        """The smallest of those that are faster, and the fastest of those that are smaller."""
        faster = [other for other in self.others if other.seconds < self.seconds]
        smaller = [other for other in self.others if other.size < self.memory.total and other not in faster]
        return [
            *([min(faster, key=lambda other: other.size)] if faster else []),
            *([min(smaller, key=lambda other: other.seconds)] if smaller else []),
        ]


def _need(size: int) -> str:
    """Rounded up, and room down: they differ in words wherever one is too large for the other."""
    return f"{math.ceil(size / 1e6)} MB"


def _room(size: int) -> str:
    return f"{size // 10**6} MB"


def _time(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.1f} minutes" if seconds < 6000 else f"{seconds / 3600:.1f} hours"


def resident_memory(lm: LanguageModel) -> tuple[int, int]:
    """Bytes in memory now, and those of the model's weights that are not read yet."""
    return current_memory(), unread(lm.config.source)


def needed(
    lm: LanguageModel, adapters: Adapters, work: Work, way: Candidate, resident: tuple[int, int]
) -> Memory:
    """What the process will have at its peak if it computes so.

    Args:
        resident: `resident_memory`, before the work was listed.
    """
    largest, threads = work.largest(way.micro_tokens), get_num_threads()
    return predicted(lm, adapters, largest, work.evaluated, way, threads, resident, work.prefix_tokens)


def shortage(memory: Memory, available: int | None) -> str:
    """Words where more is needed than is available; else empty."""
    if available is None or memory.total <= available:
        return ""
    return (
        f"{_need(memory.total)} are needed, {_room(available)} are available: "
        f"--memory {available // 1_000_000}M looks for a way of computing that fits"
    )


def choose(
    lm: LanguageModel,
    adapters: Adapters,
    work: Work,
    wishes: Wishes,
    resident: tuple[int, int],
    budget: int | None = None,
) -> Plan:
    """The fastest way that fits, in float32 if any does and the arithmetic is not fixed.

    Args:
        resident: as in `needed`.
        budget: the most bytes of the process; None: the way is as wished, and only predicted.
    Raises:
        BudgetError: no way fits.
    """
    reached = peak_memory()
    limit = math.inf if budget is None else budget if wishes.goes_on else budget / _SPARE

    def memory(way: Candidate, work: Work = work) -> Memory:
        return needed(lm, adapters, work, way, resident)

    ways = list(_ways(lm, work, wishes, budget is not None))
    sizes = {way: memory(way).total for way in ways}
    fitting = [way for way in ways if sizes[way] <= limit]
    if budget is not None and fitting and budget < reached:
        raise BudgetError(
            f"this process has had {_need(reached)} at its peak already, {_room(budget)} are allowed: plan "
            "and train in a fresh one"
        )
    if budget is not None and not fitting:
        smallest = min(ways, key=lambda way: sizes[way])
        shorter = _shorter(work, smallest, limit, lambda *cut_off: memory(*cut_off).total)
        spared = "" if wishes.goes_on else f" and {_SPARE - 1:.0%} to spare"
        enough = _SPARE * sizes[smallest] * budget / limit
        raise BudgetError(
            f"{smallest} needs {_need(sizes[smallest])}{spared}, {_room(budget)} are allowed{shorter}; "
            f"--memory {math.ceil(enough / 1e6)}M is enough"
        )
    speeds = measured(lm, tuple(dict.fromkeys(way.compute for way in ways)))
    seconds = {way: _seconds(lm, adapters, work, way, speeds[way.compute]) for way in ways}
    chosen = min((way for way in fitting if way.compute == fitting[0].compute), key=lambda way: seconds[way])
    others = tuple(Other(way, sizes[way], seconds[way]) for way in ways if way != chosen)
    return Plan(chosen, memory(chosen), seconds[chosen], work.steps, others, limit, available_memory())


def _ways(lm: LanguageModel, work: Work, wishes: Wishes, free: bool) -> Iterator[Candidate]:
    """All that the wishes leave, float32 first; where nothing is to be chosen, the one that is wished."""
    computes, policies, pieces = [wishes.compute or lm.compute], [wishes.checkpoint_blocks], wishes.pieces
    if free and wishes.compute is None and lm.compute == "float32":
        computes.append("bfloat16")
    if free and not wishes.checkpoint_blocks:
        policies.append(True)
    if pieces is None:
        pieces = (None, *_halves(work)) if free else (None,)
    return itertools.starmap(Candidate, itertools.product(computes, policies, pieces))


def _halves(work: Work) -> Iterator[int]:
    """Sizes of pieces: a half, a quarter, ... of the largest batch, down to the longest sequence."""
    size, least = work.batch_tokens, max(work.longest, _LEAST_PIECE)
    while size > least:
        size = max(-(-size // 2), least)
        yield size


def _seconds(lm: LanguageModel, adapters: Adapters, work: Work, way: Candidate, speed: Speed) -> float:
    """Of an average step."""
    passes = [speed.step(lm, adapters, one, way.checkpoint_blocks) for one in work.passes(way.micro_tokens)]
    return sum(passes) / len(work.batches) * work.accumulate


def _shorter(work: Work, way: Candidate, limit: float, size: Callable[[Candidate, Work], int]) -> str:
    """The largest power of two for --max-length that fits, or else the smallest that is of use."""
    length = work.longest
    while length > _LEAST_PIECE:
        length = 1 << ((length - 1).bit_length() - 1)  # the next smaller power of two
        needed = size(dataclasses.replace(way, micro_tokens=length), work.shortened(length))
        if needed <= limit:
            return f"; --max-length {length} would need {_need(needed)}"
    return "; no --max-length makes it fit"
