"""Starts the process that runs renderer.py, and sends it chat templates to render."""

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
    """How the process ended: its status (negative for a signal), and the last line of its error output."""

    status: int
    words: str


class _Child(NamedTuple):
    process: subprocess.Popen[bytes]
    line: socket.socket
    errors: io.FileIO


class RenderProcess:
    """The process that renders chat templates.

    The process starts at its first use, restarts if it has ended, and ends with its parent. Threads use the
    process one after another.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._child: _Child | None = None
        self._pair: tuple[socket.socket, ...] = ()  # sockets of a process that is just being started
        os.register_at_fork(after_in_child=self._leave)

    def ask(self, question: bytes, length: int) -> tuple[str, str] | End:
        """Send a request. Return the answer (at most `length` bytes), or how the process ended.

        Raises:
            ModuleNotFoundError: the package `jinja2` is not installed.
            OSError: the process cannot be started.
        """
        with self._lock:
            child = self._running()
            try:
                child.line.sendall(question)
                answer = _received(child.line, length + 1)
            except (BrokenPipeError, ConnectionResetError):
                return self._stop()
            except BaseException:  # after Ctrl-C, the next question must not receive this answer
                self._stop()
                raise
            if not answer.endswith(b"\n"):
                return self._stop()
        kind, words = json.loads(answer)
        return kind, words

    def stop(self) -> None:
        """End the process if it is running."""
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
                f"chat templates are rendered by a separate Python process, but sys.executable "
                f"{sys.executable!r} cannot run {_PROGRAM}"
            )
        self._pair = ours, theirs = socket.socketpair()
        try:
            process = subprocess.Popen(
                [sys.executable, "-I", "-S", "-W", "ignore", str(_PROGRAM), *_searched()],
                env={**os.environ, "NO_COLOR": "1"},
                bufsize=0,  # a buffer has a lock, which a fork could leave held for ever
                stdin=theirs.fileno(),
                stdout=theirs.fileno(),
                stderr=subprocess.PIPE,
                start_new_session=True,  # so that Ctrl-C does not reach it
            )
        except BaseException:
            ours.close()
            raise
        finally:
            theirs.close()
            self._pair = ()
        assert isinstance(process.stderr, io.FileIO)
        os.set_blocking(process.stderr.fileno(), False)  # a forked process may keep the other end open
        return _Child(process, ours, process.stderr)

    def _leave(self) -> None:
        """In the child process after a fork, forget the rendering process and make a new lock.

        The process belongs to the parent, and another thread of the parent may have held the old lock.
        """
        self._lock = threading.Lock()
        for end in self._pair:
            end.close()
        if self._child is not None:
            self._child.line.close()
            self._child.errors.close()
            self._child.process.returncode = 0  # there is no child to wait for
        self._child, self._pair = None, ()


def _searched() -> list[str]:
    """The entries of `sys.path` that can be passed to another process."""
    return [path for path in sys.path if isinstance(path, str) and "\0" not in path]


def _received(line: socket.socket, most: int) -> bytes:
    received = bytearray()
    while not received.endswith(b"\n") and len(received) < most:
        piece = line.recv(1 << 16)
        if not piece:
            break
        received += piece
    return bytes(received)
