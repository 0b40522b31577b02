"""FineTuning: the files and the fine-tuning jobs of a server, as OpenAI's API shows them."""

from __future__ import annotations

import contextlib
import secrets
import shutil
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

from nplora.formats.errors import brief
from nplora.formats.files import StrPath
from nplora.lm import LanguageModel
from nplora.runtime.error_text import message_of
from nplora.runtime.time_share import TimeShare
from nplora.runtime.user_warning import warn_user
from nplora.serving.jobs import shapes
from nplora.serving.jobs.job_error import is_disk_full
from nplora.serving.jobs.job_request import JobRequest, checked, require_text
from nplora.serving.jobs.job_run import JobRun, Publishing, checkpoint_name
from nplora.serving.jobs.jobs_state import OPEN, JobsState
from nplora.serving.jobs.list_page import list_page
from nplora.serving.jobs.shapes import Shape
from nplora.serving.jobs.storage import Record, Storage, new_id
from nplora.serving.model_name import checked_name
from nplora.serving.request_error import RequestError

MAX_FILE_BYTES, MAX_FILES_BYTES = 512 << 20, 8 << 30
MOST_JOBS = 100  # the most jobs that are waiting, training or paused
_LONGEST_PAGE, _MOST_EVENTS, _MOST_FILES = 100, 1000, 10_000
_LONGEST_NAME = 255
_MOST_STEPS = 10**9


