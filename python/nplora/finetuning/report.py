"""FinetuneReport: the results of a fine-tuning run."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from nplora.finetuning.data import DataReport
from nplora.finetuning.planning import peak_memory
from nplora.finetuning.step_profile import StepProfile
from nplora.formats.errors import counted
from nplora.trainer import History, RankRecord, StepRecord
from nplora.trainer.history import mean_metrics

RECENT = 20  # steps whose mean loss is shown, because the losses of single batches differ too much


def mean_loss(records: Sequence[StepRecord]) -> float:
    """The mean loss over the trained tokens (or pairs, or answers) of the steps in `records`."""
    return sum(r.loss * r.count for r in records) / max(1, sum(r.count for r in records))


def _last(records: Sequence[StepRecord]) -> Sequence[StepRecord]:
    """The last steps: as many as in the longest epoch, but at most `RECENT`."""
    longest = max(Counter(record.epoch for record in records).values(), default=0)
    return records[len(records) - min(longest, RECENT) :]


WAS_FINISHED = "the run was already finished: nothing was trained"
_SHOWN = {  # metrics in lines of text
    "rewards/margins": "margin", "rewards/accuracies": "accuracy", "kl": "KL", "nll_loss": "cross-entropy",
}  # fmt: skip


def in_words(metrics: Mapping[str, float]) -> str:
    """The main metrics as the end of a line: ", margin 0.123, accuracy 0.900"."""
    return "".join(f", {word} {metrics[name]:.3f}" for name, word in _SHOWN.items() if name in metrics)


def memory_in_words(was_finished: bool) -> str:
    """The words ", peak memory 940 MB"; "" if nothing was trained."""
    return "" if was_finished else f", peak memory {peak_memory() / 1e6:.0f} MB"


@dataclass(frozen=True)
class Sample:
    """A prompt, and the texts that the model generated after it, before and after training.

    `before` is "" if the log of a resumed run lacks the text. `after` is "" if the run was interrupted.

    >>> nplora.finetuning.Sample("1+1=", before="7", after="2").after
    '2'
    """

    prompt: str
    before: str
    after: str


@dataclass(frozen=True)
class FinetuneReport:
    """The results of a fine-tuning run; `print` shows them.

    Attributes:
        output: the directory with the adapter.
        train, valid: summaries of the training data and the validation data.
        loss_before, loss_after: validation loss before training, and with the saved adapter; None without
            validation data. `loss_before` is also None if the log of a resumed run does not have it.
            `loss_after` is also None if the run was interrupted.
        samples: prompts, with the texts before and after training.
        history: the records of the trainer. If the adapter with the lowest validation loss was saved,
            `history.best_step` is its step.
        trained: number of trained values.
        parameters: number of all values of the model, trained or not.
        was_finished: whether the resumed run was already finished, so that nothing was trained.
        unit: the unit of the counts in the history: trained tokens, pairs or answers.
        metrics_before, metrics_after: other metrics of the loss on the validation data, such as DPO's
            rewards. `metrics_before` was measured before training, `metrics_after` with the saved adapter.
        process: rank of the process that made the report, if several processes have trained together. Only
            rank 0 has the texts of the samples.
        ranks: the speed and the waiting time of each process, if several processes have trained together.
        profile: how long each kind of work in the steps took; None if the option `profile` was not set.
        tokens: number of trained tokens in all steps, including the steps before a resume. If the unit is
            pairs or answers, `tokens` is an estimate: the number of pairs or answers times the mean number of
            trained tokens of an example.

    >>> report = nplora.finetune("model.gguf", "train.jsonl", "out", steps=2, batch_examples=4)
    >>> len(report.history.steps), report.train.examples
    (2, 16)
    >>> print(report)
    2 steps in ... s, ... tokens/s (... trained), peak memory ... MB, loss ...
    trained ... of ... values
    out/ holds the adapter (PEFT's format)
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
    unit: str = "trained tokens"
    metrics_before: dict[str, float] = field(default_factory=dict)
    metrics_after: dict[str, float] = field(default_factory=dict)
    process: int = 0
    ranks: tuple[RankRecord, ...] = ()
    profile: StepProfile | None = None

    @property
    def tokens(self) -> int:
        counted = sum(record.count for record in self.history.steps)
        if self.unit == "trained tokens":
            return counted
        return round(counted * self.train.learned / max(1, self.train.examples))

    def __str__(self) -> str:
        history = self.history
        lines = [
            f"  {sample.prompt!r}\n    before  {sample.before!r}\n    after   {sample.after!r}"
            for sample in self.samples
        ]
        if self.was_finished:
            lines.insert(0, WAS_FINISHED)
        if self.loss_after is not None:
            before = "" if self.loss_before is None else f"{self.loss_before:.4f} -> "
            lines.append(f"validation loss {before}{self.loss_after:.4f}{self._best()}{self._compared()}")
        last = _last(history.steps)
        losses = f", loss {history.loss[0]:.4f}" if last else ""
        if len(last) > 1:
            losses += f" in the first step, {mean_loss(last):.4f} on average in the last {len(last)} steps"
        elif len(history.steps) > 1:
            losses += f" in the first step, {mean_loss(last):.4f} in the last"
        losses += in_words(mean_metrics(last)) if last else ""
        trained = self.tokens / max(1e-9, history.seconds)
        rate = trained * self.train.tokens / max(1, self.train.learned)  # exact for whole epochs
        lines.append(
            f"{counted(len(history.steps), 'step')} in {history.seconds:.1f} s, "
            f"{rate:.0f} tokens/s ({self._counted_rate()})"
            f"{memory_in_words(self.was_finished)}{losses}"
        )
        lines += [record.in_words(self.unit) for record in self.ranks]
        if self.profile is not None:
            lines.append(str(self.profile))
        lines.append(f"trained {self.trained:,} of {self.parameters:,} values")
        lines += self._risen()
        ended = ", interrupted: --resume continues" if history.interrupted else ""
        if best := self._kept_best():
            lines.append(best)
        if history.ended == "patience":
            lines.append("the validation loss did not fall any more, so the run ended early (patience)")
        lines.append(f"{self.output}{os.sep} holds the adapter (PEFT's format){ended}")
        return "\n".join(lines)

    def _risen(self) -> list[str]:
        """A line that warns if the validation loss or, without validation data, the training loss has risen.

        The validation loss counts as risen if it is higher by more than 0.01 than before the training. The
        training loss differs from batch to batch, so it counts as risen only if the loss of each of the last
        steps is higher by more than 1 than that of the first step.
        """
        if self.loss_after is not None and self.loss_before is not None:
            name, has_risen = "validation loss", self.loss_after > self.loss_before + 0.01
        else:
            name, losses = "loss", self.history.loss
            later = [record.loss for record in _last(self.history.steps[1:])]
            has_risen = bool(later) and min(later) > losses[0] + 1
        return [f"the {name} has risen: try a lower learning rate, or fewer epochs"] * has_risen

    def _counted_rate(self) -> str:
        """A text: how many trained tokens, pairs or answers the run processed per second."""
        rate = sum(record.count for record in self.history.steps) / max(1e-9, self.history.seconds)
        return f"{rate:.0f} trained" if self.unit == "trained tokens" else f"{rate:.1f} {self.unit}/s"

    def _compared(self) -> str:
        """The end of a line: the validation metrics before training, and with the saved adapter."""
        text = ""
        for name, word in _SHOWN.items():
            if name in self.metrics_after:
                before = f"{self.metrics_before[name]:.3f} -> " if name in self.metrics_before else ""
                text += f", {word} {before}{self.metrics_after[name]:.3f}"
        return text

    def _best(self) -> str:
        """A text that names the step of the saved adapter; "" if there were fewer than two evaluations."""
        evaluations, best = self.history.evaluations, self.history.best_step
        if best is None or len(evaluations) < 2:
            return ""
        # An evaluation before a resume may have used other validation data, with a lower loss.
        if any(record.val_loss < (self.loss_after or 0) for record in evaluations):
            return f" (step {best})"
        return f" (step {best}, the lowest of {len(evaluations)} evaluations)"

    def _kept_best(self) -> str:
        """After Ctrl-C, a checkpoint may still hold the adapter of an earlier step with a lower validation
        loss. Return a line that says how to save that adapter; "" if there is none."""
        evaluations = self.history.evaluations
        for best in evaluations[:-1]:
            if best.step == self.history.kept_step:
                return (
                    f"the lowest validation loss was {best.val_loss:.4f}, at step {best.step}: "
                    "--resume --patience 1 saves the adapter of that step and ends the run"
                )
        return ""
