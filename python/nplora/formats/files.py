"""Files on disk: read or mapped if they are regular, and written so that nobody ever sees half a file.

Every call to the file system that nplora's formats make is in this module.
"""

import contextlib
import errno
import fcntl
import mmap
import os
import re
import secrets
import stat
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, TypeAlias

from nplora import mappings
from nplora.formats.errors import (
    CorruptError,
    FormatError,
    LimitError,
    NotFetchedError,
    TruncatedError,
    UnsafeError,
)

StrPath: TypeAlias = str | os.PathLike[str]
Chunk: TypeAlias = bytes | memoryview

_LFS = b"version https://git-lfs"
_KINDS = {
    stat.S_IFREG: "a file",
    stat.S_IFDIR: "a directory",
    stat.S_IFIFO: "a FIFO",
    stat.S_IFCHR: "a character device",
    stat.S_IFBLK: "a block device",
    stat.S_IFSOCK: "a socket",
    stat.S_IFLNK: "a symbolic link to nothing",
}
OTHER_OR = "name another one, or --overwrite (overwrite=True)"  # a way out of what would be replaced
_LEAST_MAPPED = 1 << 20
_COARSEST_TICK_NS = 2_000_000_000  # FAT counts in 2 seconds, Linux's own in at most 10 ms
_TEMPORARY = re.compile(r"\.(.+)\.[0-9a-f]{12}\.tmp", re.DOTALL)


def kind_name(kind: int) -> str:
    """What stat.S_IFMT tells, in words."""
    return _KINDS.get(kind, "something else")


def suffix(path: StrPath) -> str:
    """The last suffix of a path, in lower case: ".gguf" also of MODEL.GGUF."""
    return Path(path).suffix.lower()


def name(path: StrPath) -> str:
    """The path as messages show it."""
    return os.fsdecode(path)


def require_named(op: str, **paths: StrPath | None) -> None:
    """Refuse an empty path, as an unset variable gives: it would be the working directory."""
    for what, path in paths.items():
        if path is not None and not os.fspath(path):
            raise ValueError(f"{op}: {what} is an empty path")


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
            raise FormatError(f"{name(path)}: {kind_name(kind)}, expected a regular file")
        yield fd
    finally:
        os.close(fd)


class Stamp(NamedTuple):
    """What tells whether a file is the one that it was, as well as a file system can."""

    name: str
    device: int
    inode: int
    size: int
    mtime_ns: int

    @property
    def settled(self) -> bool:
        """Whether another write could not leave the same stamp: clocks of file systems tick coarsely."""
        return time.time_ns() - self.mtime_ns > _COARSEST_TICK_NS

    def require_unchanged(self) -> None:
        """Raise CorruptError if the file was written to since: what was computed from its mapping is wrong.

        A file that was renamed over it is another file, and the mapping still shows the old one.
        """
        try:
            found = os.stat(self.name)
        except OSError:
            return
        if (found.st_dev, found.st_ino) != (self.device, self.inode):
            return
        if (found.st_size, found.st_mtime_ns) != (self.size, self.mtime_ns):
            sizes = (
                f"{self.size:,} bytes, now {found.st_size:,}" if found.st_size != self.size else "written to"
            )
            raise CorruptError(f"{self.name}: the file changed while it was in use ({sizes}); start again")


