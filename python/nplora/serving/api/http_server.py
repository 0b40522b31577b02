"""The HTTP server: uvicorn, with time limits for slow or vanished clients, and an orderly shutdown."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import json
import logging
import math
import signal
import socket
from collections.abc import Callable, Iterator
from typing import Any

from nplora.platform import processes
from nplora.serving.api.app import Application
from nplora.serving.request_error import RequestError

# The time limit for the head of a request. The time starts with the request's first byte. For the first
# request of a connection, the time starts when the client connects.
_HEADER_SECONDS = 10.0
_KEEP_ALIVE_SECONDS = 30
_LAST_SECONDS = 5  # after `drain_seconds`, unfinished answers get this time to send their errors
_STALL_SECONDS = 60.0  # the time for which a client may leave an answer unread
_MOST_CONNECTIONS = 1000
_MOST_HEAD = 32 << 10  # bytes of the head of a request
_FULL = RequestError("the server has too many connections", 503, code="too_many_connections")
_MALFORMED = RequestError("this is not an HTTP request", 400, code="invalid_request")


def serve(
    app: Application,
    listener: socket.socket,
    *,
    drain_seconds: float,
    ready: Callable[[], None] = lambda: None,
    stopping: Callable[[int], None] = lambda number: None,
) -> None:
    """Serve until SIGTERM or SIGINT.

    After the first signal, accept no new connections, and finish the answers that have begun. A second
    signal ends the server at once.

    Args:
        listener: a listening socket.
        drain_seconds: after the signal, unfinished answers may take this many more seconds.
        ready: called when the server accepts requests.
        stopping: called with the number of the first signal, before the answers are finished.
    """
    server = _server(app, drain_seconds, ready, stopping)
    asyncio.run(server.serve([listener]))


def bind(host: str, port: int) -> socket.socket:
    """Listen on a socket, so that a port in use is detected before the model is loaded.

    A connection that arrives before `serve` is called waits for `serve`.

    Raises:
        OSError: the host is unknown, or the port is in use.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
    except socket.gaierror as error:
        raise OSError(f"the host {host!r} is unknown: {error.strerror}") from error
    made = socket.socket(family, kind, protocol)
    try:
        processes.reuse_address(made)
        made.bind(address)
        made.listen()  # two sockets can be bound to one port, but only one can listen
    except OSError as error:
        made.close()
        hint = "; choose another --port" if error.errno == errno.EADDRINUSE else ""
        raise OSError(error.errno, f"cannot listen on {host}:{port}: {error.strerror}{hint}") from error
    return made


def _server(
    app: Application,
    drain_seconds: float,
    ready: Callable[[], None],
    stopping: Callable[[int], None] = lambda number: None,
) -> Any:
    import uvicorn

    class Server(uvicorn.Server):  # type: ignore[misc, unused-ignore]
        first_signal = 0

        async def startup(self, sockets: Any = None) -> None:
            await super().startup(sockets)
            ready()

        async def shutdown(self, sockets: Any = None) -> None:
            app.service.draining = True
            stopping(self.first_signal)
            timer = asyncio.get_running_loop().call_later(drain_seconds, app.service.stop_answers)
            await super().shutdown(sockets)
            timer.cancel()

        def handle_exit(self, sig: int, frame: Any) -> None:
            self.first_signal = self.first_signal or sig
            self.should_exit, self.force_exit = True, bool(self.should_exit)

        @contextlib.contextmanager
        def capture_signals(self) -> Iterator[None]:
            """Handle signals. Unlike uvicorn's own method, do not raise the signals again at the end."""
            numbers = (signal.SIGINT, signal.SIGTERM)
            try:
                before = {number: signal.signal(number, self.handle_exit) for number in numbers}
            except ValueError:  # not in the main thread
                before = {}
            try:
                yield
            finally:
                for number, handler in before.items():
                    signal.signal(number, handler)

    # python_multipart's warnings are not logged, because the client gets them as errors.
    logging.getLogger("python_multipart").setLevel(logging.ERROR)
    logging.getLogger("asyncio").addFilter(_is_no_departure)
    config = uvicorn.Config(
        app,
        http=_protocol(),
        ws="none",
        lifespan="off",
        loop="asyncio",
        log_level="critical",
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        timeout_keep_alive=_KEEP_ALIVE_SECONDS,
        timeout_graceful_shutdown=math.ceil(drain_seconds) + _LAST_SECONDS,
        h11_max_incomplete_event_size=_MOST_HEAD,
    )
    return Server(config)


def _is_no_departure(record: logging.LogRecord) -> bool:
    """Filter out asyncio's warning that a client has closed the connection during an answer."""
    return not str(record.msg).startswith("socket.send() raised")


def _protocol() -> Any:
    """The class that handles one connection."""
    from uvicorn.protocols.http.h11_impl import H11Protocol

    class Connection(H11Protocol):  # type: ignore[misc, unused-ignore]
        """A connection that is closed if a request's head takes too long, or if the client reads nothing."""

        head_timer: asyncio.TimerHandle | None = None
        stall_timer: asyncio.TimerHandle | None = None

        def connection_made(self, transport: Any) -> None:
            super().connection_made(transport)
            processes.detect_vanished_peer(transport.get_extra_info("socket"))
            if len(self.connections) > _MOST_CONNECTIONS:
                transport.write(_raw(_FULL))
                transport.close()
                return
            self._await_head()

        def connection_lost(self, exc: Exception | None) -> None:
            self._stop_timers()
            super().connection_lost(exc)

        def data_received(self, data: bytes) -> None:
            begun = self.cycle
            super().data_received(data)
            if self.cycle is not begun:
                self._stop_head_timer()
            elif self.head_timer is None and (begun is None or begun.response_complete):
                self._await_head()

        def pause_writing(self) -> None:
            self.flow.pause_writing()
            self.stall_timer = self.loop.call_later(_STALL_SECONDS, self.transport.abort)

        def resume_writing(self) -> None:
            self.flow.resume_writing()
            if self.stall_timer is not None:
                self.stall_timer.cancel()
                self.stall_timer = None

        def send_400_response(self, msg: str) -> None:
            self.transport.write(_raw(_MALFORMED))
            self.transport.close()

        def _await_head(self) -> None:
            self._stop_head_timer()
            self.head_timer = self.loop.call_later(_HEADER_SECONDS, self.transport.abort)

        def _stop_head_timer(self) -> None:
            if self.head_timer is not None:
                self.head_timer.cancel()
                self.head_timer = None

        def _stop_timers(self) -> None:
            self._stop_head_timer()
            if self.stall_timer is not None:
                self.stall_timer.cancel()

    return Connection


def _raw(error: RequestError) -> bytes:
    """A complete HTTP response that reports an error."""
    body = json.dumps(error.body(), allow_nan=False).encode()
    phrase = "Bad Request" if error.status == 400 else "Service Unavailable"
    head = (
        f"HTTP/1.1 {error.status} {phrase}\r\ncontent-type: application/json\r\n"
        f"content-length: {len(body)}\r\nconnection: close\r\n\r\n"
    )
    return head.encode() + body
