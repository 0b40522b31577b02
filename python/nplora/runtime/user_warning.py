"""Issues warnings that point at a line of the user's code."""

import sys
import warnings


def warn_user(message: str) -> None:
    """Issue a warning that points at the line outside nplora that called into nplora."""
    level, frame = 2, sys._getframe(1)
    while frame.f_back is not None and frame.f_globals.get("__name__", "").partition(".")[0] == "nplora":
        level, frame = level + 1, frame.f_back
    warnings.warn(message, stacklevel=level)