class Reader:
    """A regular file held open: `reader[begin:end]` is that piece of it, and nothing else is read."""

    def __init__(self, fd: int, path: StrPath) -> None:
        self._fd = fd
        self._name = name(path)
        found = os.fstat(fd)
        self._size = found.st_size
        self.stamp = Stamp(self._name, found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns)

    def __len__(self) -> int:
        return self._size

    def __getitem__(self, piece: slice) -> memoryview:
        begin, end, _ = piece.indices(self._size)
        try:
            data = _memory(end - begin)
        except (MemoryError, OSError, OverflowError) as error:
            raise MemoryError(f"{self._name}: no memory for {end - begin:,} bytes") from error
        while begin < end:
            count = os.preadv(self._fd, [data[begin - end :]], begin)
            if count == 0:
                raise TruncatedError(f"{self._name}: ends at byte {begin:,}, its size was {self._size:,}")
            begin += count
        return data.toreadonly()

    def map(self) -> mmap.mmap | memoryview:
        """A read-only mapping of the whole file, which outlives the reader. An empty file has none: b"".

        If the file is cut short later, whoever reads beyond its end is ended by a message: `mappings.watch`.
        """
        if not self._size:
            return memoryview(b"")
        try:
            mapping = mmap.mmap(self._fd, self._size, access=mmap.ACCESS_READ)
        except ValueError as error:
            raise TruncatedError(f"{self._name}: it was cut short, its size was {self._size:,}") from error
        mappings.watch(mapping, self._name)
        return mapping


def _memory(nbytes: int) -> memoryview:
    """Writable bytes. Many are a mapping of their own: malloc might keep them when they are let go of."""
    return memoryview(bytearray(nbytes) if nbytes < _LEAST_MAPPED else mmap.mmap(-1, nbytes))


@contextlib.contextmanager
def reading(path: StrPath, follow_links: bool = True) -> Iterator[Reader]:
    """Hold a regular file open, to be read piece by piece.

    Raises:
        FormatError: a directory, FIFO or device. NotFetchedError: Git LFS's pointer to the file.
        UnsafeError: a symbolic link, if they are not followed.
        TruncatedError: it shrank meanwhile. MemoryError: a piece that does not fit in memory.
        OSError: it cannot be opened or read.
    """
    with _open_regular(path, follow_links) as fd:
        reader = Reader(fd, path)
        if reader[: len(_LFS)] == _LFS:
            raise NotFetchedError(f"{name(path)}: Git LFS's pointer to the file, which git lfs pull fetches")
        yield reader


def read(path: StrPath, limit: int | None = None, follow_links: bool = True) -> memoryview:
    """The bytes of a regular file, read-only. Raises as `reading`, and LimitError for more than `limit`."""
    with reading(path, follow_links) as reader:
        if limit is not None and len(reader) > limit:
            raise LimitError(f"{name(path)}: {len(reader):,} bytes, at most {limit:,} are read")
        return reader[:]


def cached(path: Path) -> Path:
    """Where a link in Hugging Face's cache leads, snapshots/REVISION/NAME to blobs/DIGEST; else the path.

    For names that come with a model, of which no other link is followed.
    """
    cache, target = path.parent.resolve().parent, path.resolve()
    is_cached = path.is_symlink() and cache.name == "snapshots" and target.parent == cache.parent / "blobs"
    return target if is_cached else path


@dataclass(frozen=True)
class NewFile:
    """A file to be written: where, how many bytes, and the bytes, which may be made one chunk at a time."""

    path: StrPath
    nbytes: int
    chunks: Iterable[Chunk]


def exactly(nbytes: int, chunks: Iterable[Chunk], where: str) -> Iterator[Chunk]:
    """The chunks, which must come to so many bytes: a header that says so is written already."""
    done = 0
    for chunk in chunks:
        done += memoryview(chunk).nbytes
        yield chunk
    if done != nbytes:
        raise ValueError(f"{where}: {done:,} bytes came, expected {nbytes:,}")


@dataclass
class Progress:
    """How far a file is written; its text ends the message of an error."""

    nbytes: int
    done: int = 0

    def __str__(self) -> str:
        return f"{self.nbytes:,} bytes were to be written, {self.done:,} were"


@contextlib.contextmanager
def disk_errors(path: StrPath, note: object) -> Iterator[None]:
    """Give an OSError of the body the file that it is about, and `note`: a text, or a `Progress` by then."""
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, f"{error.strerror or error}: {note}", name(path)) from error


def require_directory(path: StrPath) -> None:
    """Raise NotADirectoryError where something else lies in the place of a directory to be written."""
    if os.path.exists(path) and not os.path.isdir(path):
        kind = kind_name(stat.S_IFMT(os.stat(path).st_mode))
        reason = f"is {kind}, expected a directory: name another one"
        raise NotADirectoryError(errno.ENOTDIR, reason, name(path))


