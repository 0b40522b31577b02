"""Callback: user code that a run calls before and after steps, evaluations, epochs and checkpoints."""

from collections.abc import Iterable, Mapping
from typing import Any

import numpy.typing as npt

from nplora import _check
from nplora.trainer.history import EpochRecord, EvaluationRecord, StepRecord
from nplora.trainer.run import Run


class Callback:
    """The base class of callbacks. Override the methods (hooks) that you need.

    Each hook gets the object `run`, with the attributes `model`, `history`, `step` and `total_steps`.
    `run.stop()` ends the run after the current step, as if this step were the last. If a hook raises an
    exception, the run is saved and ends.

    A callback can save its own state with `run.log` in `on_step_end`. When the run is resumed from a
    checkpoint, `run.logged` in `on_fit_start` returns the last state that was logged before this checkpoint.

    On several ranks, every rank calls the hooks of its callbacks, but only rank 0 calls `on_checkpoint`. A
    callback that changes the model or its gradients must make the same changes on all ranks; otherwise the
    run ends with an error.

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
        """Called before the first step. In a resumed run, the checkpoint is loaded before this call.

        A new run writes its first checkpoint after this hook. If the hook raises an exception, the
        directory therefore contains no new run, and an earlier run in the directory is not overwritten.
        """

    def on_step_begin(self, run: Run) -> None:
        """Called in every step, before the forward pass of the step's first batch."""

    def on_before_optimizer_step(self, run: Run, gradients: Mapping[str, npt.NDArray[Any]]) -> None:
        """Called in every step, before the gradients are clipped and the parameters are updated.

        `gradients` maps the name of each parameter to its gradient. Each gradient is the gradient of the mean
        loss over all batches of the step. After the hook, the trainer computes the norm of the gradients,
        clips them and checks them for NaN, so the hook may change these arrays in place. The hook is not
        called in a step without any label to train on.

        >>> import nplora, numpy as np
        >>> class FreezeB(nplora.trainer.Callback):
        ...     def on_before_optimizer_step(self, run, gradients):
        ...         gradients["B"][...] = 0
        >>> layer = nplora.LoRALinear(np.eye(4), rank=1, rng=0)
        >>> before = layer.B.copy()
        >>> optimizer = nplora.AdamW(weight_decay=0)
        >>> trainer = nplora.Trainer(layer, loss="mse", optimizer=optimizer, callbacks=[FreezeB()])
        >>> history = trainer.fit(np.eye(4), np.ones((4, 4)), steps=5)
        >>> np.array_equal(layer.B, before)
        True
        """

    def on_step_end(self, run: Run, record: StepRecord) -> None:
        """Called after every update of the parameters."""

    def on_evaluation(self, run: Run, record: EvaluationRecord) -> None:
        """Called after every evaluation of the validation data, including the one at the end of an epoch."""

    def on_epoch_end(self, run: Run, record: EpochRecord) -> None:
        """Called after every epoch and its validation."""

    def on_checkpoint(self, run: Run) -> None:
        """Called after a checkpoint was written to the disk, on rank 0 only."""

    def on_fit_end(self, run: Run) -> None:
        """Called at the end of the run, including after Ctrl-C, but not after an error."""


def checked_callbacks(op: str, callbacks: Any) -> list[Callback]:
    """Return the callbacks as a list.

    Raises:
        TypeError: `callbacks` is not a list of `Callback`s.
    """
    if not isinstance(callbacks, Iterable):
        raise TypeError(f"{op}: callbacks is {_check.kind(callbacks)}, expected a list of Callbacks")
    checked = list(callbacks)
    for number, callback in enumerate(checked):
        if not isinstance(callback, Callback):
            raise TypeError(f"{op}: callbacks[{number}] is {_check.kind(callback)}, expected a Callback")
    return checked
