"""The functions of `files.py` for Windows.

Files are opened so that they can be renamed and removed while in use.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import glob
import os
import secrets
import sys
import time
from typing import TYPE_CHECKING

assert sys.platform == "win32" or not TYPE_CHECKING  # on other systems, type checkers skip what follows

with contextlib.suppress(ImportError):  # the module can be imported on every system
    import _winapi
    import msvcrt

_SHARED = 1 | 2 | 4  # FILE_SHARE_READ, FILE_SHARE_WRITE, FILE_SHARE_DELETE
_CREATE_NEW, _OPEN_EXISTING, _OPEN_ALWAYS = 1, 3, 4
_NORMAL = 0x80  # FILE_ATTRIBUTE_NORMAL
_DIRECTORY = 0x0200_0000  # FILE_FLAG_BACKUP_SEMANTICS
_LOCKED_BYTE = 1 << 40  # beyond the end of the file, because Windows lets no other process read a locked byte
# Windows' errors for: access denied, sharing violation, lock violation, and a file that is mapped.
_IN_USE = {5, 32, 33, 1224}
_UNRESOLVABLE = 1921  # ERROR_CANT_RESOLVE_FILENAME: a link that leads to itself or through too many links
_LONGEST = 1 << 15
_MARK = "[0-9a-f]" * 12  # a glob pattern for the texts of `secrets.token_hex(6)`
_TRIES = 100  # a millisecond apart, to open a file that is just being replaced


def open_file(path: str | os.PathLike[str], flags: int, directory: int | None, follow_links: bool) -> int:
    path = joined(directory, os.fspath(path))
    if not follow_links and os.path.islink(path):
        raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), path)
    access = {os.O_RDONLY: _winapi.GENERIC_READ, os.O_WRONLY: _winapi.GENERIC_WRITE}.get(
        flags & (os.O_RDONLY | os.O_WRONLY | os.O_RDWR), _winapi.GENERIC_READ | _winapi.GENERIC_WRITE
    )
    attributes = _NORMAL
    if not flags & os.O_CREAT:
        creation = _OPEN_EXISTING
        attributes |= _DIRECTORY  # a directory can be opened too, so that its kind can be reported
    else:
        creation = _CREATE_NEW if flags & os.O_EXCL else _OPEN_ALWAYS
    try:
        for _ in range(_TRIES):
            try:
                return _descriptor(path, access, creation, attributes, flags)
            except FileNotFoundError:
                if not _is_being_replaced(path):
                    raise
                time.sleep(0.001)
        return _descriptor(path, access, creation, attributes, flags)
    except PermissionError as error:
        if os.path.isdir(path):
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), path) from error
        raise


def open_directory(path: str, directory: int | None) -> int:
    path = joined(directory, path)
    if not os.path.isdir(path):
        os.stat(path)  # raises FileNotFoundError if nothing has this name
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), path)
    return _descriptor(path, 0, _OPEN_EXISTING, _DIRECTORY, os.O_RDONLY)


def _descriptor(path: str, access: int, creation: int, attributes: int, flags: int) -> int:
    try:
        handle = _winapi.CreateFile(path, access, _SHARED, 0, creation, attributes, 0)
    except OSError as error:
        if error.winerror == _UNRESOLVABLE:
            raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), path) from None
        raise type(error)(error.errno, error.strerror, path, error.winerror) from None
    try:
        return msvcrt.open_osfhandle(handle, flags & os.O_APPEND | os.O_NOINHERIT)
    except OSError:
        _winapi.CloseHandle(handle)
        raise


def path_of(descriptor: int) -> str:
    buffer = ctypes.create_unicode_buffer(_LONGEST)
    handle = ctypes.c_void_p(msvcrt.get_osfhandle(descriptor))
    if not ctypes.windll.kernel32.GetFinalPathNameByHandleW(handle, buffer, _LONGEST, 0):
        raise ctypes.WinError()
    path = buffer.value
    return path if path.startswith("\\\\?\\UNC\\") else path.removeprefix("\\\\?\\")


def joined(directory: int | None, name: str) -> str:
    return name if directory is None else os.path.join(path_of(directory), name)


def replace(old: str, new: str) -> None:
    moved = _moved_files(new)  # a file that appears later belongs to another process
    try:
        os.replace(old, new)
    except OSError as error:
        if error.winerror not in _IN_USE or not os.path.isfile(new):
            raise
        aside = _moved_name(new, secrets.token_hex(6))
        moved.append(aside)
        try:
            os.rename(new, aside)
            os.rename(old, new)
        except BaseException:
            # The first rename may have failed. Another process may have created `new`, and removed `aside`.
            with contextlib.suppress(FileNotFoundError, FileExistsError):
                os.rename(aside, new)
            raise
    # Moved files are removed last: after a crash between the two renames, one of them is the only copy.
    for path in moved:
        _remove(path)


def _moved_name(path: str, mark: str) -> str:
    """Return the name to which the mapped file `path` is moved before another file takes its place.

    `path` and `mark` may be patterns of `glob`.
    """
    folder, name = os.path.split(path)
    return os.path.join(folder, f".{name}.{mark}.old")


def _moved_files(path: str) -> list[str]:
    """Return the names of all files to which `path` was moved, and which still exist."""
    return glob.glob(_moved_name(glob.escape(path), _MARK))


def _is_being_replaced(path: str) -> bool:
    """Whether a file that did not exist a moment ago is between the two renames of `replace`, or was."""
    return bool(_moved_files(path)) or os.path.exists(path)


def _remove(path: str) -> None:
    with contextlib.suppress(OSError):  # the file is still mapped; the next call of `replace` tries again
        os.unlink(path)


def lock(descriptor: int, shared: bool) -> None:
    if shared or os.path.isdir(path_of(descriptor)):
        raise OSError(errno.ENOTSUP, "shared locks and locks on directories are not supported on Windows")
    before = os.lseek(descriptor, 0, os.SEEK_CUR)
    os.lseek(descriptor, _LOCKED_BYTE, os.SEEK_SET)
    try:
        msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)
    except OSError as error:
        raise BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN)) from error
    finally:
        os.lseek(descriptor, before, os.SEEK_SET)
