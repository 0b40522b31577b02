"""The process of renderer.py, as those who ask it see it."""

from __future__ import annotations

import importlib.util
import json
import os
import socket
import subprocess
import sys
import threading
from pathlib import Path
from typing import NamedTuple

_PROGRAM = Path(__file__).with_name("renderer.py")


class _Child(NamedTuple):
    process: subprocess.Popen[bytes]
    line: socket.socket


class RenderProcess:
    """Started when it is first asked, and again after its end; it ends with its parent.

    Threads ask it one after the other.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._child: _Child | None = None
        os.register_at_fork(after_in_child=self._leave)

    def ask(self, question: bytes, length: int) -> tuple[str, str] | int:
        """The answer, of `length` bytes at most, or the status that the process ended with in its place.

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
                return self.stop()
            except BaseException:  # Ctrl-C: what comes next would be the answer to this question
                self.stop()
                raise
            if not told.endswith(b"\n"):
                return self.stop()
        kind, words = json.loads(told)
        return kind, words

    def stop(self) -> int:
        """End the process, where it has not ended, and tell its status."""
        if self._child is None:
            return 0
        child, self._child = self._child, None
        child.process.kill()
        child.line.close()
        return child.process.wait()

    def _running(self) -> _Child:
        if self._child is not None and self._child.process.poll() is not None:
            self.stop()
        if self._child is None:
            self._child = _start()
        return self._child

    def _leave(self) -> None:
        """After a fork: the process is another one's child, and the lock may be held there for ever."""
        self._lock = threading.Lock()
        if self._child is not None:
            self._child.line.close()
            self._child.process.returncode = 0  # there is none to wait for
            self._child = None


def _start() -> _Child:
    if importlib.util.find_spec("jinja2") is None:
        message = 'chat templates need the package jinja2: pip install "nplora[llm]"'
        raise ModuleNotFoundError(message, name="jinja2")
    if not sys.executable:
        raise OSError("chat templates are rendered by a process of Python, and sys.executable names none")
    ours, theirs = socket.socketpair()
    try:
        process = subprocess.Popen(
            [sys.executable, "-I", "-S", str(_PROGRAM), *sys.path],
            stdin=theirs.fileno(),
            stdout=theirs.fileno(),
            stderr=subprocess.DEVNULL,
            start_new_session=True,  # which Ctrl-C does not reach
        )
    except BaseException:
        ours.close()
        raise
    finally:
        theirs.close()
    return _Child(process, ours)


def _received(line: socket.socket, most: int) -> bytes:
    """A line, without a buffer, whose lock a fork could leave held for ever."""
    told = bytearray()
    while not told.endswith(b"\n") and len(told) < most:
        piece = line.recv(1 << 16)
        if not piece:
            break
        told += piece
    return bytes(told)
