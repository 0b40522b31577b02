"""RunState: where a run stands between two steps."""

from typing import Any

import numpy.typing as npt

from nplora.nn.losses import NonFiniteLossError
from nplora.nn.module import Module
from nplora.nn.optim import Optimizer
from nplora.trainer.checkpoint import Checkpoint
from nplora.trainer.early_stopping import EarlyStopping
from nplora.trainer.fingerprint import factors, set_factors
from nplora.trainer.history import EpochRecord, EvaluationRecord, History

Array = npt.NDArray[Any]


class RunState:
    """All that the rest of a run depends on: position, factors, moments, dropout streams and best factors.

    Attributes:
        model, optimizer, parameters: the objects that change in training.
        history: the records so far.
        early_stopping: the best evaluation so far.
        step: updates made.
        epoch, batch: epochs finished, and batches used of the current epoch.
        total_steps: where the run will end; None if the number of batches is unknown.
        updating: an update has begun, and `step` does not count it yet.
        divergence: the error to which the present parameters led, or None.
    """

    def __init__(
        self,
        model: Module,
        optimizer: Optimizer,
        total_steps: int | None,
        patience: int | None,
        keeps_best: bool,
    ) -> None:
        self.model, self.optimizer, self.parameters = model, optimizer, model.parameters()
        self.history, self.early_stopping = History(), EarlyStopping(model, patience, keeps_best)
        self.step = self.epoch = self.batch = 0
        self.total_steps = total_steps
        self.updating = False
        self.divergence: NonFiniteLossError | None = None
        self._adapters = list(model.adapter_layers().values())
        self._streams = self._dropout_streams()
        self._evaluated_at_the_end = False  # the last evaluation belongs to the end of the run, in an epoch

    @property
    def position(self) -> tuple[int, ...]:
        """Where the run stands; a checkpoint is new if this has changed."""
        history = self.history
        return self.step, self.epoch, self.batch, len(history.epochs), len(history.evaluations)

    @property
    def last_evaluation(self) -> EvaluationRecord | None:
        """The evaluation of the present factors; None if they have not been evaluated."""
        last = self.history.evaluations[-1:]
        return last[0] if last and last[0].step == self.step else None

    def prepare(self) -> None:
        """Give the optimiser its moments if it has none yet, and clear the gradients."""
        if self.optimizer.steps == 0:
            self.optimizer.init(self.parameters)
        self._clear_gradients()

    def count_step(self, batches: int) -> None:
        """Move on by one update, which used this many batches."""
        self._clear_gradients()
        self.step += 1
        self.batch += batches
        self._streams = self._dropout_streams()
        self.updating = False

    def roll_back(self) -> None:
        """Forget the batches since the last update."""
        self._clear_gradients()
        for layer, stream in zip(self._adapters, self._streams, strict=True):
            layer.dropout_stream = stream

    def add_evaluation(self, record: EvaluationRecord, at_the_end: bool = False) -> None:
        """Record an evaluation of the present factors, and use it for early stopping.

        Args:
            at_the_end: the run ends within an epoch, and a longer run would not evaluate here.
        """
        self.history.evaluations.append(record)
        self.early_stopping.judge(record)
        self._evaluated_at_the_end = at_the_end

    def close_epoch(self, record: EpochRecord, complete: bool) -> None:
        """Record the current epoch; if it is complete, go to the next one."""
        self.history.epochs.append(record)
        if complete:
            self.epoch, self.batch = self.epoch + 1, 0

    def reopen_epoch(self) -> None:
        """Undo what ended a run within an epoch: a resumed run does it again at its own end.

        The state before it is in the last checkpoint, so the best factors may stay as they are.
        """
        if self._evaluated_at_the_end:
            self.history.evaluations.pop()
            self._evaluated_at_the_end = False
        if self.history.epochs and self.history.epochs[-1].epoch == self.epoch + 1:
            self.history.epochs.pop()

    def checkpoint(self, settings: dict[str, Any], base: str) -> Checkpoint:
        """The state as a checkpoint. It shares the model's arrays instead of copying them."""
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
            parameters=factors(self.model),
            optimizer=self.optimizer.state_dict(copy=False),
            best_parameters=self.early_stopping.best_factors,
            history=self.history.step_columns(),
        )

    def continue_from(self, checkpoint: Checkpoint, history: History) -> None:
        """Set the state to a checkpoint's, and the history to the steps before it."""
        self.model.set_random_state(checkpoint.random_state)
        self._streams = self._dropout_streams()
        set_factors(self.model, checkpoint.parameters)
        self.optimizer.init(self.parameters)
        self.optimizer.load_state_dict(checkpoint.optimizer)
        self.history.steps, self.history.epochs = history.steps, history.epochs
        self.history.evaluations = history.evaluations
        self.step, self.epoch, self.batch = checkpoint.step, checkpoint.epoch, checkpoint.batch
        best = checkpoint.best
        if best is not None and best["epoch"] and not best["step"]:  # an older schema: the end of an epoch
            steps = [record.step for record in history.epochs if record.epoch == best["epoch"]]
            best = {**best, "step": max(steps, default=0)}
        self.early_stopping.continue_from(best, checkpoint.best_parameters)

    def _dropout_streams(self) -> list[tuple[int, int]]:
        return [layer.dropout_stream for layer in self._adapters]

    def _clear_gradients(self) -> None:
        for parameter in self.parameters:
            parameter.grad.fill(0)
