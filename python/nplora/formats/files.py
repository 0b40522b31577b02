"""Reads, maps and replaces regular files. Files are replaced as a whole: no reader sees a half-written file.

All file-system calls of nplora's formats are in this module.
"""

import contextlib
import errno
import hashlib
import mmap
import os
import re
import secrets
import stat
import time
from collections.abc import Callable, Container, Iterable, Iterator, Sequence
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
    brief,
)
from nplora.platform import files as system
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
    stat.S_IFLNK: "a broken symbolic link",
}
# The end of messages about existing output.
OTHER_OR = "name another one, or replace it with --overwrite (overwrite=True)"
_LEAST_MAPPED = 1 << 20
_HASHED_AT_ONCE = 1 << 20
_COARSEST_TICK_NS = 2_000_000_000  # FAT stores times in steps of 2 s; Linux file systems in at most 10 ms
_TEMPORARY = re.compile(r"\.(.+)\.[0-9a-f]{12}\.tmp", re.DOTALL)


def kind_name(kind: int) -> str:
    """Name a kind of file in words. `kind` is a result of stat.S_IFMT."""
    return _KINDS.get(kind, "something else")


def suffix(path: StrPath) -> str:
    """The last suffix of a path in lower case: ".gguf" for MODEL.GGUF."""
    return Path(path).suffix.lower()


def name(path: StrPath) -> str:
    """The path as text, for messages."""
    return os.fsdecode(path)


def require_named(op: str, **paths: StrPath | None) -> None:
    """Raise an error if an argument is not a path, or is an empty path.

    An empty path would mean the working directory, and often comes from an unset shell variable.

    Raises:
        TypeError: an argument is not a path. ValueError: a path is empty.
    """
    for what, path in paths.items():
        if path is None:
            continue
        if not isinstance(path, str | os.PathLike):
            raise TypeError(f"{op}: {what} is {brief(path)}, expected a path")
        if not os.fspath(path):
            raise ValueError(f"{op}: {what} is an empty path")


@contextlib.contextmanager
def _open_regular(path: StrPath, follow_links: bool) -> Iterator[int]:
    try:  # opening a FIFO that has no writer would wait for ever
        fd = system.open_file(path, os.O_RDONLY, follow_links=follow_links, wait=False)
    except OSError as error:
        if error.errno == errno.ELOOP and os.path.islink(path):
            why = " that leads to itself or through too many links" if follow_links else ""
            raise UnsafeError(f"{name(path)}: a symbolic link{why}, expected a regular file") from error
        raise
    try:
        kind = stat.S_IFMT(os.fstat(fd).st_mode)
        if kind != stat.S_IFREG:
            raise FormatError(f"{name(path)}: {kind_name(kind)}, expected a regular file")
        yield fd
    finally:
        os.close(fd)


