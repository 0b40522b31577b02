"""What a demo may write over."""

import errno
import os
from collections.abc import Callable

from nplora.checkpoint import Checkpoint, RunDirectory, holds_run
from nplora.formats import peft_adapter
from nplora.formats.files import StrPath


def require_own(output: StrPath, adapter: StrPath, is_own: Callable[[Checkpoint], bool]) -> None:
    """Refuse a directory in which others left a run or an adapter.

    Args:
        adapter: the directory that the demo saves its adapter in.
        is_own: whether the run of a checkpoint was the demo's.
    Raises:
        FileExistsError: what is there is not the demo's.
    """
    if holds_run(output):
        with RunDirectory(output) as earlier:
            newest = earlier.newest
        found = None if newest is not None and is_own(newest) else "a run"
    else:
        found = "an adapter" if peft_adapter.lies_in(adapter) else None
    if found:
        reason = f"the directory holds {found} that is not the demo's: name another one"
        raise FileExistsError(errno.EEXIST, reason, os.fspath(output))
