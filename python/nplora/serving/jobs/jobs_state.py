"""JobsState: the records and the events of all jobs, which several threads read and change."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from nplora.runtime.error_text import message_of
from nplora.runtime.user_warning import warn_user
from nplora.serving.jobs.event_log import EventLog
from nplora.serving.jobs.storage import Record, Storage

NOT_TRAINED = ("succeeded", "failed", "cancelled", "paused")  # the training thread does not train such a job
OPEN = ("queued", "validating_files", "running")


class JobsState:
    """The records in a `Storage`, and the events of the jobs.

    If a change cannot be written to the disk, the change stays in memory, and the user gets a warning. After
    a restart, the job continues from the older state on the disk.

    Args:
        log: called with a line of text for each event, except for events with metrics.
    Attributes:
        storage: the records. Hold `lock` while you read or change records.
        lock: the attribute `lock` of the storage.
    """

    def __init__(self, storage: Storage, log: Callable[[str], None] | None = None) -> None:
        self.storage, self.lock, self._log = storage, storage.lock, log
        self._logs: dict[str, EventLog] = {}

    def key(self, job_id: str) -> str:
        """The random part of a job's id."""
        return job_id.partition("-")[2]

    def log(self, job_id: str) -> EventLog:
        """The events of a job."""
        with self.lock:
            if job_id not in self._logs:
                path = self.storage.place(job_id) / "events.jsonl"
                self._logs[job_id] = EventLog(path, self.key(job_id))
            return self._logs[job_id]

    def event(
        self, job_id: str, message: str, level: str = "info", data: Mapping[str, Any] | None = None
    ) -> None:
        """Add an event to the log of a job."""
        if data is None:
            self._print(message if job_id in message else f"{job_id}: {message}")
        with self.lock, _kept_in_memory(job_id):
            self.log(job_id).add(message, level, None if data is None else dict(data))

    def _print(self, line: str) -> None:
        """Call `log`. If `log` raises an error (a closed pipe, for example), warn, and stop calling `log`."""
        log = self._log
        try:
            if log is not None:
                log(line)
        except Exception as error:
            self._log = None
            warn_user(f"events of jobs are no longer printed: {type(error).__name__}: {error}")

    def change(self, job_id: str, **changes: Any) -> bool:
        """Change the record of a job. Return whether the change is on the disk."""
        with self.lock:
            try:
                self.storage.change_job(job_id, **changes)
            except OSError as error:
                self.storage.jobs[job_id] = {**self.storage.jobs[job_id], **changes}
                _warn(job_id, error)
                return False
            return True

    def advance(self, job_id: str, status: str, **changes: Any) -> None:
        """Change the status of a job, unless the job has ended."""
        with self.lock:
            if self.storage.jobs[job_id]["status"] in OPEN:
                self.change(job_id, status=status, **changes)

    def drop_data(self, job_id: str) -> None:
        """Remove the data of a job that will never train again."""
        with self.lock, _kept_in_memory(job_id):
            self.storage.drop_data(job_id)

    def drop_unused(self, job_id: str) -> None:
        """Remove the files that a job needs only to train (see `Storage.drop_unused`)."""
        with self.lock, _kept_in_memory(job_id):
            self.storage.drop_unused(job_id)

    def add_results(self, job_id: str, content: bytes) -> list[str]:
        """Store the table of a job's losses as a file. Return a list that contains the file's id.

        If the file cannot be written, the list is empty. A second call replaces the file.
        """
        file_id = f"file-results-{self.key(job_id)}"
        record: Record = {
            "id": file_id, "created_at": int(time.time()), "filename": "step_metrics.csv",
            "purpose": "fine-tune-results",
        }  # fmt: skip
        with self.lock, _kept_in_memory(job_id):
            self.storage.add_file(record, content, most=1 << 40)
        return [file_id] if file_id in self.storage.files else []

    def names(self, job_id: str) -> dict[str, tuple[str, str]]:
        """Return the names of a job's data files, in the form of the argument `names` of `job_error`."""
        job, place = self.storage.jobs[job_id], self.storage.place(job_id)
        parameters = {"train": "training_file", "valid": "validation_file"}
        return {
            str(place / name): (job["filenames"][role], parameters[role])
            for role, name in job["data"].items()
        }


@contextlib.contextmanager
def _kept_in_memory(job_id: str) -> Iterator[None]:
    """A context that turns a disk error into a warning. The caller has already made the change in memory."""
    try:
        yield
    except OSError as error:
        _warn(job_id, error)


def _warn(job_id: str, error: OSError) -> None:
    warn_user(f"{job_id}: {message_of(error)}; a change to the job was not written to the disk")
