"""TuneReport: the trials of a search, the winner, and the command that trains it."""

from __future__ import annotations

import dataclasses
import math
import os
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nplora.finetuning.options import FinetuneOptions
from nplora.finetuning.tuning.schedule import shown_time
from nplora.finetuning.tuning.search import shown_value
from nplora.finetuning.tuning.trial import Trial
from nplora.formats.errors import counted
from nplora.platform import processes


@dataclass(frozen=True)
class TuneReport:
    """The results of a search; `print` shows them.

    Attributes:
        output: the directory with tune.jsonl.
        trials: all trials, in the order in which they were made.
        winner: the full run with the lowest loss; None if all trials diverged. A full run has at least as
            many steps as the run that is tuned. If no trial was a full run, the longest trials are compared
            instead.
        options: the options of `finetune` for a run with the winner's settings, including the options that
            were given to the search.
        command: a shell command, `nplora finetune ...`, that trains the winner; "" if there is no winner.
        loss_before: the validation loss before training.
        seconds: the total time of all trials.
        budget: the time limit for all trials.
        ended: why the search ended: "complete", "budget" or "interrupted".
        notes: hints on the results.

    >>> report = nplora.finetuning.tune("model.gguf", "train.jsonl", "search", budget="3s", progress=False)
    >>> report.winner.loss < report.loss_before
    True
    >>> print(report)
    rung  steps  lr ...
    ...
    nplora finetune model.gguf --data train.jsonl --output search/best ...
    """

    output: Path
    trials: tuple[Trial, ...]
    winner: Trial | None
    options: Mapping[str, Any]
    command: str
    loss_before: float
    seconds: float
    budget: float
    ended: str
    notes: tuple[str, ...] = ()

    def table(self) -> str:
        """One line for each trial, sorted by rung and then by loss, the lowest loss first.

        A star marks the winner.
        """
        names = list(dict.fromkeys(name for trial in self.trials for name in trial.settings))
        rows = [["rung", "steps", *names, "loss", "seconds", ""]]
        for trial in sorted(self.trials, key=lambda trial: (trial.rung, trial.steps, trial.loss)):
            loss = f"{trial.loss:.4f}" if math.isfinite(trial.loss) else "diverged"
            values = [shown_value(trial.settings.get(name, "")) for name in names]
            star = "*" if trial is self.winner else ""
            rows.append([str(trial.rung), str(trial.steps), *values, loss, f"{trial.seconds:.1f}", star])
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        return "\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)

    def __str__(self) -> str:
        used = f"{shown_time(self.seconds)} of {shown_time(self.budget)}"
        ended = {"interrupted": "; interrupted: --resume continues", "budget": "; the time is used up"}
        lines = [self.table(), f"{counted(len(self.trials), 'trial')} in {used}{ended.get(self.ended, '')}"]
        if self.winner is None:
            lines.append("no trial has a finite loss: search smaller learning rates")
            return "\n".join(lines)
        lines.append(f"validation loss {self.loss_before:.4f} -> {self.winner.loss:.4f} (*)")
        return "\n".join([*lines, *self.notes, self.command])


def command_of(
    model: str, data: Sequence[tuple[str, float]], valid: str | None, output: Path, options: Mapping[str, Any]
) -> str:
    """The command line of a run.

    Args:
        data: pairs (path of a data file, sampling weight).
        options: the options of `finetune` that differ from the defaults.
    """
    words = ["nplora", "finetune", model]
    for path, weight in data:
        words += ["--data", path if weight == 1 else f"{path}:{_exact(weight)}"]
    words += [] if valid is None else ["--valid", valid]
    words += ["--output", os.fspath(output)]
    kinds = typing.get_type_hints(FinetuneOptions)
    for field in dataclasses.fields(FinetuneOptions):
        if field.name in options:
            words += _option(field.name, options[field.name], kinds[field.name])
    return processes.command_line(words)


def _option(name: str, value: Any, kind: Any) -> list[str]:
    option = f"--{name.replace('_', '-')}"
    if kind is bool:
        return [option] if value else []
    if value is None:
        return []
    if isinstance(value, Mapping):
        return [option, ",".join(f"{key}={value[key]}" for key in value)]
    if isinstance(value, tuple | list):
        return [option, ",".join(map(str, value))]
    if isinstance(value, os.PathLike):
        return [option, os.fspath(value)]
    return [option, _exact(value) if isinstance(value, float) else str(value)]


def _exact(value: float) -> str:
    """Return a short text that the command line converts back to exactly `value`."""
    short = shown_value(value)
    return short if float(short) == value else repr(value)