class Stamp(NamedTuple):
    """Identifies one version of a file.

    If two stamps of a file are equal, the file did not change between them. There is one exception: if two
    writes happen within one tick of the file system's clock, the second write may leave the stamp unchanged.
    """

    name: str
    device: int
    inode: int
    size: int
    mtime_ns: int

    @property
    def settled(self) -> bool:
        """Whether the last write was so long ago that any later write changes the stamp.

        A file system's clock may tick only every two seconds. Two writes within one tick have the same time.
        """
        return time.time_ns() - self.mtime_ns > _COARSEST_TICK_NS

    def require_unchanged(self) -> None:
        """Raise CorruptError if the file was modified after this stamp was taken.

        A memory map of a modified file shows the new data. If the name now belongs to a new file, no error is
        raised, because a memory map of the old file still shows the old data.
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
    """An open regular file. `reader[begin:end]` reads the bytes from `begin` to `end`."""

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
            count = system.read_at(self._fd, data[begin - end :], begin)
            if count == 0:
                raise TruncatedError(
                    f"{self._name}: the file ends at byte {begin:,}, but had {self._size:,} bytes "
                    "when it was opened"
                )
            begin += count
        return data.toreadonly()

    def is_at(self, path: StrPath) -> bool:
        """Whether `path` still leads to this file, and not to a file that has replaced it."""
        try:
            return os.path.samestat(os.stat(path), os.fstat(self._fd))
        except OSError:
            return False

    def map(self) -> mmap.mmap | memoryview:
        """Map the whole file read-only. The mapping stays valid after the reader closes.

        If the file is truncated later, an access beyond its new end terminates the process with a message
        (see `mappings.watch`).
        """
        if not self._size:
            return memoryview(b"")
        try:
            mapping = mmap.mmap(self._fd, self._size, access=mmap.ACCESS_READ)
        except ValueError as error:
            raise TruncatedError(
                f"{self._name}: the file was cut short: it had {self._size:,} bytes when it was opened"
            ) from error
        mappings.watch(mapping, self._name)
        return mapping


def _memory(nbytes: int) -> memoryview:
    """Allocate writable memory. When a large block is freed, its memory returns to the system at once."""
    return memoryview(bytearray(nbytes) if nbytes < _LEAST_MAPPED else mmap.mmap(-1, nbytes))


@contextlib.contextmanager
def reading(path: StrPath, follow_links: bool = True) -> Iterator[Reader]:
    """Open a regular file for a `with` body that reads the file in parts.

    Raises:
        FormatError: the path is a directory, FIFO or device.
        NotFetchedError: the file is a Git LFS pointer.
        UnsafeError: the path is a symbolic link and `follow_links` is False, or the link leads to itself or
            through too many links.
        TruncatedError: the file shrank while it was read.
        MemoryError: the requested bytes do not fit in memory.
        OSError: the file cannot be opened or read.
    """
    with _open_regular(path, follow_links) as fd:
        reader = Reader(fd, path)
        if reader[: len(_LFS)] == _LFS:
            raise NotFetchedError(f"{name(path)}: is a Git LFS pointer; fetch the file with git lfs pull")
        yield reader


def read(path: StrPath, limit: int | None = None, follow_links: bool = True) -> memoryview:
    """Read a whole regular file.

    Raises the errors of `reading`, and LimitError if the file has more than `limit` bytes.
    """
    with reading(path, follow_links) as reader:
        if limit is not None and len(reader) > limit:
            raise LimitError(f"{name(path)}: {len(reader):,} bytes, expected at most {limit:,}")
        return reader[:]


def sha256(path: StrPath) -> str:
    """The SHA-256 of a regular file as hexadecimal digits. Raises the errors of `reading`."""
    digest = hashlib.sha256()
    with reading(path) as reader:
        for begin in range(0, len(reader), _HASHED_AT_ONCE):
            digest.update(reader[begin : begin + _HASHED_AT_ONCE])
    return digest.hexdigest()


def cached(path: Path) -> Path:
    """If `path` is a link of Hugging Face's cache, return the link's target, else `path`.

    The cache's links lead from snapshots/REVISION/NAME to blobs/DIGEST. A path that comes from a model's
    files may be such a link, but must not be any other symbolic link.
    """
    cache, target = path.parent.resolve().parent, path.resolve()
    is_cached = path.is_symlink() and cache.name == "snapshots" and target.parent == cache.parent / "blobs"
    return target if is_cached else path


@dataclass(frozen=True)
class NewFile:
    """A file to write: its path, its size, and its bytes, which may be produced one chunk at a time."""

    path: StrPath
    nbytes: int
    chunks: Iterable[Chunk]


def exactly(nbytes: int, chunks: Iterable[Chunk], where: str) -> Iterator[Chunk]:
    """Yield the chunks, then check that their total size is `nbytes`, the size in the file's header."""
    done = 0
    for chunk in chunks:
        done += memoryview(chunk).nbytes
        yield chunk
    if done != nbytes:
        raise ValueError(f"{where}: got {done:,} bytes, expected {nbytes:,}")


@dataclass
class Progress:
    """Counts how many bytes of a file have been written. The count appears in the message of an OSError."""

    nbytes: int
    done: int = 0

    def __str__(self) -> str:
        return f"{self.done:,} of {self.nbytes:,} bytes were written"


@contextlib.contextmanager
def disk_errors(path: StrPath, note: object) -> Iterator[None]:
    """Add the file's name and `note` to an OSError that the `with` body raises."""
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, f"{error.strerror or error}: {note}", name(path)) from error


def absolute(path: StrPath) -> str:
    """Make a path absolute. ".." is kept: after a symbolic link, it means the parent of the link's target."""
    return str(Path(path).absolute())


