"""The directory of a training run, written so that a crash loses nothing.

It holds

    checkpoint-0.safetensors, checkpoint-1.safetensors     two generations, written in turn
    log.jsonl                                              a line for every step and epoch
    lock                                                   while a run writes here; its text is the PID

A checkpoint is written beside its target and renamed over the older generation (`formats.files.replace`), so
at every moment a whole one is there. A SHA-256 over everything in it tells whether it still is whole. All
that touches the disk here are the calls of `formats.files` and those of the class `RunDirectory`. That class
holds the directory open, so a run stays in it when it is renamed. It never follows a link, and writes to no
file that another program made.
"""

import contextlib
import dataclasses
import errno
import fcntl
import functools
import json
import os
import re
import stat
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Self

import numpy as np

from nplora.formats import files, peft_adapter, run_files, safetensors
from nplora.formats.errors import (
    CorruptError,
    FormatError,
    TruncatedError,
    UnsafeError,
    UnsupportedError,
)
from nplora.formats.files import StrPath
from nplora.formats.run_files import CHECKPOINTS, LOCK, LOG, holds_run
from nplora.formats.safetensors import SafetensorsFile
from nplora.runtime.user_warning import warn_user
from nplora.trainer import checkpoint as checkpoints
from nplora.trainer.checkpoint import MARKS, Checkpoint

_FIRST_RECORD = re.compile(rb'\{"event":"(start","total_steps|resume","step|step","step|epoch","epoch)":')
_MAX_LOG = 1 << 30
_LONGEST_LINE = 1 << 16


# Whether a file was made by a run, by its name.


def _is_log(reader: files.Reader) -> bool:
    """It begins with a record, or is all that a full disk left of the first one."""
    head = bytes(reader[:64])
    is_cut = len(reader) < 64 and b"\n" not in head
    return bool(_FIRST_RECORD.match(head)) or (is_cut and b'{"event":"'.startswith(head[:10]))


def _is_lock(reader: files.Reader) -> bool:
    """It is empty or holds a PID."""
    try:
        text = bytes(reader[:32]).strip()
    except TruncatedError:  # by the run that locks it now
        return True
    return len(reader) <= 32 and (not text or text.isdigit())


def _is_generation(reader: files.Reader) -> bool:
    """A file that is not safetensors may be a damaged checkpoint: `RunDirectory.latest` judges it."""
    try:
        return bool(SafetensorsFile(reader, "checkpoint").metadata.keys() & MARKS)
    except FormatError:
        return True


_IS_OURS = {LOG: _is_log, LOCK: _is_lock, **dict.fromkeys(CHECKPOINTS, _is_generation)}


