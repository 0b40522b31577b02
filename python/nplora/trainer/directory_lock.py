"""DirectoryLock: lets only one process at a time write to a directory."""

import contextlib
import errno
import os
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Self

from nplora.formats import files
from nplora.formats.errors import TruncatedError, UnsafeError
from nplora.formats.run_files import LOCK
from nplora.platform import files as system


class DirectoryLock:
    """A locked file in a directory. The file contains the PID of this process, and is locked until `close`.

    The operating system unlocks the file when the process ends for any reason. So the lock file of a killed
    process locks nothing.

    Args:
        directory: the directory, which must stay open until `close`.
        what: a name for the process that already has the lock, used in the error message.
    Raises:
        BlockingIOError: another process has the lock; the message names its PID.
        UnsafeError: a symbolic link has the name of the lock file.
        FileExistsError: a file of this name is not a lock. The file is left unchanged.
        OSError: the file cannot be created or written.
    """

    def __init__(self, directory: files.Directory, what: str = "another run") -> None:
        self._directory = directory
        self._descriptor = self._lock(what)
        self._pid = os.getpid()  # forked children must not unlock
        try:
            os.ftruncate(self._descriptor, 0)
            system.write_at(self._descriptor, f"{self._pid}\n".encode(), 0)
        except BaseException:
            self.close()
            raise

    def _lock(self, what: str) -> int:
        """Open and lock the file. If another process removes the file between the two actions, try again."""
        while True:
            descriptor = open_ours(self._directory, LOCK, os.O_RDWR | os.O_CREAT, _is_lock)
            try:
                system.lock(descriptor)
                if self._is_in_directory(descriptor):
                    return descriptor
            except BlockingIOError as error:
                pid = _content(descriptor).decode(errors="replace").strip() or "unknown"
                reason = f"{what} (process {pid}) is writing to this directory"
                os.close(descriptor)
                raise BlockingIOError(error.errno, reason, os.fspath(self._directory)) from error
            except BaseException:
                os.close(descriptor)
                raise
            os.close(descriptor)

    def _is_in_directory(self, descriptor: int) -> bool:
        """Whether the lock file in the directory is still the file that this object has opened."""
        try:
            found = system.stat_in(self._directory.fd, LOCK, follow_links=False)
        except FileNotFoundError:
            return False
        return os.path.samestat(os.fstat(descriptor), found)

    def close(self) -> None:
        """Unlock the directory.

        This process removes the lock file first, and then releases its lock on the file. In the opposite
        order, another process could lock the file just before this process removes it.
        """
        if self._descriptor < 0:
            return
        if self._pid == os.getpid():
            with contextlib.suppress(OSError):
                if self._is_in_directory(self._descriptor):
                    system.remove_in(self._directory.fd, LOCK)
        os.close(self._descriptor)
        self._descriptor = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def open_ours(
    directory: files.Directory, name: str, flags: int, is_ours: Callable[[files.Reader], bool]
) -> int:
    """Open a file of a run. Do not follow a symbolic link, and do not wait if the file is a FIFO.

    Args:
        is_ours: a function that decides from the content of a file whether a run may have made the file.
    Raises:
        UnsafeError: a symbolic link has this name.
        FileExistsError: the file is not a regular file, or no run made it.
        OSError: the file cannot be opened.
    """
    path = Path(directory, name)
    try:
        descriptor = system.open_file(name, flags, directory=directory.fd, follow_links=False, wait=False)
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise UnsafeError(f"{path}: a symbolic link, expected a regular file") from error
        raise
    try:
        kind = stat.S_IFMT(os.fstat(descriptor).st_mode)
        if kind != stat.S_IFREG:
            what = files.kind_name(kind)
            raise FileExistsError(errno.EEXIST, f"{name} is {what}, expected a regular file")
        if not is_ours(files.Reader(descriptor, path)):
            reason = f"the file {name} was not made by a run: move that file, or choose another directory"
            raise FileExistsError(errno.EEXIST, reason)
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def _content(descriptor: int) -> bytes:
    """The first bytes of a file."""
    content = bytearray(20)
    return bytes(content[: system.read_at(descriptor, memoryview(content), 0)])


def _is_lock(reader: files.Reader) -> bool:
    """Whether the file is a lock: it is empty or contains a process ID."""
    try:
        text = bytes(reader[:32]).strip()
    except TruncatedError:  # a run is locking the file now
        return True
    return len(reader) <= 32 and (not text or text.isdigit())
