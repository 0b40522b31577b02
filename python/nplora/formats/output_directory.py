"""Whether a command may write into a directory: what training left there."""

import errno

from nplora.formats import files, peft_adapter
from nplora.formats.files import StrPath
from nplora.formats.run_files import holds_run


def trained(directory: StrPath) -> str | None:
    """Words for what training left in a directory: checkpoints, or an adapter alone; None if neither."""
    if holds_run(directory):
        return "a run"
    return "an adapter" if peft_adapter.lies_in(directory) else None


def require_untouched(directory: StrPath) -> None:
    """Refuse a directory in which training left something.

    Raises:
        NotADirectoryError: it is something else. FileExistsError: training left something in it.
    """
    files.require_directory(directory)
    found = trained(directory)
    if found is not None:
        raise _occupied(directory, f"{found}; {files.OTHER_OR} drops it")


def require_no_other(directory: StrPath, overwrite: bool) -> None:
    """Refuse to put an adapter beside the checkpoints of a run, or to replace another one unasked.

    Raises:
        ValueError: the directory's name is empty. NotADirectoryError: it is something else.
        FileExistsError: the directory holds a run; or it holds an adapter, and `overwrite` is not set.
    """
    files.require_named("adapter", output=directory)
    files.require_directory(directory)
    if holds_run(directory):
        raise _occupied(directory, "a run, whose adapter it would replace; name another one")
    if peft_adapter.lies_in(directory) and not overwrite:
        raise _occupied(directory, f"an adapter; {files.OTHER_OR} replaces it")


def _occupied(directory: StrPath, found: str) -> FileExistsError:
    return FileExistsError(errno.EEXIST, f"the directory holds {found}", files.name(directory))
