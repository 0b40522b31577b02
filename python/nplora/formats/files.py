"""Files on disk: read or mapped if they are regular, and written so that nobody ever sees half a file.

Every call to the file system that nplora's formats make is in this module.
"""

import contextlib
import errno
import fcntl
import hashlib
import mmap
import os
import re
import secrets
import stat
import time
from collections.abc import Container, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, Self, TypeAlias

from nplora.formats.errors import (
    CorruptError,
    FormatError,
    LimitError,
    NotFetchedError,
    TruncatedError,
    UnsafeError,
)
from nplora.runtime import mappings

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
_HASHED_AT_ONCE = 1 << 20
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
            raise CorruptError(
                f"{self.name}: the file changed while it was in use ({sizes}): put the original file back"
            )


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

    def is_at(self, path: StrPath) -> bool:
        """Whether a path still leads to this file, which another may have replaced."""
        try:
            return os.path.samestat(os.stat(path), os.fstat(self._fd))
        except OSError:
            return False

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


def sha256(path: StrPath) -> str:
    """The SHA-256 of a regular file, in hexadecimal digits. It is read in pieces. Raises as `read`."""
    digest = hashlib.sha256()
    with reading(path) as reader:
        for begin in range(0, len(reader), _HASHED_AT_ONCE):
            digest.update(reader[begin : begin + _HASHED_AT_ONCE])
    return digest.hexdigest()


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


def absolute(path: StrPath) -> str:
    """The path from the root. ".." stays in it: behind a link, that is not the name before it."""
    return str(Path(path).absolute())


class Directory(os.PathLike[str]):
    """A directory held open: it stays the same one, whatever it is renamed to and wherever the process moves.

    As a path, it is where the directory is now.

    Raises:
        OSError: it cannot be opened.
    """

    def __init__(self, path: "StrPath | Directory") -> None:
        held = path if isinstance(path, Directory) else None
        self._path: str = absolute(path) if held is None else held._path
        flags = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
        self.fd: int = os.open(
            self._path if held is None else ".", flags, dir_fd=None if held is None else held.fd
        )

    def is_at(self, path: StrPath) -> bool:
        """Whether this path leads to the directory."""
        try:
            return os.path.samestat(os.stat(path), os.fstat(self.fd))
        except OSError:
            return False

    def seen_from(self, path: StrPath) -> Path:
        """The path that was given, as long as it leads to the directory; else where the directory is now."""
        return Path(path if self.is_at(path) else self)

    def __fspath__(self) -> str:
        if not self.is_at(self._path):
            with contextlib.suppress(OSError):  # a system without /proc
                moved = os.readlink(f"/proc/self/fd/{self.fd}")
                return moved if self.is_at(moved) else self._path
        return self._path

    def close(self) -> None:
        if self.fd >= 0:
            os.close(self.fd)
        self.fd = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def require_directory(path: StrPath) -> None:
    """Raise NotADirectoryError where something other than a directory has the name of one to be written."""
    if os.path.exists(path) and not os.path.isdir(path):
        kind = kind_name(stat.S_IFMT(os.stat(path).st_mode))
        reason = f"is {kind}, expected a directory: name another one"
        raise NotADirectoryError(errno.ENOTDIR, reason, name(path))


def require_new(path: StrPath, overwrite: bool) -> None:
    """Raise FileExistsError for a path that is taken, unless it is a file and may be replaced.

    Raises:
        IsADirectoryError: it is a directory, which nothing replaces.
    """
    if not os.path.lexists(path):
        return
    _require_replaceable(Path(path))
    if not overwrite:
        raise FileExistsError(errno.EEXIST, f"the file is there; {OTHER_OR} replaces it", name(path))


def require_not_read(op: str, outputs: Iterable[StrPath], inputs: Iterable[tuple[str, StrPath]]) -> None:
    """Refuse to write over a file that the same call reads, under whatever name, link or hard link.

    Args:
        inputs: what each is called in the message, and its path. A path that does not exist is passed over.
    Raises:
        ValueError: an output is an input.
    """
    read = [(what, found) for what, path in inputs if (found := _stat(path)) is not None]
    for output in outputs:
        there = _stat(output)
        for what, found in read:
            if there is not None and os.path.samestat(there, found):
                raise ValueError(f"{op}: {name(output)} is the {what} itself, which is left as it is")


def _stat(path: StrPath) -> os.stat_result | None:
    try:
        return os.stat(path)
    except OSError:
        return None


