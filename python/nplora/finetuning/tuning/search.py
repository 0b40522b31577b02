"""Search: decides which trials a search makes, rung by rung."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

from nplora.finetuning.tuning.log import TuneLog
from nplora.finetuning.tuning.schedule import (
    LEAST_STEPS,
    Pace,
    Rung,
    first_rung,
    last_rung,
    second_rung,
    shown_time,
)
from nplora.finetuning.tuning.space import Settings, Space, rounded
from nplora.finetuning.tuning.trial import Trial, key_of

_SURVIVORS = 2
_SAMPLED = 10  # trials of a sampler in the first rung
_NEIGHBOUR = 10**0.25  # half a step of the grid of learning rates
_ROUNDS = 4  # rounds of trials with neighbouring learning rates


class Sampler(Protocol):
    """Proposes the settings of the first rung, one trial at a time."""

    def propose(self) -> Settings: ...
    def tell(self, loss: float) -> None: ...


class OutOfBudgetError(Exception):
    """Raised if there is no time for the next trial."""


@dataclass
class Search:
    """A search for the best settings in a `Space`, within a time budget.

    Attributes:
        epoch_steps: the number of steps in an epoch.
        full: the number of steps of the run whose options are tuned. If the number of epochs is searched,
            `full` is the number of steps of the run with the fewest epochs.
        budget: the seconds that the trials may take.
        planned: the predicted seconds of a training step. The search uses this prediction until a trial has
            ended.
        train: a function that makes one trial. Its arguments are the settings and the number of steps. It
            returns three numbers: the loss, the seconds of the training, and the seconds of the evaluation.
        sampler: proposes the settings of the first rung. None: the first rung tries the learning rates of the
            space.
        say: prints a text.
    """

    space: Space
    epoch_steps: int
    full: int
    budget: float
    planned: float
    log: TuneLog
    train: Callable[[Settings, int], tuple[float, float, float]]
    sampler: Sampler | None
    say: Callable[[str], None]
    ended: str = "complete"

    def run(self) -> None:
        """Make all trials that the budget allows.

        Raises:
            ValueError: the budget is too small for two trials.
        """
        try:
            self._run()
        except OutOfBudgetError:
            self.ended = "budget"

    def _run(self) -> None:
        best = self._first()
        best = self._second(best) if self.sampler is None else self._halved(2, best)
        number = self._full_runs(best)
        if len(self.space.rates) > 1:
            self._neighbours(number)

    # ---- rungs ----

    def _first(self) -> list[Trial]:
        """Try learning rates, or the proposals of a sampler."""
        rates = len(self.space.rates) if self.sampler is None else _SAMPLED
        rung = self._rung(1, first_rung(self._left, self._pace, rates, self.full))
        if rung.count < min(2, rates):
            least = min(LEAST_STEPS, self.full)
            one = self._pace.seconds(least)
            needed = shown_time(math.ceil(max(1.0, 2 * one + self.log.seconds)))
            raise ValueError(
                f"tune: the budget is {shown_time(self.budget)}, but two trials of {least} steps need about "
                f"{needed}; {shown_time(math.ceil(20 * one + 8 * self._pace.seconds(self.full)))} is enough "
                "for a whole search"
            )
        if self.sampler is None:
            middle_first = sorted(self.space.rates, key=lambda lr: abs(math.log(lr / self._middle)))
            rates_tried = sorted(middle_first[: rung.count])
            return self._trials(1, [self.space.settings(lr) for lr in rates_tried], rung.steps)
        made = list[Trial]()
        for _ in range(rung.count):
            made += self._trials(1, [self.sampler.propose()], rung.steps)
            self.sampler.tell(made[-1].loss)
        return _by_loss(list({trial.key: trial for trial in made}.values()))  # a proposal may be repeated

    def _second(self, first: list[Trial]) -> list[Trial]:
        """Try the best learning rates so far and a new rate near them, and then other values of one option at
        a time."""
        rates = [trial.settings["lr"] for trial in _finite(first)[:_SURVIVORS]]
        if not rates:
            return []
        nearby = self._nearby([trial.settings["lr"] for trial in _finite(first)])
        candidates = [self.space.settings(lr) for lr in dict.fromkeys((*rates, *nearby))]
        candidates += [self.space.settings(rates[0], **{name: v}) for name, v in self.space.variations()]
        steps = first[0].steps
        decided = second_rung(self.budget, self._left, self._pace, len(candidates), steps, self.full)
        rung = self._rung(2, decided)
        if rung.count < 2 or len(candidates) < 2:
            return first
        return self._with_combination(2, self._trials(2, candidates[: rung.count], rung.steps))

    def _halved(self, number: int, before: list[Trial]) -> list[Trial]:
        """Repeat the best third of `before` (or the best `_SURVIVORS`, if more) with more steps.

        The budget may allow fewer trials. If it allows fewer than two, return `before`.
        """
        survivors = [trial.settings for trial in _finite(before)][: max(_SURVIVORS, -(-len(before) // 3))]
        steps = before[0].steps if before else 1
        decided = second_rung(self.budget, self._left, self._pace, len(survivors), steps, self.full)
        rung = self._rung(number, decided)
        return self._trials(number, survivors[: rung.count], rung.steps) if rung.count > 1 else before

    def _full_runs(self, before: list[Trial]) -> int:
        """Train the best settings at full length, and then for more epochs, until the loss no longer falls.

        Returns:
            the number of the next rung.
        """
        made, number, best = _finite(before)[:_SURVIVORS], 3, math.inf
        lengths = [count * self.epoch_steps for count in self.space.epochs] or [self.full]
        for length in lengths:
            least = made[0].steps if made and length == lengths[0] else length
            while made and least <= length:
                rung = self._rung(number, last_rung(self._left, self._pace, len(made), least, length))
                if not rung.count:
                    return number
                if rung.steps < least:  # logged by an earlier search with a smaller budget
                    number += 1
                    continue
                made = self._trials(number, [trial.settings for trial in made[: rung.count]], rung.steps)
                made, number = _finite(made), number + 1
                least = rung.steps if rung.steps < length else length + 1
            if not made or made[0].loss >= best:
                return number
            best = made[0].loss
        return number

    def _neighbours(self, number: int) -> None:
        """Use the remaining time to try learning rates near the rate of the winner.

        Stop when no new learning rate leads to a lower loss.
        """
        for rung_number in range(number, number + _ROUNDS):
            before = self.log.trials_before(rung_number)
            winner = winner_of(before, self.full)
            if winner is None or winner.steps < self.full:
                return
            lr, known = winner.settings["lr"], {trial.key for trial in before}
            candidates = [winner.settings | {"lr": rounded(lr * _NEIGHBOUR**sign)} for sign in (1, -1)]
            new = [settings for settings in candidates if key_of(settings, winner.steps) not in known]
            count = sum(i * self._pace.seconds(winner.steps) <= self._left for i in range(1, len(new) + 1))
            rung = self._rung(rung_number, Rung(count, winner.steps))
            self._trials(rung_number, new[: rung.count], rung.steps)
            if winner_of(self.log.trials, self.full) is winner:
                return

    def _nearby(self, rates: Sequence[float]) -> list[float]:
        """A new learning rate near the best rate: between the two best rates.

        If the best rate is the smallest (or largest) rate tried, the new rate is even smaller (or larger).
        """
        tried = sorted(rates)
        if len(tried) < 2:
            return []
        best, second = rates[0], rates[1]
        if best in (tried[0], tried[-1]):
            inner = tried[1] if best == tried[0] else tried[-2]
            return [rounded(best * best / inner)]
        return [rounded(math.sqrt(best * second))]

    def _with_combination(self, number: int, made: list[Trial]) -> list[Trial]:
        """Combine all option values that lowered the loss, and try this combination if it is new."""
        start = self.space.settings(0.0)
        combined = dict(made[0].settings)
        for trial in reversed(made):  # the best trial last, because its values take precedence
            change = {k: v for k, v in trial.settings.items() if k != "lr" and v != start[k]}
            before = self.log.find(key_of({**start, "lr": trial.settings["lr"]}, trial.steps))
            if change and before is not None and trial.loss < before.loss:
                combined |= change
        if any(trial.settings == combined for trial in made):
            return made
        return _by_loss([*made, *self._trials(number, [combined], made[0].steps)])

    # ---- trials ----

    def _rung(self, number: int, decided: Rung) -> Rung:
        """Return the rung `number` from the log. If the log lacks this rung, log and return `decided`.

        A rung without trials is not logged: a resumed search may have the time for trials in this rung.
        """
        if number not in self.log.rungs and decided.count:
            self.log.add_rung(number, decided)
        return self.log.rungs.get(number, decided)

    def _trials(self, rung: int, candidates: Iterable[Settings], steps: int) -> list[Trial]:
        """Make the trials of `candidates` that are not in the log. Return the trials of all candidates,
        sorted by loss."""
        return _by_loss([self._trial(rung, settings, steps) for settings in candidates])

    def _trial(self, rung: int, settings: Settings, steps: int) -> Trial:
        if (found := self.log.find(key_of(settings, steps))) is not None:
            return found
        if len(self.log.trials) >= 2 and self._pace.seconds(steps) > 1.1 * self._left:
            raise OutOfBudgetError
        loss, seconds, evaluation = self.train(settings, steps)
        epochs = steps // self.epoch_steps if steps % self.epoch_steps == 0 else None
        number = len(self.log.trials) + 1
        trial = Trial(number, rung, settings, steps, epochs, loss, seconds, evaluation)
        self.log.add_trial(trial)
        words = "diverged" if math.isinf(loss) else f"loss {loss:.4f}"
        used = f"{shown_time(self.log.seconds)} of {shown_time(self.budget)}"
        self.say(f"trial {number} (rung {rung}): {_shown(settings)}, {steps} steps: {words} ({used})")
        return trial

    @property
    def _left(self) -> float:
        return self.budget - self.log.seconds

    @property
    def _pace(self) -> Pace:
        """The seconds of a training step and of an evaluation.

        The time of a step is measured in the trials that did not diverge. If there are no such trials yet,
        the predicted time is used.
        """
        whole = _finite(self.log.trials)
        steps = sum(trial.steps for trial in whole)
        evaluation = self.log.baseline[1] if self.log.baseline else 0.0
        return Pace(sum(trial.seconds for trial in whole) / steps if steps else self.planned, evaluation)

    @property
    def _middle(self) -> float:
        return math.exp(sum(map(math.log, self.space.rates)) / len(self.space.rates))


def winner_of(trials: Sequence[Trial], full: int) -> Trial | None:
    """The full run with the lowest loss. If no trial is a full run, the longest trials are compared instead.

    A full run has at least `full` steps.
    """
    finite = _finite(trials)
    longest = max((trial.steps for trial in finite), default=0)
    candidates = [trial for trial in finite if trial.steps >= min(full, longest)]
    return min(candidates, key=lambda trial: trial.loss, default=None)


def _by_loss(trials: Sequence[Trial]) -> list[Trial]:
    return sorted(trials, key=lambda trial: trial.loss)


def _finite(trials: Sequence[Trial]) -> list[Trial]:
    return [trial for trial in trials if math.isfinite(trial.loss)]


def _shown(settings: Settings) -> str:
    return ", ".join(f"{name} {shown_value(value)}" for name, value in settings.items())


def shown_value(value: object) -> str:
    """An option's value, written as on the command line."""
    if isinstance(value, tuple):
        return ",".join(map(str, value))
    return f"{value:g}" if isinstance(value, float) else str(value)
