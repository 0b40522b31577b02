"""Callback: user code that a run calls after steps, epochs and checkpoints."""

from nplora.trainer.history import EpochRecord, EvaluationRecord, StepRecord
from nplora.trainer.run import Run


class Callback:
    """The base class of callbacks: override the hooks that you need.

    Each hook gets the run, with `run.model`, `run.history`, `run.step` and `run.total_steps`. `run.stop()`
    ends the run after the current step, as if this step were the last. An exception ends the run too, after
    the run is saved.

        >>> import nplora, numpy as np
        >>> class StopAt(nplora.trainer.Callback):
        ...     def on_step_end(self, run, record):
        ...         if record.loss < 0.01:
        ...             run.stop()
        >>> layer = nplora.LoRALinear(np.eye(4), rank=2, rng=0)
        >>> optimizer = nplora.AdamW(lr=0.1)
        >>> trainer = nplora.Trainer(layer, loss="mse", optimizer=optimizer, callbacks=[StopAt()])
        >>> history = trainer.fit(np.eye(4), np.ones((4, 4)) + np.eye(4), steps=1000)
        >>> history.ended, history.loss[-1] < 0.01
        ('callback', True)
    """

    def on_fit_start(self, run: Run) -> None:
        """Called before the first step. A resumed run has loaded its checkpoint by then."""

    def on_step_end(self, run: Run, record: StepRecord) -> None:
        """Called after every update of the parameters."""

    def on_evaluation(self, run: Run, record: EvaluationRecord) -> None:
        """Called after every evaluation of the validation data, also after one at the end of an epoch."""

    def on_epoch_end(self, run: Run, record: EpochRecord) -> None:
        """Called after every epoch and its validation."""

    def on_checkpoint(self, run: Run) -> None:
        """Called after a checkpoint was written to the disk."""

    def on_fit_end(self, run: Run) -> None:
        """Called at the end of the run, also after Ctrl-C, but not after an error."""
