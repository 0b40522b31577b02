"""Checks whether a command may write into a directory, which may hold results of an earlier run."""

import errno

from nplora.formats import files, peft_adapter
from nplora.formats.files import StrPath
from nplora.formats.run_files import holds_run


def trained(directory: StrPath) -> str | None:
    """Return what a directory holds: "a run" (the files of a training run), "an adapter" or None."""
    if holds_run(directory):
        return "a run"
    return "an adapter" if peft_adapter.lies_in(directory) else None


def require_untouched(directory: StrPath) -> None:
    """Raise an error if a directory holds a training run or an adapter.

    Raises:
        NotADirectoryError: the path is not a directory.
        FileExistsError: the directory holds a run or an adapter.
    """
    files.require_directory(directory)
    found = trained(directory)
    if found is not None:
        raise _occupied(directory, f"{found}; {files.OTHER_OR}")


def require_no_other(directory: StrPath, overwrite: bool) -> None:
    """Raise an error if a directory holds a training run or, unless `overwrite` is set, an adapter.

    Raises:
        ValueError: the directory's name is empty.
        NotADirectoryError: the path is not a directory.
        FileExistsError: the directory holds a run. Or it holds an adapter, and `overwrite` is not set.
    """
    files.require_named("adapter", output=directory)
    files.require_directory(directory)
    if holds_run(directory):
        raise _occupied(directory, "a run, whose adapter would be replaced; name another directory")
    if peft_adapter.lies_in(directory) and not overwrite:
        raise _occupied(directory, f"an adapter; {files.OTHER_OR}")


def _occupied(directory: StrPath, found: str) -> FileExistsError:
    return FileExistsError(errno.EEXIST, f"the directory holds {found}", files.name(directory))
