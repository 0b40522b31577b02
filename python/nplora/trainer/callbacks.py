"""Callback: what users hang into a run."""

from typing import TYPE_CHECKING

from nplora.trainer.history import EpochRecord, StepRecord

if TYPE_CHECKING:
    from nplora.trainer.run import Run


class Callback:
    """The base of callbacks: override the hooks that you need.

    Each gets the run: `run.model`, `run.history`, `run.total_steps`; `run.stop()` ends it after the present
    step, as if that had been the last one. An exception ends it too, after a checkpoint.

        class StopAt(nplora.trainer.Callback):
            def on_step_end(self, run, record):
                if record.loss < 0.01:
                    run.stop()
    """

    def on_fit_start(self, run: "Run") -> None:
        """Before the first step; after a resumed run took over its checkpoint."""

    def on_step_end(self, run: "Run", record: StepRecord) -> None:
        """After every update of the parameters."""

    def on_epoch_end(self, run: "Run", record: EpochRecord) -> None:
        """After every epoch and its validation."""

    def on_checkpoint(self, run: "Run") -> None:
        """After a checkpoint reached the disk."""

    def on_fit_end(self, run: "Run") -> None:
        """At the end, also after Ctrl-C; not after an error."""
