"""Reads the bodies of requests within limits of size and time."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, MutableMapping
from typing import Any

from nplora.formats import strict_json
from nplora.formats.errors import FormatError
from nplora.serving.api.access import Receive
from nplora.serving.request_error import RequestError

_MOST_VALUES = 1 << 19
_STALL = 30.0  # seconds that a client may pause while it sends a body
_JSON_SECONDS = 60.0
_DRAIN_SECONDS = 5.0


class DisconnectedError(Exception):
    """The client has closed the connection."""


class Body:
    """The body of one request, with a limit on its size.

    Args:
        receive: ASGI's function `receive`.
        length: the Content-Length header; None if the client sent none.
        limit: the largest number of bytes.
    """

    def __init__(self, receive: Receive, length: str | None, limit: int) -> None:
        self._receive, self._limit, self._size, self._ended = receive, limit, 0, False
        self._length = length

    @property
    def ended(self) -> bool:
        """Whether the body was read to its end."""
        return self._ended

    async def receive(self) -> MutableMapping[str, Any]:
        """Return ASGI's next message of the request, within limits of size and time.

        Raises:
            RequestError: the body is too large, or the client pauses too long.
        """
        if self._ended:
            return await self._receive()
        if self._length is not None and self._length.isdecimal() and int(self._length[:20]) > self._limit:
            raise self._too_large()
        try:
            async with asyncio.timeout(_STALL):
                message = await self._receive()
        except TimeoutError:
            raise RequestError("the body did not arrive in time", 408, code="timeout") from None
        if message["type"] == "http.request":
            self._size += len(message.get("body", b""))
            self._ended = not message.get("more_body", False)
            if self._size > self._limit:
                raise self._too_large()
        else:
            self._ended = True
        return message

    def _too_large(self) -> RequestError:
        return RequestError(f"the body is larger than {self._limit:,} bytes", 413, code="request_too_large")

    async def read(self) -> bytes:
        """The whole body."""
        parts = []
        try:
            async with asyncio.timeout(_JSON_SECONDS):
                while not self._ended:
                    message = await self.receive()
                    if message["type"] != "http.request":
                        raise DisconnectedError
                    parts.append(message.get("body", b""))
        except TimeoutError:
            raise RequestError("the body did not arrive in time", 408, code="timeout") from None
        return b"".join(parts)

    async def json(self) -> Any:
        """The body as JSON.

        Raises:
            RequestError: the body is not JSON, is too large or nested too deeply, or did not arrive in time.
        """
        raw = await self.read()
        if not raw.strip():
            raise RequestError("the body is empty, expected a JSON object", code="invalid_json")
        try:
            return strict_json.loads(raw, "the body", _MOST_VALUES)
        except FormatError as error:
            raise RequestError(str(error), code="invalid_json") from error
        except RecursionError:
            raise RequestError("the body is nested too deeply", code="invalid_json") from None

    async def drain(self, most: int) -> None:
        """Read the rest of a refused body and discard it. Stop after `most` bytes or `_DRAIN_SECONDS`."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_DRAIN_SECONDS):
                while not self._ended and most > 0:
                    message = await self._receive()
                    most -= len(message.get("body", b""))
                    self._ended = message["type"] != "http.request" or not message.get("more_body", False)


async def unless_disconnected(receive: Receive, work: Awaitable[Any]) -> Any:
    """Return the result of `work`. If the client closes the connection before `work` ends, cancel `work`.

    Raises:
        DisconnectedError: the client has closed the connection.
    """
    task = asyncio.ensure_future(work)
    watch = asyncio.ensure_future(_disconnection(receive))
    try:
        await asyncio.wait({task, watch}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise DisconnectedError
        return task.result()
    finally:
        for one in (task, watch):
            one.cancel()
        await asyncio.gather(task, watch, return_exceptions=True)


async def _disconnection(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