def require_new(path: StrPath, overwrite: bool) -> None:
    """Raise FileExistsError where a file lies that is not to be replaced."""
    if Path(path).is_file() and not overwrite:
        raise FileExistsError(errno.EEXIST, f"the file is there; {OTHER_OR} replaces it", name(path))


def replace(files: Sequence[NewFile]) -> None:
    """Write each file beside its target, then rename them over their targets in the order given.

    Nothing is renamed before every byte of every file is on the disk, so a full disk leaves all the old
    files. A crash between two renames leaves the later ones old. What a crash left beside a target is removed
    by the next call, unless another one is at work in that directory.

    Raises:
        OSError: a target is there and is not a regular file or a link to one, or the disk refuses; the
            temporary files are gone and the message says how many bytes were needed.
    """
    targets = [Path(file.path) for file in files]
    for target in targets:
        _require_replaceable(target)
    temporaries: list[Path] = []
    with contextlib.ExitStack() as opened:
        directories = {target.parent: opened.enter_context(_directory(target)) for target in targets}
        for path, fd in directories.items():
            _clear_and_share(fd, {target.name for target in targets if target.parent == path})
        try:
            for file, target in zip(files, targets, strict=True):
                temporaries.append(target.with_name(f".{target.name}.{secrets.token_hex(6)}.tmp"))
                _write_new(temporaries[-1], file)
            for temporary, target in zip(temporaries, targets, strict=True):
                os.replace(temporary, target)
        except BaseException:
            for temporary in temporaries:
                with contextlib.suppress(OSError):
                    temporary.unlink()
            raise
        for path, fd in directories.items():
            with disk_errors(path, "the new files are in place, but a power cut may undo that"):
                os.fsync(fd)


def _require_replaceable(target: Path) -> None:
    """Refuse what a rename would destroy: a FIFO or a device would become a regular file."""
    try:
        kind = stat.S_IFMT(os.stat(target).st_mode)
    except FileNotFoundError:
        if not target.is_symlink():
            return
        kind = stat.S_IFLNK
    if kind == stat.S_IFDIR:
        raise IsADirectoryError(errno.EISDIR, "is a directory, expected a file's name", str(target))
    if kind != stat.S_IFREG:
        raise FileExistsError(
            errno.EEXIST, f"is {kind_name(kind)}, only a regular file is replaced", str(target)
        )


@contextlib.contextmanager
def _directory(target: Path) -> Iterator[int]:
    """The directory of a target, open for as long as files are written there."""
    with disk_errors(target, "its directory cannot be opened"):
        fd = os.open(target.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield fd
    finally:
        os.close(fd)


def _clear_and_share(directory: int, targets: set[str]) -> None:
    """Remove the temporary files that a crash left, then hold a shared lock against those who do the same.

    A file that another call is writing looks like a left-over, so nothing is removed where a lock is held, or
    where the file system has none.
    """
    with contextlib.suppress(OSError):
        fcntl.flock(directory, fcntl.LOCK_EX | fcntl.LOCK_NB)
        for file in os.listdir(directory):
            if (match := _TEMPORARY.fullmatch(file)) and match[1] in targets:
                os.unlink(file, dir_fd=directory)
    with contextlib.suppress(OSError):
        fcntl.flock(directory, fcntl.LOCK_SH | fcntl.LOCK_NB)


def _write_new(path: Path, file: NewFile) -> None:
    """Write and fsync a file that does not exist yet."""
    progress = Progress(file.nbytes)
    with disk_errors(file.path, progress):
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
        try:
            for chunk in file.chunks:
                write(fd, chunk, progress)
            os.fsync(fd)
        finally:
            os.close(fd)


def write(fd: int, chunk: Chunk, progress: Progress) -> None:
    """Write all of a chunk, however little the system takes at a time, and count it."""
    rest = memoryview(chunk)
    while rest:
        count = os.write(fd, rest)
        rest = rest[count:]
        progress.done += count
