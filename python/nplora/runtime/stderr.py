"""Standard error for progress and warnings. If a write fails, the text is lost and training continues."""

import contextlib
import sys
from typing import Any


class _Stderr:
    """A text stream that writes to the current `sys.stderr`, and ignores a write that fails.

    A write fails if the process at the other end of a pipe ended (BrokenPipeError), the terminal was closed
    (EIO), the disk is full, or `sys.stderr` is None. A failed write must not end a training run.
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
        """Whether stderr is an open terminal."""
        try:
            return sys.stderr.isatty()
        except (OSError, ValueError, AttributeError):
            return False

    def is_watched(self) -> bool:
        """Whether a user sees new text on stderr at once: in a terminal, or below a notebook's cell.

        Terminals and notebooks both redraw a line after a carriage return.
        """
        return self.isatty() or (sys.stderr is not None and in_notebook())

    def __getattr__(self, name: str) -> Any:
        return getattr(sys.stderr, name)  # tqdm asks for the encoding and the size of the terminal


def in_notebook() -> bool:
    """Whether this process is the kernel of a Jupyter or Colab notebook."""
    get_shell = getattr(sys.modules.get("IPython"), "get_ipython", None)
    shell = get_shell() if get_shell is not None else None
    return any(kind.__name__ == "ZMQInteractiveShell" for kind in type(shell).__mro__)


stderr = _Stderr()
