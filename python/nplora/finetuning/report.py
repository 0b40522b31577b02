"""What came of a fine-tuning run."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from nplora.finetuning.data import DataReport
from nplora.finetuning.planning import peak_memory
from nplora.formats.errors import counted
from nplora.trainer import History, StepRecord

RECENT = 20  # steps whose mean loss is told: single batches differ too much


def mean_loss(records: Sequence[StepRecord]) -> float:
    """Over all targets of these steps."""
    return sum(r.loss * r.count for r in records) / max(1, sum(r.count for r in records))


@dataclass(frozen=True)
class Sample:
    """A prompt, and the answers before and after; "" where they are not known."""

    prompt: str
    before: str
    after: str


@dataclass(frozen=True)
class FinetuneReport:
    """What came of a run; `str(report)` is what the command prints.

    Attributes:
        output: the directory with the adapter.
        loss_before, loss_after: of the validation data, None without it (and after an interruption); before
            also where a run that goes on finds it not, or of other data, in its log.
        history: the trainer's records.
        trained: numbers in the factors, `parameters`: of the whole model.
        was_finished: the run was at its end already when it was to go on.
        tokens: that were learned from, those before a resumed run went on included.
    """

    output: Path
    train: DataReport
    valid: DataReport | None
    loss_before: float | None
    loss_after: float | None
    samples: tuple[Sample, ...]
    history: History
    trained: int
    parameters: int
    was_finished: bool = False

    @property
    def tokens(self) -> int:
        return sum(record.count for record in self.history.steps)

    def __str__(self) -> str:
        history = self.history
        lines = [
            f"  {sample.prompt!r}\n    before  {sample.before!r}\n    after   {sample.after!r}"
            for sample in self.samples
        ]
        if self.was_finished:
            lines.insert(0, "the run is finished: nothing was trained")
        if self.loss_after is not None:
            before = "" if self.loss_before is None else f"{self.loss_before:.4f} -> "
            lines.append(f"validation loss {before}{self.loss_after:.4f}")
        last = history.steps[-RECENT:]
        losses = f", loss {history.loss[0]:.4f}" if last else ""
        if len(last) > 1:
            losses += f" in the first step, {mean_loss(last):.4f} in the last {len(last)} on average"
        trained = self.tokens / max(1e-9, history.seconds)
        rate = trained * self.train.tokens / max(1, self.train.learned)  # over whole epochs, this is exact
        lines.append(
            f"{counted(len(history.steps), 'step')} in {history.seconds:.1f} s, "
            f"{rate:.0f} tokens/s ({trained:.0f} trained), "
            f"peak memory {peak_memory() / 1e6:.0f} MB{losses}"
        )
        lines.append(f"trained {self.trained:,} of {self.parameters:,} numbers")
        ended = ", interrupted: --resume goes on" if history.interrupted else ""
        lines.append(f"{self.output}{os.sep} holds the adapter (PEFT's format){ended}")
        return "\n".join(lines)
