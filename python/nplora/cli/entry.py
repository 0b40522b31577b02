"""The entry point of the command line: runs one command, and prints an error as one line."""

import argparse
import contextlib
import functools
import io
import itertools
import os
import sys
import warnings
from collections.abc import Callable, Sequence
from typing import TextIO

from nplora.cli.errors import Spelling, UsageError, show_error, show_warning
from nplora.cli.parser import parser_of
from nplora.distributed.communicator import RankError, is_reported
from nplora.distributed.launch import require_one_process
from nplora.distributed.opening import heard_by_all_ranks
from nplora.platform.processes import is_broken_pipe, write_utf8
from nplora.runtime.error_text import EXPECTED
from nplora.runtime.stderr import stderr

_INTERRUPTED = 128 + 2  # the exit status that a shell reports for a program that Ctrl-C ended


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line. Return the exit status:

    - 0: success.
    - 1: the command failed; or nobody reads stdout any more, because the program at the other end of the pipe
      has ended.
    - 2: the arguments or a file are wrong, the disk failed, a package is missing, or --memory is too small.
    - 130: the user pressed Ctrl-C.
    - 129, 138 or 143: SIGHUP, SIGUSR1 or SIGTERM ended a training run. The run is saved.
    - 135: another program shortened a model file while the file was mapped into memory.

    With status 1, 2 or 135, one line on stderr states the reason, unless the reason is that nobody reads
    stdout any more. Each warning is one line too. If stderr cannot be written, the lines for errors and
    warnings are lost, but the exit status is the same.

    Args:
        arguments: the words after `nplora`; None: the arguments of this process.
    Raises:
        SystemExit: on --help, --version or wrong arguments, or after SIGHUP, SIGUSR1 or SIGTERM in training.

    >>> nplora.cli.main(["eval", "model.gguf", "--data", "valid.jsonl"])
    loss ... over 12 tokens (95 % interval ...)
    perplexity ...
    token_accuracy ...
    0
    """
    write_utf8(sys.stdout)
    write_utf8(sys.stderr)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # print "?" for a letter that the encoding lacks
    try:
        return _status(list(sys.argv[1:] if arguments is None else arguments))
    finally:
        for stream in (sys.stdout, sys.stderr):
            _discard_unwritable(stream)


def _status(arguments: list[str]) -> int:
    spelled: Callable[[str], str] = str
    try:
        with heard_by_all_ranks(_distributed(arguments)):
            parsed, unknown = parser_of(arguments).parse_known_args(arguments)
            if unknown:
                raise UsageError(f"unrecognized arguments: {' '.join(unknown)}")
        spelled = Spelling(getattr(parsed, "options", {}), arguments)
        with warnings.catch_warnings():
            warnings.showwarning = functools.partial(show_warning, spelled=spelled)
            _require_one_writer(parsed)
            _run_command(parsed)
        print(end="", flush=True)
    except (KeyboardInterrupt, SystemExit) as end:
        for note in getattr(end, "__notes__", ()):
            print(f"nplora: {spelled(note)}", file=stderr)
        if isinstance(end, SystemExit):
            raise
        return _INTERRUPTED
    except BrokenPipeError:  # the program that reads our output has ended, as `head` does
        return 1
    except UsageError as error:
        show_error(error, f" (try {parsed.prog} --help)", spelled, arguments)
        return 2
    except EXPECTED as error:
        if _nobody_reads(error):
            return 1
        show_error(error, spelled=spelled, typed=arguments)
        is_wrong = isinstance(error, ValueError | OSError | ModuleNotFoundError)
        return 2 if is_wrong and not isinstance(error, RankError) else 1
    return 0


def _nobody_reads(error: Exception) -> bool:
    """Whether a write to stdout failed because its reader has ended, but not with BrokenPipeError."""
    if not isinstance(error, OSError) or not is_broken_pipe(error) or error.filename is not None:
        return False
    try:
        print(end="", flush=True)  # the text that could not be written is still in the buffer
    except OSError as again:
        return is_broken_pipe(again)
    return False


def _run_command(parsed: argparse.Namespace) -> None:
    """Run the command. If rank 0 reports this rank's error, do not print the error here."""
    try:
        parsed.run_command(parsed)
    except Exception as error:
        if is_reported(error):
            raise SystemExit(1) from None
        raise


def _distributed(arguments: list[str]) -> str | None:
    """Return "mpi" if the unchecked arguments contain --distributed mpi, else None."""
    pairs = {" ".join(pair) for pair in itertools.pairwise(arguments)} | set(arguments)
    return None if pairs.isdisjoint({"--distributed mpi", "--distributed=mpi"}) else "mpi"


_PLACES = ("output", "target", "ollama", "plot", "answers")  # the arguments that name files to write


def _require_one_writer(parsed: argparse.Namespace) -> None:
    """Raise an error if mpirun started several ranks that would all write the same output."""
    writes = any(getattr(parsed, name, None) is not None for name in _PLACES)
    if writes and not hasattr(parsed, "distributed"):
        require_one_process(parsed.prog.split()[-1])


def _discard_unwritable(stream: TextIO | None) -> None:
    """If a stream's buffered text cannot be written, send the text to /dev/null.

    Otherwise Python would try to write the text again at exit, and report an error.
    """
    if stream is None:
        return
    try:
        stream.flush()
    except (OSError, ValueError):
        with contextlib.suppress(OSError, ValueError), open(os.devnull, "wb") as nothing:
            os.dup2(nothing.fileno(), stream.fileno())
