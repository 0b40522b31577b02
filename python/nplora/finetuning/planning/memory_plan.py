"""MemoryPlan: how a run computes its steps, with the memory and the time that this is predicted to take."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from nplora.finetuning.planning.memory import ExecutionPlan, Memory
from nplora.formats.errors import counted


@dataclass(frozen=True)
class Alternative:
    """An execution plan that was not chosen, with its bytes at the peak and its seconds per step."""

    plan: ExecutionPlan
    size: int
    seconds: float

    def __str__(self) -> str:
        return f"{self.plan}: {need(self.size)}, {self.seconds:.2f} s per step"


@dataclass(frozen=True)
class MemoryPlan:
    """How a step is computed, and what that is predicted to take.

    Attributes:
        chosen: the execution plan.
        memory: bytes at the peak of the process, term by term.
        seconds: the time of an average step.
        steps: the steps of the run.
        others: plans that do not fit, are slower or less exact.
        limit: the most bytes that a plan may take: the budget less its margin; infinite without a budget.
        available: bytes that machine and container leave to the process; None if they do not say.
    """

    chosen: ExecutionPlan
    memory: Memory
    seconds: float
    steps: int
    others: tuple[Alternative, ...] = ()
    limit: float = math.inf
    available: int | None = None

    def __str__(self) -> str:
        nearest = self._nearest()
        lines, rest = self._lines(nearest), len(self.others) - len(nearest)
        if rest:
            lines.append(f"and {counted(rest, 'other plan')}: nplora plan --verbose lists all")
        return "\n".join(lines)

    def table(self) -> str:
        """The same with a line for every alternative."""
        return "\n".join(self._lines(self.others))

    def _lines(self, others: Iterable[Alternative]) -> list[str]:
        return [
            f"{self.chosen}: {need(self.memory.total)} at most, {self.seconds:.2f} s per step, "
            f"{counted(self.steps, 'step')} in {_time(self.steps * self.seconds)}",
            str(self.memory),
            *filter(None, [shortage(self.memory, self.available)]),
            *(f"{'too large' if other.size > self.limit else 'or'}: {other}" for other in others),
        ]

    def _nearest(self) -> list[Alternative]:
        """The smallest of the faster alternatives, and the fastest of the smaller ones."""
        faster = [other for other in self.others if other.seconds < self.seconds]
        smaller = [other for other in self.others if other.size < self.memory.total and other not in faster]
        return [
            *([min(faster, key=lambda other: other.size)] if faster else []),
            *([min(smaller, key=lambda other: other.seconds)] if smaller else []),
        ]


def need(size: int) -> str:
    """Bytes that are needed, rounded up: so a need never reads like `room` that is too small for it."""
    return f"{math.ceil(size / 1e6)} MB"


def room(size: int) -> str:
    """Bytes that there are, rounded down."""
    return f"{size // 10**6} MB"


def shortage(memory: Memory, available: int | None) -> str:
    """Words if more is needed than is available; else empty."""
    if available is None or memory.total <= available:
        return ""
    return (
        f"{need(memory.total)} are needed, {room(available)} are available: "
        f"--memory {available // 1_000_000}M looks for a plan that fits"
    )


def _time(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.1f} minutes" if seconds < 6000 else f"{seconds / 3600:.1f} hours"
