"""Run: one call of `Trainer.fit`, as callbacks see it."""

from collections.abc import Mapping
from typing import Any

from nplora.nn.module import Module
from nplora.trainer.history import History, last_logged
from nplora.trainer.run_directory import RunDirectory
from nplora.trainer.run_state import RunState


class Run:
    """One call of `Trainer.fit`, as callbacks see it.

    >>> import nplora, numpy as np
    >>> class Report(nplora.trainer.Callback):
    ...     def on_fit_end(self, run):
    ...         print(run)
    >>> layer = nplora.LoRALinear(np.eye(4), rank=1, rng=0)
    >>> trainer = nplora.Trainer(layer, loss="mse", callbacks=[Report()])
    >>> history = trainer.fit(np.eye(4), np.ones((4, 4)), epochs=3)
    Run(step 3 of 3, epoch 3)
    """

    def __init__(self, state: RunState, directory: RunDirectory | None) -> None:
        self._state, self._directory = state, directory
        self._ended: str | None = None  # the reason, as `History.ended` has it

    def __repr__(self) -> str:
        total = "" if self.total_steps is None else f" of {self.total_steps}"
        directory = "" if self._directory is None else f", in {str(self._directory.path)!r}"
        return f"Run(step {self.step}{total}, epoch {self.epoch}{directory})"

    @property
    def model(self) -> Module:
        """The model that is trained."""
        return self._state.model

    @property
    def history(self) -> History:
        """The records so far."""
        return self._state.history

    @property
    def step(self) -> int:
        """Updates made."""
        return self._state.step

    @property
    def epoch(self) -> int:
        """Epochs finished."""
        return self._state.epoch

    @property
    def batch(self) -> int:
        """Batches used of the current epoch."""
        return self._state.batch

    @property
    def total_steps(self) -> int | None:
        """Where the run will end; None if the number of batches is unknown."""
        return self._state.total_steps

    def stop(self) -> None:
        """End the run after the current step."""
        self._ended = "callback"

    def log(self, event: str, record: Mapping[str, Any]) -> None:
        """Append a line of JSON to the run's log, if it has one. NaN and infinities become null."""
        if self._directory is not None:
            self._directory.log({"event": event, **record})

    def logged(self, event: str) -> dict[str, Any]:
        """The last line of this event in the run's log, as it was read; empty if there is none."""
        if self._directory is None:
            return {}
        return last_logged(self._directory.read_log(self._directory.log_bytes), event)
