"""Standard error for progress and warnings. If it cannot be written, they are lost, but no work is."""

import contextlib
import sys
from typing import Any


class _Stderr:
    """A text stream onto the `sys.stderr` of the moment; it drops what cannot be written and never raises.

    A reader that went away (BrokenPipeError), a terminal that was closed (EIO), a full disk, a closed file
    or no stderr at all (None) must not end a training run.
    """

    def write(self, text: str) -> int:
        try:
            return sys.stderr.write(text)
        except (OSError, ValueError, AttributeError):
            return len(text)

    def flush(self) -> None:
        with contextlib.suppress(OSError, ValueError, AttributeError):
            sys.stderr.flush()

    def isatty(self) -> bool:
        """Whether it is a terminal; a closed file is none."""
        try:
            return sys.stderr.isatty()
        except (OSError, ValueError, AttributeError):
            return False

    def __getattr__(self, name: str) -> Any:
        return getattr(sys.stderr, name)  # tqdm asks for the encoding and the terminal's size


stderr = _Stderr()
