"""Messages: the pending MPI messages of a rank. Progress: a thread that lets MPI move messages."""

import contextlib
import threading
from typing import Any

_PERIOD = 1e-3  # seconds between two calls of MPI


class Messages:
    """The MPI requests that send messages to other ranks or receive messages from them.

    Attributes:
        receives, sends: lists of pairs (rank, request) for messages from, or to, another rank.
    """

    def __init__(self) -> None:
        self.receives: list[tuple[int, Any]] = []
        self.sends: list[tuple[int, Any]] = []

    def unfinished(self) -> list[int]:
        """The other rank of each incomplete request: the receiver or the sender of its message."""
        return [rank for rank, request in (*self.receives, *self.sends) if not request.Test()]

    def abandon(self, pending: list[Any]) -> None:
        """Cancel the receives, and move all requests to `pending`.

        MPI may still complete the requests, so `pending` must keep them and their buffers alive.
        """
        receives = [request for _, request in self.receives]
        pending += [*receives, *(request for _, request in self.sends)]
        self.clear()
        for request in receives:
            with contextlib.suppress(Exception):  # MPI itself has failed
                if not request.Test():
                    request.Cancel()

    def clear(self) -> None:
        self.receives.clear()
        self.sends.clear()


class Progress:
    """A thread that lets MPI move messages while the process computes.

    MPI moves large messages only during calls of MPI functions, so the thread calls MPI again and again. No
    other thread may call MPI between `start` and `stop`.

    Args:
        messages: the thread ends when all of these messages are complete.
        is_allowed: whether a thread may call MPI. If False, `start` does nothing, and MPI moves messages only
            when the process waits for messages.
    """

    def __init__(self, messages: Messages, is_allowed: bool) -> None:
        self._messages, self._is_allowed = messages, is_allowed
        self._stopped = threading.Event()
        self._thread: threading.Thread | None = None
        self._error: Exception | None = None

    def start(self) -> None:
        if self._is_allowed and self._messages.unfinished():
            self._stopped.clear()
            self._thread = threading.Thread(target=self._run, name="nplora messages", daemon=True)
            self._thread.start()

    def stop(self) -> None:
        """End the thread, if there is one.

        Raises:
            Exception: an MPI error has ended the thread.
        """
        if self._thread is not None:
            self._stopped.set()
            self._thread.join()
            self._thread = None
        error, self._error = self._error, None
        if error is not None:
            raise error

    def _run(self) -> None:
        try:
            while not self._stopped.wait(_PERIOD) and self._messages.unfinished():
                pass
        except Exception as error:
            self._error = error
