"""Files relative to an open directory."""

import contextlib
import errno
import mmap
import os
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

import systems
from nplora.platform import files, windows_files


@systems.needs_new_paths
def test_a_directory_is_found_again_after_a_rename(tmp_path: Path) -> None:
    (tmp_path / "old").mkdir()
    descriptor = files.open_directory(str(tmp_path / "old"))
    try:
        (tmp_path / "old").rename(tmp_path / "new")
        assert os.path.samefile(files.path_of(descriptor), tmp_path / "new")
        file = files.open_file("name", os.O_WRONLY | os.O_CREAT, directory=descriptor)
        assert files.write_at(file, b"abc", 2) == 3
        os.close(file)
        assert (tmp_path / "new/name").read_bytes() == b"\0\0abc"
        assert files.list_in(descriptor) == ["name"]
        files.replace_in(descriptor, "name", "other")
        assert files.stat_in(descriptor, "other").st_size == 5
        files.remove_in(descriptor, "other")
        assert files.list_in(descriptor) == []
    finally:
        os.close(descriptor)


def test_a_mapped_file_is_replaced_and_the_old_one_is_gone_at_the_latest_after_the_next_time(
    tmp_path: Path,
) -> None:
    """On Windows, whose mapped files cannot be replaced, the old one gets another name."""
    target = tmp_path / "model [ä].bin"
    target.write_bytes(b"a" * 5000)
    descriptor = files.open_file(target, os.O_RDONLY)
    mapping = mmap.mmap(descriptor, 0, access=mmap.ACCESS_READ)
    os.close(descriptor)
    with closing_directory(tmp_path) as directory:
        for letter in (b"b", b"c"):
            (tmp_path / "new").write_bytes(letter * 10)
            files.replace_in(directory, "new", target.name)
            assert target.read_bytes() == letter * 10
            assert mapping[:] == b"a" * 5000
        mapping.close()
        (tmp_path / "new").write_bytes(b"d")
        files.replace_in(directory, "new", target.name)
        assert files.list_in(directory) == [target.name]


@contextlib.contextmanager
def closing_directory(path: Path) -> Iterator[int]:
    descriptor = files.open_directory(str(path))
    try:
        yield descriptor
    finally:
        os.close(descriptor)


@systems.needs_locks
def test_a_locked_file_cannot_be_locked_again(tmp_path: Path) -> None:
    first, second = (files.open_file(tmp_path / "lock", os.O_RDWR | os.O_CREAT) for _ in range(2))
    files.lock(first)
    with pytest.raises(BlockingIOError):
        files.lock(second)
    os.close(first)
    files.lock(second)
    os.close(second)


@systems.needs_links
def test_a_link_is_not_followed_unless_it_may_be(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("text")
    files.link(tmp_path / "file", tmp_path / "link")
    os.close(files.open_file(tmp_path / "link", os.O_RDONLY))
    with pytest.raises(OSError, match=re.escape(os.strerror(errno.ELOOP))):
        files.open_file(tmp_path / "link", os.O_RDONLY, follow_links=False)


def test_reserved_files_have_their_size_and_can_be_read_at_a_position(tmp_path: Path) -> None:
    descriptor = files.open_file(tmp_path / "file", os.O_RDWR | os.O_CREAT)
    files.reserve(descriptor, 1000)
    assert os.fstat(descriptor).st_size == 1000
    files.write_at(descriptor, b"abc", 500)
    into = bytearray(4)
    assert files.read_at(descriptor, memoryview(into), 499) == 4
    assert into == b"\0abc"
    assert files.read_at(descriptor, memoryview(into), 1000) == 0
    os.close(descriptor)


@pytest.mark.skipif(not hasattr(os, "posix_fallocate"), reason="this system has no posix_fallocate")
def test_a_file_system_need_not_reserve_space(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(number: int) -> Callable[..., None]:
        def fail(*arguments: int) -> None:
            raise OSError(number, os.strerror(number))

        return fail

    descriptor = files.open_file(tmp_path / "file", os.O_RDWR | os.O_CREAT)
    monkeypatch.setattr(os, "posix_fallocate", fails(errno.ENOSPC))
    with pytest.raises(OSError, match=re.escape(os.strerror(errno.ENOSPC))):
        files.reserve(descriptor, 1000)
    monkeypatch.setattr(os, "posix_fallocate", fails(errno.EOPNOTSUPP))
    files.reserve(descriptor, 1000)
    assert os.fstat(descriptor).st_size == 1000
    monkeypatch.setattr(sys, "platform", "darwin")  # its ENOTSUP is not EOPNOTSUPP
    monkeypatch.setattr(errno, "ENOTSUP", 45)
    monkeypatch.setattr("fcntl.fcntl", fails(45))
    files.reserve(descriptor, 2000)
    assert os.fstat(descriptor).st_size == 2000
    os.close(descriptor)


def test_on_windows_a_failed_replacement_keeps_the_copy_that_a_crash_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A crash between the two renames leaves no file `model`, and its old content in `.model.MARK.old`."""
    left, new, path = tmp_path / ".model.0123456789ab.old", tmp_path / "new", tmp_path / "model"
    left.write_text("old")
    new.write_text("new")
    denied = PermissionError(errno.EACCES, "denied")
    denied.winerror = 5  # type: ignore[attr-defined]

    def fail(*paths: str) -> None:
        raise denied

    rename = os.rename

    def rename_unless_new(old: str, to: str) -> None:
        if old == str(new):
            raise OSError(errno.ENOSPC, "full")
        rename(old, to)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", fail)
        with pytest.raises(PermissionError):
            windows_files.replace(str(new), str(path))
        path.write_text("path")
        patch.setattr(os, "rename", rename_unless_new)
        with pytest.raises(OSError, match="full"):  # the old file has been moved, and is moved back
            windows_files.replace(str(new), str(path))
        assert path.read_text() == "path"
    assert left.read_text() == "old"
    windows_files.replace(str(new), str(path))
    assert sorted(file.name for file in tmp_path.iterdir()) == ["model"]


def test_on_windows_a_link_to_itself_has_the_error_of_other_systems(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: object) -> None:
        error = OSError(errno.EINVAL, "the name of the file cannot be resolved")
        error.winerror = 1921  # type: ignore[attr-defined]
        raise error

    monkeypatch.setattr(windows_files, "_winapi", SimpleNamespace(CreateFile=fail), raising=False)
    with pytest.raises(OSError, match=re.escape(os.strerror(errno.ELOOP))) as caught:
        windows_files._descriptor("link", 0, 3, 0, 0)
    assert (caught.value.errno, caught.value.filename) == (errno.ELOOP, "link")
