"""FineTuning: the files and the fine-tuning jobs of a server, as OpenAI's API shows them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, BinaryIO

from nplora.adapters import Adapter
from nplora.formats.files import StrPath
from nplora.lm import LanguageModel

Shape = dict[str, Any]


class FineTuning:
    """Files and fine-tuning jobs in one directory, and a thread that trains the jobs one after the other.

    All methods may be called from any thread. They return dictionaries in the shapes of OpenAI's API, and
    raise `RequestError`, whose `status`, `param` and `code` belong into OpenAI's error object. Every change
    is on the disk before its method returns, so a process that is killed loses nothing.

    Args:
        lm: the model without adapter. A job trains a twin that shares the weights.
        directory: the directory for files and jobs; made if needed. One process can use it at a time.
        model: the name of the base model in the API.
        publish: called as publish(name, directory) from the training thread when a job has ended: from then
            on, the adapter in this PEFT directory answers to `name`. Also called in `start` for the adapters
            of earlier jobs. If it raises an error, the job fails.
        adapter: returns the adapter of a name that is not a job's, or None, so that a job can continue it.
        memory: memory limit of the whole process for the plan of a job, as in `finetune`.
        compute: arithmetic of training; None: that of `lm`, or float32 if `lm` computes in int8.
        max_file_bytes: the largest file that is accepted.
    """

    def __init__(
        self,
        lm: LanguageModel,
        directory: StrPath,
        *,
        model: str,
        publish: Callable[[str, Path], None],
        adapter: Callable[[str], Adapter | None] = lambda name: None,
        memory: str | int | None = None,
        compute: str | None = None,
        max_file_bytes: int = 512 << 20,
    ) -> None: ...

    def start(self) -> None:
        """Publish the adapters of earlier jobs, and start the thread that trains."""

    def close(self) -> None:
        """Stop after the present block. A job that is interrupted goes on after the next `start`."""

    # ---- files ----

    def create_file(
        self, content: bytes | BinaryIO | Iterable[bytes], filename: str, purpose: str = "fine-tune"
    ) -> Shape:
        """Store a file: POST /v1/files."""
        raise NotImplementedError

    def files(
        self, purpose: str | None = None, after: str | None = None, limit: int = 10_000, order: str = "desc"
    ) -> Shape:
        """List the files: GET /v1/files."""
        raise NotImplementedError

    def file(self, file_id: str) -> Shape:
        """One file: GET /v1/files/{id}."""
        raise NotImplementedError

    def delete_file(self, file_id: str) -> Shape:
        """Delete a file: DELETE /v1/files/{id}. Jobs that use the file keep their copy."""
        raise NotImplementedError

    def file_content(self, file_id: str) -> Path:
        """The path of a file's bytes: GET /v1/files/{id}/content."""
        raise NotImplementedError

    # ---- jobs ----

    def create_job(self, request: Mapping[str, Any]) -> Shape:
        """Queue a job: POST /v1/fine_tuning/jobs, with the decoded body of the request."""
        raise NotImplementedError

    def jobs(
        self, after: str | None = None, limit: int = 20, metadata: Mapping[str, str] | None = None
    ) -> Shape:
        """List the jobs, the newest first: GET /v1/fine_tuning/jobs."""
        raise NotImplementedError

    def job(self, job_id: str) -> Shape:
        """One job: GET /v1/fine_tuning/jobs/{id}."""
        raise NotImplementedError

    def events(self, job_id: str, after: str | None = None, limit: int = 20) -> Shape:
        """A job's events, the newest first: GET /v1/fine_tuning/jobs/{id}/events."""
        raise NotImplementedError

    def checkpoints(self, job_id: str, after: str | None = None, limit: int = 10) -> Shape:
        """A job's checkpoints, the newest first: GET /v1/fine_tuning/jobs/{id}/checkpoints."""
        raise NotImplementedError

    def cancel(self, job_id: str) -> Shape:
        """Cancel a job: POST /v1/fine_tuning/jobs/{id}/cancel."""
        raise NotImplementedError

    def pause(self, job_id: str) -> Shape:
        """Stop a job until `resume`: POST /v1/fine_tuning/jobs/{id}/pause."""
        raise NotImplementedError

    def resume(self, job_id: str) -> Shape:
        """Continue a paused or failed job: POST /v1/fine_tuning/jobs/{id}/resume."""
        raise NotImplementedError
