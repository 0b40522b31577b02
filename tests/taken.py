"""Checks of commands that write a file whose name is already taken."""

import os
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from systems import HAS_LINKS, IS_WINDOWS

FOREIGN = b"a file that nplora did not make"


def assert_nothing_is_lost(target: Path, write: Callable[[bool], object], replaces: bool = True) -> None:
    """Test a writer of one file against an existing file, links, a directory and a FIFO of that name.

    Args:
        target: the file, which does not exist yet.
        write: writes it; its argument is `overwrite`.
        replaces: whether it replaces an existing file with `overwrite`.
    """
    foreign = target.with_name("foreign")
    foreign.write_bytes(FOREIGN)
    before = sorted(os.listdir(target.parent))

    def refuses(error: type[OSError], *overwrite: bool) -> None:
        for chosen in overwrite:
            with pytest.raises(error, match=re.escape(repr(str(target))[1:-1])):
                write(chosen)

    target.mkdir()
    refuses(OSError, False, True)
    target.rmdir()
    if not IS_WINDOWS:
        os.mkfifo(target)
        refuses(FileExistsError, False, True)
        assert target.is_fifo()
        target.unlink()
    if HAS_LINKS:
        target.symlink_to("nothing")
        refuses(FileExistsError, False, True)
        assert os.readlink(target) == "nothing"
        target.unlink()
    for make in (os.link, os.symlink) if HAS_LINKS else (os.link,):
        make(foreign, target)
        refuses(FileExistsError, False, *[True] * (not replaces))
        assert target.read_bytes() == FOREIGN
        if replaces:
            write(True)
            assert not target.is_symlink()
            assert target.read_bytes() != FOREIGN
        target.unlink()
        assert foreign.read_bytes() == FOREIGN
    assert sorted(os.listdir(target.parent)) == before
