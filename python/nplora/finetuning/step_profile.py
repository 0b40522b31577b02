"""StepProfile: a table of the time that each kind of work took in a run's steps."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from nplora import _core
from nplora.formats.errors import counted
from nplora.models.head import SECTION as HEAD
from nplora.runtime import get_num_threads
from nplora.runtime.profile import Profiler, Total
from nplora.trainer import Callback, Run
from nplora.trainer.history import StepRecord

_NAMES = {
    ("", "forward"): "products, forward",
    ("", "backward"): "products, backward",
    ("", "attention"): "attention, forward",
    ("", "attention_backward"): "attention, backward",
    ("", "norm"): "norms",
    ("", "rope"): "rotary positions",
    ("", "activation"): "activation functions",
    ("", "conversion"): "bfloat16 conversions",
    (HEAD, "forward"): "head: products, forward",
    (HEAD, "backward"): "head: products, backward",
    (HEAD, "loss"): "head: loss",
    ("", "optimizer"): "clipping and optimiser",
}
_HEAD_REST, _REST = "head: norm and rest", "rest: Python and NumPy"
_PEAKS = ("float32", "bfloat16", "int8")  # arithmetics whose peak rates are measured before the run too


@dataclass(frozen=True)
class ProfileRow:
    """One kind of work in a step, such as "attention, forward".

    Attributes:
        seconds: the time of this activity in all steps.
        operations: a dict from the name of an arithmetic, such as "int8", to the number of operations that
            the activity's matrix products make in this arithmetic. An int8 operation counts as one operation,
            like a floating-point operation. Products with W and products with the adapter's factors are both
            counted.
    """

    name: str
    seconds: float
    operations: Mapping[str, float]

    def floor(self, peaks: Mapping[str, float]) -> float:
        """The seconds that the operations would take at the rates `peaks`, in operations per second."""
        return sum(number / peaks[arithmetic] for arithmetic, number in self.operations.items())


@dataclass(frozen=True)
class StepProfile:
    """The time that each kind of work took in a run's steps; `print` shows a table.

    Attributes:
        steps: the number of steps.
        seconds: the time of all steps, without evaluations and checkpoints.
        threads: the number of threads.
        rows: the rows of the table, one for each kind of work. The times of all rows add up to `seconds`.
        peaks: maps an arithmetic to the highest number of operations per second that all threads together
            reached in measurements at the beginning and the end of the run.

    >>> report = nplora.finetune("model.gguf", "train.jsonl", "out", steps=2, profile=True, overwrite=True)
    >>> report.profile.steps, [row.name for row in report.profile.rows][:2]
    (2, ['products, forward', 'products, backward'])
    """

    steps: int
    seconds: float
    threads: int
    rows: tuple[ProfileRow, ...]
    peaks: Mapping[str, float]

    @property
    def floor(self) -> float:
        """The seconds that the matrix products of all steps would take at the rates `peaks`."""
        return sum(row.floor(self.peaks) for row in self.rows)

    def __str__(self) -> str:
        head = f"{'a step':<26}{'ms':>9}{'share':>8}{'GFLOP/s':>10}{'of peak':>9}"
        lines = [head, *map(self._line, self.rows)]
        used = {arithmetic for row in self.rows for arithmetic in row.operations}
        peaks = ", ".join(f"{name} {rate / 1e9:.0f}" for name, rate in self.peaks.items() if name in used)
        each, floor = (1e3 * seconds / max(1, self.steps) for seconds in (self.seconds, self.floor))
        lines.append(f"{'all':<26}{each:9.1f}{1:8.1%}")
        lines.append(f"products alone, at the peak rates: {floor:.1f} ms a step")
        lines.append(f"peak rates on {counted(self.threads, 'thread')}, in GFLOP/s: {peaks}")
        return "\n".join(lines)

    def _line(self, row: ProfileRow) -> str:
        text = f"{row.name:<26}{1e3 * row.seconds / max(1, self.steps):9.1f}"
        text += f"{row.seconds / max(1e-9, self.seconds):8.1%}"
        if not row.operations:
            return text
        seconds = max(1e-9, row.seconds)
        rate = sum(row.operations.values()) / seconds
        return f"{text}{rate / 1e9:10.0f}{row.floor(self.peaks) / seconds:9.0%}"


class StepProfiler(Callback):
    """Makes the profile of a run.

    A step is recorded from this callback's `on_step_begin` to its `on_step_end`. The profiler must be the
    first callback, so that the work of other callbacks in `on_step_end` is not recorded. The work of other
    callbacks in `on_step_begin` is recorded. `cancel` must be called at the end.
    """

    def __init__(self) -> None:
        self._profiler = Profiler()
        self._steps, self._seconds = 0, 0.0
        self._peaks = dict[str, float]()

    def on_fit_start(self, run: Run) -> None:
        self._measure(_PEAKS)

    def on_step_begin(self, run: Run) -> None:
        self._profiler.start()

    def on_step_end(self, run: Run, record: StepRecord) -> None:
        self._profiler.stop()
        self._steps += 1
        self._seconds += record.seconds

    def cancel(self) -> None:
        """Stop recording."""
        self._profiler.cancel()

    def result(self) -> StepProfile:
        """The profile of all steps so far."""
        totals, sections = self._profiler.totals, self._profiler.sections
        self._measure({name for total in totals.values() for name in total.operations})
        rows = [_row(name, totals[key]) for key, name in _NAMES.items() if key in totals]
        in_head = sum(total.seconds for key, total in totals.items() if key[0] == HEAD and key in _NAMES)
        rows.append(ProfileRow(_HEAD_REST, sections[HEAD] - in_head, {}))
        rest = self._seconds - sum(row.seconds for row in rows)
        rows.append(ProfileRow(_REST, rest, {}))
        return StepProfile(self._steps, self._seconds, get_num_threads(), tuple(rows), dict(self._peaks))

    def _measure(self, arithmetics: set[str] | tuple[str, ...]) -> None:
        """Measure the peak rates. Keep the highest values: other programs may slow down a measurement."""
        for name in sorted(arithmetics):
            self._peaks[name] = max(self._peaks.get(name, 0.0), _core.peak_rate(name))


def _row(name: str, total: Total) -> ProfileRow:
    return ProfileRow(name, total.seconds, dict(total.operations))
