"""Directories that are removed after an error."""

import errno
import os
from pathlib import Path

import pytest

from nplora.formats import files

errors = pytest.mark.parametrize("error", [RuntimeError("stop"), KeyboardInterrupt("stop")])


def write_and_fail(folder: Path, error: BaseException) -> None:
    with files.creating_directory(folder) as written:
        for name in ("a", "b"):
            (folder / name).write_text("new")
            written[folder / name] = os.stat(folder / name)
        raise error


@errors
def test_after_an_error_a_new_directory_is_removed(tmp_path: Path, error: BaseException) -> None:
    with pytest.raises(type(error), match="stop"):
        write_and_fail(tmp_path / "new", error)
    assert not (tmp_path / "new").exists()


@errors
def test_after_an_error_other_files_are_kept(tmp_path: Path, error: BaseException) -> None:
    (tmp_path / "old").write_text("old")
    with pytest.raises(type(error), match="stop"):
        write_and_fail(tmp_path, error)
    assert {file.name: file.read_text() for file in tmp_path.iterdir()} == {"old": "old"}


def test_a_file_that_another_program_replaced_is_kept(tmp_path: Path) -> None:
    def write_and_replace() -> None:
        with files.creating_directory(tmp_path) as written:
            (tmp_path / "a").write_text("new")
            written[tmp_path / "a"] = os.stat(tmp_path / "a")
            (tmp_path / "b").write_text("of another program")
            os.replace(tmp_path / "b", tmp_path / "a")
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        write_and_replace()
    assert (tmp_path / "a").read_text() == "of another program"


def test_a_file_that_cannot_be_removed_does_not_keep_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On Windows, a mapped file cannot be removed."""
    unlink = Path.unlink

    def deny(path: Path, missing_ok: bool = False) -> None:
        if path.name == "b":
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        unlink(path, missing_ok)

    monkeypatch.setattr(Path, "unlink", deny)
    with pytest.raises(RuntimeError, match="stop"):
        write_and_fail(tmp_path, RuntimeError("stop"))
    assert [file.name for file in tmp_path.iterdir()] == ["b"]


def test_an_existing_directory_is_accepted_whatever_error_mkdir_raises(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(path: Path) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))

    monkeypatch.setattr(os, "mkdir", fail)  # as Windows does for the root of a drive
    with files.creating_directory(tmp_path):
        pass
    with pytest.raises(PermissionError), files.creating_directory(tmp_path / "missing"):
        pass
