"""Follows the answers of the engine in asyncio, while the engine computes in its own thread."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Sequence

from nplora.serving.request_error import RequestError
from nplora.serving.ticket import Chunk, Ticket

PAUSE = None  # yielded when nothing has come for a while


class TicketStream:
    """The answers to one HTTP request.

    Args:
        tickets: the engine's tickets, one for each answer.
        timeout: seconds after which the answers are cancelled.
    """

    def __init__(self, tickets: Sequence[Ticket], timeout: float) -> None:
        self.tickets = tickets
        self._loop = asyncio.get_running_loop()
        self._end = self._loop.time() + timeout
        self._timeout = timeout
        self._queue: asyncio.Queue[tuple[int, Chunk | None] | None] = asyncio.Queue()
        for index, ticket in enumerate(tickets):
            ticket.listen(lambda chunk, index=index: self._put(index, chunk))  # type: ignore[misc]

    def _put(self, index: int, chunk: Chunk | None) -> None:
        with contextlib.suppress(RuntimeError):  # the loop has ended, and with it the client's connection
            self._loop.call_soon_threadsafe(self._queue.put_nowait, (index, chunk))

    def stop(self) -> None:
        """End the answers now, because the server shuts down: `follow` raises an error at once."""
        self._queue.put_nowait(None)
        self.cancel()

    def cancel(self) -> None:
        """End the answers that have not ended."""
        for ticket in self.tickets:
            if ticket.finish_reason is None:
                ticket.cancel()

    async def follow(self, pause: float | None = None) -> AsyncGenerator[tuple[int, Chunk | None] | None]:
        """Yield pairs (number of the answer, chunk) as they come. The chunk None ends an answer.

        Args:
            pause: seconds without a chunk after which PAUSE is yielded.
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
                async with asyncio.timeout(wait):  # wait_for of Python 3.11 may swallow a cancellation
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
