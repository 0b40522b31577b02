"""Progress: a callback that reports the steps, evaluations and epochs of a job while it trains."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

from nplora.trainer import Callback, EpochRecord, EvaluationRecord, Run, StepRecord

Event = Callable[[str, Mapping[str, Any] | None], None]

_RECENT = 0.9  # the weight of the earlier steps in the moving average of a step's seconds


class Progress(Callback):
    """Reports the steps, the evaluations and the epochs of a run.

    Args:
        event: called as event(message, data) for each event.
        on_start: called as on_start(run) before the first step.
        on_epoch: called as on_epoch(run, record) after each epoch.
        clock: returns the Unix time.
    """

    def __init__(
        self,
        event: Event,
        on_start: Callable[[Run], None],
        on_epoch: Callable[[Run, EpochRecord], None],
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._event, self._on_start, self._on_epoch, self._clock = event, on_start, on_epoch, clock
        self._last, self._seconds = 0.0, 0.0
        self._left = 0  # the number of remaining steps

    @property
    def estimated_finish(self) -> int | None:
        """The Unix time at which the last step will end, estimated from the duration of recent steps."""
        return round(self._last + self._left * self._seconds) if self._seconds else None

    def on_fit_start(self, run: Run) -> None:
        self._last = self._clock()
        self._on_start(run)

    def on_step_end(self, run: Run, record: StepRecord) -> None:
        total, now = run.total_steps or record.step, self._clock()
        seconds, self._last = now - self._last, now
        self._seconds = _RECENT * self._seconds + (1 - _RECENT) * seconds if self._seconds else seconds
        self._left = max(0, total - record.step)
        data = {
            "step": record.step, "total_steps": total, "epoch": record.epoch, "train_loss": record.loss,
            "learning_rate": record.lr, "grad_norm": record.grad_norm, **record.metrics,
        }  # fmt: skip
        self._event(f"Step {record.step}/{total}: training loss={record.loss:.4f}", data)

    def on_evaluation(self, run: Run, record: EvaluationRecord) -> None:
        total = run.total_steps or record.step
        data: dict[str, Any] = {
            "step": record.step, "total_steps": total, "epoch": record.epoch, "valid_loss": record.val_loss,
            "full_valid_loss": record.val_loss, **record.val_metrics,
        }  # fmt: skip
        if record.val_accuracy is not None:
            data["full_valid_mean_token_accuracy"] = record.val_accuracy
        self._event(f"Step {record.step}/{total}: full validation loss={record.val_loss:.4f}", data)

    def on_epoch_end(self, run: Run, record: EpochRecord) -> None:
        self._on_epoch(run, record)
