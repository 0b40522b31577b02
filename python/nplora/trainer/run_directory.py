"""The directory of a training run, written so that a crash cannot damage the last checkpoint.

The directory holds

    checkpoint-0.safetensors, checkpoint-1.safetensors     the last two checkpoints; the older one is replaced
    log.jsonl                                              a header, and a line for every step and epoch
    reference.safetensors                                  log-probabilities of the model without its adapter,
                                                           for DPO, KTO, ...; nplora.finetuning writes it
    lock                                                   exists while a run writes here; contains its PID

A new checkpoint is written to a temporary file, which is then renamed over the older checkpoint
(`formats.files.replace`). So a complete checkpoint exists at every moment. A SHA-256 in each checkpoint shows
whether the file is damaged. Only `formats.files` and `RunDirectory` access the disk. `RunDirectory` keeps
the directory open, so a run can continue after the directory is renamed. `RunDirectory` never follows a
symbolic link, and never writes to a file that another program made.
"""

import contextlib
import dataclasses
import functools
import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

from nplora.formats import files, peft_adapter, run_files, safetensors
from nplora.formats.errors import (
    CorruptError,
    FormatError,
    UnsupportedError,
)
from nplora.formats.files import StrPath
from nplora.formats.run_files import CHECKPOINTS, LOG, REFERENCE, REFERENCE_MARK, holds_run
from nplora.formats.safetensors import SafetensorsFile
from nplora.formats.strict_json import json_values
from nplora.platform import files as system
from nplora.runtime.user_warning import warn_user
from nplora.trainer import checkpoint as checkpoints
from nplora.trainer.checkpoint import MARKS, Checkpoint
from nplora.trainer.directory_lock import DirectoryLock, open_ours

# A log without a header was written by an early version, or has lost its beginning.
_FIRST_RECORD = re.compile(
    rb'\{"event":"(header","nplora|start","total_steps|resume","step|step","step|epoch","epoch)":'
)
_MAX_LOG = 1 << 30
_LONGEST_LINE = 1 << 16


# Each of the following functions checks whether a run made a file.


def _is_log(reader: files.Reader) -> bool:
    """Whether the file is a log: it begins with a record, or with a part of a record if the disk was full."""
    head = bytes(reader[:64])
    is_cut = len(reader) < 64 and b"\n" not in head
    return bool(_FIRST_RECORD.match(head)) or (is_cut and b'{"event":"'.startswith(head[:10]))


def _is_generation(reader: files.Reader) -> bool:
    """Whether the file may be a checkpoint.

    A file that is not safetensors may be a damaged checkpoint, which `RunDirectory.latest` reports.
    """
    try:
        return bool(SafetensorsFile(reader, "checkpoint").metadata.keys() & MARKS)
    except FormatError:
        return True


def _is_reference(reader: files.Reader) -> bool:
    """Whether the file may be `reference.safetensors`.

    A file that is not safetensors may be a damaged `reference.safetensors`.
    """
    try:
        return REFERENCE_MARK in SafetensorsFile(reader, REFERENCE).metadata
    except FormatError:
        return True


_IS_OURS = {
    LOG: _is_log,
    REFERENCE: _is_reference,
    **dict.fromkeys(CHECKPOINTS, _is_generation),
}


