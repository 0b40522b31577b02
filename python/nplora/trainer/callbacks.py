"""Callback: code of users that a run calls."""

from nplora.trainer.history import EpochRecord, StepRecord
from nplora.trainer.run import Run


class Callback:
    """The base class of callbacks: override the hooks that you need.

    Each hook gets the run, with `run.model`, `run.history`, `run.step` and `run.total_steps`. `run.stop()`
    ends the run after the current step, as if that were the last one. An exception ends it too, and the run
    is saved first.

        class StopAt(nplora.trainer.Callback):
            def on_step_end(self, run, record):
                if record.loss < 0.01:
                    run.stop()
    """

    def on_fit_start(self, run: Run) -> None:
        """Before the first step; a resumed run has taken over its checkpoint by then."""

    def on_step_end(self, run: Run, record: StepRecord) -> None:
        """After every update of the parameters."""

    def on_epoch_end(self, run: Run, record: EpochRecord) -> None:
        """After every epoch and its validation."""

    def on_checkpoint(self, run: Run) -> None:
        """After a checkpoint was written to the disk."""

    def on_fit_end(self, run: Run) -> None:
        """At the end, also after Ctrl-C; not after an error."""
