"""RunCheckpoints: saves a run at intervals and after an error, and loads a checkpoint to resume the run."""

import math
import time
from typing import Any

from nplora.nn.losses import NonFiniteLossError
from nplora.runtime.error_text import message_of
from nplora.runtime.user_warning import warn_user
from nplora.trainer.checkpoint import Checkpoint
from nplora.trainer.fingerprint import base_fingerprint
from nplora.trainer.fit_config import FitConfig
from nplora.trainer.history import last_of_each_event
from nplora.trainer.interrupts import Interrupts
from nplora.trainer.log_header import HEADER, log_header
from nplora.trainer.nonfinite import nonfinite_parameters
from nplora.trainer.resuming import (
    NONFINITE,
    checked_history,
    compute_changes,
    failure_record,
    first_few,
    has_other_validation,
    log_before,
    restored_history,
    settings_of,
    starting_point,
    with_compute_of,
)
from nplora.trainer.run_directory import RunDirectory
from nplora.trainer.run_state import RunState
from nplora.trainer.training_setup import TrainingSetup

EPOCH_CHECKPOINT_SECONDS = 1.0  # at the end of an epoch, the least age of the last checkpoint
RESUME_HINT = "--resume (resume=True) continues the run"
COMPUTE_HINT = "--change-compute (change_compute=True) continues the run in the new arithmetic"

_RUINED = 3.0  # if the loss is more than this many times the first loss, a new run is better


