"""JobRun: trains one job in the training thread."""

from __future__ import annotations

import contextlib
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nplora.adapters import save_adapter
from nplora.finetuning import FinetuneReport, finetune
from nplora.finetuning.options import DEFAULT_EXAMPLES, default_lr
from nplora.formats.strict_json import json_values
from nplora.lm import LanguageModel
from nplora.runtime import release_memory
from nplora.runtime.giving_way import giving_way
from nplora.runtime.time_share import TimeShare
from nplora.serving.jobs.job_error import job_error
from nplora.serving.jobs.job_request import OBJECTIVES
from nplora.serving.jobs.jobs_state import NOT_TRAINED, JobsState
from nplora.serving.jobs.progress import Progress
from nplora.serving.jobs.results import results_csv
from nplora.serving.request_error import RequestError
from nplora.trainer import EpochRecord, Run

KEPT_CHECKPOINTS = 3
CHECKPOINT_SECONDS = 10.0  # the least time between two published checkpoints
_SAVE_MINUTES = 1.0  # the longest time between two saved states; after a crash, a job repeats about this much


def checkpoint_name(name: str, step: int) -> str:
    """Return the name of the adapter of a checkpoint. `name` is the name of the job's final adapter."""
    return f"{name}:ckpt-step-{step}"


class StoppedError(Exception):
    """Raised in the training thread after `JobRun.stop`, to end the training."""


@dataclass(frozen=True)
class Publishing:
    """Two functions: one makes an adapter available, and the other makes it unavailable.

    Attributes:
        publish: called as publish(name, directory). The function makes the adapter in this PEFT directory
            available under the name.
        withdraw: called as withdraw(name). The function makes the adapter with this name unavailable.
    """

    publish: Callable[[str, Path], None]
    withdraw: Callable[[str], None]


