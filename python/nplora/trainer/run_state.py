"""RunState: the state of a run between two steps."""

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from nplora.nn.losses import NonFiniteLossError
from nplora.nn.module import Module
from nplora.nn.optim import Optimizer
from nplora.trainer.checkpoint import Checkpoint
from nplora.trainer.early_stopping import EarlyStopping
from nplora.trainer.fingerprint import factors, set_factors
from nplora.trainer.history import EpochRecord, EvaluationRecord, History
from nplora.trainer.meeting import Meeting

Array = npt.NDArray[Any]


@dataclass
class StateCopy:
    """A copy of the state of a run, without the best factors.

    Attributes:
        step, batch, records: the numbers of steps, of batches used in the current epoch, and of step records.
        logged: the last log line of each event.
        updates, outer_updates: the numbers of steps that the optimiser and the outer optimiser have made.
        streams: the positions of the layers' dropout streams.
        values, moments: the trained values, and the arrays of the optimiser and of the outer optimiser.
    """

    step: int = 0
    batch: int = 0
    records: int = 0
    logged: dict[str, dict[str, Any]] = field(default_factory=dict)
    updates: int = 0
    outer_updates: int = 0
    streams: list[tuple[int, int]] = field(default_factory=list)
    values: list[Array] = field(default_factory=list)
    moments: list[Array] = field(default_factory=list)