class RunCheckpoints:
    """Writes and loads the checkpoints of one run in its directory.

    Args:
        directory: the directory, which is open and locked for this run.
        interrupts: the object that delays signals while a checkpoint is written.
    """

    def __init__(
        self,
        setup: TrainingSetup,
        config: FitConfig,
        state: RunState,
        directory: RunDirectory,
        interrupts: Interrupts,
    ) -> None:
        self._config, self._state, self._directory = config, state, directory
        self._interrupts = interrupts
        self._base = base_fingerprint(state.model)
        self._settings = settings_of(setup, config)
        self._saved: tuple[int, ...] | None = None  # the position of the newest checkpoint
        self._tried_step = 0  # the step of the last attempt to write a checkpoint
        self._tried_at = -math.inf  # the time of the last attempt to write a checkpoint
        self.changed_compute = ""  # how a resumed run's arithmetic has changed; "": not at all

    # ---- the beginning ----

    def begin(self) -> None:
        """Begin the log of a new run. This method writes no checkpoint: the first call of `save` does."""
        self._directory.begin()
        self._directory.log({"event": HEADER, **self._header()})
        start = {"total_steps": self._state.total_steps, "settings": self._settings}
        self._directory.log({"event": "start", **start})

    def _header(self) -> dict[str, Any]:
        return log_header(self._state.model, self._config.batches, self._config.validation)

    def resume(self) -> bool:
        """Load the state of the run in the directory; return False if the directory holds no run.

        Raises:
            ValueError: the run cannot continue with the current data and settings.
            CorruptError: the checkpoint is damaged, or does not fit the model.
        Warns:
            UserWarning: the run continues in another arithmetic; see also `restored_history`.
        """
        newest, batches = self._directory.latest(), self._config.batches.length
        if newest is None:
            return False
        changed, may_change = "", self._config.change_compute
        try:
            checkpoint = starting_point(self._directory, newest, self._settings)
            changed = compute_changes(checkpoint, self._settings)
            in_new_compute = with_compute_of(checkpoint, self._settings)
            expected = in_new_compute if may_change else checkpoint
            history, unlogged = restored_history(
                self._directory, expected, self._state, self._settings, self._base, batches
            )
        except ValueError as error:
            may_continue = changed and not may_change and self._fits(in_new_compute, batches)
            hint = f"; {COMPUTE_HINT}" if may_continue else ""
            raise type(error)(f"{error}{hint}; --overwrite (overwrite=True) starts a new run") from error
        total = self._state.total_steps
        if total is not None and checkpoint.step >= total:
            changed = ""  # the run is finished, so nothing is computed in the new arithmetic
        if changed:
            warn_user(f"{self._directory.path}: the run continues in another arithmetic: {changed}")
        self.changed_compute = changed
        self._state.continue_from(checkpoint, history)
        if not checkpoint.logged:  # an older schema: the lines are only in the log
            self._state.logged = last_of_each_event(log_before(self._directory, checkpoint))
        if has_other_validation(checkpoint, self._settings):
            self._state.early_stopping.continue_from(None, {})
        elif (
            self._settings["validation"] is None
        ):  # the best evaluation is kept, and so is the identity of its data
            self._settings["validation"] = checkpoint.settings.get("validation")
        self._note_saved()
        self._directory.cut_log(checkpoint.log_bytes)
        for event, record in unlogged:
            self._directory.log({"event": event, **record.row()})
        change = {"changed": changed} if changed else {}
        self._directory.log({"event": "resume", "step": self._state.step, **change, **self._header()})
        if checkpoint is not newest:
            self._saved = None
            self.save(must=True)  # so that this older checkpoint becomes the newest
        self._directory.newest = None  # not needed any more: the state has copies of its arrays
        return True

    def _fits(self, checkpoint: Checkpoint, batches: int | None) -> bool:
        """Whether a checkpoint fits the run, so that the run can continue from it."""
        try:
            path = self._directory.path
            checked_history(path, checkpoint, self._state, self._settings, self._base, batches)
        except ValueError:
            return False
        return True

    # ---- during the run ----

    def is_due_after_step(self) -> bool:
        every, step = self._config.checkpoint_every, self._state.step
        # Between outer steps, a checkpoint may become due, but cannot be written.
        is_due = step == 1 or (every is not None and step // every > self._tried_step // every)
        return is_due or self._age() >= self._config.save_seconds

    def is_due_after_epoch(self) -> bool:
        by_epochs = self._config.checkpoint_every is None
        return self._age() >= (EPOCH_CHECKPOINT_SECONDS if by_epochs else self._config.save_seconds)

    def save(self, must: bool = False) -> bool:
        """Write a checkpoint.

        Return whether a checkpoint was written. If there is nothing new to save, no checkpoint is written.

        Args:
            must: whether a failed write raises an error. If False, only a failure of the run's first
                write raises an error. After any later failure, there is a warning, and the next call of
                `save` tries again.
        Raises:
            NonFiniteLossError: the last update made a parameter NaN or infinite; nothing is written.
            OSError: the log cannot be written, or `must` is set and the checkpoint cannot be written. The
                earlier checkpoints are kept.
        Warns:
            UserWarning: the checkpoint cannot be written, and `must` is not set.
        """
        state = self._state
        if state.updating or self._saved == state.position:
            return False
        bad = nonfinite_parameters(state.parameters, gradients=False)
        if bad:
            state.diverged_after = state.step
            state.divergence = NonFiniteLossError(
                f"step {state.step} made {first_few(bad, ', ')} not finite, so this step is not saved: "
                "a lower lr may help"
            )
            raise state.divergence
        with self._interrupts.hold():
            self._directory.sync_log()  # the history of the checkpoint is in the log
            try:
                self._directory.save(state.checkpoint(self._settings, self._base))
            except OSError as error:
                if must or self._saved is None:
                    raise
                self._tried_at, self._tried_step = time.monotonic(), state.step
                self._warn_unsaved(error, self._saved[0])
                return False
            self._note_saved()
        return True

    def _warn_unsaved(self, error: OSError, saved: int) -> None:
        warn_user(
            f"the checkpoint of step {self._state.step} could not be written ({message_of(error)}); the run "
            "continues and tries again at the next checkpoint. The newest checkpoint is still from step "
            f"{saved}"
        )

    def _note_saved(self) -> None:
        self._saved, self._tried_at = self._state.position, time.monotonic()
        self._tried_step = self._state.step

    def _age(self) -> float:
        """The seconds since the last attempt to write a checkpoint."""
        return time.monotonic() - self._tried_at

    # ---- after an error ----

    def save_after(self, error: Exception) -> None:
        """After an error, save the state of the last complete step, and add a note about it to the error."""
        if self._saved is None:
            return
        with self._interrupts.hold():
            error.add_note(self._saved_after(error, self._saved[0]))

    def _saved_after(self, error: Exception, saved: int) -> str:
        """Save the state of the last complete step, if possible. Return a sentence that names the saved step.

        Args:
            saved: the step of the newest checkpoint before this call.
        """
        state, problem = self._state, ""
        state.roll_back()
        state.reopen_epoch()
        try:
            self._directory.cut_log(self._directory.log_bytes)  # removes an incomplete last line
            diverged = error is state.divergence
            if not (diverged and nonfinite_parameters(state.parameters, gradients=False)):
                saved = state.step if self.save(must=True) else saved
            if diverged and isinstance(error, NonFiniteLossError):
                return self._log_divergence(error)
        except Exception as second:
            problem = f", but step {state.step} could not be saved ({message_of(second)})"
        hint = "" if isinstance(error, NonFiniteLossError) else f": {RESUME_HINT}"
        return f"the run is saved at step {saved}{problem}{hint}"

    def _log_divergence(self, error: NonFiniteLossError) -> str:
        """Write to the log that the current parameters lead to NaN or infinity. Return advice for the user.

        `starting_point` reads this line when the run is resumed, and refuses unchanged settings.
        """
        step = self._state.diverged_after  # the current step may be lower, if local steps were undone
        good = self._directory.before(step)
        error.good_step = None if good is None else good.step
        self._directory.log({"event": NONFINITE, **failure_record(step, error, self._settings)})
        if good is None:
            return "no earlier checkpoint is left: start a new run with a lower lr (--overwrite)"
        return self._way_out(good)

    def _way_out(self, good: Checkpoint) -> str:
        """Advice for the user: how to continue from a checkpoint, and whether a new run would be better."""
        words = f"--resume with a lower --lr (resume=True, a lower lr) continues from step {good.step}"
        losses = {record.step: record.loss for record in self._state.history.steps}
        first, then = losses.get(1, math.nan), losses.get(good.step + 1, math.nan)
        if good.step and then > _RUINED * first:
            words += (
                f", where the loss had risen from {first:.4g} to {then:.4g}: "
                "a new run with --overwrite and a lower --lr would be better"
            )
        return words
