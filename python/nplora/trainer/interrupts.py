"""Signals during a run. They wait while parameters or a checkpoint are written."""

import math
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any, Self

REPEAT_SECONDS = 0.5  # two Ctrl-C within this time end the program

_ENDING = (signal.SIGTERM, signal.SIGHUP)

Handler = Callable[[int, FrameType | None], Any]


class Terminated(BaseException):
    """A signal that ends the process has arrived.

    Attributes:
        status: the exit status that a shell reports for a process that this signal ended.
    """

    def __init__(self, signum: int) -> None:
        super().__init__(signum)
        self.status = 128 + signum


def _terminate(signum: int, frame: FrameType | None) -> None:
    raise Terminated(signum)


class Interrupts:
    """While this is entered, SIGINT, SIGTERM and SIGHUP are handled at once, except inside `hold()`.

    Inside `hold()` they wait until its end. The handlers stay the same: Python's own handler of SIGINT raises
    KeyboardInterrupt, and a signal that is ignored stays ignored, like SIGHUP under nohup. If `terminate` is
    true, SIGTERM and SIGHUP raise Terminated instead of ending the process at once. Only the main thread
    receives signals; in other threads nothing changes.

    Attributes:
        repeated: the last Ctrl-C came soon after another Ctrl-C, perhaps in the previous run. The user wants
            to end the whole program.
    """

    _last = -math.inf  # the time of the last Ctrl-C in any run

    def __init__(self, terminate: bool) -> None:
        self._signals = (signal.SIGINT, *_ENDING) if terminate else (signal.SIGINT,)
        self._previous: dict[int, Any] = {}
        self._handlers: dict[int, Handler] = {}
        self._held = 0
        self._waiting: list[int] = []
        self.repeated = False

    def __enter__(self) -> Self:
        if threading.current_thread() is not threading.main_thread():
            return self
        for signum in self._signals:
            previous = signal.getsignal(signum)
            if previous is signal.SIG_DFL and signum in _ENDING:
                self._handlers[signum] = _terminate
            elif callable(previous):
                self._handlers[signum] = previous
            else:
                continue
            self._previous[signum] = previous
            signal.signal(signum, self._on_signal)
        return self

    def __exit__(self, *exception: object) -> None:
        for signum, previous in self._previous.items():
            signal.signal(signum, previous)

    def _on_signal(self, signum: int, frame: FrameType | None) -> None:
        if signum == signal.SIGINT:
            now = time.monotonic()
            self.repeated = now - Interrupts._last < REPEAT_SECONDS
            Interrupts._last = now
        if self._held:
            self._waiting.append(signum)
        else:
            self._handlers[signum](signum, frame)

    @contextmanager
    def hold(self) -> Iterator[None]:
        """Finish this block before a signal is handled."""
        self._held += 1
        try:
            yield
        finally:
            self._held -= 1
            while self._waiting and not self._held:
                self._handlers[signum := self._waiting.pop(0)](signum, None)
