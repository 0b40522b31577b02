"""Divides a time budget into rungs of trials, by successive halving.

Each rung trains its candidates for more steps than the rung before (Jamieson and Talwalkar 2016; Li et al.
2018, "Hyperband"). Every trial starts from scratch with its own learning rate schedule, which ends with the
trial. The alternative, to continue the trials of a rung in the next rung, has two disadvantages: the schedule
could not end with each trial, although it ends with each run of `finetune`; and trials with high learning
rates would be dropped too early, because they pay off only after the schedule has lowered the rate.
"""

from __future__ import annotations

from dataclasses import dataclass

LEAST_STEPS = 10  # fewer steps say nothing about a learning rate
# Shares of the budget for the rung of learning rates and for that of variations. Full runs get the rest.
RATES, VARIATIONS = 0.15, 0.35
# The most trials in a rung of variations. The time for learning rates is divided by at least this number, so
# that trials do not get longer if only a few learning rates are tried.
_TRIALS = 6


@dataclass(frozen=True)
class Pace:
    """How many seconds a training step takes, and how many seconds an evaluation takes."""

    step: float
    evaluation: float

    def seconds(self, steps: int) -> float:
        """The predicted seconds of a trial with `steps` steps."""
        return steps * self.step + self.evaluation

    def steps(self, seconds: float) -> int:
        """The number of steps (at least 0) that a trial can make in `seconds` seconds."""
        return max(0, int((seconds - self.evaluation) / self.step))


@dataclass(frozen=True)
class Rung:
    """A group of trials with the same number of steps.

    Attributes:
        count: the number of trials.
        steps: the number of steps of each trial; 0 if there is no time for this rung.
    """

    count: int
    steps: int


def first_rung(budget: float, pace: Pace, rates: int, full: int) -> Rung:
    """Plan the rung that tries learning rates: `rates` of them, or fewer if there is not enough time.

    A trial has at most `full` steps, and at least LEAST_STEPS steps if `full` allows.

    Args:
        full: the number of steps of the run whose options are tuned.
    """
    least = min(LEAST_STEPS, full)
    count = min(rates, int(budget / pace.seconds(least)))
    if not count:
        return Rung(0, 0)
    return Rung(count, min(full, max(least, pace.steps(RATES * budget / max(count, _TRIALS)))))


def second_rung(budget: float, left: float, pace: Pace, candidates: int, least: int, full: int) -> Rung:
    """Plan the second rung: longer trials of the first rung's best settings, or of variations of them.

    Each trial has at least twice as many steps as the trials of the first rung, but at most `full` steps.

    Args:
        left: the seconds that are left of the budget.
        least: the number of steps of each trial in the first rung.
    """
    least = min(full, 2 * least)
    share = min(left, VARIATIONS * budget)
    count = min(candidates, _TRIALS, int(share / pace.seconds(least)))
    if count < 2:
        return Rung(0, 0)
    return Rung(count, min(full, max(least, pace.steps(share / count))))


def last_rung(left: float, pace: Pace, survivors: int, least: int, full: int) -> Rung:
    """Plan a rung of full runs, or of two shorter runs if there is no time for a full run.

    Each of the two shorter runs has at least 1.5 * `least` steps. If there is no time for these runs either,
    the rung has no trials.

    Args:
        least: the number of steps of each trial in the previous rung.
    """
    for count in range(survivors, 0, -1):
        if count * pace.seconds(full) <= left:
            return Rung(count, full)
    steps = pace.steps(left / 2)
    return Rung(2, steps) if survivors > 1 and steps >= 1.5 * least else Rung(0, 0)


def parse_budget(budget: str | float, op: str = "tune") -> float:
    """Convert a time such as "90s", "30m" or "1.5h" to seconds. A number without a unit means minutes.

    Raises:
        ValueError: the text is not such a time, or the time is not above 0.
    """
    units = {"s": 1.0, "m": 60.0, "h": 3600.0}
    text = str(budget).strip().lower()
    number, unit = (text[:-1], units[text[-1]]) if text[-1:] in units else (text, 60.0)
    try:
        seconds = float(number) * unit
    except ValueError:
        seconds = -1.0
    if isinstance(budget, bool) or not 0 < seconds < float("inf"):
        raise ValueError(f"{op}: budget is {budget!r}, expected a time such as 30m, 90s or 1.5h")
    return seconds


def shown_time(seconds: float) -> str:
    """A duration as a readable text: 45s, 12m, 1.5h."""
    if seconds < 100:
        return f"{seconds:.0f}s"
    return f"{seconds / 60:.0f}m" if seconds < 6000 else f"{seconds / 3600:.1f}h"
