"""Files on disk: read or mapped if they are regular, and written so that nobody ever sees half a file.

Every call to the file system that nplora's formats make is in this module.
"""

import contextlib
import errno
import mmap
import os
import secrets
import stat
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

from nplora.formats.errors import FormatError, LimitError, TruncatedError, UnsafeError

StrPath: TypeAlias = str | os.PathLike[str]
Chunk: TypeAlias = bytes | memoryview

_KINDS = {
    stat.S_IFDIR: "a directory",
    stat.S_IFIFO: "a FIFO",
    stat.S_IFCHR: "a character device",
    stat.S_IFBLK: "a block device",
}


def name(path: StrPath) -> str:
    """The path as messages show it."""
    return os.fsdecode(path)


@contextlib.contextmanager
def _open_regular(path: StrPath, follow_links: bool) -> Iterator[int]:
    # O_NONBLOCK: opening a FIFO that nobody writes to would otherwise wait for ever.
    flags = os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC | (0 if follow_links else os.O_NOFOLLOW)
    try:
        fd = os.open(path, flags)
    except OSError as error:
        if error.errno == errno.ELOOP and os.path.islink(path):
            raise UnsafeError(f"{name(path)}: a symbolic link, expected a regular file") from error
        raise
    try:
        kind = stat.S_IFMT(os.fstat(fd).st_mode)
        if kind != stat.S_IFREG:
            raise FormatError(f"{name(path)}: {_KINDS.get(kind, 'something else')}, expected a regular file")
        yield fd
    finally:
        os.close(fd)


def read(path: StrPath, limit: int | None = None, follow_links: bool = True) -> memoryview:
    """The bytes of a regular file, read-only.

    Raises:
        FormatError: a directory, FIFO or device.
        UnsafeError: a symbolic link, if they are not followed.
        LimitError: more than `limit` bytes.
        TruncatedError: it shrank meanwhile.
        OSError: it cannot be opened or read.
    """
    with _open_regular(path, follow_links) as fd:
        size = os.fstat(fd).st_size
        if limit is not None and size > limit:
            raise LimitError(f"{name(path)}: {size:,} bytes, at most {limit:,} are read")
        data = memoryview(bytearray(size))
        done = 0
        while done < size:
            count = os.readv(fd, [data[done:]])
            if count == 0:
                raise TruncatedError(f"{name(path)}: ends at byte {done:,}, its size was {size:,}")
            done += count
        return data.toreadonly()


def map_readonly(path: StrPath, follow_links: bool = True) -> mmap.mmap | memoryview:
    """A read-only mapping of a regular file (an empty one cannot be mapped and is read). Raises as `read`."""
    with _open_regular(path, follow_links) as fd:
        if os.fstat(fd).st_size:
            return mmap.mmap(fd, 0, access=mmap.ACCESS_READ)
    return memoryview(b"")


@dataclass(frozen=True)
class NewFile:
    """A file to be written: where, how many bytes, and the bytes, which may be made one chunk at a time."""

    path: StrPath
    nbytes: int
    chunks: Iterable[Chunk]


def replace(files: Sequence[NewFile]) -> None:
    """Write each file beside its target, then rename them over their targets in the order given.

    Nothing is renamed before every byte of every file is on the disk, so a full disk leaves all the old
    files. A crash between two renames leaves the later ones old.

    Raises:
        OSError: a target is a directory, or the disk refuses; the temporary files are gone and the message
            says how many bytes were needed.
    """
    temporaries: list[Path] = []
    targets = [Path(file.path) for file in files]
    try:
        for file, target in zip(files, targets, strict=True):
            if target.is_dir():
                raise IsADirectoryError(errno.EISDIR, "is a directory, expected a file's name", str(target))
            temporaries.append(target.with_name(f".{target.name}.{secrets.token_hex(6)}.tmp"))
            _write_new(temporaries[-1], file)
        for temporary, target in zip(temporaries, targets, strict=True):
            os.replace(temporary, target)
    except BaseException:
        for temporary in temporaries:
            with contextlib.suppress(OSError):
                temporary.unlink()
        raise
    for directory in dict.fromkeys(target.parent for target in targets):
        _sync_directory(directory)


def _write_new(path: Path, file: NewFile) -> None:
    """Write and fsync a file that does not exist yet."""
    done = 0
    try:
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
        try:
            for chunk in file.chunks:
                rest = memoryview(chunk)
                while rest:
                    count = os.write(fd, rest)
                    rest, done = rest[count:], done + count
            os.fsync(fd)
        finally:
            os.close(fd)
    except OSError as error:
        reason = f"{error.strerror}: {file.nbytes:,} bytes were to be written, {done:,} were"
        raise OSError(error.errno, reason, str(file.path)) from error


def _sync_directory(path: Path) -> None:
    """Make the renames in a directory last: without it a power cut may undo them."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
