"""Signals during a run: they wait while the parameters or a checkpoint are being written."""

import math
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any, Self

REPEAT_SECONDS = 0.5  # two Ctrl-C no further apart are one wish to leave the program

_ENDING = (signal.SIGTERM, signal.SIGHUP)

Handler = Callable[[int, FrameType | None], Any]


class Terminated(BaseException):
    """A signal arrived that ends the process.

    Attributes:
        status: what a shell reports for a process that this signal ended.
    """

    def __init__(self, signum: int) -> None:
        super().__init__(signum)
        self.status = 128 + signum


def _terminate(signum: int, frame: FrameType | None) -> None:
    raise Terminated(signum)


class Interrupts:
    """While entered, a handler of SIGINT, SIGTERM or SIGHUP runs at once, but within `hold()` at its end.

    The handlers that were there stay in charge: Python's own raises KeyboardInterrupt; a signal that is
    ignored stays ignored, as SIGHUP is under nohup. SIGTERM and SIGHUP, which by default end the process on
    the spot, raise Terminated instead if `terminate` is true. Outside the main thread, which alone receives
    signals, nothing is changed.

    Attributes:
        repeated: whether the last Ctrl-C came so soon after another, perhaps in the run before this one, that
            it is meant for the whole program.
    """

    _last = -math.inf  # when any run heard Ctrl-C

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
        """Let what happens in here finish before a signal is heard."""
        self._held += 1
        try:
            yield
        finally:
            self._held -= 1
            while self._waiting and not self._held:
                self._handlers[signum := self._waiting.pop(0)](signum, None)
