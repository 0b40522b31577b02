"""Registers mapped files, so that the core can explain a SIGBUS that a truncated file causes."""

import mmap
import os
import weakref

from nplora import _core

_REASON = (
    b": the file was cut short while it was mapped, or its disk failed; "
    b"load_model(..., mmap=False) copies the file\n"
)
_LONGEST_NAME = 800


def watch(mapping: mmap.mmap, name: str) -> None:
    """Make a SIGBUS in `mapping` print the file's name on stderr and end the process with status 135.

    If a SIGBUS handler, such as faulthandler's, was set before the first call of `watch`, that handler runs
    too.
    """
    shown = name if name.isprintable() else repr(name)[1:-1]
    message = b"nplora: error: " + os.fsencode(shown)[-_LONGEST_NAME:] + _REASON
    number = _core.watch_mapping(mapping, message)
    weakref.finalize(mapping, _core.unwatch_mapping, number).atexit = False
