"""The entry point: it runs one command, and prints its errors as one line."""

import contextlib
import io
import os
import sys
import warnings
from collections.abc import Sequence
from typing import TextIO

from nplora.cli.errors import UsageError, show_error, show_warning
from nplora.cli.parser import parser_of
from nplora.runtime.stderr import stderr

_INTERRUPTED = 128 + 2  # what a shell reports for a program that Ctrl-C ended


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit status.

        0           success
        1           the command failed, or the reader of stdout is gone
        2           wrong arguments, a wrong file, a disk error, a missing package, or --memory is too small
        130         Ctrl-C
        129, 143    SIGHUP or SIGTERM ended a training run, which is saved
        135         a mapped model file was cut short

    For 1, 2 and 135, one line on stderr says why, unless the reader of stdout is gone. Each warning is one
    line. If stderr cannot be written, these lines are lost and the status stays the same.

    Args:
        arguments: the words after `nplora`; None: the arguments of this process.
    Raises:
        SystemExit: --help, --version, wrong arguments, or SIGHUP or SIGTERM during training.

    >>> nplora.cli.main(["eval", "model.gguf", "--data", "valid.jsonl"])
    loss ... over 12 tokens
    0
    """
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # as stderr: letters that cannot be shown become "?"
    try:
        return _status(list(sys.argv[1:] if arguments is None else arguments))
    finally:
        for stream in (sys.stdout, sys.stderr):
            _discard_unwritable(stream)


def _status(arguments: list[str]) -> int:
    """Run the command; return the exit status."""
    try:
        parsed, unknown = parser_of(arguments).parse_known_args(arguments)
        if unknown:
            raise UsageError(f"unrecognized arguments: {' '.join(unknown)}")
        with warnings.catch_warnings():
            warnings.showwarning = show_warning
            parsed.run_command(parsed)
        print(end="", flush=True)
    except (KeyboardInterrupt, SystemExit) as end:
        for note in getattr(end, "__notes__", ()):
            print(f"nplora: {note}", file=stderr)
        if isinstance(end, SystemExit):
            raise
        return _INTERRUPTED
    except BrokenPipeError:  # the reader of our output is gone, as `head` when it has its lines
        return 1
    except UsageError as error:
        show_error(error, f" (try {parsed.prog} --help)")
        return 2
    except (OSError, ValueError, ArithmeticError, ImportError, MemoryError) as error:
        show_error(error)
        return 2 if isinstance(error, ValueError | OSError | ModuleNotFoundError) else 1
    return 0


def _discard_unwritable(stream: TextIO | None) -> None:
    """If a stream's buffered text cannot be written, send it to /dev/null. Else Python would fail at exit."""
    if stream is None:
        return
    try:
        stream.flush()
    except (OSError, ValueError):
        with contextlib.suppress(OSError, ValueError), open(os.devnull, "wb") as nothing:
            os.dup2(nothing.fileno(), stream.fileno())
