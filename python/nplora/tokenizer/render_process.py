"""The process of renderer.py, as those who ask it see it."""

from __future__ import annotations

import importlib.util
import io
import json
import os
import socket
import subprocess
import sys
import threading
from pathlib import Path
from typing import NamedTuple

_PROGRAM = Path(__file__).with_name("renderer.py")


class End(NamedTuple):
    """Of the process: its status, below 0 the signal, and the last line of what Python said of an error."""

    status: int
    words: str


class _Child(NamedTuple):
    process: subprocess.Popen[bytes]
    line: socket.socket
    errors: io.FileIO


class RenderProcess:
    """Started when it is first asked, and again after its end; it ends with its parent.

    Threads ask it one after the other.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._child: _Child | None = None
        self._pair: tuple[socket.socket, ...] = ()  # of a process that is being started
        os.register_at_fork(after_in_child=self._leave)

    def ask(self, question: bytes, length: int) -> tuple[str, str] | End:
        """The answer, of `length` bytes at most, or how the process ended in its place.

        Raises:
            ModuleNotFoundError: the package `jinja2` is not installed.
            OSError: the process cannot be started.
        """
        with self._lock:
            child = self._running()
            try:
                child.line.sendall(question)
                told = _received(child.line, length + 1)
            except (BrokenPipeError, ConnectionResetError):
                return self._stop()
            except BaseException:  # Ctrl-C: what comes next would be the answer to this question
                self._stop()
                raise
            if not told.endswith(b"\n"):
                return self._stop()
        kind, words = json.loads(told)
        return kind, words

    def stop(self) -> None:
        """End the process, where it has not ended."""
        with self._lock:
            self._stop()

    def _stop(self) -> End:
        if self._child is None:
            return End(0, "")
        child, self._child = self._child, None
        child.process.kill()
        child.line.close()
        status = child.process.wait()
        with child.errors:
            words = (child.errors.read(1 << 16) or b"").decode(errors="replace").strip()
        return End(status, words.rpartition("\n")[2])

    def _running(self) -> _Child:
        if self._child is not None and self._child.process.poll() is not None:
            self._stop()
        if self._child is None:
            self._child = self._start()
        return self._child

    def _start(self) -> _Child:
        if importlib.util.find_spec("jinja2") is None:
            message = 'chat templates need the package jinja2: pip install "nplora[llm]"'
            raise ModuleNotFoundError(message, name="jinja2")
        if not sys.executable or getattr(sys, "frozen", False) or not _PROGRAM.is_file():
            raise OSError(
                f"chat templates are rendered by a process of Python: sys.executable {sys.executable!r} "
                f"would have to run {_PROGRAM}"
            )
        self._pair = ours, theirs = socket.socketpair()
        try:
            process = subprocess.Popen(
                [sys.executable, "-I", "-S", "-W", "ignore", str(_PROGRAM), *_searched()],
                env={**os.environ, "NO_COLOR": "1"},
                bufsize=0,  # no buffer, whose lock a fork could leave held for ever
                stdin=theirs.fileno(),
                stdout=theirs.fileno(),
                stderr=subprocess.PIPE,
                start_new_session=True,  # which Ctrl-C does not reach
            )
        except BaseException:
            ours.close()
            raise
        finally:
            theirs.close()
            self._pair = ()
        assert isinstance(process.stderr, io.FileIO)
        os.set_blocking(process.stderr.fileno(), False)  # a fork may hold its other end
        return _Child(process, ours, process.stderr)

    def _leave(self) -> None:
        """After a fork: the process is another one's child, and the lock may be held there for ever."""
        self._lock = threading.Lock()
        for end in self._pair:
            end.close()
        if self._child is not None:
            self._child.line.close()
            self._child.errors.close()
            self._child.process.returncode = 0  # there is none to wait for
        self._child, self._pair = None, ()


def _searched() -> list[str]:
    """sys.path, as far as it can be handed on."""
    return [path for path in sys.path if isinstance(path, str) and "\0" not in path]


def _received(line: socket.socket, most: int) -> bytes:
    told = bytearray()
    while not told.endswith(b"\n") and len(told) < most:
        piece = line.recv(1 << 16)
        if not piece:
            break
        told += piece
    return bytes(told)
