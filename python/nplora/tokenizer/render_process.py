"""Starts the process that runs renderer.py, and sends it chat templates to render."""

from __future__ import annotations

import errno
import importlib.util
import io
import json
import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import NamedTuple, Self

from nplora.platform import limits, processes
from nplora.platform.limits import Limits
from nplora.platform.memory import usage_of

_PROGRAM = Path(__file__).with_name("renderer.py")


class End(NamedTuple):
    """How the process ended: its exit status, the last line of its stderr, and the limit that it exceeded."""

    status: int
    words: str
    cause: str | None = None


class _Line(NamedTuple):
    """One end of a two-way connection: one file descriptor to read from, and one to write to."""

    reader: int
    writer: int

    @classmethod
    def pair(cls) -> tuple[Self, Self]:
        first, second = os.pipe(), os.pipe()
        return cls(first[0], second[1]), cls(second[0], first[1])

    def send(self, data: bytes) -> None:
        rest = memoryview(data)
        while rest:
            try:
                rest = rest[os.write(self.writer, rest) :]
            except OSError as error:
                if processes.is_broken_pipe(error):  # on Windows, it may be another OSError
                    raise BrokenPipeError(errno.EPIPE, os.strerror(errno.EPIPE)) from error
                raise

    def receive(self, most: int) -> bytes:
        """Read a line. The end is missing if the line exceeds `most` bytes or the other process has ended."""
        received = bytearray()
        while not received.endswith(b"\n") and len(received) < most:
            piece = os.read(self.reader, 1 << 16)
            if not piece:
                break
            received += piece
        return bytes(received)

    def close(self) -> None:
        os.close(self.reader)
        os.close(self.writer)


class _Child(NamedTuple):
    process: subprocess.Popen[bytes]
    line: _Line
    errors: io.FileIO


class RenderProcess:
    """The process that renders chat templates.

    The process starts at its first use, restarts if it has ended, and ends with its parent. The process
    serves one thread at a time.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._child: _Child | None = None
        self._pair: tuple[_Line, ...] = ()  # pipes of a process that is just being started
        processes.call_in_forked_child(self._leave)

    def ask(self, question: bytes, length: int, most: Limits) -> tuple[str, str] | End:
        """Send a request. Return the answer (kind, text), or an `End` if the process ended.

        Args:
            length: the largest number of bytes that the answer may have.
            most: the limits for the time and the memory of this request.
        Raises:
            ModuleNotFoundError: the package `jinja2` is not installed.
            OSError: the process cannot be started.
        """
        with self._lock:
            child = self._running()
            process, answer = child.process, b""
            with limits.watched(lambda: usage_of(process.pid), process.kill, most) as causes:
                try:
                    child.line.send(question)
                    answer = child.line.receive(length + 1)
                except BrokenPipeError:
                    pass
                except BaseException:  # after Ctrl-C, the next question must not receive this answer
                    self._stop()
                    raise
            if len(answer) > length:
                causes.append("memory")
            if causes or not answer.endswith(b"\n"):
                end = self._stop()
                return end._replace(cause=causes[0]) if causes else end
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
        return End(status, words.rpartition("\n")[2], limits.cause_of_end(status))

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
        self._pair = ours, theirs = _Line.pair()
        try:
            process = processes.start_apart(
                [sys.executable, "-I", "-S", "-W", "ignore", str(_PROGRAM), *_searched()],
                env={**os.environ, "NO_COLOR": "1"},
                bufsize=0,  # a buffer has a lock, which could stay locked for ever after a fork
                stdin=theirs.reader,
                stdout=theirs.writer,
                stderr=subprocess.PIPE,
            )
        except BaseException:
            ours.close()
            raise
        finally:
            theirs.close()
            self._pair = ()
        assert isinstance(process.stderr, io.FileIO)
        processes.do_not_wait(process.stderr)  # a forked process may keep the other end open
        return _Child(process, ours, process.stderr)

    def _leave(self) -> None:
        """In a forked child process, close the pipes to the rendering process and make a new lock.

        The rendering process belongs to the parent. Another thread of the parent may have held the old lock.
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
    """Return the entries of `sys.path` that can be passed to another process as arguments."""
    return [path for path in sys.path if isinstance(path, str) and "\0" not in path]
