"""Passes answers from the engine's thread to the event loop of asyncio."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import weakref
from collections import deque
from collections.abc import AsyncGenerator, Sequence

from nplora.serving.request_error import RequestError
from nplora.serving.ticket import Chunk, Ticket

PAUSE = None  # `follow` yields this value if no chunk has come for a while


Queue = asyncio.Queue[tuple[int, Chunk | None] | None]


class Inbox:
    """Moves chunks of answers from the engine's thread into asyncio queues of an event loop.

    In each round, the engine produces a chunk for each running request. To wake the event loop, the engine's
    thread makes a system call. Afterwards, the thread may have to wait for Python's interpreter lock. So the
    thread wakes the loop only once for several chunks.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = weakref.ref(loop)
        self._came = deque[tuple[Queue, int, Chunk | None]]()
        self._woken = False

    def put(self, queue: Queue, index: int, chunk: Chunk | None) -> None:
        """Put a chunk into `queue`, which belongs to the event loop. Any thread may call this method."""
        self._came.append((queue, index, chunk))
        if not self._woken and (loop := self._loop()) is not None:
            self._woken = True
            with contextlib.suppress(RuntimeError):  # the loop and all connections have ended
                loop.call_soon_threadsafe(self._distribute)

    def _distribute(self) -> None:
        self._woken = False  # set first, so that a chunk that comes from now on wakes the loop again
        while self._came:
            queue, index, chunk = self._came.popleft()
            queue.put_nowait((index, chunk))


_inboxes = weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, Inbox]()


class TicketStream:
    """Follows the answers to one HTTP request.

    Args:
        tickets: the engine's tickets, one for each answer.
        timeout: seconds after which the answers are cancelled.
    """

    def __init__(self, tickets: Sequence[Ticket], timeout: float) -> None:
        self.tickets = tickets
        self._loop = asyncio.get_running_loop()
        self._end = self._loop.time() + timeout
        self._timeout = timeout
        self._queue: Queue = asyncio.Queue()
        inbox = _inboxes.setdefault(self._loop, Inbox(self._loop))
        for index, ticket in enumerate(tickets):
            ticket.listen(functools.partial(inbox.put, self._queue, index))

    def stop(self) -> None:
        """End the answers now, because the server shuts down. A running `follow` raises an error at once."""
        self._queue.put_nowait(None)
        self.cancel()

    def cancel(self) -> None:
        """Cancel the answers that have not ended yet."""
        for ticket in self.tickets:
            if ticket.finish_reason is None:
                ticket.cancel()

    async def follow(self, pause: float | None = None) -> AsyncGenerator[tuple[int, Chunk | None] | None]:
        """Yield a pair (index of the answer, chunk) for each new chunk. The chunk None ends an answer.

        Args:
            pause: after this many seconds without a chunk, yield the constant PAUSE instead of a pair; None:
                never yield PAUSE.
        Raises:
            RequestError: an answer failed, or took too long, or the server is shutting down.
        """
        left = len(self.tickets)
        while left:
            now = self._loop.time()
            if now >= self._end:
                raise RequestError(
                    f"the answer was not complete after {self._timeout:g} s", 504, code="timeout"
                )
            wait = self._end - now if pause is None else min(pause, self._end - now)
            try:
                async with asyncio.timeout(wait):  # Python 3.11's wait_for may lose a cancellation
                    found = await self._queue.get()
            except TimeoutError:
                yield PAUSE
                continue
            if found is None:
                raise _shutting_down()
            index, chunk = found
            if chunk is None:
                left -= 1
                _require_success(self.tickets[index])
            yield index, chunk


def _require_success(ticket: Ticket) -> None:
    if ticket.finish_reason == "error" and ticket.error is not None:
        raise ticket.error
    if ticket.finish_reason == "cancelled":
        raise _shutting_down()


def _shutting_down() -> RequestError:
    return RequestError("the server is shutting down", 503, code="shutting_down")
