"""Limits on the process that renders chat templates.

That process runs renderer.py. To start fast, renderer.py imports this module by its file path, without
importing the package nplora.

On Linux, the process limits its own memory and CPU time; on macOS, only its time; on Windows, neither. The
parent process enforces the other limits (see `watched`). For these limits, the parent checks every few
milliseconds what the rendering process has used, and ends the rendering process if it exceeds a limit.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, NoReturn

if sys.platform != "win32" and sys.platform != "emscripten":  # browsers have no processes
    import resource

LIMITS_MEMORY = sys.platform == "linux"
LIMITS_TIME = sys.platform != "win32"
_POLL = 0.005  # seconds between two checks of the process
_IDLE = 48 << 20, 1.0  # bytes and seconds that the process needs to start
_MEMORY_STATUS = 86  # the exit status on Windows
_STACK_OVERFLOW = 0xC000_00FD  # Windows' exit status

if sys.platform == "win32":
    _CAUSES = {_MEMORY_STATUS: "memory", _STACK_OVERFLOW: "nesting"}
else:
    _CAUSES = {
        -signal.SIGVTALRM: "compiling",
        -signal.SIGPROF: "rendering",
        -signal.SIGKILL: "memory",
        -signal.SIGSEGV: "nesting",
    }


def cause_of_end(status: int) -> str | None:
    """The name of the limit that ended a process: "compiling", "rendering", "memory" or "nesting".

    The result is "other" if another signal ended the process, and None if the process ended by itself.

    Args:
        status: the exit status; on POSIX, a negative number means that a signal ended the process.
    """
    return _CAUSES.get(status, "other" if status < 0 else None)


# ---- called by the limited process ----


def isolate() -> None:
    """Prevent this process from writing files. Make sure that the timers' signals can end the process."""
    if sys.platform != "win32" and sys.platform != "emscripten":
        os.set_blocking(sys.stderr.fileno(), False)  # the parent reads stderr after this process has ended
        for kind in (resource.RLIMIT_CORE, resource.RLIMIT_FSIZE):
            resource.setrlimit(kind, (0, 0))
        signal.pthread_sigmask(signal.SIG_SETMASK, [])
        for number in (signal.SIGPROF, signal.SIGVTALRM):
            signal.signal(number, signal.SIG_DFL)


def limit_compiling(seconds: float) -> None:
    """End this process after `seconds` more seconds of CPU time in user mode. 0 means no limit."""
    if sys.platform != "win32":
        signal.setitimer(signal.ITIMER_VIRTUAL, seconds)


def limit_rendering(seconds: float) -> None:
    """End this process after `seconds` more seconds of CPU time in user or system mode. 0: no limit."""
    if sys.platform != "win32":
        signal.setitimer(signal.ITIMER_PROF, seconds)


@contextlib.contextmanager
def limited_memory(nbytes: int) -> Iterator[None]:
    """Limit the additional memory that this process can use in the `with` body to `nbytes`; 0: no limit.

    On systems other than Linux, the memory is not limited. The end of the body also removes the limits of
    `limit_compiling` and `limit_rendering`.
    """
    if sys.platform == "linux":
        soft, hard = resource.getrlimit(resource.RLIMIT_AS)
        with open("/proc/self/statm") as file:
            mapped = int(file.read().split()[0]) * resource.getpagesize()
        if nbytes:
            with contextlib.suppress(ValueError):  # the hard limit is already lower
                resource.setrlimit(resource.RLIMIT_AS, (mapped + nbytes, hard))
    yield
    limit_compiling(0)
    limit_rendering(0)
    if sys.platform == "linux":
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def end_without_memory() -> NoReturn:
    """End this process as the system does when memory runs out: with SIGKILL.

    On Windows, end it with the exit status `_MEMORY_STATUS`.
    """
    if sys.platform != "win32":
        os.kill(os.getpid(), signal.SIGKILL)
    os._exit(_MEMORY_STATUS)


# ---- called by the parent process ----


class Limits(NamedTuple):
    """The limits for one request. Memory and time that earlier requests used do not count. 0 means no limit.

    Attributes:
        compiling, rendering: seconds of CPU time.
        memory: bytes.
    """

    compiling: float
    rendering: float
    memory: int

    def set_by_process(self) -> Limits:
        """The limits that the rendering process can set for itself."""
        return self._replace(**({} if LIMITS_TIME else _NO_TIME), **({} if LIMITS_MEMORY else _NO_MEMORY))

    def set_by_parent(self) -> Limits:
        """The limits that the parent process must enforce."""
        return self._replace(**(_NO_TIME if LIMITS_TIME else {}), **(_NO_MEMORY if LIMITS_MEMORY else {}))


_NO_TIME: dict[str, Any] = {"compiling": 0.0, "rendering": 0.0}
_NO_MEMORY: dict[str, Any] = {"memory": 0}


@contextlib.contextmanager
def watched(
    usage: Callable[[], tuple[int, float] | None], kill: Callable[[], None], limits: Limits
) -> Iterator[list[str]]:
    """During a `with` body, end a process as soon as it exceeds a limit that the system cannot enforce.

    The context yields a list. If this function ends the process, it adds the cause to the list: "memory" or
    "rendering".

    Args:
        usage: a function that returns the bytes of memory and the seconds of CPU time that the process has
            used, or None if the process is gone.
        kill: a function that ends the process.
    """
    causes: list[str] = []
    most = limits.set_by_parent()
    seconds = most.compiling + most.rendering
    if not (most.memory or seconds):
        yield causes
        return
    ended = threading.Event()
    begun = usage() or (0, 0.0)

    def watch() -> None:
        while not ended.wait(_POLL):
            used = usage()
            if used is None:
                return
            if most.memory and used[0] > max(begun[0], _IDLE[0]) + most.memory:
                causes.append("memory")
            elif seconds and used[1] > max(begun[1], _IDLE[1]) + seconds:
                causes.append("rendering")
            if causes:
                kill()
                return

    thread = threading.Thread(target=watch, name="nplora-limits", daemon=True)
    thread.start()
    try:
        yield causes
    finally:
        ended.set()
        thread.join()
