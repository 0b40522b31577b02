"""Preparation: computes and stores the log-probabilities that an objective needs before the first step."""

from __future__ import annotations

from collections.abc import Callable

from nplora.distributed.communicator import Ranks
from nplora.finetuning.data import TokenBatches
from nplora.finetuning.objectives import Objective
from nplora.formats import files
from nplora.formats.run_files import holds_run
from nplora.lm import LanguageModel
from nplora.trainer import Callback, Run
from nplora.trainer.run_directory import RunDirectory


class Preparation(Callback):
    """Calls `Objective.prepare`, which computes log-probabilities, at the right time of a run.

    In a new run, that time is before the trainer starts (in `compute`), so that an error does not change an
    earlier run in the directory. In a resumed run, it is after the trainer has locked the directory and has
    accepted the checkpoint, so that a refused run changes nothing. The files of an earlier run are replaced
    only after the first checkpoint of this run is on the disk.

    Args:
        lm: the model without the adapter; released after the computation.
        batches: the training data, and the validation data, if there are any.
        directory: the output directory; None on all ranks except rank 0.
        say: prints a text.
        ranks: connection to the processes that train together. All processes compute at the same time.
    """

    def __init__(
        self,
        objective: Objective,
        lm: LanguageModel,
        batches: list[TokenBatches],
        directory: files.Directory | None,
        say: Callable[[str], None],
        ranks: Ranks,
    ) -> None:
        self._objective, self._batches, self._directory, self._say = objective, batches, directory, say
        self._ranks = ranks
        self._lm: LanguageModel | None = lm

    def compute(self) -> None:
        """Prepare the objective of a new run. The directory is locked during this work."""
        if self._directory is None:
            self._compute(writes=False, ranks=self._ranks)
            return
        with RunDirectory(self._directory):
            self._compute(writes=not holds_run(self._directory), ranks=self._ranks)

    def on_fit_start(self, run: Run) -> None:
        self._compute(writes=True, ranks=run.ranks)
        if self._directory is not None:
            self._objective.keep(self._directory)

    def _compute(self, writes: bool, ranks: Ranks) -> None:
        if self._lm is not None:
            self._objective.prepare(self._lm, self._batches, self._directory, self._say, writes, ranks)
        self._lm = None
