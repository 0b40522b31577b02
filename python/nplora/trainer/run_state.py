"""RunState: the state of a run between two steps."""

from typing import Any

import numpy.typing as npt

from nplora.nn.losses import NonFiniteLossError
from nplora.nn.module import Module
from nplora.nn.optim import Optimizer
from nplora.trainer.checkpoint import Checkpoint
from nplora.trainer.early_stopping import EarlyStopping
from nplora.trainer.fingerprint import factors, set_factors
from nplora.trainer.history import EpochRecord, History

Array = npt.NDArray[Any]


class RunState:
    """The state from which a run continues: position, factors, moments, dropout streams and best epoch.

    Attributes:
        model, optimizer, parameters: the objects that change in training.
        history: the records of the run so far.
        early_stopping: keeps the best epoch so far.
        step: the number of updates made.
        epoch, batch: the numbers of epochs finished, and of batches used in the current epoch.
        total_steps: the number of steps in the whole run; None if the number of batches is unknown.
        updating: whether an update has begun that `step` does not count yet.
        divergence: the error if the present parameters led to NaN or infinity; otherwise None.
    """

    def __init__(
        self, model: Module, optimizer: Optimizer, total_steps: int | None, patience: int | None
    ) -> None:
        self.model, self.optimizer, self.parameters = model, optimizer, model.parameters()
        self.history, self.early_stopping = History(), EarlyStopping(model, patience)
        self.step = self.epoch = self.batch = 0
        self.total_steps = total_steps
        self.updating = False
        self.divergence: NonFiniteLossError | None = None
        self._adapters = list(model.adapter_layers().values())
        self._streams = self._dropout_streams()

    @property
    def position(self) -> tuple[int, int, int, int]:
        """Step, epoch, batch and the number of epoch records. A new position needs a new checkpoint."""
        return self.step, self.epoch, self.batch, len(self.history.epochs)

    def prepare(self) -> None:
        """Create the optimiser's moments if there are none yet, and clear the gradients."""
        if self.optimizer.steps == 0:
            self.optimizer.init(self.parameters)
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

    def close_epoch(self, metrics: dict[str, float]) -> EpochRecord:
        """Record the current epoch with its validation metrics, and update early stopping."""
        record = self.history.epoch_record(self.epoch + 1, metrics)
        self.history.epochs.append(record)
        self.early_stopping.judge(self.epoch + 1, metrics.get("loss"))
        return record

    def reopen_epoch(self) -> None:
        """Undo `close_epoch` if it was called for the current epoch; a resumed run will call it again."""
        if self.history.epochs and self.history.epochs[-1].epoch == self.epoch + 1:
            self.history.epochs.pop()
            self.early_stopping.forget_last()

    def next_epoch(self) -> None:
        self.epoch, self.batch = self.epoch + 1, 0

    def checkpoint(self, settings: dict[str, Any], base: str) -> Checkpoint:
        """The state as a checkpoint, which shares the model's arrays instead of copying them."""
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
            log_bytes=0,
            parameters=factors(self.model),
            optimizer=self.optimizer.state_dict(copy=False),
            best_parameters=self.early_stopping.best_factors,
            history=self.history.step_columns(),
        )

    def continue_from(self, checkpoint: Checkpoint, history: History) -> None:
        """Restore the state from a checkpoint; `history` holds the records up to the checkpoint."""
        self.model.set_random_state(checkpoint.random_state)
        self._streams = self._dropout_streams()
        set_factors(self.model, checkpoint.parameters)
        self.optimizer.init(self.parameters)
        self.optimizer.load_state_dict(checkpoint.optimizer)
        self.history.steps, self.history.epochs = history.steps, history.epochs
        self.step, self.epoch, self.batch = checkpoint.step, checkpoint.epoch, checkpoint.batch
        self.early_stopping.continue_from(checkpoint.best, checkpoint.best_parameters)

    def _dropout_streams(self) -> list[tuple[int, int]]:
        return [layer.dropout_stream for layer in self._adapters]

    def _clear_gradients(self) -> None:
        for parameter in self.parameters:
            parameter.grad.fill(0)
