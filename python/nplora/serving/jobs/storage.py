"""Storage: a directory of uploaded files and jobs. If the process is killed, no completed change is lost.

The directory holds

    lock                                 exists while a server uses the directory
    files/ID/content.SUFFIX, file.json   an uploaded file, and its record
    jobs/ID/job.json                     the record of a job
    jobs/ID/train.SUFFIX, valid.SUFFIX   the job's data: hard links to the contents of uploaded files. The
                                         data remain if a client deletes these files
    jobs/ID/start/                       the adapter that the job continues, if any
    jobs/ID/events.jsonl                 the job's events
    jobs/ID/run/                         the output directory of `finetune`: checkpoints, log and adapter
    jobs/ID/checkpoints/step-N/          adapters of the last epochs

In a new directory, the record is written last. A changed record replaces the old record atomically. If a
process is killed before it has written the record, the next start removes the incomplete directory.
Directories whose names are not ids are ignored. This module makes all ids. An id in a request is only
compared with the ids of records, so no text from a request is ever used in a path.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import re
import secrets
import shutil
import threading
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

from nplora.adapters import Adapter
from nplora.finetuning.data.rows import COMPRESSED, SUFFIXES
from nplora.formats import files, strict_json
from nplora.formats.errors import FormatError
from nplora.formats.files import NewFile, StrPath
from nplora.platform.files import sync_directory
from nplora.runtime.user_warning import warn_user
from nplora.serving.jobs import record_check
from nplora.serving.jobs.record_check import Check
from nplora.serving.request_error import RequestError
from nplora.trainer.directory_lock import DirectoryLock

Record = dict[str, Any]

_FILE, _JOB = "file.json", "job.json"
_PART = 1 << 20
_ID = re.compile(r"(file|file-results|ftjob)-[0-9a-f]{24}")


def new_id(kind: str) -> str:
    """A new random id, such as file-3f0c…"""
    return f"{kind}-{secrets.token_hex(12)}"


class Storage:
    """Keeps uploaded files and the records of jobs in one directory.

    Attributes:
        files, jobs: dicts from ids to records, in the order of creation. Hold `lock` while you read the
            records, and change the records only through the methods. Also hold `lock` while you call a method
            other than `add_file`.
        lock: a reentrant lock.
    Raises:
        BlockingIOError: another process uses the directory.
        OSError: the directory cannot be created, read or written.
    Warns:
        UserWarning: a record cannot be read, and is ignored.
    """

    def __init__(self, path: StrPath) -> None:
        self.path = Path(files.absolute(path))
        for name in ("files", "jobs"):
            os.makedirs(self.path / name, exist_ok=True)
        self._directory = files.Directory(self.path)
        try:
            self._lock = DirectoryLock(self._directory, "another server")
        except BaseException:
            self._directory.close()
            raise
        self.lock = threading.RLock()
        try:
            self.files = _read(self.path / "files", _FILE, record_check.FILE)
            self.jobs = _read(self.path / "jobs", _JOB, record_check.JOB)
        except BaseException:
            self.close()
            raise
        self._arriving = dict[str, int]()  # the bytes received so far of each unfinished upload
        self._stored: int | None = None  # the bytes of all files; None: count them again
        self._file_serials = itertools.count(_next_serial(self.files))
        for job_id, job in self.jobs.items():
            if job["status"] in ("succeeded", "cancelled"):  # a crash may have left files of such a job
                with contextlib.suppress(OSError):
                    self.drop_unused(job_id)

    def close(self) -> None:
        """Unlock the directory."""
        self._lock.close()
        self._directory.close()

    # ---- files ----

    def add_file(
        self,
        record: Record,
        content: bytes | BinaryIO | Iterable[bytes],
        most: int,
        most_together: int | None = None,
    ) -> Record:
        """Write a file.

        Return the record with additional fields: the size in bytes, the name of the file with the content,
        and a serial number.

        Args:
            most: the largest accepted size of the file, in bytes.
            most_together: the largest accepted total size of all files, in bytes; None: no limit.
        Raises:
            RequestError: the file is empty or too large, or all files together are too large.
            OSError: the file cannot be written. An incomplete file is removed.
        """
        record = {**record, "bytes": 0, "content": f"content{_suffix(record['filename'])}"}
        record["serial"] = next(self._file_serials)
        place = self.path / "files" / record["id"]

        def counted() -> Iterator[bytes]:
            for part in _parts(content):
                record["bytes"] += len(part)
                if record["bytes"] > most:
                    message = f"the file has more than {most:,} bytes, which is the limit"
                    raise RequestError(message, 413, "file", "file_too_large")
                with self.lock:
                    self._arriving[record["id"]] = record["bytes"]
                    if most_together is not None and self._file_bytes() > most_together:
                        raise _too_many(most_together)
                yield part
            if not record["bytes"]:
                raise RequestError("the file is empty", param="file", code="invalid_value")

        def described() -> Iterator[bytes]:
            yield _json(record)

        content_file = NewFile(place / record["content"], 0, counted())
        try:
            self._make(place, [content_file, NewFile(place / _FILE, 0, described())])
            with self.lock:
                self.files[record["id"]], self._stored = record, None
                del self._arriving[record["id"]]
        finally:
            with self.lock:
                self._arriving.pop(record["id"], None)
        return record

    def _file_bytes(self) -> int:
        """Return the total bytes of files, unfinished uploads, and deleted files that jobs still use."""
        if self._stored is None:
            self._stored = self._stored_bytes()
        return self._stored + sum(self._arriving.values())

    def _stored_bytes(self) -> int:
        paths = [self.content(file_id) for file_id in self.files]
        for job_id, job in self.jobs.items():
            paths += [self.place(job_id) / name for name in job["data"].values()]
        sizes = dict[tuple[int, int], int]()
        for path in paths:
            with contextlib.suppress(OSError):
                found = path.stat(follow_symlinks=False)
                sizes[found.st_dev, found.st_ino] = found.st_size
        return sum(sizes.values())

    def drop_data(self, job_id: str) -> None:
        """Remove the data of a job that will never train again."""
        self._stored = None
        for name in self.jobs[job_id]["data"].values():
            (self.place(job_id) / name).unlink(missing_ok=True)

    def delete_file(self, file_id: str) -> None:
        """Delete a file. The record is deleted first, so that even after a crash each record has its
        content."""
        place, self._stored = self.path / "files" / self.files[file_id]["id"], None
        os.unlink(place / _FILE)
        del self.files[file_id]
        shutil.rmtree(place, ignore_errors=True)

    def content(self, file_id: str) -> Path:
        """Return the path of the content of an uploaded file."""
        record = self.files[file_id]
        return self.path / "files" / str(record["id"]) / str(record["content"])

    # ---- jobs ----

    def add_job(self, record: Record, data: Mapping[str, str], start: Adapter | None) -> Record:
        """Write a new job. Return its record with two more fields: the names of the data files, and a serial
        number.

        Args:
            data: a dict with the ids of uploaded files: "train" and, if there is a validation file, "valid".
            start: the adapter that the job continues, or None.
        Raises:
            OSError: the job cannot be written. The files of an incomplete job are removed.
        """
        place = self.path / "jobs" / record["id"]
        record = {**record, "serial": _next_serial(self.jobs), "data": {}}
        os.makedirs(place)
        try:
            for role, file_id in data.items():
                source = self.content(file_id)
                record["data"][role] = name = role + _suffix(source.name)
                _link(source, place / name)
            if start is not None:
                start.save(place / "start")
            self._make(place, [NewFile(place / _JOB, 0, [_json(record)])])
        except BaseException:
            shutil.rmtree(place, ignore_errors=True)
            raise
        self.jobs[record["id"]], self._stored = record, None
        return record

    def change_job(self, job_id: str, **changes: Any) -> Record:
        """Change fields of a job's record, in memory and on the disk.

        Raises:
            OSError: the new record cannot be written. `jobs` keeps the old record. The disk also keeps it,
                unless the error came after the new file had replaced the old file.
        """
        record = {**self.jobs[job_id], **changes}
        files.replace([NewFile(self.place(job_id) / _JOB, 0, [_json(record)])])
        self.jobs[job_id] = record
        return record

    def drop_unused(self, job_id: str) -> None:
        """Remove the files that a job needs only to train.

        Call this only if the job has succeeded, or if it was cancelled and its training has ended.

        The job keeps its record, its events, the adapters that its record names and, if it has succeeded, the
        output directory of `finetune`.
        """
        place, job = self.place(job_id), self.jobs[job_id]
        kept = [self.adapter_place(job_id, one) for one in job["checkpoints"]]
        unused = [place / "start", *(one for one in place.glob("checkpoints/*") if one not in kept)]
        if job["status"] == "cancelled":
            unused.append(place / "run")
        for one in unused:
            shutil.rmtree(one, ignore_errors=True)
        with contextlib.suppress(OSError):
            (place / "checkpoints").rmdir()
        self.drop_data(job_id)

    def place(self, job_id: str) -> Path:
        """The directory of a job."""
        return self.path / "jobs" / str(self.jobs[job_id]["id"])

    def adapter_place(self, job_id: str, checkpoint: Record) -> Path:
        """The directory that contains the adapter of a job's checkpoint."""
        is_final = checkpoint["name"] == self.jobs[job_id]["fine_tuned_model"]
        return self.place(job_id) / ("run" if is_final else f"checkpoints/step-{checkpoint['step']}")

    def _make(self, place: Path, new: list[NewFile]) -> None:
        """Create a directory and write its files. After an error, remove the directory."""
        os.makedirs(place, exist_ok=True)
        try:
            files.replace(new)
            with files.Directory(place.parent) as parent:
                sync_directory(parent.fd)
        except BaseException:
            shutil.rmtree(place, ignore_errors=True)
            raise


