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


def deny(*paths: str) -> None:
    """What `os.replace` does on Windows if the second path is a mapped file."""
    error = PermissionError(errno.EACCES, "denied")
    error.winerror = 5  # type: ignore[attr-defined]
    raise error


def contents(folder: Path) -> dict[str, str]:
    return {file.name: file.read_text() for file in folder.iterdir()}


def test_on_windows_a_failed_replacement_keeps_the_copy_that_a_crash_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A crash between the two renames leaves no file `model`, and its old content in `.model.MARK.old`."""
    left, new, path = tmp_path / ".model.0123456789ab.old", tmp_path / "new", tmp_path / "model"
    left.write_text("old")
    new.write_text("new")
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", deny)
        with pytest.raises(PermissionError):
            windows_files.replace(str(new), str(path))
    assert left.read_text() == "old"
    windows_files.replace(str(new), str(path))
    assert contents(tmp_path) == {"model": "new"}


def test_on_windows_a_mapped_file_is_moved_and_then_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "new").write_text("new")
    (tmp_path / "model").write_text("old")
    monkeypatch.setattr(os, "replace", deny)
    windows_files.replace(str(tmp_path / "new"), str(tmp_path / "model"))
    assert contents(tmp_path) == {"model": "new"}


@pytest.mark.parametrize("other", [None, "other"])
def test_on_windows_a_failed_replacement_moves_the_old_file_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, other: str | None
) -> None:
    """Unless another process has created a file with this name."""
    new, path = tmp_path / "new", tmp_path / "model"
    new.write_text("new")
    path.write_text("old")
    rename = os.rename

    def rename_unless_new(old: str, to: str) -> None:
        if old == str(new) and other is not None:
            path.write_text(other)
        if old == str(new) or os.path.exists(to):  # Windows never renames to an existing file
            raise FileExistsError(errno.EEXIST, f"cannot rename {old}")
        rename(old, to)

    monkeypatch.setattr(os, "replace", deny)
    monkeypatch.setattr(os, "rename", rename_unless_new)
    with pytest.raises(FileExistsError, match=r"cannot rename .*new$"):
        windows_files.replace(str(new), str(path))
    assert path.read_text() == (other or "old")
    assert "old" in contents(tmp_path).values()


@pytest.mark.parametrize("moves", [0, 1, 2])
def test_an_interruption_on_windows_loses_no_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moves: int
) -> None:
    """Ctrl-C before the first of the two renames, between them, or after the second."""
    new, path = tmp_path / "new", tmp_path / "model"
    new.write_text("new")
    path.write_text("old")
    rename, calls = os.rename, list[str]()

    def interrupted(old: str, to: str) -> None:
        calls.append(old)
        if os.path.exists(to):  # Windows never renames to an existing file
            raise FileExistsError(errno.EEXIST, f"cannot rename {old}")
        if len(calls) != 1 or moves:
            rename(old, to)
        if len(calls) == max(moves, 1):
            raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", deny)
    monkeypatch.setattr(os, "rename", interrupted)
    with pytest.raises(KeyboardInterrupt):
        windows_files.replace(str(new), str(path))
    assert path.read_text() == ("new" if moves == 2 else "old")
    assert sorted(contents(tmp_path).values()) == ["new", "old"]


def test_on_windows_a_replacement_removes_no_other_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only moved copies of this file, and none that another process makes during the replacement."""
    others = {f".model.{part}.old" for part in ("index.0123456789ab", "my-notes", "0123456789ab")}
    (tmp_path / "new").write_text("new")
    for name in others - {".model.0123456789ab.old"}:
        (tmp_path / name).write_text("other")
    replace = os.replace

    def replace_late(old: str, to: str) -> None:
        (tmp_path / ".model.0123456789ab.old").write_text("other")
        replace(old, to)

    monkeypatch.setattr(os, "replace", replace_late)
    windows_files.replace(str(tmp_path / "new"), str(tmp_path / "model"))
    assert set(contents(tmp_path)) == {"model", *others}


def test_on_windows_a_link_to_itself_has_the_error_of_other_systems(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: object) -> None:
        error = OSError(errno.EINVAL, "the name of the file cannot be resolved")
        error.winerror = 1921  # type: ignore[attr-defined]
        raise error

    monkeypatch.setattr(windows_files, "_winapi", SimpleNamespace(CreateFile=fail), raising=False)
    with pytest.raises(OSError, match=re.escape(os.strerror(errno.ELOOP))) as caught:
        windows_files._descriptor("link", 0, 3, 0, 0)
    assert (caught.value.errno, caught.value.filename) == (errno.ELOOP, "link")
