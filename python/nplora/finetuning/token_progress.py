"""TokenProgress: a line of progress on stderr while a language model is trained."""

from __future__ import annotations

import shutil
import sys
import time
from collections.abc import Callable

import numpy as np

from nplora.finetuning.objectives.packed_loss import PackedLoss
from nplora.finetuning.planning import peak_memory
from nplora.finetuning.report import RECENT, in_words, mean_loss
from nplora.runtime.stderr import stderr
from nplora.trainer import Callback, EpochRecord, EvaluationRecord, Run, StepRecord
from nplora.trainer.history import mean_metrics


def speaks(progress: bool | None) -> bool:
    """Whether to print progress: by default, only if a terminal or notebook shows stderr."""
    return sys.stderr is not None and (stderr.is_watched() if progress is None else progress)


def speaker(progress: bool | None) -> Callable[[str], None]:
    """A function that prints a text on stderr if `speaks(progress)`, and otherwise does nothing."""
    if not speaks(progress):
        return lambda text: None
    return lambda text: print(text, file=stderr, flush=True)


class TokenProgress(Callback):
    """A line with the mean loss of the last steps, tokens per second, peak memory and the time left.

    A terminal and a notebook show one line that is redrawn. Elsewhere a new line appears every few seconds.

    Args:
        every: the seconds between two new lines.
        loss: the loss object of the run, which counts all tokens. None: the line shows only the trained
            tokens per second.

    >>> lm = nplora.load_model("model.gguf")
    >>> lm.add_lora(rank=2)
    >>> dataset = nplora.data.read_dataset("train.jsonl", lm.tokenizer)
    >>> batches = nplora.data.TokenBatches(dataset, batch_examples=8)
    >>> loss = nplora.finetuning.TokenLoss()
    >>> progress = nplora.finetuning.TokenProgress(loss=loss)
    >>> trainer = nplora.Trainer(lm, loss, nplora.AdamW(lr=1e-2), callbacks=[progress], progress=False)
    >>> history = trainer.fit(batches, steps=1)
    """

    def __init__(self, every: float = 10.0, loss: PackedLoss | None = None) -> None:
        self._loss, self._tokens = loss, [0 if loss is None else loss.tokens]
        self._redraws = stderr.is_watched()
        self._every = 0.1 if self._redraws else every
        self._drawn = -np.inf
        self._width = 0
        self._recent: list[StepRecord] = []

    def on_step_end(self, run: Run, record: StepRecord) -> None:
        self._recent = [*self._recent[1 - RECENT :], record]
        if self._loss is not None:
            self._tokens = [*self._tokens[-RECENT:], self._loss.tokens]
        last = record.step == run.total_steps
        if last or time.monotonic() - self._drawn >= self._every:
            self._drawn = time.monotonic()
            self._draw(self._text(run, record))

    def on_evaluation(self, run: Run, record: EvaluationRecord) -> None:
        if not run.history.epochs or run.history.epochs[-1].step != record.step:
            metrics = in_words(record.val_metrics)
            self._draw(f"step {record.step}: validation loss {record.val_loss:.4f}{metrics}")
            self._break()

    def on_epoch_end(self, run: Run, record: EpochRecord) -> None:
        validation = "" if record.val_loss is None else f", validation loss {record.val_loss:.4f}"
        validation += in_words(record.val_metrics)
        self._draw(f"epoch {record.epoch}: loss {record.loss:.4f}{in_words(record.metrics)}{validation}")
        self._break()

    def on_fit_end(self, run: Run) -> None:
        self._break()

    def _text(self, run: Run, record: StepRecord) -> str:
        """The progress line. If the terminal is too narrow, the line leaves out its least important parts."""
        recent = self._recent
        seconds = max(1e-9, sum(r.seconds for r in recent))
        total = "" if run.total_steps is None else f"/{run.total_steps}"
        parts = {
            "step": f"step {record.step}{total}, loss {mean_loss(recent):.4f}",
            "metrics": in_words(mean_metrics(recent)),
            "mean": f" (mean of {len(recent)} steps)" if len(recent) > 1 else "",
            "rate": f", {self._rate(seconds)}",
            "memory": f", {peak_memory() / 1e6:.0f} MB",
        }
        if run.total_steps is not None:
            left = round((run.total_steps - record.step) * seconds / len(recent))
            parts["left"] = f", {_duration(left)} left"
        for name in ("mean", "memory", "rate", "left", "metrics"):
            if len("".join(parts.values())) > self._columns:
                parts.pop(name, None)
        return "".join(parts.values())

    def _rate(self, seconds: float) -> str:
        """The tokens per second of the last steps, which took `seconds` seconds in total."""
        trained = sum(record.count for record in self._recent) / seconds
        if self._loss is None:
            return f"{trained:.0f} trained tokens/s"
        rate = f"{(self._tokens[-1] - self._tokens[0]) / seconds:.0f} tokens/s"
        if self._loss.unit == "trained tokens":
            return f"{rate} ({trained:.0f} trained)"
        return f"{rate} ({trained:.1f} {self._loss.unit}/s)"

    @property
    def _columns(self) -> int:
        """The number of characters that fit into the line."""
        return shutil.get_terminal_size().columns - 1 if self._redraws else sys.maxsize

    def _draw(self, text: str) -> None:
        if self._redraws:
            text = text[: self._columns]
            print(f"\r{text:<{self._width}}", end="", file=stderr, flush=True)
            self._width = len(text)
        else:
            print(text, file=stderr, flush=True)

    def _break(self) -> None:
        """End the line that is redrawn."""
        if self._width:
            print(file=stderr, flush=True)
            self._width = 0


def _duration(seconds: int) -> str:
    """A duration as text: 65 seconds are 1:05, two hours and five seconds are 2:00:05."""
    minutes, rest = divmod(seconds, 60)
    return f"{minutes // 60}:{minutes % 60:02}:{rest:02}" if minutes >= 60 else f"{minutes}:{rest:02}"