class FineTuning:
    """Keeps files and fine-tuning jobs in one directory. A thread trains the jobs one after the other.

    All methods may be called from any thread. The methods return dictionaries in the form of OpenAI's API. On
    errors, the methods raise `RequestError`, which has the fields of OpenAI's error object. A method returns
    only when its changes are on the disk, so no change is lost if the process is killed. After the next
    `start`, an interrupted job continues from its last checkpoint. Its result has the same bits as the result
    of a job that was not interrupted.

    Args:
        lm: the model that answers requests. This model does not change: a job trains a second model that
            shares the frozen weights.
        directory: the directory for files and jobs, created if needed. Only one process at a time can use
            this directory.
        model: the name of the base model in the API.
        turns: an object that divides the time between training and answers. The engine must get the same
            object as its argument `turn`. None: training does not wait for answers.
        publish: called as publish(name, directory) for each new adapter of a job, and in `start` for the
            adapters of earlier jobs. The function makes the adapter in this PEFT directory available under
            the name. If another adapter has the name, the function replaces that adapter. Default:
            `lm.load_adapter`.
        withdraw: called as withdraw(name). The function makes the adapter with this name unavailable.
            `withdraw` may raise KeyError or RequestError. Default: `lm.delete_adapter`.
        memory: the memory limit for the whole process while a job trains, as in `finetune`; or a function
            that returns this limit when a job begins.
        compute: the arithmetic of training. None: float32 if `lm` computes in int8; otherwise the arithmetic
            of `lm`.
        max_file_bytes: the largest accepted size of a file.
        max_files_bytes: the largest total size of all files, including deleted files that jobs still use.
        log: called with a line of text for each event, except for events with metrics.
    Raises:
        BlockingIOError: another process uses the directory.
        OSError: the directory cannot be created, read or written.

    >>> from nplora.serving.jobs import FineTuning
    >>> lm = nplora.load_model("model.gguf", compute="int8")
    >>> with FineTuning(lm, "jobs", model="small") as jobs, open("train.jsonl", "rb") as rows:
    ...     file = jobs.create_file(rows, "train.jsonl")
    ...     job = jobs.create_job({"model": "small", "training_file": file["id"]})
    ...     jobs.wait(job["id"])["status"]
    'succeeded'
    """

    def __init__(
        self,
        lm: LanguageModel,
        directory: StrPath,
        *,
        model: str,
        turns: TimeShare | None = None,
        publish: Callable[[str, Path], None] | None = None,
        withdraw: Callable[[str], None] | None = None,
        memory: str | int | Callable[[], int] | None = None,
        compute: str | None = None,
        max_file_bytes: int = MAX_FILE_BYTES,
        max_files_bytes: int = MAX_FILES_BYTES,
        log: Callable[[str], None] | None = None,
    ) -> None:
        self._lm, self._model, self._turns = lm, model, turns
        self._memory, self._compute, self._max_file_bytes = memory, compute, max_file_bytes
        self._max_files_bytes = max_files_bytes
        self._publishing = Publishing(publish or self._load, withdraw or lm.delete_adapter)
        self._state = JobsState(Storage(directory), log)
        self._changed = threading.Condition(self._state.lock)
        self._running: JobRun | None = None
        self._is_closing = self._has_published = False
        self._thread: threading.Thread | None = None

    def _load(self, name: str, directory: Path) -> None:
        self._lm.load_adapter(directory, name, replace=True)

    def start(self) -> None:
        """Call `publish` for the adapters of earlier jobs, and start the thread that trains."""
        self.publish_earlier()
        with self._state.lock:
            for job in self._jobs.values():
                if job["status"] in OPEN and job["status"] != "queued":
                    self._state.event(job["id"], "The server was restarted")
            self._thread = threading.Thread(target=self._work, name="nplora-training", daemon=True)
            self._thread.start()

    def publish_earlier(self) -> None:
        """Call `publish` for the adapters of earlier jobs, unless this was already done."""
        with self._state.lock:
            jobs = [] if self._has_published else list(self._jobs.values())
            self._has_published = True
            for job in jobs:
                self._publish_again(job)

    def _publish_again(self, job: Record) -> None:
        """Call `publish` for the adapters that a job created before the server was restarted."""
        for one in job["checkpoints"]:
            try:
                self._publishing.publish(one["name"], self._state.storage.adapter_place(job["id"], one))
            except (OSError, ValueError, RequestError) as error:
                reason = message_of(error) if isinstance(error, OSError) else str(error)
                warn_user(f"the adapter {one['name']!r} cannot be used: {reason}")

    def delete_model(self, name: str) -> bool:
        """Delete the files of an adapter that a job has created, for DELETE /v1/models/{name}.

        Return whether a job has created an adapter with this name. This method does not call
        `withdraw`: the caller must make the adapter unavailable.

        Raises:
            RequestError: the disk is full or has failed. The files are deleted, but the job still names the
                adapter. Call the method again.
        """
        is_found = False
        with self._state.lock, _disk_errors():
            for job in list(self._jobs.values()):
                for one in [one for one in job["checkpoints"] if one["name"] == name]:
                    is_found = True
                    shutil.rmtree(self._state.storage.adapter_place(job["id"], one), ignore_errors=True)
                    kept = [other for other in job["checkpoints"] if other is not one]
                    self._state.storage.change_job(job["id"], checkpoints=kept)
        return is_found

    def close(self) -> None:
        """Interrupt the training, and close the directory.

        The training ends before the model computes its next transformer block. The interrupted job continues
        after the next `start`.
        """
        with self._changed:
            self._is_closing = True
            if self._running is not None:
                self._running.stop()
                if self._jobs[self._running.job_id]["status"] in OPEN:
                    message = "The server is stopping; the job continues when the server starts again"
                    self._state.event(self._running.job_id, message)
            self._changed.notify_all()
        if self._thread is not None:
            self._thread.join()
        self._state.storage.close()

    def __enter__(self) -> FineTuning:
        """Call `start`."""
        self.start()
        return self

    def __exit__(self, *exception: object) -> None:
        """Call `close`."""
        self.close()

    # ---- the thread that trains ----

    @property
    def _jobs(self) -> dict[str, Record]:
        return self._state.storage.jobs

    def _work(self) -> None:
        while (run := self._next()) is not None:
            run.execute()
            with self._changed:
                if self._jobs[run.job_id]["status"] == "cancelled":
                    self._state.drop_unused(run.job_id)
                self._running = None
                self._changed.notify_all()

    def _next(self) -> JobRun | None:
        """Wait until there is a job to train, and return the oldest one; None when the server shuts down."""
        with self._changed:
            while not self._is_closing:
                job = next((job for job in self._jobs.values() if job["status"] in OPEN), None)
                if job is not None:
                    self._running = JobRun(
                        self._lm,
                        self._state,
                        job["id"],
                        self._publishing,
                        self._turns,
                        self._memory() if callable(self._memory) else self._memory,
                        self._compute,
                    )
                    return self._running
                self._changed.wait()
        return None

    def wait(self, job_id: str, seconds: float | None = None) -> Shape:
        """Wait until a job has ended or is paused, but not longer than `seconds`. Return the job."""
        with self._changed:
            self._changed.wait_for(
                lambda: self._job(job_id)["status"] not in OPEN and not self._trains(job_id), seconds
            )
            return self.job(job_id)

    def _trains(self, job_id: str) -> bool:
        return self._running is not None and self._running.job_id == job_id

    # ---- files ----

    def create_file(
        self, content: bytes | BinaryIO | Iterable[bytes], filename: str, purpose: str = "fine-tune"
    ) -> Shape:
        """Store a file: POST /v1/files.

        Raises:
            RequestError: the file is empty or too large, its name or purpose is wrong, all files together
                would be too large, or the disk is full.
        """
        if purpose != "fine-tune":
            message = f"purpose is {brief(purpose)}, expected 'fine-tune'"
            raise RequestError(message, param="purpose", code="invalid_value")
        if not isinstance(filename, str) or not filename.strip() or len(filename) > _LONGEST_NAME:
            message = f"the name of the file is {brief(filename)}, expected 1 to {_LONGEST_NAME} characters"
            raise RequestError(message, param="file", code="invalid_value")
        require_text(filename, "file")
        record: Record = {
            "id": new_id("file"), "created_at": int(time.time()), "filename": filename, "purpose": purpose,
        }  # fmt: skip
        with _disk_errors():
            made = self._state.storage.add_file(record, content, self._max_file_bytes, self._max_files_bytes)
            return shapes.file(made)

    def files(
        self, purpose: str | None = None, after: str | None = None, limit: int = 10_000, order: str = "desc"
    ) -> Shape:
        """List the files: GET /v1/files."""
        if order not in ("asc", "desc"):
            message = f"order is {brief(order)}, expected 'asc' or 'desc'"
            raise RequestError(message, param="order", code="invalid_value")
        with self._state.lock:
            found = [shapes.file(one) for one in self._state.storage.files.values()]
        found = [one for one in found if purpose is None or one["purpose"] == purpose]
        return list_page(found if order == "asc" else found[::-1], after, limit, _MOST_FILES)

    def file(self, file_id: str) -> Shape:
        """Return the object of a file: GET /v1/files/{id}."""
        with self._state.lock:
            return shapes.file(self._file(file_id))

    def delete_file(self, file_id: str) -> Shape:
        """Delete a file: DELETE /v1/files/{id}. Jobs that use the file keep its content."""
        with self._state.lock, _disk_errors():
            self._state.storage.delete_file(self._file(file_id)["id"])
        return {"id": file_id, "object": "file", "deleted": True}

    def file_content(self, file_id: str) -> Path:
        """Return the path of a file's content: GET /v1/files/{id}/content."""
        with self._state.lock:
            return self._state.storage.content(self._file(file_id)["id"])

    def _file(self, file_id: str, param: str = "file_id") -> Record:
        found = self._state.storage.files.get(file_id)
        if found is None:
            status = 404 if param == "file_id" else 400
            raise RequestError(f"no file has the id {brief(file_id)}", status, param, "file_not_found")
        return found

    # ---- jobs ----

    def create_job(self, request: Mapping[str, Any]) -> Shape:
        """Queue a job: POST /v1/fine_tuning/jobs, with the decoded body of the request.

        Raises:
            RequestError: a field is missing, unknown or wrong; there is no such file or model; too many jobs
                have not ended; or the disk is full.
        """
        asked = checked(request, self._model)
        with self._changed:
            if sum(job["status"] in (*OPEN, "paused") for job in self._jobs.values()) >= MOST_JOBS:
                message = f"{MOST_JOBS} jobs have not ended, and no more are accepted: wait, or cancel a job"
                raise RequestError(message, 429, code="queue_full")
            data = {"train": self._file(asked.training_file, "training_file")}
            if asked.validation_file is not None:
                data["valid"] = self._file(asked.validation_file, "validation_file")
            start = None if asked.model == self._model else self._lm.adapters.get(asked.model)
            if asked.model != self._model and start is None:
                message = f"no model has the name {brief(asked.model)}"
                raise RequestError(message, 404, "model", "model_not_found")
            record = self._new_record(asked, {role: one["filename"] for role, one in data.items()})
            with _disk_errors():
                files = {role: one["id"] for role, one in data.items()}
                job_id = self._state.storage.add_job(record, files, start)["id"]
            self._state.event(job_id, f"Created fine-tuning job: {job_id}")
            self._changed.notify_all()
            return self.job(job_id)

    def _new_record(self, asked: JobRequest, filenames: Mapping[str, str]) -> Record:
        job_id = new_id("ftjob")
        name = f"ft:{self._model}:{asked.suffix or ''}:{secrets.token_hex(4)}"
        checked_name("the name of the new model's checkpoints", checkpoint_name(name, _MOST_STEPS), "suffix")
        return {
            "id": job_id, "created_at": int(time.time()), "status": "queued", "model": asked.model,
            "name": name, "suffix": asked.suffix,
            "training_file": asked.training_file, "validation_file": asked.validation_file,
            "filenames": dict(filenames), "seed": asked.seed, "metadata": asked.metadata,
            "method": asked.method, "hyperparameters": asked.hyperparameters, "options": asked.options,
            "multiplier": asked.multiplier, "resolved": {}, "checkpoints": [], "result_files": [],
            "error": None, "finished_at": None, "fine_tuned_model": None, "trained_tokens": None,
        }  # fmt: skip

    def jobs(
        self, after: str | None = None, limit: int = 20, metadata: Mapping[str, str] | None = None
    ) -> Shape:
        """List the jobs, the newest first: GET /v1/fine_tuning/jobs."""
        with self._state.lock:
            found = [self._shape(job) for job in reversed(self._jobs.values())]
        wanted = (metadata or {}).items()
        found = [job for job in found if wanted <= (job["metadata"] or {}).items()]
        return list_page(found, after, limit, _LONGEST_PAGE)

    def job(self, job_id: str) -> Shape:
        """Return the object of a job: GET /v1/fine_tuning/jobs/{id}."""
        with self._state.lock:
            return self._shape(self._job(job_id))

    def _shape(self, job: Record) -> Shape:
        run = self._running if self._trains(job["id"]) else None
        return shapes.job(job, None if run is None else run.progress.estimated_finish)

    def events(self, job_id: str, after: str | None = None, limit: int = 20) -> Shape:
        """List a job's events, the newest first: GET /v1/fine_tuning/jobs/{id}/events."""
        with self._state.lock:
            found = self._state.log(self._job(job_id)["id"]).newest_first()
        return list_page(found, after, limit, _MOST_EVENTS)

    def checkpoints(self, job_id: str, after: str | None = None, limit: int = 10) -> Shape:
        """List a job's checkpoints, the newest first: GET /v1/fine_tuning/jobs/{id}/checkpoints."""
        with self._state.lock:
            found = [shapes.checkpoint(job_id, one) for one in reversed(self._job(job_id)["checkpoints"])]
        return list_page(found, after, limit, _LONGEST_PAGE)

    def cancel(self, job_id: str) -> Shape:
        """End a job permanently: POST /v1/fine_tuning/jobs/{id}/cancel.

        The data and the training state are removed. A job that has failed can also be cancelled. The
        cancelled job keeps its error.
        """
        return self._end(job_id, (*OPEN, "paused", "failed"), "cancelled", finished_at=int(time.time()))

    def pause(self, job_id: str) -> Shape:
        """Stop a job until `resume`: POST /v1/fine_tuning/jobs/{id}/pause."""
        return self._end(job_id, OPEN, "paused")

    def resume(self, job_id: str) -> Shape:
        """Continue a job that is paused or has failed: POST /v1/fine_tuning/jobs/{id}/resume."""
        return self._end(job_id, ("paused", "failed"), "queued", error=None, finished_at=None)

    def _end(self, job_id: str, before: tuple[str, ...], status: str, **changes: Any) -> Shape:
        """Set a job's status to `status`. Raise RequestError if the present status is not in `before`."""
        with self._changed:
            job = self._job(job_id)
            if job["status"] not in before:
                message = f"the job {job_id} is {job['status']}, expected {' or '.join(before)}"
                raise RequestError(message, 400, "fine_tuning_job_id", "invalid_status")
            if self._trains(job_id) and status == "queued":
                message = f"the job {job_id} is still stopping; try again in a moment"
                raise RequestError(message, 409, "fine_tuning_job_id", "invalid_status")
            with _disk_errors():
                self._state.storage.change_job(job_id, status=status, **changes)
            if self._trains(job_id) and self._running is not None:
                self._running.stop()
                if status == "cancelled":  # `_work` removes the other files when the run has ended
                    self._state.drop_data(job_id)
            elif status == "cancelled":
                self._state.drop_unused(job_id)
            self._state.event(job_id, f"The job is {status}")
            self._changed.notify_all()
            return self.job(job_id)

    def _job(self, job_id: str) -> Record:
        found = self._jobs.get(job_id)
        if found is None:
            message = f"no fine-tuning job has the id {brief(job_id)}"
            raise RequestError(message, 404, "fine_tuning_job_id", "fine_tune_not_found")
        return found


@contextlib.contextmanager
def _disk_errors() -> Iterator[None]:
    """Turn a disk error into a `RequestError` whose message does not contain paths of the server."""
    try:
        yield
    except OSError as error:
        if is_disk_full(error):
            raise RequestError("the server's disk is full", 507, code="disk_full") from error
        raise RequestError(f"the server's disk failed: {error.strerror}", 500, code="disk_error") from error