class Directory(os.PathLike[str]):
    """An open directory, which stays usable if it is renamed or if the working directory changes.

    The object can be used as a path: it stands for the directory's current location.

    Raises:
        OSError: the directory cannot be opened.
    """

    def __init__(self, path: "StrPath | Directory") -> None:
        held = path if isinstance(path, Directory) else None
        self._path: str = absolute(path) if held is None else held._path
        self.fd: int = (
            system.open_directory(self._path) if held is None else system.open_directory(".", held.fd)
        )

    def is_at(self, path: StrPath) -> bool:
        """Whether `path` leads to this directory."""
        try:
            return os.path.samestat(os.stat(path), os.fstat(self.fd))
        except OSError:
            return False

    def seen_from(self, path: StrPath) -> Path:
        """Return `path` if it still leads to this directory, else the directory's current location."""
        return Path(path if self.is_at(path) else self)

    def __fspath__(self) -> str:
        if not self.is_at(self._path):
            with contextlib.suppress(OSError):  # the system may not know the directory's path
                moved = system.path_of(self.fd)
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
    """Raise NotADirectoryError if the path exists but is not a directory."""
    if os.path.exists(path) and not os.path.isdir(path):
        kind = kind_name(stat.S_IFMT(os.stat(path).st_mode))
        reason = f"is {kind}, expected a directory"
        raise NotADirectoryError(errno.ENOTDIR, reason, name(path))


@contextlib.contextmanager
def creating_directory(path: StrPath) -> Iterator[dict[Path, os.stat_result]]:
    """Create the directory, unless it exists.

    Yields a dict, to which the `with` body adds each new file and its `os.stat`, after the file was written.
    If the body raises an error, these files are removed, unless another program has replaced them. Then the
    directory is removed if it is new and empty.
    """
    is_new = True
    try:
        os.mkdir(path)
    except OSError:  # if the directory exists, this is not always a FileExistsError
        if not os.path.isdir(path):
            raise
        is_new = False
    written = dict[Path, os.stat_result]()
    try:
        yield written
    except BaseException:
        for file, found in written.items():
            with contextlib.suppress(OSError):
                if os.path.samestat(os.stat(file), found):
                    file.unlink()
        if is_new:
            with contextlib.suppress(OSError):
                os.rmdir(path)
        raise


def require_new(path: StrPath, overwrite: bool) -> None:
    """Raise FileExistsError if the path exists, unless it is a file and `overwrite` is set.

    Raises:
        IsADirectoryError: the path is a directory. A directory is never replaced.
    """
    if not os.path.lexists(path):
        return
    _require_replaceable(Path(path))
    if not overwrite:
        raise FileExistsError(errno.EEXIST, f"the file already exists; {OTHER_OR}", name(path))


def require_parent(path: StrPath) -> None:
    """Raise FileNotFoundError if the directory of a file to write does not exist."""
    parent = Path(path).parent
    if not parent.is_dir():
        raise FileNotFoundError(errno.ENOENT, "the directory of the new file does not exist", name(parent))


def require_not_read(op: str, outputs: Iterable[StrPath], inputs: Iterable[tuple[str, StrPath]]) -> None:
    """Raise an error if one of the paths `outputs` leads to the same file as one of the paths in `inputs`.

    A symbolic or hard link to an input counts as that input.

    Args:
        inputs: pairs (the file's name in error messages, path). Paths that do not exist are ignored.
    Raises:
        ValueError: an output is also an input.
    """
    read = [(what, found) for what, path in inputs if (found := _stat(path)) is not None]
    for output in outputs:
        there = _stat(output)
        for what, found in read:
            if there is not None and os.path.samestat(there, found):
                raise ValueError(f"{op}: {name(output)} is the {what} itself, which is never overwritten")


def _stat(path: StrPath) -> os.stat_result | None:
    try:
        return os.stat(path)
    except OSError:
        return None


def replace(
    files: Sequence[NewFile],
    directory: Directory | None = None,
    check: Callable[[list[Path]], None] = lambda paths: None,
) -> None:
    """Write each file to a temporary name beside its target, then rename all files in the given order.

    No file is renamed until all bytes of all files are on disk, so a full disk leaves every old file intact.
    After a crash between two renames, the files that were not yet renamed still have their old content. A new
    file takes the permissions of the file that it replaces. If a target is a symbolic link, the link is
    replaced and the linked file stays unchanged. The next call of `replace` removes temporary files that a
    crash left, unless another call is writing in the same directory.

    Args:
        directory: an open directory that all files are written into. If `directory` is given, only the last
            component of each path is used as the file's name. Messages show the whole path.
        check: a function that is called with the paths of the temporary files before the files are renamed.
            If `check` raises an error, the temporary files are removed, and all old files stay unchanged.
    Raises:
        OSError: a target exists and is not a regular file (or a link to one), or a write fails, for example
            on a full disk. After a failed write, the temporary files are removed, and the message gives the
            number of needed bytes.
    """
    with _temporaries(files, directory) as written:
        check([target.parent / temporary for _, temporary, target in written])
        for place, temporary, target in written:
            system.replace_in(place, temporary, target.name)
            with disk_errors(target.parent, f"{target.name} is in place, but a power cut may undo that"):
                system.sync_directory(place)  # makes the renames reach the disk in order