class RunDirectory:
    """A directory that one run writes: made if needed, locked and held open until `close`.

    Args:
        overwrite: a run that begins here drops an adapter that an earlier one left.
    Attributes:
        newest: the newest whole checkpoint, or None; read when asked for, let go of by the first `save`.
        damaged: one sentence for each checkpoint that is not whole. Of one that is older than a whole one,
            only the header is read.
        occupied: whether there was a checkpoint, whole or damaged.
    Raises:
        BlockingIOError: another run writes there; the message names its PID.
        UnsupportedError: a later nplora's checkpoint is there.
        UnsafeError: a symbolic link has the name of a file of the run.
        FileExistsError: a file that no run made has such a name. It is left as it is.
        OSError: the directory cannot be made or written.
    Warns:
        UserWarning: a crashed run left an unfinished file, which is removed.
    """

    def __init__(self, path: StrPath | files.Directory, overwrite: bool = False) -> None:
        self.damaged: list[str] = []
        self._overwrite = overwrite
        self._serials = [0, 0]  # the generations' numbers
        self._slot = 0  # the generation to be replaced next
        self._step = 0  # of the newest generation
        self._first_log: bytearray | None = None  # of a run that overwrites another, until its checkpoint
        self._descriptors: list[int] = []
        self._locked_by = 0  # a process, whose forked children do not unlock
        try:
            if not isinstance(path, files.Directory):
                os.makedirs(path, exist_ok=True)
            self._directory = files.Directory(path)
        except OSError as error:
            raise _unwritable(path, error) from error
        try:
            try:
                lock = self._lock()
                self._require_ours()
                os.ftruncate(lock, 0)
                os.pwrite(lock, f"{os.getpid()}\n".encode(), 0)
                self._log = self._open(LOG, os.O_RDWR | os.O_CREAT | os.O_APPEND)
                self.log_bytes = os.fstat(self._log).st_size
                self._remove_unfinished()
            except BlockingIOError:
                raise
            except OSError as error:
                raise _unwritable(self.path, error) from error
            self.occupied = holds_run(self.path)
            headers = [checkpoints.read_header(self.path / name) for name in CHECKPOINTS]
            self._serials, self._step = [serial for serial, _ in headers], max(headers)[1]
            self._slot = self._serials.index(min(self._serials))
        except BaseException:
            self.close()
            raise

    @property
    def path(self) -> Path:
        """Where the directory is now."""
        return Path(self._directory)

    def _require_ours(self) -> None:
        """Look at every file that the run may write to, before it writes into any."""
        for name in {LOG, *CHECKPOINTS}.intersection(os.listdir(self._directory.fd)):
            self._open(name, os.O_RDONLY)
            os.close(self._descriptors.pop())

    def _open(self, name: str, flags: int) -> int:
        # O_NONBLOCK: a FIFO would otherwise be waited for.
        flags |= os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CLOEXEC
        try:
            descriptor = os.open(name, flags, 0o666, dir_fd=self._directory.fd)
        except OSError as error:
            if error.errno == errno.ELOOP:
                raise UnsafeError(f"{self.path / name}: a symbolic link, expected a regular file") from error
            raise
        self._descriptors.append(descriptor)
        kind = stat.S_IFMT(os.fstat(descriptor).st_mode)
        if kind != stat.S_IFREG:
            what = files.kind_name(kind)
            raise FileExistsError(errno.EEXIST, f"{name} is {what}, expected a regular file")
        if not _IS_OURS[name](files.Reader(descriptor, self.path / name)):
            reason = f"no run made the {name} in it: move that file, or name another directory"
            raise FileExistsError(errno.EEXIST, reason)
        return descriptor

    def _lock(self) -> int:
        """Lock the file; again if the earlier run removed it after it was opened here."""
        while not self._locked_by:
            descriptor = self._open(LOCK, os.O_RDWR | os.O_CREAT)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                pid = os.pread(descriptor, 20, 0).decode(errors="replace").strip() or "unknown"
                reason = f"another run, of process {pid}, writes to this directory"
                raise BlockingIOError(error.errno, reason, str(self.path)) from error
            if self._has_lock():
                self._locked_by = os.getpid()
            else:
                os.close(self._descriptors.pop())
        return descriptor

    def _has_lock(self) -> bool:
        """Whether the file that was locked is the one that others find there."""
        try:
            found = os.stat(LOCK, dir_fd=self._directory.fd, follow_symlinks=False)
        except FileNotFoundError:
            return False
        return os.path.samestat(os.fstat(self._descriptors[0]), found)

    def _remove_unfinished(self) -> None:
        for file in files.unfinished(self._directory.fd, run_files.NAMES):
            os.unlink(file, dir_fd=self._directory.fd)
            warn_user(f"{self.path / file}: left unfinished by a run that was killed, removed")

    @functools.cached_property
    def newest(self) -> Checkpoint | None:
        newest: Checkpoint | None = None
        for serial, slot in sorted(zip(self._serials, (0, 1), strict=True), reverse=True):
            path = self.path / CHECKPOINTS[slot]
            if (newest is not None and serial) or not os.path.lexists(path):
                continue
            try:
                found = checkpoints.read(path)
            except UnsupportedError:
                raise
            except (FormatError, OSError) as error:
                self.damaged.append(str(error))
                self._slot = slot
                continue
            newest = newest or found
        return newest

    def _newest_metadata(self) -> dict[str, str]:
        """Those of the checkpoint `newest`."""
        slot = 1 - self._slot
        with safetensors.reading(self.path / CHECKPOINTS[slot], follow_links=False) as content:
            return content.metadata

    def latest(self) -> Checkpoint | None:
        """The checkpoint to continue from; None if there is none.

        If that run had begun to drop what an earlier one left, that is completed.

        Raises:
            CorruptError: there are checkpoints, but none is whole.
        Warns:
            UserWarning: one is damaged, and the other is used.
        """
        if self.newest is None and self.damaged:
            raise CorruptError(
                f"{self.path}: no whole checkpoint is left: {'; '.join(self.damaged)}; "
                "--overwrite (overwrite=True) begins anew"
            )
        if self.newest is not None:
            for problem in self.damaged:
                warn_user(f"{problem}; the other checkpoint is used, of step {self.newest.step}")
            self._finish_dropping(self.newest)
        return self.newest

    def before(self, step: int) -> Checkpoint | None:
        """The whole checkpoint of the latest step before this one; None if there is none."""
        found: Checkpoint | None = None
        for name in CHECKPOINTS:
            with contextlib.suppress(FormatError, OSError):
                checkpoint = checkpoints.read(self.path / name)
                if checkpoint.step < step and (found is None or found.step < checkpoint.step):
                    found = checkpoint
        return found

    def _finish_dropping(self, newest: Checkpoint) -> None:
        """Put the first log of a run that overwrites another in place, and remove the other's adapter."""
        log = self._newest_metadata().get(run_files.FIRST_LOG)
        if log is None:
            return
        if self.read_log(newest.log_bytes) != log.encode():
            files.replace([self._new_log(log.encode())], self._directory)
            self._reopen_log()
        if peft_adapter.is_dropped(self.path):
            self._drop_adapter()

    def read_log(self, size: int) -> bytes:
        """The whole lines among the first `size` bytes of the log, or of what is left of it.

        Raises:
            FormatError, OSError: it cannot be read.
        """
        log = bytes(files.read(self.path / LOG, _MAX_LOG)[:size])
        return log[: log.rfind(b"\n") + 1]

    def cut_log(self, size: int) -> None:
        """Drop what stands in the log after `size` bytes, and before them a last line without its end."""
        with files.disk_errors(self.path / LOG, f"the log was to end after byte {size:,}"):
            self.log_bytes = min(self.log_bytes, size)
            start = max(0, self.log_bytes - _LONGEST_LINE)
            self.log_bytes = start + os.pread(self._log, self.log_bytes - start, start).rfind(b"\n") + 1
            os.ftruncate(self._log, self.log_bytes)

    def begin(self) -> None:
        """Begin a new run, with an empty log.

        What an earlier run left is dropped with the first checkpoint: its log, both its checkpoints, and the
        adapter if `overwrite` is set. Until then it stays as it is.
        """
        if self.occupied or (self._overwrite and peft_adapter.lies_in(self.path)):
            self._first_log, self.log_bytes = bytearray(), 0
        else:
            self.cut_log(0)

    def save(self, checkpoint: Checkpoint) -> None:
        """Write a checkpoint over the older generation, or the first one of a new run over both.

        One of the same step as the newest replaces that, so the older one is always of an earlier step.

        Raises:
            OSError: the disk refuses; both generations are as they were, and the message says how many bytes
                were needed.
        """
        if self._first_log is not None:
            self._drop_other(checkpoint)
        elif checkpoint.step == self._step and any(self._serials) and not self.damaged:
            self._slot = 1 - self._slot
        with files.disk_errors(self.path / LOG, "the log may have lost lines, no checkpoint is written"):
            os.fsync(self._log)  # the checkpoint relies on it for the history
        self._write(checkpoint)
        self._step = checkpoint.step

    def _write(self, checkpoint: Checkpoint, *more: files.NewFile, **metadata: str) -> None:
        numbered = dataclasses.replace(checkpoint, serial=max(self._serials) + 1, log_bytes=self.log_bytes)
        new = checkpoints.new_file(self.path / CHECKPOINTS[self._slot], numbered, metadata)
        files.replace([new, *more], self._directory)
        self.newest, self._serials[self._slot], self._slot = None, numbered.serial, 1 - self._slot
        self.damaged.clear()  # a damaged checkpoint is the first to be replaced

    def _drop_other(self, checkpoint: Checkpoint) -> None:
        """Write the first checkpoint of a run that overwrites another, and drop what that left.

        The checkpoint carries what `_finish_dropping` needs, so the rename of its file is the moment at which
        the new run takes the place of the old one.
        """
        log = bytes(self._first_log or b"")
        metadata = {run_files.FIRST_LOG: log.decode()}
        digest = peft_adapter.tensors_digest(self.path) if self._overwrite else None
        if digest is not None:
            metadata[run_files.DROPPED_ADAPTER] = digest
        self._write(checkpoint, self._new_log(log), **metadata)
        self._first_log = None
        self._reopen_log()
        if self._overwrite:
            self._drop_adapter()

    def _new_log(self, log: bytes) -> files.NewFile:
        return files.NewFile(self.path / LOG, len(log), [log])

    def _reopen_log(self) -> None:
        """Continue in the log that replaced the one that is open."""
        self._descriptors.remove(self._log)
        os.close(self._log)
        self._log = self._open(LOG, os.O_RDWR | os.O_APPEND)
        self.log_bytes = os.fstat(self._log).st_size

    def _drop_adapter(self) -> None:
        with files.disk_errors(self.path, "the adapter of an earlier run could not be removed"):
            for name in (peft_adapter.TENSORS, peft_adapter.CONFIG):
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(name, dir_fd=self._directory.fd)
            os.fsync(self._directory.fd)

    def log(self, record: Mapping[str, Any]) -> None:
        """Append a line of JSON to the log, NaN and infinities as null."""
        line = json.dumps(dict(_finite(record.items())), allow_nan=False, separators=(",", ":"))
        data = f"{line}\n".encode()
        if self._first_log is not None:
            self._first_log += data
            self.log_bytes += len(data)
            return
        progress = files.Progress(len(data))
        try:
            with files.disk_errors(self.path / LOG, progress):
                files.write(self._log, data, progress)
        finally:
            self.log_bytes += progress.done

    def close(self) -> None:
        """Let the next run in. The lock file is removed while it is locked, so it is this run's own."""
        if self._locked_by == os.getpid():
            with contextlib.suppress(OSError):
                if self._has_lock():
                    os.unlink(LOCK, dir_fd=self._directory.fd)
        self._locked_by = 0
        while self._descriptors:
            os.close(self._descriptors.pop())
        self._directory.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def _unwritable(path: StrPath, error: OSError) -> OSError:
    """The error for a run directory; of the class that fits its number."""
    return OSError(error.errno, f"the run directory cannot be written: {error.strerror}", files.name(path))


def _finite(items: Iterable[tuple[str, Any]]) -> Iterable[tuple[str, Any]]:
    for name, value in items:
        yield name, None if isinstance(value, float) and not np.isfinite(value) else value