class RunState:
    """The state from which a run continues: position, factors, moments, dropout streams and best factors.

    Attributes:
        model, optimizer, parameters: the objects that change in training.
        outer: the optimiser of outer steps; None if the ranks make no local steps.
        history: the records of the run so far.
        logged: a dict from the name of each event to the last line of the run's log with this event.
        early_stopping: the object that keeps the best evaluation so far and its factors.
        step: the number of updates so far.
        epoch, batch: the number of finished epochs, and the number of batches used in the current epoch.
        total_steps: the number of steps in the whole run; None if the number of batches is unknown.
        updating: whether an update has begun but is not finished, so that the state must not be saved.
        divergence: the error if the current parameters led to NaN or infinity; otherwise None.
        diverged_after: the step whose update made the parameters that led to NaN or infinity.
    """

    def __init__(
        self,
        model: Module,
        optimizer: Optimizer,
        total_steps: int | None,
        patience: int | None,
        keeps_best: bool,
        outer: Optimizer | None = None,
    ) -> None:
        self.model, self.optimizer, self.parameters = model, optimizer, model.parameters()
        self.outer = outer
        self.history, self.early_stopping = History(), EarlyStopping(model, patience, keeps_best)
        self.logged: dict[str, dict[str, Any]] = {}
        self.step = self.epoch = self.batch = 0
        self.total_steps = total_steps
        self.updating = False
        self.divergence: NonFiniteLossError | None = None
        self.diverged_after = 0
        self._adapters = list(model.adapter_layers().values())
        self._streams = self._dropout_streams()
        self._evaluated_at_the_end = False  # whether the last evaluation was made only because the run ended

    @property
    def position(self) -> tuple[int, ...]:
        """Five numbers: `step`, `epoch`, `batch`, the number of epoch records, and the number of evaluations.

        A checkpoint is written only if one of these numbers has changed since the last checkpoint.
        """
        history = self.history
        return self.step, self.epoch, self.batch, len(history.epochs), len(history.evaluations)

    @property
    def last_evaluation(self) -> EvaluationRecord | None:
        """The last evaluation, if it evaluated the current factors; otherwise None."""
        last = self.history.evaluations[-1:]
        return last[0] if last and last[0].step == self.step else None

    def prepare(self) -> None:
        """Create the optimiser's moments if there are none yet, and clear the gradients."""
        if self.optimizer.steps == 0:
            self.optimizer.init(self.parameters)
        if self.outer is not None and self.outer.steps == 0:
            self.outer.init(self.parameters)
        self._clear_gradients()

    def count_step(self, batches: int) -> None:
        """Count one update and the batches that it used; clear the gradients."""
        self._clear_gradients()
        self.step += 1
        self.batch += batches
        self._streams = self._dropout_streams()
        self.updating = False

    def roll_back(self) -> None:
        """Undo the batches since the last update: clear the gradients and reset the dropout streams."""
        self._clear_gradients()
        for layer, stream in zip(self._adapters, self._streams, strict=True):
            layer.dropout_stream = stream

    def copy_to(self, copy: StateCopy) -> None:
        """Copy the state into the object `copy` and its arrays. Call this method only between two steps."""
        copy.step, copy.batch, copy.records = self.step, self.batch, len(self.history.steps)
        copy.updates, copy.streams = self.optimizer.steps, list(self._streams)
        copy.logged = dict(self.logged)
        copy.outer_updates = 0 if self.outer is None else self.outer.steps
        for arrays, held in ((copy.values, self._values()), (copy.moments, self._moments())):
            arrays += [np.empty_like(array) for array in held[len(arrays) :]]
            for array, now in zip(arrays, held, strict=True):
                np.copyto(array, now)

    def return_to(self, copy: StateCopy) -> None:
        """Undo all steps since the call of `copy_to` that filled `copy`.

        Since that call, there must have been no evaluation and no end of an epoch.
        """
        self.step, self.batch, self.optimizer.steps = copy.step, copy.batch, copy.updates
        if self.outer is not None:
            self.outer.steps = copy.outer_updates
        del self.history.steps[copy.records :]
        self.logged = dict(copy.logged)
        for arrays, held in ((copy.values, self._values()), (copy.moments, self._moments())):
            for array, now in zip(arrays, held, strict=True):
                np.copyto(now, array)
        self._streams, self.updating = list(copy.streams), False
        self.roll_back()

    def _values(self) -> list[Array]:
        return [parameter.value for parameter in self.parameters]

    def _moments(self) -> list[Array]:
        optimizers = [self.optimizer] if self.outer is None else [self.optimizer, self.outer]
        states = (optimizer.state_dict(copy=False) for optimizer in optimizers)
        return [array for state in states for name, array in state.items() if name != "steps"]

    def add_evaluation(self, record: EvaluationRecord, at_the_end: bool = False) -> None:
        """Record an evaluation of the current factors, and update early stopping.

        Args:
            at_the_end: whether this evaluation is made only because the run ends here, in the middle of an
                epoch.
        """
        self.history.evaluations.append(record)
        self.early_stopping.judge(record)
        self._evaluated_at_the_end = at_the_end

    def close_epoch(self, record: EpochRecord, complete: bool) -> None:
        """Record the current epoch. If `complete` is true, go to the next epoch."""
        self.history.epochs.append(record)
        if complete:
            self.epoch, self.batch = self.epoch + 1, 0

    def reopen_epoch(self) -> None:
        """Remove the records that exist only because the run ended within an epoch.

        A resumed run that ends within an epoch makes its own records. The best factors need no change: a
        resumed run reads them from the last checkpoint, which is older than the removed records.
        """
        if self._evaluated_at_the_end:
            self.history.evaluations.pop()
            self._evaluated_at_the_end = False
        if self.history.epochs and self.history.epochs[-1].epoch == self.epoch + 1:
            self.history.epochs.pop()

    def checkpoint(self, settings: dict[str, Any], base: str) -> Checkpoint:
        """Make a checkpoint of the state. The checkpoint shares the model's arrays and does not copy them."""
        return Checkpoint(
            step=self.step,
            epoch=self.epoch,
            batch=self.batch,
            total_steps=self.total_steps,
            random_state=self.model.random_state(),
            settings=settings,
            base=base,
            best=self.early_stopping.best,
            epochs=self.history.epoch_rows(),
            evaluations=self.history.evaluation_rows(),
            log_bytes=0,
            logged=self.logged,
            parameters=factors(self.model),
            optimizer=self.optimizer.state_dict(copy=False),
            best_parameters=self.early_stopping.best_factors,
            history=self.history.step_columns(),
            outer={} if self.outer is None else self.outer.state_dict(copy=False),
        )

    def continue_from(self, checkpoint: Checkpoint, history: History) -> None:
        """Restore the state from a checkpoint; `history` holds the records up to the checkpoint."""
        self.model.set_random_state(checkpoint.random_state)
        self._streams = self._dropout_streams()
        set_factors(self.model, checkpoint.parameters)
        self.optimizer.init(self.parameters)
        self.optimizer.load_state_dict(checkpoint.optimizer)
        if self.outer is not None:
            self.outer.init(self.parameters)
            if self.continues_momentum(checkpoint):
                self.outer.load_state_dict(checkpoint.outer)
        self.history.steps, self.history.epochs = history.steps, history.epochs
        self.history.evaluations = history.evaluations
        self.logged = {event: dict(row) for event, row in checkpoint.logged.items()}
        self.step, self.epoch, self.batch = checkpoint.step, checkpoint.epoch, checkpoint.batch
        best = checkpoint.best
        if best is not None and best["epoch"] and not best["step"]:  # an older schema without steps in `best`
            steps = [record.step for record in history.epochs if record.epoch == best["epoch"]]
            best = {**best, "step": max(steps, default=0)}
        self.early_stopping.continue_from(best, checkpoint.best_parameters)

    def continues_momentum(self, checkpoint: Checkpoint) -> bool:
        """Whether the outer steps continue with the momentum that a checkpoint stores.

        The outer steps start with a momentum of zero if `outer_momentum` is 0 now, or was 0 when the
        checkpoint was written.
        """
        if self.outer is None:
            return False
        return checkpoint.outer.keys() == self.outer.state_dict(copy=False).keys()

    def share(self, meeting: Meeting, resumed: bool) -> bool:
        """If rank 0 resumes a run, send the run's state to all ranks. Return whether rank 0 resumes a run."""
        mine = (self.checkpoint({}, ""), self.history) if resumed else None
        given = meeting.broadcast(mine, "the start of a run")
        if given is not None and meeting.rank:
            self.continue_from(*given)
        return given is not None

    def _dropout_streams(self) -> list[tuple[int, int]]:
        return [layer.dropout_stream for layer in self._adapters]

    def _clear_gradients(self) -> None:
        for parameter in self.parameters:
            parameter.grad.fill(0)