@contextlib.contextmanager
def written(files: Sequence[NewFile]) -> Iterator[list[Path]]:
    """Write files to temporary names beside their targets.

    At the end of the `with` body, remove the temporary files that were not renamed.

    Raises:
        OSError: a target exists and is not a regular file, or a write fails.
    """
    with _temporaries(files, None) as found:
        yield [target.parent / temporary for _, temporary, target in found]


@contextlib.contextmanager
def _temporaries(
    files: Sequence[NewFile], directory: Directory | None
) -> Iterator[list[tuple[int, str, Path]]]:
    """Write files to temporary names. At the end, remove the temporary files that were not renamed.

    Yields for each file: the descriptor of its directory, its temporary name, and its target.
    """
    targets = [Path(file.path) for file in files]
    temporaries: list[tuple[int, str, Path]] = []
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
                temporaries.append((place, f".{target.name}.{secrets.token_hex(6)}.tmp", target))
                _write_new(file, place, temporaries[-1][1], _permissions(target.name, place))
            yield temporaries
        finally:
            for place, temporary, _ in temporaries:
                with contextlib.suppress(OSError):
                    system.remove_in(place, temporary)


def _require_replaceable(target: Path, directory: int | None = None) -> None:
    """Raise an error if an existing target is not a regular file. (A device must not be replaced.)"""
    place = str(target) if directory is None else target.name or "."
    try:
        kind = stat.S_IFMT(system.stat_in(directory, place).st_mode)
    except FileNotFoundError:
        try:
            kind = stat.S_IFMT(system.stat_in(directory, place, follow_links=False).st_mode)
        except FileNotFoundError:
            return
    if kind == stat.S_IFDIR:
        raise IsADirectoryError(errno.EISDIR, "is a directory, expected a file's name", str(target))
    if kind != stat.S_IFREG:
        raise FileExistsError(
            errno.EEXIST, f"is {kind_name(kind)}, but only a regular file can be replaced", str(target)
        )


def _permissions(target: str, directory: int) -> int | None:
    """The permissions of the file that will be replaced, or None if there is no such file."""
    try:
        return system.stat_in(directory, target).st_mode & 0o777
    except OSError:
        return None


@contextlib.contextmanager
def _parent(target: Path, held: Directory | None) -> Iterator[int]:
    """Open the target's directory with a new descriptor, because each descriptor has its own lock."""
    with disk_errors(target, "its directory cannot be opened"):
        directory = Directory(target.parent if held is None else held)
    with directory:
        yield directory.fd


def unfinished(directory: int, targets: Container[str]) -> list[str]:
    """The names of all temporary files that belong to `targets`.

    Each file was left by a crash, or another `replace` is writing it now.
    """
    return [
        file
        for file in sorted(system.list_in(directory))
        if (match := _TEMPORARY.fullmatch(file)) and match[1] in targets
    ]


def _clear_and_share(directory: int, targets: set[str]) -> None:
    """Remove temporary files that a crash left, then hold a shared lock.

    While this call holds the lock, no other call removes the temporary files of this call. A temporary file
    that another call is writing looks like one that a crash left. So nothing is removed while another call
    holds the lock, or if the file system has no locks.
    """
    with contextlib.suppress(OSError):
        system.lock(directory)
        for file in unfinished(directory, targets):
            system.remove_in(directory, file)
    with contextlib.suppress(OSError):
        system.lock(directory, shared=True)


def _write_new(file: NewFile, directory: int, temporary: str, permissions: int | None) -> None:
    """Create a new file, write its chunks, and fsync it."""
    progress = Progress(file.nbytes)
    with disk_errors(file.path, progress):
        fd = system.open_file(
            temporary,
            os.O_WRONLY | os.O_CREAT | os.O_EXCL,
            permissions=0o666 if permissions is None else permissions,
            directory=directory,
            follow_links=False,
        )
        try:
            if permissions is not None:
                with contextlib.suppress(PermissionError):  # a file system without permissions
                    system.set_permissions(fd, permissions)
            for chunk in file.chunks:
                write(fd, chunk, progress)
            system.sync(fd)
        finally:
            os.close(fd)


def write(fd: int, chunk: Chunk, progress: Progress) -> None:
    """Write the whole chunk, in several system calls if needed, and add its size to `progress`."""
    rest = memoryview(chunk)
    while rest:
        count = os.write(fd, rest)
        rest = rest[count:]
        progress.done += count
