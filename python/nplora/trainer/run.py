"""Run: one call of `Trainer.fit`, from its first step or a checkpoint to its end."""

import dataclasses
import math
import time
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy.typing as npt

from nplora.nn.losses import NonFiniteLossError
from nplora.nn.optim import schedule
from nplora.trainer.batches import Batches
from nplora.trainer.callbacks import Callback
from nplora.trainer.checkpoint import Checkpoint
from nplora.trainer.evaluation import evaluate
from nplora.trainer.fingerprint import base_fingerprint, factors
from nplora.trainer.gradients import Gathered, Gradients
from nplora.trainer.history import History, StepRecord, last_logged
from nplora.trainer.interrupts import Interrupts, Terminated
from nplora.trainer.nonfinite import INPUT, TARGETS, nonfinite_parameters
from nplora.trainer.resuming import (
    NONFINITE,
    failure_record,
    first_few,
    restored_history,
    settings_of,
    starting_point,
)
from nplora.trainer.run_directory import RunDirectory

Array = npt.NDArray[Any]

if TYPE_CHECKING:
    from nplora.trainer.trainer import Trainer

EPOCH_CHECKPOINT_SECONDS = 1.0  # a checkpoint at an epoch's end comes no sooner after the one before

_RUINED = 3.0  # a loss this many times the first one: the factors are not worth continuing from
_CONTINUES = "--resume (resume=True) continues it"


@dataclass(frozen=True)
class Plan:
    """What one call of `fit` asks for; exactly one of epochs and steps is given."""

    batches: Batches
    validation: Batches | None
    epochs: int | None
    steps: int | None
    total_steps: int | None
    patience: int | None
    checkpoint_every: int | None
    save_seconds: float  # the longest time between two checkpoints; infinite: no limit


