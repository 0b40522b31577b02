"""Messages: MPI messages on their way, and Progress, which moves them while the process computes."""

import contextlib
import threading
from typing import Any

_PERIOD = 1e-3  # seconds between two calls of MPI


class Messages:
    """MPI requests of messages to and from other ranks.

    Attributes:
        receives, sends: pairs of the other rank and the request.
    """

    def __init__(self) -> None:
        self.receives: list[tuple[int, Any]] = []
        self.sends: list[tuple[int, Any]] = []

    def unfinished(self) -> list[int]:
        """The other ranks of the requests that are not complete yet."""
        return [rank for rank, request in (*self.receives, *self.sends) if not request.Test()]

    def abandon(self, pending: list[Any]) -> None:
        """Cancel the receives, and move all requests to `pending`.

        MPI may still carry out the requests, so they must keep their memory.
        """
        receives = [request for _, request in self.receives]
        pending += [*receives, *(request for _, request in self.sends)]
        self.clear()
        for request in receives:
            with contextlib.suppress(Exception):  # MPI itself has failed
                if not request.Test():
                    request.Cancel()

    def clear(self) -> None:
        """Remove all requests."""
        self.receives.clear()
        self.sends.clear()


class Progress:
    """A thread that lets MPI move messages. MPI moves large messages only while the process calls it.

    No other thread may call MPI between `start` and `stop`.

    Args:
        messages: the thread ends when all of them have arrived.
        is_allowed: whether threads may call MPI. If not, `start` does nothing, and messages move when the
            process waits for them.
    """

    def __init__(self, messages: Messages, is_allowed: bool) -> None:
        self._messages, self._is_allowed = messages, is_allowed
        self._stopped = threading.Event()
        self._thread: threading.Thread | None = None
        self._error: Exception | None = None

    def start(self) -> None:
        """Start the thread."""
        if self._is_allowed and self._messages.unfinished():
            self._stopped.clear()
            self._thread = threading.Thread(target=self._run, name="nplora messages", daemon=True)
            self._thread.start()

    def stop(self) -> None:
        """End the thread, if it runs.

        Raises:
            Exception: the error of MPI that has ended the thread.
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
