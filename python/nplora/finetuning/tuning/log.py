"""TuneLog: the file tune.jsonl, which records a search, so that a resumed search repeats no trial."""

from __future__ import annotations

import errno
import json
import math
from pathlib import Path
from typing import Any

from nplora.finetuning.tuning.schedule import Rung
from nplora.finetuning.tuning.trial import Trial, settings_of
from nplora.formats import files, strict_json
from nplora.formats.errors import CorruptError, FormatError
from nplora.formats.files import StrPath

NAME = "tune.jsonl"
_LARGEST = 64 << 20


class TuneLog:
    """The log of a search: one line of JSON for each event. Each new event rewrites the whole file.

    Attributes:
        path: the file.
        start: all inputs of the search, which must be the same when the search is resumed.
        baseline: a pair of the loss before training, and the seconds that its computation took; None: not
            measured yet.
        rungs: a dict from the number of a rung to the rung. A rung is a group of trials with the same number
            of steps.
        trials: the trials with their results, in order.
    """

    def __init__(self, directory: StrPath) -> None:
        self.path = Path(directory, NAME)
        self.start: dict[str, Any] = {}
        self.baseline: tuple[float, float] | None = None
        self.rungs: dict[int, Rung] = {}
        self.trials: list[Trial] = []
        self._trials_before: dict[int, int] = {}  # number of a rung -> trials before the rung was decided
        self._lines: list[str] = []

    def begin(self, start: dict[str, Any], resume: bool, overwrite: bool) -> None:
        """Begin a new log, or read the log of the search that is resumed.

        Raises:
            FileExistsError: there is a log with trials, and neither `resume` nor `overwrite` is set.
            CorruptError: the log is damaged.
            ValueError: the log belongs to another search.
        """
        start = json.loads(json.dumps({"event": "start", **start}, allow_nan=False))
        if self.path.exists():
            if not (resume or overwrite) and self._holds_trials():
                raise FileExistsError(
                    errno.EEXIST,
                    "the directory holds a search: --resume (resume=True) continues it, "
                    "--overwrite (overwrite=True) deletes it",
                    str(self.path.parent),
                )
            if resume:
                self._read()
                self._require_same(start)
                return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.start = start
        self._add(start)

    def _holds_trials(self) -> bool:
        """Whether only `overwrite` may replace the file, because it holds trials or is not a valid log."""
        found = TuneLog(self.path.parent)
        try:
            found._read()
        except (FormatError, OSError):
            return True
        return bool(found.trials)

    def add_baseline(self, loss: float, seconds: float) -> None:
        self.baseline = loss, seconds
        self._add({"event": "baseline", "loss": loss, "evaluation": seconds})

    def add_rung(self, number: int, rung: Rung) -> None:
        self._take_rung(number, rung)
        self._add({"event": "rung", "rung": number, "trials": rung.count, "steps": rung.steps})

    def add_trial(self, trial: Trial) -> None:
        self.trials.append(trial)
        self._add(trial.to_json())

    def trials_before(self, rung: int) -> list[Trial]:
        """The trials that were logged before the rung `rung`; all trials if the log lacks this rung."""
        return self.trials[: self._trials_before.get(rung)]

    def find(self, key: tuple[Any, ...]) -> Trial | None:
        """The trial with this `Trial.key`; None if the log has no such trial."""
        return next((trial for trial in self.trials if trial.key == key), None)

    @property
    def seconds(self) -> float:
        """The total seconds of all trials, and of the evaluation before training."""
        before = self.baseline[1] if self.baseline else 0.0
        return before + sum(trial.seconds + trial.evaluation for trial in self.trials)

    def _add(self, event: dict[str, Any]) -> None:
        self._lines.append(json.dumps(event, allow_nan=False, ensure_ascii=False) + "\n")
        text = "".join(self._lines).encode()
        files.replace([files.NewFile(self.path, len(text), [text])])

    # ---- reading ----

    def _read(self) -> None:
        text = bytes(files.read(self.path, _LARGEST, follow_links=False)).decode("utf-8", "replace")
        for number, line in enumerate(text.removesuffix("\n").split("\n"), 1):
            where = f"{self.path}, line {number}"
            event = strict_json.loads(line.encode(), where)
            try:
                self._take(event)
            except (KeyError, TypeError, ValueError, AttributeError) as error:
                raise CorruptError(f"{where}: this is not an event of a search: {line[:80]!r}") from error
            self._lines.append(line + "\n")
        if not self.start:
            raise CorruptError(f"{self.path}: the log has no event 'start'")

    def _take(self, event: dict[str, Any]) -> None:
        kind = event["event"]
        if kind == "start":
            self.start = event
        elif kind == "baseline":
            self.baseline = _number(event["loss"]), _number(event["evaluation"])
        elif kind == "rung":
            self._take_rung(_count(event["rung"]), Rung(_count(event["trials"]), _count(event["steps"])))
        elif kind == "trial":
            loss = math.inf if event["loss"] is None else _number(event["loss"])
            epochs = None if event["epochs"] is None else _count(event["epochs"])
            number, rung, steps = (_count(event[name]) for name in ("number", "rung", "steps"))
            times = _number(event["seconds"]), _number(event["evaluation"])
            self.trials.append(
                Trial(number, rung, settings_of(event["settings"]), steps, epochs, loss, *times)
            )
        else:
            raise ValueError(kind)

    def _take_rung(self, number: int, rung: Rung) -> None:
        self.rungs[number] = rung
        self._trials_before[number] = len(self.trials)

    def _require_same(self, start: dict[str, Any]) -> None:
        other = [name for name in {**start, **self.start} if start.get(name) != self.start.get(name)]
        if other:
            raise ValueError(
                f"tune: {self.path} belongs to a search with different values of {', '.join(other)}: "
                f"{other[0]} was {self.start.get(other[0])!r}, is now {start.get(other[0])!r}"[:300]
            )


def _count(value: Any) -> int:
    if type(value) is not int or value < 0:
        raise ValueError(value)
    return value


def _number(value: Any) -> float:
    if type(value) not in (int, float) or not math.isfinite(value):
        raise ValueError(value)
    return float(value)
