"""Standard error for progress and warnings. If a write fails, the text is dropped and training goes on."""

import contextlib
import sys
from typing import Any


class _Stderr:
    """A text stream that writes to the current `sys.stderr`. If a write fails, it drops the text silently.

    The reader may have gone away (BrokenPipeError), the terminal may be closed (EIO), the disk may be full,
    or there may be no stderr at all (None). None of this may end a training run.
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
        """Whether it is a terminal; False if it is closed."""
        try:
            return sys.stderr.isatty()
        except (OSError, ValueError, AttributeError):
            return False

    def is_watched(self) -> bool:
        """Whether someone sees it while the program runs: in a terminal, or below a notebook's cell.

        Both redraw a line after a carriage return.
        """
        return self.isatty() or (sys.stderr is not None and in_notebook())

    def __getattr__(self, name: str) -> Any:
        return getattr(sys.stderr, name)  # tqdm asks for the encoding and the size of the terminal


def in_notebook() -> bool:
    """Whether this process is the kernel of a Jupyter notebook, Colab included."""
    get_shell = getattr(sys.modules.get("IPython"), "get_ipython", None)
    shell = get_shell() if get_shell is not None else None
    return any(kind.__name__ == "ZMQInteractiveShell" for kind in type(shell).__mro__)


stderr = _Stderr()