def _read(place: Path, name: str, fields: Mapping[str, Check]) -> dict[str, Record]:
    """Read the records in the subdirectories of `place`. Return a dict {id: record}, in the order of
    creation."""
    found = list[Record]()
    for entry in sorted(place.iterdir()):
        if not _ID.fullmatch(entry.name):
            continue
        path = entry / name
        if not os.path.lexists(path):
            shutil.rmtree(entry, ignore_errors=True)
            continue
        try:
            record = strict_json.loads(bytes(files.read(path, follow_links=False)), str(path))
            found.append(record_check.require_record(str(path), record, entry.name, fields))
        except (FormatError, OSError) as error:
            warn_user(f"{error}; the record is ignored")
    return {record["id"]: record for record in sorted(found, key=lambda record: record["serial"])}


def _next_serial(records: Mapping[str, Record]) -> int:
    return 1 + max((int(record["serial"]) for record in records.values()), default=0)


def _json(record: Record) -> bytes:
    described = {**record, "schema": record_check.SCHEMA}
    return json.dumps(described, ensure_ascii=False, allow_nan=False, indent=1).encode()


def _too_many(most: int) -> RequestError:
    message = (
        f"all files together would have more than {most:,} bytes, which is the limit: delete files that are "
        "not needed, and cancel failed jobs, which keep their data for `resume`"
    )
    return RequestError(message, 507, "file", "storage_limit_exceeded")


def _suffix(name: str) -> str:
    """Return the suffix that shows the format of a file; ".jsonl" if the name has no known suffix."""
    lower = name.lower()
    known = sorted((*SUFFIXES, *COMPRESSED), key=len, reverse=True)
    return next((suffix for suffix in known if lower.endswith(suffix)), ".jsonl")


def _parts(content: bytes | BinaryIO | Iterable[bytes]) -> Iterator[bytes]:
    if isinstance(content, bytes | bytearray | memoryview):
        yield bytes(content)
    elif hasattr(content, "read"):
        while part := content.read(_PART):
            yield part
    else:
        yield from content


def _link(source: Path, target: Path) -> None:
    """Make a hard link to a file, or a copy if the file system does not support hard links."""
    try:
        os.link(source, target)
    except OSError:
        with files.reading(source) as reader:
            parts = (reader[begin : begin + _PART] for begin in range(0, len(reader), _PART))
            files.replace([NewFile(target, len(reader), parts)])
