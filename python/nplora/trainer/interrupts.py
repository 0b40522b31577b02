"""Interrupts: delays the handling of signals while a run writes parameters or a checkpoint."""

import math
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any, Self

from nplora.platform.processes import ENDING_SIGNALS, NOTICE

REPEAT_SECONDS = 0.5  # a second Ctrl-C within this time ends the program

Handler = Callable[[int, FrameType | None], Any]


class Terminated(BaseException):
    """SIGTERM, SIGHUP or SIGUSR1 has arrived and ends the process.

    Attributes:
        status: the exit status that a shell reports for a process ended by the signal.
    """

    def __init__(self, signum: int) -> None:
        super().__init__(signum)
        self.status = 128 + signum


def _terminate(signum: int, frame: FrameType | None) -> None:
    raise Terminated(signum)


def _interrupt(signum: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def _ignore(signum: int, frame: FrameType | None) -> None:
    """Ignore SIGUSR1, which may arrive after a run of several processes, while the program saves results."""


class Interrupts:
    """A context manager that can delay the signals SIGINT, SIGTERM, SIGHUP and SIGUSR1.

    A signal is handled at once, except inside a `hold()` block, which delays the signal until the block ends.
    The existing handlers are kept: Python's handler of SIGINT raises KeyboardInterrupt, and an ignored
    signal, such as SIGHUP under nohup, stays ignored. If `terminate` is true, SIGTERM, SIGHUP and SIGUSR1
    raise Terminated instead of ending the process at once. If the program has its own handler for one of
    these signals, the signal calls that handler instead. Slurm and mpirun can send SIGUSR1 before the end of
    a job. Python handles signals only in the main thread, so in any other thread the context manager does
    nothing.

    Args:
        terminate: whether SIGTERM, SIGHUP and SIGUSR1 raise Terminated.
        noted_only: whether a signal is only recorded when it arrives, so that `end_run` can handle it later.
            Runs of several processes need this, because the processes must end together.
    Attributes:
        repeated: whether the last Ctrl-C came soon after another Ctrl-C, even one in the previous run. A
            repeated Ctrl-C means that the user wants to end the whole program.
    """

    _last = -math.inf  # the time of the last Ctrl-C in any run

    def __init__(self, terminate: bool, noted_only: bool = False) -> None:
        self._signals: tuple[signal.Signals, ...] = (
            (signal.SIGINT, *ENDING_SIGNALS) if terminate else (signal.SIGINT,)
        )
        self._noted_only = noted_only
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
            if previous in (signal.SIG_DFL, _ignore) and signum != signal.SIGINT:
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
            # MPI may have had its own handler for this signal. Python does not know and cannot restore it.
            is_usual = self._noted_only and signum == NOTICE and previous is signal.SIG_DFL
            signal.signal(signum, _ignore if is_usual else previous)

    def _on_signal(self, signum: int, frame: FrameType | None) -> None:
        if signum == signal.SIGINT:
            now = time.monotonic()
            self.repeated = now - Interrupts._last < REPEAT_SECONDS
            Interrupts._last = now
        if self._held or self._noted_only:
            self._waiting.append(signum)
        else:
            self._handlers[signum](signum, frame)

    @contextmanager
    def hold(self) -> Iterator[None]:
        """Delay the handling of signals until the end of the block."""
        self._held += 1
        try:
            yield
        finally:
            self._held -= 1
            while self._waiting and not self._held and not self._noted_only:
                self._handlers[signum := self._waiting.pop(0)](signum, None)

    def noted(self) -> tuple[int, bool] | None:
        """Return the pair (last recorded signal, `repeated`), or None if no signal was recorded."""
        return (self._waiting[-1], self.repeated) if self._waiting else None

    def end_run(self, signum: int, repeated: bool) -> None:
        """Handle a signal that this process or another process of the run has recorded.

        Raises:
            KeyboardInterrupt, Terminated: the signal ends the run. If the program's own handler of the signal
                returns, the run continues.
        """
        self._waiting.clear()
        self.repeated = repeated
        handler = self._handlers.get(signum, _interrupt if signum == signal.SIGINT else _terminate)
        handler(signum, None)
