"""Warnings that name the line of the user's code."""

import sys
import warnings


def warn_user(message: str) -> None:
    """Warn at the line outside nplora that made the call, however deep inside nplora the warning arises."""
    level, frame = 2, sys._getframe(1)
    while frame.f_back is not None and frame.f_globals.get("__name__", "").partition(".")[0] == "nplora":
        level, frame = level + 1, frame.f_back
    warnings.warn(message, stacklevel=level)