class Run:
    """One call of `Trainer.fit`; callbacks are given it.

    Attributes:
        model, history: as they stand.
        step: updates made.
        epoch, batch: epochs finished, and batches used of the epoch under way. Between two updates, these and
            the factors, the moments and the dropout streams are all that the rest of the run depends on.
        total_steps: where the run is to end; None where the number of batches is not known.
    """

    def __init__(self, trainer: "Trainer", plan: Plan, callbacks: list[Callback]) -> None:
        self.model, self.history = trainer.model, History()
        self.step = self.epoch = self.batch = 0
        self.total_steps = plan.total_steps
        self._trainer, self._plan, self._callbacks = trainer, plan, callbacks
        self._parameters = self.model.parameters()
        self._gradients = Gradients(trainer)
        self._adapters = list(self.model.adapter_layers().values())
        self._streams = [layer.dropout_stream for layer in self._adapters]
        self._directory: RunDirectory | None = None
        self._interrupts = Interrupts(terminate=False)
        self._ended: str | None = None
        self._best: dict[str, Any] | None = None
        self._best_factors: dict[str, Array] = {}
        self._best_before: tuple[dict[str, Any] | None, dict[str, Array]] = None, {}  # the epoch closed last
        self._base, self._settings = "", dict[str, Any]()  # what a checkpoint must agree with
        self._saved: tuple[int, ...] | None = None
        self._saved_at = -math.inf
        self._updating = False  # an update has begun, and the position does not count it yet
        self._nonfinite_error: NonFiniteLossError | None = None  # that the present parameters led to

    def stop(self) -> None:
        """End the run after the present step."""
        self._ended = "callback"

    def log(self, event: str, record: Mapping[str, Any]) -> None:
        """Append a line of JSON to the run's log, if it has one; NaN and infinities as null."""
        if self._directory is not None:
            self._directory.log({"event": event, **record})

    def logged(self, event: str) -> dict[str, Any]:
        """The last line of this event in the run's log, as it is found; empty where there is none."""
        if self._directory is None:
            return {}
        return last_logged(self._directory.read_log(self._directory.log_bytes), event)

    def execute(self, directory: RunDirectory | None, resume: bool) -> History:
        """Run to the end, to Ctrl-C or to an error."""
        self._directory = directory
        self._interrupts = Interrupts(terminate=directory is not None)
        try:
            with self._interrupts, self._saved_after_an_error():
                try:
                    with self._interrupts.hold():
                        self._begin(resume)
                    self._train()
                except (KeyboardInterrupt, SystemExit, Terminated) as reason:
                    with self._interrupts.hold():
                        self._ended = "interrupted"
                        self._roll_back()
                        self._reopen_epoch()
                        written = self._write()
                    if written:
                        self._call("on_checkpoint")
                    if not isinstance(reason, KeyboardInterrupt) or self._interrupts.repeated:
                        if self._directory is not None:
                            reason.add_note(f"the run is saved at step {self.step}: {_CONTINUES}")
                        raise
                with self._interrupts.hold():
                    self._finish()
                self._call("on_fit_end")
        except Terminated as signal:
            end = SystemExit(signal.status)
            end.__notes__ = getattr(signal, "__notes__", [])
            raise end from None
        except BaseException:
            self._roll_back()
            raise
        return self.history

    # ---- the loop ----

    def _train(self) -> None:
        self._call("on_fit_start")
        while not self._is_over():
            if self._pass():
                self._close_epoch(complete=True)
                every, seconds = self._plan.checkpoint_every, time.monotonic() - self._saved_at
                if seconds >= (EPOCH_CHECKPOINT_SECONDS if every is None else self._plan.save_seconds):
                    self._save()
        self._save()
        if self.batch:  # `steps` or a callback ended the run within an epoch; a resumed run closes it later
            self._close_epoch(complete=False)

    def _is_over(self) -> bool:
        plan = self._plan
        return (
            self._ended is not None
            or (plan.steps is not None and self.step >= plan.steps)
            or (plan.epochs is not None and self.epoch >= plan.epochs)
        )

    def _pass(self) -> bool:
        """The steps of one epoch, or of the rest of it; False where the run is over before."""
        gathered = Gathered()
        for x, y in self._plan.batches.epoch(self.epoch, self.batch):
            problem = self._gradients.add(x, y, gathered)
            if problem:
                raise self._nonfinite(f"the loss of batch {self.batch + gathered.batches} {problem}")
            if gathered.batches == self._trainer.accumulate:
                self._update(gathered)
                gathered = Gathered()
                if self._is_over():
                    return False
        if gathered.batches:
            self._update(gathered)
        return not self._is_over()

    def _update(self, gathered: Gathered) -> None:
        """Clip, step, and move the position on."""
        trainer = self._trainer
        factor = schedule(trainer.schedule, self.step, self.total_steps or 0, trainer.warmup_steps)
        lr = trainer.optimizer.lr * factor
        with self._interrupts.hold():
            norm = self._clip_and_step(gathered, lr)
            self._clear_gradients()
            self.step += 1
            self.batch += gathered.batches
            self._streams = [layer.dropout_stream for layer in self._adapters]
            self._updating = False
            record = StepRecord(
                step=self.step,
                epoch=self.epoch + 1,
                loss=gathered.loss / max(1, gathered.count),
                count=gathered.count,
                lr=lr,
                grad_norm=norm,
                seconds=time.perf_counter() - gathered.started,
            )
            self.history.steps.append(record)
            self.log("step", dataclasses.asdict(record))
        self._call("on_step_end", record)
        every = self._plan.checkpoint_every
        is_due = self.step == 1 or (every is not None and self.step % every == 0)
        if is_due or time.monotonic() - self._saved_at >= self._plan.save_seconds:
            self._save()

    def _clip_and_step(self, gathered: Gathered, lr: float) -> float:
        """Returns the norm of the gradient before it was clipped; one that is not finite changes nothing."""
        if not gathered.count:
            return 0.0
        clip_norm, scale = self._trainer.clip_norm, gathered.first_count / gathered.count
        max_norm = math.inf if clip_norm is None else clip_norm
        self._updating = True
        norm = self._trainer.optimizer.step(self._parameters, lr=lr, grad_scale=scale, max_norm=max_norm)
        assert norm is not None, "an optimizer's step returns the norm where it is given a max_norm"
        if not math.isfinite(norm):
            self._updating = False
            names = nonfinite_parameters(self._parameters, gradients=True)
            raise self._nonfinite(f"the loss is finite, the gradient of {first_few(names, ', ')} is not")
        return norm

    def _close_epoch(self, complete: bool) -> None:
        """Validate, keep the best factors, and go to the next epoch."""
        validation = self._plan.validation
        metrics = evaluate(self.model, self._trainer.loss, validation) if validation else {}
        with self._interrupts.hold():
            record = self.history.epoch_record(self.epoch + 1, metrics)
            self._best_before = self._best, self._best_factors
            self.history.epochs.append(record)
            self.log("epoch", dataclasses.asdict(record))
            if self._plan.patience is not None:
                self._judge(metrics["loss"])
            if complete:
                self.epoch, self.batch = self.epoch + 1, 0
        self._call("on_epoch_end", record)

    def _reopen_epoch(self) -> None:
        """Forget that the epoch under way was closed: a run that goes on closes it at its own end."""
        if self.history.epochs and self.history.epochs[-1].epoch == self.epoch + 1:
            self.history.epochs.pop()
            self._best, self._best_factors = self._best_before

    def _judge(self, loss: float) -> None:
        """Early stopping: remember the factors of the best epoch, count the epochs since."""
        best = self._best or {"loss": None, "epoch": 0, "since": 0}  # None: no loss was finite yet
        if math.isfinite(loss) and (best["loss"] is None or loss < best["loss"]):
            self._best = {"loss": loss, "epoch": self.epoch + 1, "since": 0}
            self._best_factors = {name: array.copy() for name, array in factors(self.model).items()}
        else:
            self._best = {**best, "since": best["since"] + 1}
        self._lose_patience()

    def _lose_patience(self) -> None:
        patience = self._plan.patience
        if self._ended is None and patience is not None and self._best and self._best["since"] >= patience:
            self._ended = "patience"

    def _finish(self) -> None:
        if self._best is not None and self._best["loss"] is not None:
            self._put(self._best_factors)
            self.history.best_epoch = self._best["epoch"]
        self.history.ended = self._ended or "complete"
        if self.history.steps and not any(record.count for record in self.history.steps):
            warnings.warn("Trainer.fit: no label counts in any step, so nothing was learned", stacklevel=4)
        self.log("end", {"ended": self.history.ended, "step": self.step})

    def _call(self, hook: str, *arguments: Any) -> None:
        for callback in self._callbacks:
            getattr(callback, hook)(self, *arguments)

    def _nonfinite(self, what: str) -> NonFiniteLossError:
        blamed = self.step and not what.endswith((INPUT, TARGETS))
        hint = "; a lower lr may help" if blamed else ""
        error = NonFiniteLossError(f"step {self.step + 1} (epoch {self.epoch + 1}): {what}{hint}")
        self._nonfinite_error = error if blamed else None
        return error

    # ---- the state between two steps ----

    def _clear_gradients(self) -> None:
        for parameter in self._parameters:
            parameter.grad.fill(0)

    def _set_streams(self, streams: list[tuple[int, int]]) -> None:
        for layer, stream in zip(self._adapters, streams, strict=True):
            layer.dropout_stream = stream

    def _roll_back(self) -> None:
        """Forget the batches since the last update."""
        self._clear_gradients()
        self._set_streams(self._streams)

    def _put(self, values: Mapping[str, Array]) -> None:
        for name, array in factors(self.model).items():
            array[...] = values[name]

    # ---- checkpoints ----

    def _begin(self, resume: bool) -> None:
        """Take over the directory's checkpoint, or write the first one: the disk is tried before any work."""
        optimizer = self._trainer.optimizer
        if optimizer.steps == 0:
            optimizer.init(self._parameters)
        self._clear_gradients()
        if self._directory is None:
            return
        self._base, self._settings = base_fingerprint(self.model), self._describe()
        newest = self._directory.latest() if resume else None
        if newest is not None:
            self._resume(newest, self._directory)
            self._directory.newest = None  # its arrays are taken over
            return
        self._directory.begin()
        self.log("start", {"total_steps": self.total_steps, "settings": self._settings})
        self._save()

    def _describe(self) -> dict[str, Any]:
        trainer = self._trainer
        options = {
            "schedule": trainer.schedule,
            "warmup_steps": trainer.warmup_steps,
            "clip_norm": trainer.clip_norm,
            "total_steps": self.total_steps,
        }
        data = self._plan.batches.identity()
        return settings_of(data, self.model, trainer.loss, trainer.optimizer, trainer.accumulate, options)

    def _resume(self, newest: Checkpoint, directory: RunDirectory) -> None:
        optimizer = self._trainer.optimizer
        try:
            checkpoint = starting_point(directory, newest, self._settings)
            history, unlogged = restored_history(
                directory,
                checkpoint,
                self.model,
                optimizer,
                self._settings,
                self._base,
                self.total_steps,
                self._plan.batches.length,
            )
        except ValueError as error:
            raise type(error)(f"{error}; --overwrite (overwrite=True) begins anew") from error
        self.model.set_random_state(checkpoint.random_state)
        self._streams = [layer.dropout_stream for layer in self._adapters]
        self._put(checkpoint.parameters)
        optimizer.init(self._parameters)
        optimizer.load_state_dict(checkpoint.optimizer)
        self.history.steps, self.history.epochs = history.steps, history.epochs
        self.step, self.epoch, self.batch = checkpoint.step, checkpoint.epoch, checkpoint.batch
        if self._plan.patience is not None:
            self._best = checkpoint.best
            self._best_factors = {name: array.copy() for name, array in checkpoint.best_parameters.items()}
            self._lose_patience()
        self._saved, self._saved_at = self._position(), time.monotonic()
        directory.cut_log(checkpoint.log_bytes)
        for event, record in unlogged:
            self.log(event, dataclasses.asdict(record))
        self.log("resume", {"step": self.step})
        if checkpoint is not newest:
            self._saved = None
            self._write()  # it becomes the newest

    def _position(self) -> tuple[int, ...]:
        return self.step, self.epoch, self.batch, len(self.history.epochs)

    def _save(self) -> None:
        """Write a checkpoint, if there is a directory and something new to keep."""
        if self._write():
            self._call("on_checkpoint")

    def _write(self) -> bool:
        if self._directory is None or self._updating or self._saved == self._position():
            return False
        bad = nonfinite_parameters(self._parameters, gradients=False)
        if bad:
            names = first_few(bad, ", ")
            self._nonfinite_error = NonFiniteLossError(
                f"step {self.step} made {names} not finite; it is not saved: a lower lr may help"
            )
            raise self._nonfinite_error
        with self._interrupts.hold():
            self._directory.save(self._checkpoint())
            self._saved, self._saved_at = self._position(), time.monotonic()
        return True

    @contextmanager
    def _saved_after_an_error(self) -> Iterator[None]:
        """Save the last whole step before an error leaves; a note on the error says what was saved."""
        try:
            yield
        except Exception as error:
            if self._directory is not None and self._saved is not None:
                with self._interrupts.hold():
                    error.add_note(self._save_for(error, self._directory, self._saved[0]))
            raise

    def _save_for(self, error: Exception, directory: RunDirectory, saved: int) -> str:
        """Save the last whole step if the disk lets us; return words for what it holds.

        Args:
            saved: the step of the newest checkpoint.
        """
        self._roll_back()
        self._reopen_epoch()
        problem = ""
        try:
            directory.cut_log(directory.log_bytes)  # a line that was cut short
            if error is not self._nonfinite_error or not nonfinite_parameters(self._parameters, False):
                saved = self.step if self._write() else saved
            if error is self._nonfinite_error:
                return self._remember(self._nonfinite_error, directory)
        except Exception as second:
            problem = f", step {self.step} could not be saved ({second})"
        hint = "" if isinstance(error, NonFiniteLossError) else f": {_CONTINUES}"
        return f"the run is saved at step {saved}{problem}{hint}"

    def _remember(self, error: NonFiniteLossError, directory: RunDirectory) -> str:
        """Note in the log that the present parameters lead to this error, whatever the settings are.

        So a run that is resumed starts from the checkpoint before them, and only with other settings.
        """
        good = directory.before(self.step)
        error.good_step = None if good is None else good.step
        self.log(NONFINITE, failure_record(self.step, error, self._settings))
        if good is None:
            return "no checkpoint from before is left: begin anew with a lower lr (--overwrite)"
        way = f"--resume with a lower --lr (resume=True, a lower lr) continues from step {good.step}"
        losses = {record.step: record.loss for record in self.history.steps}
        before, after = losses.get(1, math.nan), losses.get(good.step + 1, math.nan)
        if good.step and after > _RUINED * before:
            way += (
                f", where the loss had risen from {before:.4g} to {after:.4g}: "
                "better begin anew with a lower --lr (--overwrite)"
            )
        return way

    def _checkpoint(self) -> Checkpoint:
        return Checkpoint(
            step=self.step,
            epoch=self.epoch,
            batch=self.batch,
            total_steps=self.total_steps,
            random_state=self.model.random_state(),
            settings=self._settings,
            base=self._base,
            best=self._best,
            epochs=self.history.epoch_rows(),
            log_bytes=0,
            parameters=factors(self.model),
            optimizer=self._trainer.optimizer.state_dict(copy=False),
            best_parameters=self._best_factors,
            history=self.history.step_columns(),
        )
