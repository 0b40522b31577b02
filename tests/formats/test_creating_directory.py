"""The directory of a command's output."""

import errno
import os
from pathlib import Path

import pytest

from nplora.formats import files


def write_and_fail(folder: Path) -> None:
    with files.creating_directory(folder, "a", "b"):
        for name in ("a", "b"):
            (folder / name).write_text("new")
        raise RuntimeError("stop")


def test_after_an_error_a_new_directory_is_removed(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="stop"):
        write_and_fail(tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_after_an_error_files_that_existed_are_kept(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("old")
    with pytest.raises(RuntimeError, match="stop"):
        write_and_fail(tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["a"]


def test_a_directory_may_exist(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(path: Path) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))

    monkeypatch.setattr(os, "mkdir", fail)  # as Windows does for the root of a drive
    with files.creating_directory(tmp_path):
        pass
    with pytest.raises(PermissionError), files.creating_directory(tmp_path / "missing"):
        pass
