"""Opens, locks, renames and replaces files on all operating systems.

A directory is kept open through a descriptor, and the files in the directory are named relative to this
descriptor. So a name still refers to the same file if the directory is renamed or the working directory
changes.
"""

from __future__ import annotations

import errno
import os
import shutil
import struct
import sys
import threading

if sys.platform == "win32":
    from nplora.platform import windows_files
elif sys.platform != "emscripten":
    import fcntl

_F_PREALLOCATE = 42  # from macOS' <sys/fcntl.h>
_seeking = threading.Lock()  # for Windows, where Python has no os.pread and os.pwrite


def open_file(
    path: str | os.PathLike[str],
    flags: int,
    *,
    permissions: int = 0o666,
    directory: int | None = None,
    follow_links: bool = True,
    wait: bool = True,
) -> int:
    """Open a file, and return a descriptor that child processes do not inherit.

    Args:
        flags: os.O_RDONLY, os.O_WRONLY or os.O_RDWR, optionally combined with os.O_CREAT, os.O_EXCL and
            os.O_APPEND.
        directory: the descriptor of the directory to which `path` is relative; None: the working directory.
        follow_links: whether to follow a symbolic link. If False, a symbolic link raises OSError with
            errno.ELOOP.
        wait: whether to wait until another process opens the other end of a FIFO.
    """
    if sys.platform == "win32":
        return windows_files.open_file(path, flags, directory, follow_links)
    flags |= os.O_CLOEXEC | (0 if follow_links else os.O_NOFOLLOW) | (0 if wait else os.O_NONBLOCK)
    return os.open(path, flags, permissions, dir_fd=directory)


def open_directory(path: str, directory: int | None = None) -> int:
    """Open a directory, and return its descriptor.

    `directory`: the descriptor of the directory to which `path` is relative; None: the working directory.
    """
    if sys.platform == "win32":
        return windows_files.open_directory(path, directory)
    return os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=directory)


def path_of(descriptor: int) -> str:
    """The current path of an open directory.

    Raises:
        OSError: the system does not know the path.
    """
    if sys.platform == "win32":
        return windows_files.path_of(descriptor)
    if sys.platform == "darwin":
        found = fcntl.fcntl(descriptor, fcntl.F_GETPATH, bytes(1024))
        return os.fsdecode(found.partition(b"\0")[0])
    return os.readlink(f"/proc/self/fd/{descriptor}")


def stat_in(directory: int | None, name: str, follow_links: bool = True) -> os.stat_result:
    """Call os.stat for a file in an open directory, or in the working directory if `directory` is None."""
    if sys.platform == "win32":
        return os.stat(windows_files.joined(directory, name), follow_symlinks=follow_links)
    return os.stat(name, dir_fd=directory, follow_symlinks=follow_links)


def list_in(directory: int) -> list[str]:
    """The names of the files in an open directory."""
    if sys.platform == "win32":
        return os.listdir(windows_files.path_of(directory))
    return os.listdir(directory)


def remove_in(directory: int, name: str) -> None:
    """Remove a file from an open directory."""
    if sys.platform == "win32":
        os.unlink(windows_files.joined(directory, name))
    else:
        os.unlink(name, dir_fd=directory)


def replace_in(directory: int, old: str, new: str) -> None:
    """Rename a file in an open directory. An existing file with the new name is replaced.

    Windows cannot replace a file that is mapped. So the mapped file is first renamed to a name that ends in
    ".old"; then the file `old` is renamed to `new`. If the process is killed between these two renames, no
    file has the name `new`. The next successful call with the same `new` removes the file that ends in
    ".old", unless that file is still mapped.
    """
    if sys.platform == "win32":
        windows_files.replace(windows_files.joined(directory, old), windows_files.joined(directory, new))
    else:
        os.replace(old, new, src_dir_fd=directory, dst_dir_fd=directory)


def link(source: str | os.PathLike[str], target: str | os.PathLike[str]) -> None:
    """Make a symbolic link.

    On Windows, most users may not make symbolic links. So on Windows, this function makes a hard link, or a
    copy if a hard link is not possible.
    """
    if sys.platform != "win32":
        os.symlink(source, target)
        return
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


def lock(descriptor: int, shared: bool = False) -> None:
    """Lock an open file or directory without waiting. The lock ends when the descriptor is closed.

    In a browser, this function does nothing, because no other process sees the files.

    Raises:
        BlockingIOError: another process holds a lock on the file.
        OSError: the file system or the operating system does not support this kind of lock.
    """
    if sys.platform == "win32":
        windows_files.lock(descriptor, shared)
    elif sys.platform != "emscripten":
        fcntl.flock(descriptor, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)


def set_permissions(descriptor: int, permissions: int) -> None:
    """Set the permissions of an open file. On Windows, this function does nothing."""
    if sys.platform != "win32":
        os.fchmod(descriptor, permissions)


def sync(descriptor: int) -> None:
    """Wait until all data that was written to a file is on the disk."""
    if sys.platform == "darwin":  # fsync leaves the data in the disk's own cache
        try:
            fcntl.fcntl(descriptor, fcntl.F_FULLFSYNC)
            return
        except OSError:  # not every file system knows F_FULLFSYNC
            pass
    os.fsync(descriptor)


def sync_directory(descriptor: int) -> None:
    """Wait until all changes to a directory's entries are on the disk. On NTFS, nothing needs to be done."""
    if sys.platform != "win32":
        os.fsync(descriptor)


def read_at(descriptor: int, into: memoryview, offset: int) -> int:
    """Read bytes at `offset` into the buffer `into`. Return how many were read: at most `len(into)`."""
    if sys.platform != "win32" and sys.platform != "emscripten":
        return os.preadv(descriptor, [into], offset)
    if sys.platform == "win32":
        with _seeking:
            os.lseek(descriptor, offset, os.SEEK_SET)
            read = os.read(descriptor, len(into))
    else:
        read = os.pread(descriptor, len(into), offset)
    into[: len(read)] = read
    return len(read)


def write_at(descriptor: int, data: memoryview | bytes, offset: int) -> int:
    """Write bytes at a position, and return how many were written."""
    if sys.platform == "win32":
        with _seeking:
            os.lseek(descriptor, offset, os.SEEK_SET)
            return os.write(descriptor, data)
    return os.pwrite(descriptor, data, offset)


def reserve(descriptor: int, nbytes: int) -> None:
    """Give a new file a length of `nbytes`, and reserve this space on the disk, if the file system can.

    Raises:
        OSError: the disk has too little space.
    """
    try:
        if sys.platform == "darwin":
            # struct fstore: F_ALLOCATEALL, F_PEOFPOSMODE, offset 0, length `nbytes`
            fcntl.fcntl(descriptor, _F_PREALLOCATE, struct.pack("=Iiqqq", 4, 3, 0, nbytes, 0))
        elif sys.platform != "win32" and sys.platform != "emscripten":
            os.posix_fallocate(descriptor, 0, nbytes)
    except OSError as error:
        # These errors mean that the file system cannot reserve space. glibc raises neither: it writes zeros.
        if error.errno not in (errno.EOPNOTSUPP, errno.ENOTSUP):
            raise
    os.ftruncate(descriptor, nbytes)  # with NTFS, this also reserves the space; a browser has no disk
