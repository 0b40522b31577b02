"""Run: the interface between a call of `Trainer.fit` and its callbacks."""

from collections.abc import Mapping
from typing import Any

from nplora.distributed.communicator import Alone, Ranks
from nplora.formats.strict_json import json_values
from nplora.nn.module import Module
from nplora.trainer.history import History
from nplora.trainer.run_directory import RunDirectory
from nplora.trainer.run_state import RunState


class Run:
    """Lets callbacks read the state of a call of `Trainer.fit`, write to its log and end the run.

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
        self.ranks: Ranks = Alone()  # the processes that train together
        self._ended: str | None = None  # why the run ended, as in `History.ended`
        self.was_finished = False  # whether the run was resumed, but had already ended
        self.changed_compute = ""  # how a resumed run's arithmetic has changed; "": not at all

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
        """The records of the run so far."""
        return self._state.history

    @property
    def step(self) -> int:
        """The number of updates so far."""
        return self._state.step

    @property
    def epoch(self) -> int:
        """The number of finished epochs."""
        return self._state.epoch

    @property
    def batch(self) -> int:
        """The number of batches used in the current epoch."""
        return self._state.batch

    @property
    def total_steps(self) -> int | None:
        """The number of steps in the whole run; None if the number of batches is unknown."""
        return self._state.total_steps

    def stop(self) -> None:
        """End the run after the current step; see `Callback` for an example."""
        self._ended = "callback"

    def log(self, event: str, record: Mapping[str, Any]) -> None:
        """Append a line of JSON to the run's log, if the run has a log. NaN and infinity become null.

        >>> import nplora, numpy as np
        >>> class Note(nplora.trainer.Callback):
        ...     def on_epoch_end(self, run, record):
        ...         run.log("note", {"loss": record.loss})
        ...         print(run.logged("note"))
        >>> layer = nplora.LoRALinear(np.eye(4), rank=1)
        >>> trainer = nplora.Trainer(layer, loss="mse", callbacks=[Note()])
        >>> history = trainer.fit(np.eye(4), np.eye(4), checkpoint_dir="noted-run", overwrite=True)
        {'event': 'note', 'loss': 0.0}
        """
        row = json_values({"event": event, **record})
        if self._directory is not None:
            self._directory.log(row)
        self._state.logged[event] = row

    def logged(self, event: str) -> dict[str, Any]:
        """The last line that was logged for `event`, as a dict; an empty dict if there is none.

        Checkpoints hold these lines, so a resumed run finds them even if its log is lost. On several ranks,
        only rank 0 writes the log. On another rank, this method finds only the lines that were in the log
        before the first step, and the lines that this rank itself has logged.
        """
        return dict(self._state.logged.get(event, {}))
