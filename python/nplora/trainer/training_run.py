"""TrainingRun: carries out one call of `Trainer.fit`."""

import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

from nplora.runtime.user_warning import warn_user
from nplora.trainer.callbacks import Callback
from nplora.trainer.checksum import checksum
from nplora.trainer.evaluation import evaluate
from nplora.trainer.fit_config import FitConfig
from nplora.trainer.handshake import require_agreement
from nplora.trainer.history import EVALUATION, EvaluationRecord, History
from nplora.trainer.interrupts import Interrupts, Terminated
from nplora.trainer.local_steps import LocalSteps
from nplora.trainer.meeting import Meeting
from nplora.trainer.rank_record import Stopwatch
from nplora.trainer.run import Run
from nplora.trainer.run_checkpoints import RESUME_HINT, RunCheckpoints
from nplora.trainer.run_directory import RunDirectory
from nplora.trainer.run_state import RunState
from nplora.trainer.stepper import Stepper
from nplora.trainer.training_setup import TrainingSetup


class TrainingRun(Run):
    """Carries out one call of `Trainer.fit`, from the first step or a checkpoint to the end of the run."""

    def __init__(
        self,
        setup: TrainingSetup,
        config: FitConfig,
        callbacks: list[Callback],
        directory: RunDirectory | None = None,
    ) -> None:
        keeps_best = config.validation is not None and config.keep == "best"
        outer = None if setup.local_steps is None else setup.outer
        state = RunState(setup.model, setup.optimizer, config.total_steps, config.patience, keeps_best, outer)
        super().__init__(state, directory)
        self._setup, self._config, self._callbacks = setup, config, callbacks
        self._gradient_callbacks = [callback for callback in callbacks if _sees_gradients(callback)]
        self._checkpoints: RunCheckpoints | None = None
        several = setup.communicator.size > 1
        self._interrupts = Interrupts(terminate=several or directory is not None, noted_only=several)
        self.ranks = self._meeting = Meeting(setup.communicator, self._interrupts)
        self._stepper = Stepper(setup, state, self._meeting)
        self._local = LocalSteps(setup, state, self._meeting)
        self._has_begun = False  # while this is False, the run has no state to save
        self._log_bytes = 0  # the length of the log when the ranks began their local steps
        self._stopwatch = Stopwatch.start(setup.communicator, time.perf_counter())

    def execute(self, resume: bool) -> History:
        """Train until the run is complete, or until Ctrl-C or an error ends the run."""
        try:
            with self._interrupts, self._saved_after_an_error():
                self._train_until_interrupted(resume)
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

    def _train_until_interrupted(self, resume: bool) -> None:
        """Train until the end of the run or until a signal. The first Ctrl-C only ends the run early.

        After SIGTERM, SIGHUP, SIGUSR1 or a second Ctrl-C, the run is saved and an exception is raised.
        """
        try:
            with self._interrupts.hold():
                self._begin(resume)
            self._train()
        except (KeyboardInterrupt, SystemExit, Terminated) as reason:
            if not self._has_begun:
                raise
            self._save_interrupted()
            is_alone = self._meeting.size > 1 and not self._meeting.is_ended  # the other ranks still train
            if not isinstance(reason, KeyboardInterrupt) or self._interrupts.repeated or is_alone:
                if self._directory is not None:
                    reason.add_note(f"the run is saved at step {self.step}: {RESUME_HINT}")
                raise

    def _begin(self, resume: bool) -> None:
        """Load the directory's checkpoint, or begin the log of a new run."""
        self._state.prepare()
        require_agreement(self._setup.communicator, self._setup, self._config)
        resumed = self._directory is not None and self._begin_directory(self._directory, resume)
        if self._meeting.size > 1:
            resumed = self._state.share(self._meeting, resumed)
            start = self._state.logged, self.changed_compute
            self._state.logged, self.changed_compute = self._meeting.broadcast(start, "the start of a log")
        if resumed:
            self._stop_if_patience_is_lost()
            self.was_finished = self._ended is not None or self._has_all_steps()
        self._has_begun = True

    def _begin_directory(self, directory: RunDirectory, resume: bool) -> bool:
        """Load a checkpoint to resume a run, or begin a new log. Return whether a checkpoint was loaded."""
        self._checkpoints = RunCheckpoints(
            self._setup, self._config, self._state, directory, self._interrupts
        )
        if resume and self._checkpoints.resume():
            self.changed_compute = self._checkpoints.changed_compute
            return True
        self._checkpoints.begin()
        return False

    def _save_interrupted(self) -> None:
        with self._interrupts.hold():
            self._ended = "interrupted"
            self._roll_back()
            self._state.reopen_epoch()
            saved = self._checkpoints is not None and self._checkpoints.save(must=True)
        if saved:
            self._call("on_checkpoint")

    def _roll_back(self) -> None:
        """Undo the batches since the last update, and all steps since the last outer step."""
        self._state.roll_back()
        if self._local.undo() and self._directory is not None:
            with suppress(OSError):  # if the log cannot be cut, a resumed run ignores the lines at its end
                self._directory.cut_log(self._log_bytes)

    def _finish(self) -> None:
        history = self.history
        if self._meeting.size > 1:
            record = self._stopwatch.record(time.perf_counter(), *self._stepper.work)
            self._setup.ranks = self._meeting.communicator.gather(record, "the end of a run")
            self.log("ranks", {"ranks": [vars(one) for one in self._setup.ranks]})
        history.ended = self._ended or "complete"
        stopping = self._state.early_stopping
        if history.interrupted:
            history.kept_step = stopping.kept["step"] if stopping.kept else None
        elif best := stopping.restore_best():
            history.best_step, history.best_epoch = best["step"], best["epoch"]
            history.best_loss = best["loss"]
        if history.steps and not any(record.count for record in history.steps):
            warn_user("Trainer.fit: no step had a label to train on, so nothing was trained")
        self.log("end", {"ended": history.ended, "step": self.step, "best_step": history.best_step})

    # ---- the loop ----

    def _train(self) -> None:
        self._call("on_fit_start")
        # The first checkpoint of a new run comes after `on_fit_start`. So if the hook fails, no run is left.
        self._save(must=True)
        self._evaluate_if_due()  # a resumed run may have stopped between a step and its evaluation
        while not self._is_over():
            if self._make_steps_of_epoch():
                self._close_epoch(complete=True)
                if self._checkpoints is not None and self._checkpoints.is_due_after_epoch():
                    self._save()
        self._save(must=True)
        if self.batch:  # the run ended within an epoch; a resumed run closes that epoch later
            self._close_epoch(complete=False)

    def _is_over(self) -> bool:
        """Whether the run is over on all ranks. A callback may have ended the run on any of the ranks.

        If a callback ends a run between two outer steps, the run continues until the next outer step, so that
        a resumed run gets the same results.

        Raises:
            ValueError: the ranks have different trained values.
        """
        compares = self._meeting.size > 1 and not self._local.is_open
        values = checksum([p.value for p in self._state.parameters]) if compares else 0
        rows = self._meeting.gather((self._ended, values), f"the end of step {self.step}")
        for rank, (_, other) in enumerate(rows):
            if other != rows[0][1]:
                self._state.updating = True  # so that these values are not saved
                raise ValueError(
                    f"Trainer.fit: after step {self.step}, the trained values of rank {rank} differ from "
                    "those of rank 0: a callback must make the same changes on all ranks"
                )
        self._ended = next((end for end, _ in rows if end is not None), None)
        return (self._ended is not None and not self._local.is_open) or self._is_complete()

    def _is_complete(self) -> bool:
        config = self._config
        return (config.steps is not None and self.step >= config.steps) or (
            config.epochs is not None and self.epoch >= config.epochs
        )

    def _has_all_steps(self) -> bool:
        """Whether all steps are made. The record of the last epoch may still be missing."""
        return self._is_complete() or self.step == self.total_steps

    def _make_steps_of_epoch(self) -> bool:
        """Make the remaining steps of the current epoch; return False if the run is over."""
        stepper = self._stepper
        stepper.begin()
        for x, y in self._config.batches.epoch(self.epoch, self.batch):
            if not stepper.has_batches:
                self._call("on_step_begin")
            stepper.add(x, y)
            if stepper.is_full:
                self._update()
                if self._is_over():
                    return False
                self._save_if_due()
                stepper.begin()
        if stepper.has_batches:
            self._update()
        self._combine()
        if self._is_over():
            return False
        self._save_if_due()
        return True

    def _update(self) -> None:
        self._stepper.complete()
        if self._gradient_callbacks and self._stepper.has_gradients:
            gradients = self._stepper.gradients()
            for callback in self._gradient_callbacks:
                callback.on_before_optimizer_step(self, gradients)
        with self._interrupts.hold():
            if self._directory is not None and not self._local.is_open:
                self._log_bytes = self._directory.log_bytes
            self._local.begin()
            record = self._stepper.update()
            self.log("step", record.row())
        if self._local.is_due or self._is_complete():
            self._combine()
        self._call("on_step_end", record)
        self._evaluate_if_due()

    def _save_if_due(self) -> None:
        """Write a checkpoint if one is due and there are no local steps since the last outer step."""
        checkpoints = None if self._local.is_open else self._checkpoints
        if checkpoints is not None and checkpoints.is_due_after_step():
            self._save()

    def _combine(self) -> None:
        """Make an outer step if the ranks have made local steps."""
        with self._interrupts.hold():
            self._local.combine()

    def _evaluate_if_due(self) -> None:
        """Evaluate the validation data if `step` is a multiple of `eval_every`."""
        every, state = self._config.eval_every, self._state
        if every is None or not self.step or self.step % every or state.last_evaluation is not None:
            return
        record = self._evaluation(state.history.steps[-1].epoch)
        assert record is not None, "eval_every needs validation data"
        with self._interrupts.hold():
            self.log(EVALUATION, record.row())
            state.add_evaluation(record)
            self._stop_if_patience_is_lost()
            self._keep_best()
        self._call("on_evaluation", record)

    def _evaluation(self, epoch: int) -> EvaluationRecord | None:
        """Evaluate the validation data, if there are any."""
        validation, started = self._config.validation, time.perf_counter()
        if validation is None:
            return None
        metrics = evaluate(self.model, self._setup.loss, validation, self._meeting)
        seconds = time.perf_counter() - started
        loss, accuracy = metrics.pop("loss"), metrics.pop("accuracy", None)
        return EvaluationRecord(self.step, epoch, loss, accuracy, seconds, metrics)

    def _close_epoch(self, complete: bool) -> None:
        """Evaluate the validation data and record the epoch. If `complete` is true, go to the next epoch."""
        state = self._state
        made = self._evaluation(state.epoch + 1) if state.last_evaluation is None else None
        with self._interrupts.hold():
            if made is not None:
                self.log(EVALUATION, made.row())
                state.add_evaluation(made, at_the_end=not complete)
            record = state.history.epoch_record(state.epoch + 1, state.last_evaluation)
            self.log("epoch", record.row())
            state.close_epoch(record, complete)
            self._stop_if_patience_is_lost()
            self._keep_best()
        if made is not None:
            self._call("on_evaluation", made)
        self._call("on_epoch_end", record)

    def _stop_if_patience_is_lost(self) -> None:
        """End the run early if `EarlyStopping.is_over` is true, unless the run has made all of its steps."""
        if self._ended is None and self._state.early_stopping.is_over and not self._has_all_steps():
            self._ended = "patience"

    def _keep_best(self) -> None:
        """Copy the model's factors if they are the best so far and further steps will change them."""
        if not self._is_over():
            self._state.early_stopping.before_other_factors()

    def _call(self, hook: str, *arguments: Any) -> None:
        for callback in self._callbacks:
            getattr(callback, hook)(self, *arguments)

    def _save(self, must: bool = False) -> None:
        """Write a checkpoint if there is a directory and something new to save.

        `must` is as in `RunCheckpoints.save`.
        """
        if self._checkpoints is not None and self._checkpoints.save(must):
            self._call("on_checkpoint")

    @contextmanager
    def _saved_after_an_error(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            self._roll_back()
            if self._checkpoints is not None:
                self._checkpoints.save_after(error)
            raise


def _sees_gradients(callback: Callback) -> bool:
    """Whether a callback overrides `on_before_optimizer_step`."""
    hook = callback.on_before_optimizer_step
    return getattr(hook, "__func__", hook) is not Callback.on_before_optimizer_step
