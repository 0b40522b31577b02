"""Run: one call of `Trainer.fit`, as callbacks see it."""

from collections.abc import Mapping
from typing import Any

from nplora.nn.module import Module
from nplora.trainer.history import History, last_logged
from nplora.trainer.run_directory import RunDirectory
from nplora.trainer.run_state import RunState


class Run:
    """One call of `Trainer.fit`, as callbacks see it."""

    def __init__(self, state: RunState, directory: RunDirectory | None) -> None:
        self._state, self._directory = state, directory
        self._ended: str | None = None  # the reason, as `History.ended` has it

    @property
    def model(self) -> Module:
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
        """The last line of this event in the run's log, not checked; empty if there is none."""
        if self._directory is None:
            return {}
        return last_logged(self._directory.read_log(self._directory.log_bytes), event)