def replace(files: Sequence[NewFile], directory: Directory | None = None) -> None:
    """Write each file beside its target, then rename them over their targets in the order given.

    Nothing is renamed before every byte of every file is on the disk, so a full disk leaves all the old
    files. A crash between two renames leaves the later files old. A new file has the permissions of the one
    that it replaces. A link is itself replaced, and the file that it leads to stays as it is. The next call
    removes what a crash left beside a target, unless another call is at work in that directory.

    Args:
        directory: the directory of all these files, held open. Their paths are then for messages only, and
            the last part of each is a name in that directory.
    Raises:
        OSError: a target is there and is not a regular file or a link to one, or the disk refuses; the
            temporary files are gone and the message says how many bytes were needed.
    """
    targets = [Path(file.path) for file in files]
    temporaries: list[str] = []
    with contextlib.ExitStack() as opened:
        parents = {target.parent: target for target in reversed(targets)}
        descriptors = {
            parent: opened.enter_context(_parent(target, directory)) for parent, target in parents.items()
        }
        places = [descriptors[target.parent] for target in targets]
        for place, target in zip(places, targets, strict=True):
            _require_replaceable(target, place)
        for parent, descriptor in descriptors.items():
            _clear_and_share(descriptor, {target.name for target in targets if target.parent == parent})
        try:
            for file, place, target in zip(files, places, targets, strict=True):
                temporaries.append(f".{target.name}.{secrets.token_hex(6)}.tmp")
                _write_new(file, place, temporaries[-1], _permissions(target.name, place))
            for place, temporary, target in zip(places, temporaries, targets, strict=True):
                os.replace(temporary, target.name, src_dir_fd=place, dst_dir_fd=place)
                with disk_errors(target.parent, f"{target.name} is in place, but a power cut may undo that"):
                    os.fsync(place)  # renames reach the disk in their order
        except BaseException:
            for place, temporary in zip(places, temporaries, strict=False):
                with contextlib.suppress(OSError):
                    os.unlink(temporary, dir_fd=place)
            raise


def _require_replaceable(target: Path, directory: int | None = None) -> None:
    """Refuse what a rename would destroy: a FIFO or a device would become a regular file."""
    place = target if directory is None else target.name or "."
    try:
        kind = stat.S_IFMT(os.stat(place, dir_fd=directory).st_mode)
    except FileNotFoundError:
        try:
            kind = stat.S_IFMT(os.stat(place, dir_fd=directory, follow_symlinks=False).st_mode)
        except FileNotFoundError:
            return
    if kind == stat.S_IFDIR:
        raise IsADirectoryError(errno.EISDIR, "is a directory, expected a file's name", str(target))
    if kind != stat.S_IFREG:
        raise FileExistsError(
            errno.EEXIST, f"is {kind_name(kind)}, only a regular file is replaced", str(target)
        )


def _permissions(target: str, directory: int) -> int | None:
    """Those of the file that is to be replaced, if there is one."""
    try:
        return os.stat(target, dir_fd=directory).st_mode & 0o777
    except OSError:
        return None


@contextlib.contextmanager
def _parent(target: Path, held: Directory | None) -> Iterator[int]:
    """The directory of a target, opened for this call alone: a lock belongs to what was opened."""
    with disk_errors(target, "its directory cannot be opened"):
        directory = Directory(target.parent if held is None else held)
    with directory:
        yield directory.fd


def unfinished(directory: int, targets: Container[str]) -> list[str]:
    """The temporary files that calls of `replace` left for these targets, or that are being written."""
    return [
        file
        for file in sorted(os.listdir(directory))
        if (match := _TEMPORARY.fullmatch(file)) and match[1] in targets
    ]


def _clear_and_share(directory: int, targets: set[str]) -> None:
    """Remove the temporary files that a crash left, then hold a shared lock against those who do the same.

    A file that another call is writing looks like a left-over, so nothing is removed where a lock is held, or
    where the file system has none.
    """
    with contextlib.suppress(OSError):
        fcntl.flock(directory, fcntl.LOCK_EX | fcntl.LOCK_NB)
        for file in unfinished(directory, targets):
            os.unlink(file, dir_fd=directory)
    with contextlib.suppress(OSError):
        fcntl.flock(directory, fcntl.LOCK_SH | fcntl.LOCK_NB)


def _write_new(file: NewFile, directory: int, temporary: str, permissions: int | None) -> None:
    """Write and fsync a file that does not exist yet."""
    progress = Progress(file.nbytes)
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    with disk_errors(file.path, progress):
        fd = os.open(temporary, flags, 0o666 if permissions is None else permissions, dir_fd=directory)
        try:
            if permissions is not None:
                with contextlib.suppress(PermissionError):  # a file system without permissions
                    os.fchmod(fd, permissions)
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