class JobRun:
    """Trains one job.

    Args:
        lm: the model that answers requests. This model does not change.
        state: the records and the events of all jobs.
        job_id: the id of the job to train.
        publishing: the functions that make the job's adapters available or unavailable.
        turns: an object that divides the time between training and answers; None: training does not wait for
            answers.
        memory, compute: the memory limit and the arithmetic, as in `finetune`.
    """

    def __init__(
        self,
        lm: LanguageModel,
        state: JobsState,
        job_id: str,
        publishing: Publishing,
        turns: TimeShare | None,
        memory: str | int | None,
        compute: str | None,
    ) -> None:
        self._lm, self._state, self.job_id = lm, state, job_id
        self._publishing, self._turns = publishing, turns
        self._memory, self._compute = memory, compute
        self._place = state.storage.place(job_id)
        self._is_stopped = False
        self._last_checkpoint = time.monotonic()
        self.progress = Progress(self._event, self._started, self._save_checkpoint)

    def stop(self) -> None:
        """End the training before its next transformer block. The training thread saves its state."""
        self._is_stopped = True

    def execute(self) -> None:
        """Train the job until it ends or `stop` is called. If training raises an error, the job fails."""
        try:
            with giving_way(self._give_way):
                report = self._train()
            self._end_turn()
            self._finish(report)
        except StoppedError:
            pass
        except Exception as error:
            self._fail(error)
        finally:
            self._end_turn()
            release_memory()

    def _give_way(self) -> None:
        if self._turns is not None:
            self._turns.pause()
        if self._is_stopped:
            raise StoppedError("the job was stopped")

    def _end_turn(self) -> None:
        if self._turns is not None:
            self._turns.end()

    def _train(self) -> FinetuneReport:
        record = self._state.storage.jobs[self.job_id]
        self._state.advance(self.job_id, "validating_files")
        options, multiplier = dict(record["options"]), record["multiplier"]
        objective = OBJECTIVES[record["method"]]
        if multiplier is not None:
            options["lr"] = multiplier * default_lr(self._lm.config.hidden_size, objective)
        data = {role: self._place / name for role, name in record["data"].items()}
        start = self._place / "start"
        # int8 may have been chosen for the speed of answers. A job trains in int8 only if `compute` says so.
        own = self._lm.compute
        compute = self._compute or ("float32" if own == "int8" else own)
        return finetune(
            self._lm.with_compute(compute),
            data["train"],
            self._place / "run",
            valid=data.get("valid"),
            progress=False,
            callbacks=[self.progress],
            adapter=start if start.exists() else None,
            objective=objective,
            seed=record["seed"],
            memory=self._memory,
            save_minutes=_SAVE_MINUTES,
            resume=True,
            distributed="off",
            **options,
        )

    # ---- during the run ----

    def _event(self, message: str, data: Mapping[str, Any] | None) -> None:
        self._state.event(self.job_id, message, data=data)

    def _started(self, run: Run) -> None:
        record = self._state.storage.jobs[self.job_id]
        options, given = record["options"], record["hyperparameters"]
        resolved = {
            "n_epochs": options.get("epochs", given.get("n_epochs")),
            "batch_size": options.get("batch_examples")
            or (None if "batch_tokens" in options else DEFAULT_EXAMPLES),
            "learning_rate_multiplier": record["multiplier"] or (None if "lr" in options else 1.0),
        }
        self._state.advance(self.job_id, "running", resolved=resolved)
        self._event(_first_words(run.step, bool(record["resolved"])), None)

    def _save_checkpoint(self, run: Run, record: EpochRecord) -> None:
        """Save the adapter after an epoch, and make it available under the name of a checkpoint.

        Only the adapters of the last few epochs are kept.
        """
        is_last = run.total_steps is not None and record.step >= run.total_steps
        if is_last or time.monotonic() - self._last_checkpoint < CHECKPOINT_SECONDS:
            return  # the next checkpoint, or the job's result, follows soon
        self._last_checkpoint = time.monotonic()
        job, step = self._state.storage.jobs[self.job_id], record.step
        if any(known["step"] == step for known in job["checkpoints"]):
            return
        place = self._place / "checkpoints" / f"step-{step}"
        save_adapter(run.model, place, str(self._lm.source))
        name = checkpoint_name(job["name"], step)
        made = self._checkpoint(str(step), step, name, record.loss, record.val_loss)
        try:
            self._publish(name, place)
        except RequestError as error:
            if error.code != "insufficient_memory":
                raise
            shutil.rmtree(place, ignore_errors=True)
            self._event(f"The checkpoint at step {step} cannot be used: {error}", None)
            return
        with self._state.lock:
            checkpoints = [*self._state.storage.jobs[self.job_id]["checkpoints"], made]
            is_recorded = self._state.change(self.job_id, checkpoints=checkpoints[-KEPT_CHECKPOINTS:])
        self._drop(checkpoints[:-KEPT_CHECKPOINTS], is_recorded)
        self._event(f"Checkpoint created at step {step}", None)

    def _checkpoint(
        self, part: str, step: int, name: str, train_loss: float | None, valid_loss: float | None
    ) -> dict[str, Any]:
        """Return the record of a checkpoint. `part` is the last part of the checkpoint's id."""
        made = {
            "id": f"ftckpt-{self._state.key(self.job_id)}-{part}", "created_at": int(time.time()),
            "step": step, "name": name, "train_loss": train_loss, "valid_loss": valid_loss,
        }  # fmt: skip
        return json_values(made)  # type: ignore[no-any-return]

    def _drop(self, checkpoints: list[dict[str, Any]], is_recorded: bool) -> None:
        """Make the adapters of checkpoints unavailable, and remove their files.

        Args:
            is_recorded: whether the record on the disk no longer names the checkpoints. If False, the files
                are kept, because the job continues from this record after a restart.
        """
        for one in checkpoints:
            self._withdraw(one["name"])
            if is_recorded:
                shutil.rmtree(self._state.storage.adapter_place(self.job_id, one), ignore_errors=True)

    def _withdraw(self, name: str) -> None:
        with contextlib.suppress(KeyError, RequestError):  # a client may have removed the adapter
            self._publishing.withdraw(name)

    # ---- the end ----

    def _has_ended(self) -> bool:
        return self._state.storage.jobs[self.job_id]["status"] in NOT_TRAINED or self._is_stopped

    def _finish(self, report: FinetuneReport) -> None:
        state, job = self._state, self._state.storage.jobs[self.job_id]
        if self._has_ended():
            return
        self._publish(job["name"], self._place / "run")  # does not hold the lock, because it may take seconds
        with state.lock:
            if self._has_ended():
                self._withdraw(job["name"])
                return
            steps, epochs = report.history.steps, report.history.epochs
            step = report.history.best_step or (steps[-1].step if steps else 0)
            train_loss = epochs[-1].loss if epochs else None
            final = self._checkpoint("final", step, job["name"], train_loss, report.loss_after)
            earlier = state.storage.jobs[self.job_id]["checkpoints"]
            is_recorded = state.change(
                self.job_id,
                status="succeeded",
                fine_tuned_model=job["name"],
                finished_at=int(time.time()),
                trained_tokens=report.tokens,
                result_files=state.add_results(self.job_id, results_csv(report.history)),
                checkpoints=[final],
            )
            self._drop(earlier, is_recorded)
            if is_recorded:
                state.drop_unused(self.job_id)
        self._event(f"New fine-tuned model created: {job['name']}", None)
        self._event("The job has successfully completed", None)

    def _publish(self, name: str, place: Path) -> None:
        """Make an adapter available. While there is too little memory, remove the oldest checkpoint."""
        while True:
            try:
                return self._publishing.publish(name, place)
            except RequestError as error:
                if error.code != "insufficient_memory" or not self._drop_oldest():
                    raise

    def _drop_oldest(self) -> bool:
        """Remove the oldest checkpoint of the job. Return whether there was one."""
        with self._state.lock:
            checkpoints = self._state.storage.jobs[self.job_id]["checkpoints"]
            if not checkpoints:
                return False
            is_recorded = self._state.change(self.job_id, checkpoints=checkpoints[1:])
        self._drop(checkpoints[:1], is_recorded)
        return True

    def _fail(self, error: Exception) -> None:
        state = self._state
        with state.lock:
            if state.storage.jobs[self.job_id]["status"] in NOT_TRAINED:
                return
            found = job_error(error, state.names(self.job_id))
            state.change(self.job_id, status="failed", error=found, finished_at=int(time.time()))
        state.event(self.job_id, f"The job failed: {found['message']}", level="error")


def _first_words(step: int, has_begun: bool) -> str:
    """Return the message of the event that reports the start of training.

    `step` is the number of steps already trained.
    """
    if step:
        return f"Fine-tuning job continues at step {step}"
    return (
        "Fine-tuning job starts again: it had no checkpoint yet" if has_begun else "Fine-tuning job started"
    )
