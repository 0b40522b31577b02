"""Child processes, forks, signals and connections."""

from __future__ import annotations

import contextlib
import errno
import io
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from typing import IO, Any, TextIO

# Signals that ask a training run to end. On Windows, SIGBREAK is sent for Ctrl-Break, and when the console is
# closed.
if sys.platform == "win32":
    ENDING_SIGNALS: tuple[signal.Signals, ...] = (signal.SIGTERM, signal.SIGBREAK)
    NOTICE: signal.Signals | None = None
else:
    ENDING_SIGNALS = (signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)
    NOTICE = signal.SIGUSR1  # Slurm and mpirun can send this signal before the end of a job


def command_line(words: list[str]) -> str:
    """Join the words of a command into a line that the system's usual shell splits into the same words."""
    return " ".join(map(_quoted, words)) if sys.platform == "win32" else shlex.join(words)


def _quoted(word: str) -> str:
    """A word in double quotes, if Windows' shells would split it or give one of its signs a meaning."""
    quoted = subprocess.list2cmdline([word])
    if quoted != word or not re.search(r"[&|<>^();,'`@{}]", word):
        return quoted
    return f'"{word}{word[len(word.rstrip(chr(92))) :]}"'  # a backslash before a quote is doubled


def call_in_forked_child(function: Callable[[], object]) -> None:
    """Call a function in every child process that `os.fork` makes after this call."""
    if sys.platform != "win32":
        os.register_at_fork(after_in_child=function)


def start_apart(arguments: list[str], **options: Any) -> subprocess.Popen[bytes]:
    """Start a program that Ctrl-C in the terminal does not reach."""
    if sys.platform == "win32":
        flags = subprocess.CREATE_NEW_PROCESS_GROUP | subprocess.CREATE_NO_WINDOW
        try:
            return subprocess.Popen(arguments, creationflags=flags, **options)
        except OSError as error:  # add the name of the program
            raise type(error)(error.errno, error.strerror, arguments[0], error.winerror) from None
    return subprocess.Popen(arguments, start_new_session=True, **options)


def do_not_wait(stream: IO[bytes]) -> None:
    """Let a read from a pipe return the data that is there, instead of waiting for the end of the data."""
    if sys.platform != "win32":
        os.set_blocking(stream.fileno(), False)


def write_utf8(stream: TextIO | None) -> None:
    """On Windows, let a stream to a file or a pipe write UTF-8, as Python does from version 3.15 on.

    Windows' older encodings lack the letters of most languages. A stream to a console does not change.
    """
    if sys.platform != "win32" or "PYTHONIOENCODING" in os.environ:
        return
    with contextlib.suppress(OSError, ValueError):  # a closed stream
        if isinstance(stream, io.TextIOWrapper) and not stream.isatty():
            stream.reconfigure(encoding="utf-8")


def is_broken_pipe(error: OSError) -> bool:
    """Whether a write failed because the reader has ended. On Windows, the error can be EINVAL."""
    return error.errno == errno.EPIPE or (sys.platform == "win32" and error.errno == errno.EINVAL)


def detect_vanished_peer(connection: Any) -> None:
    """Let the system close a connection after the other end has vanished without closing the connection."""
    with contextlib.suppress(OSError, AttributeError):  # not TCP, or the system lacks one of these options
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 10)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 3)
        if sys.platform == "darwin":
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPALIVE, 30)
            return
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 30)
        if sys.platform == "linux":
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, 60_000)


def reuse_address(listener: socket.socket) -> None:
    """Let a restarted server listen on its port at once.

    Windows always lets a restarted server listen at once. On Windows, SO_REUSEADDR would let another program
    take the port.
    """
    if sys.platform == "win32":
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_EXCLUSIVEADDRUSE, 1)
    else:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