class RunDirectory:
    """The directory of a run, which is created if needed, locked, and kept open until `close`.

    Args:
        overwrite: whether a new run deletes the adapter of an earlier run.
    Attributes:
        newest: the newest undamaged checkpoint, or None. The file is read when `newest` is first used. `save`
            sets `newest` to None.
        damaged: one sentence for each checkpoint that was found to be damaged. If the newer checkpoint is
            undamaged, the older one is not checked, except for its header.
        occupied: whether the directory held a checkpoint, damaged or not, when it was opened.
    Raises:
        BlockingIOError: another run writes to the directory; the message names its PID.
        UnsupportedError: a later version of nplora wrote a checkpoint.
        UnsafeError: a symbolic link has the name of a file of the run.
        FileExistsError: one of the files that the run would write exists, but was not made by a run. The file
            is left unchanged.
        OSError: the directory cannot be created or written.
    Warns:
        UserWarning: an unfinished file of a crashed run was removed.
    """

    def __init__(self, path: StrPath | files.Directory, overwrite: bool = False) -> None:
        self.damaged: list[str] = []
        self._overwrite = overwrite
        self._serials = [0, 0]  # the serials of the two checkpoints; 0: none
        self._slot = 0  # the index (0 or 1) of the checkpoint file that is replaced next
        self._step = 0  # the step of the newest checkpoint
        # The log of a run that overwrites an earlier run, in memory until the first checkpoint is written.
        self._first_log: bytearray | None = None
        self._descriptors: list[int] = []
        self._lock: DirectoryLock | None = None
        try:
            if not isinstance(path, files.Directory):
                os.makedirs(path, exist_ok=True)
            self._directory = files.Directory(path)
        except OSError as error:
            raise _unwritable(path, error) from error
        try:
            try:
                self._lock = DirectoryLock(self._directory)
                self._require_ours()
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
        """The current path of the directory. The path changes if the directory is renamed."""
        return Path(self._directory)

    def _require_ours(self) -> None:
        """Check that a run made the log, the checkpoints and the file `reference.safetensors`, if they exist.

        This check precedes the first write to the directory.
        """
        for name in {LOG, REFERENCE, *CHECKPOINTS}.intersection(system.list_in(self._directory.fd)):
            self._open(name, os.O_RDONLY)
            os.close(self._descriptors.pop())

    def _open(self, name: str, flags: int) -> int:
        descriptor = open_ours(self._directory, name, flags, _IS_OURS[name])
        self._descriptors.append(descriptor)
        return descriptor

    def _remove_unfinished(self) -> None:
        for file in files.unfinished(self._directory.fd, run_files.NAMES):
            system.remove_in(self._directory.fd, file)
            warn_user(f"{self.path / file}: removed, because a run that was killed left this file unfinished")

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
        """The metadata of the checkpoint `newest`."""
        slot = 1 - self._slot
        with safetensors.reading(self.path / CHECKPOINTS[slot], follow_links=False) as content:
            return content.metadata

    def latest(self) -> Checkpoint | None:
        """The checkpoint to continue from; None if there is none.

        If the run was killed while it deleted the files of an earlier run, the remaining files are deleted.

        Raises:
            CorruptError: all checkpoints are damaged.
        Warns:
            UserWarning: one checkpoint is damaged, and the other checkpoint is used.
        """
        if self.newest is None and self.damaged:
            raise CorruptError(
                f"{self.path}: no undamaged checkpoint is left: {'; '.join(self.damaged)}; "
                "--overwrite (overwrite=True) starts a new run"
            )
        if self.newest is not None:
            for problem in self.damaged:
                warn_user(f"{problem}; the other checkpoint, of step {self.newest.step}, is used")
            self._finish_dropping(self.newest)
        return self.newest

    def before(self, step: int) -> Checkpoint | None:
        """The newest undamaged checkpoint of a step before `step`; None if there is none."""
        found: Checkpoint | None = None
        for name in CHECKPOINTS:
            with contextlib.suppress(FormatError, OSError):
                checkpoint = checkpoints.read(self.path / name)
                if checkpoint.step < step and (found is None or found.step < checkpoint.step):
                    found = checkpoint
        return found

    def _finish_dropping(self, newest: Checkpoint) -> None:
        """Finish a call of `_drop_other` that a crash ended: replace the old log, delete the old adapter."""
        log = self._newest_metadata().get(run_files.FIRST_LOG)
        if log is None:
            return
        if self.read_log(newest.log_bytes) != log.encode():
            files.replace([self._new_log(log.encode())], self._directory)
            self._reopen_log()
        if peft_adapter.is_dropped(self.path):
            self._drop_adapter()

    def read_log(self, size: int) -> bytes:
        """The complete lines in the first `size` bytes of the log. The log may be shorter than `size`.

        Raises:
            FormatError, OSError: the log cannot be read.
        """
        new = self._first_log
        log = bytes((files.read(self.path / LOG, _MAX_LOG) if new is None else new)[:size])
        return log[: log.rfind(b"\n") + 1]

    def cut_log(self, size: int) -> None:
        """Truncate the log to the complete lines in the first `size` bytes of the log."""
        with files.disk_errors(self.path / LOG, f"cutting the log to {size:,} bytes failed"):
            self.log_bytes = min(self.log_bytes, size)
            start = max(0, self.log_bytes - _LONGEST_LINE)
            end = bytearray(self.log_bytes - start)
            count = system.read_at(self._log, memoryview(end), start)
            self.log_bytes = start + end[:count].rfind(b"\n") + 1
            os.ftruncate(self._log, self.log_bytes)

    def begin(self) -> None:
        """Begin a new run, with an empty log.

        The files of an earlier run stay unchanged until the first checkpoint of the new run is written. The
        first checkpoint replaces the earlier log and checkpoints, and also the earlier adapter if `overwrite`
        is set.
        """
        if self.occupied or (self._overwrite and peft_adapter.lies_in(self.path)):
            self._first_log, self.log_bytes = bytearray(), 0
        else:
            self.cut_log(0)

    def save(self, checkpoint: Checkpoint) -> None:
        """Replace the directory's older checkpoint. The first save of a new run replaces both checkpoints.

        If the newest checkpoint in the directory has the same step as `checkpoint`, the newest checkpoint is
        replaced instead of the older one. So after the next save, the two checkpoints have different steps.

        Raises:
            OSError: the checkpoint cannot be written. The checkpoints in the directory are unchanged, and the
                message says how many bytes were needed.
        """
        is_again = False
        if self._first_log is not None:
            self._drop_other(checkpoint)
        else:
            is_again = checkpoint.step == self._step and any(self._serials) and not self.damaged
        self._write(checkpoint, 1 - self._slot if is_again else self._slot)
        self._step = checkpoint.step

    def sync_log(self) -> None:
        """Flush the log to the disk, because the next checkpoint needs the history in the log.

        Raises:
            OSError: the flush has failed, so lines of the log may be lost.
        """
        with files.disk_errors(self.path / LOG, "the log may have lost lines, so no checkpoint is written"):
            system.sync(self._log)

    def _write(self, checkpoint: Checkpoint, slot: int, *more: files.NewFile, **metadata: str) -> None:
        numbered = dataclasses.replace(checkpoint, serial=max(self._serials) + 1, log_bytes=self.log_bytes)
        new = checkpoints.new_file(self.path / CHECKPOINTS[slot], numbered, metadata)
        files.replace([new, *more], self._directory)
        self.newest, self._serials[slot], self._slot = None, numbered.serial, 1 - slot
        self.damaged.clear()  # a damaged checkpoint is always replaced first

    def _drop_other(self, checkpoint: Checkpoint) -> None:
        """Write the first checkpoint of a run that overwrites an earlier run; delete the earlier run's files.

        The checkpoint contains the new log and a digest of the old adapter. Once the checkpoint's file is
        renamed, the directory holds the new run. After a later crash, `_finish_dropping` replaces the log and
        deletes the old adapter.
        """
        log = bytes(self._first_log or b"")
        metadata = {run_files.FIRST_LOG: log.decode()}
        digest = peft_adapter.tensors_digest(self.path) if self._overwrite else None
        if digest is not None:
            metadata[run_files.DROPPED_ADAPTER] = digest
        self._write(checkpoint, self._slot, self._new_log(log), **metadata)
        self._first_log = None
        self._reopen_log()
        if self._overwrite:
            self._drop_adapter()

    def _new_log(self, log: bytes) -> files.NewFile:
        return files.NewFile(self.path / LOG, len(log), [log])

    def _reopen_log(self) -> None:
        self._descriptors.remove(self._log)
        os.close(self._log)
        self._log = self._open(LOG, os.O_RDWR | os.O_APPEND)
        self.log_bytes = os.fstat(self._log).st_size

    def _drop_adapter(self) -> None:
        with files.disk_errors(self.path, "the adapter of an earlier run could not be removed"):
            for name in (peft_adapter.TENSORS, peft_adapter.CONFIG):
                with contextlib.suppress(FileNotFoundError):
                    system.remove_in(self._directory.fd, name)
            system.sync_directory(self._directory.fd)

    def log(self, record: Mapping[str, Any]) -> None:
        """Append a line of JSON to the log. NaN and infinity become null."""
        line = json.dumps(json_values(dict(record)), allow_nan=False, separators=(",", ":"))
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
        """Close the directory and its files, and unlock it."""
        if self._lock is not None:
            self._lock.close()
        while self._descriptors:
            os.close(self._descriptors.pop())
        self._directory.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def _unwritable(path: StrPath, error: OSError) -> OSError:
    """Make the error for a run directory that cannot be written. The errno selects the class of the error."""
    return OSError(error.errno, f"the run directory cannot be written: {error.strerror}", files.name(path))
