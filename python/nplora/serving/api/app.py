"""The application: the routes of the server, as ASGI."""

from __future__ import annotations

import asyncio
import os
from collections import Counter
from collections.abc import Awaitable, Callable, MutableMapping
from pathlib import Path
from typing import Any

from nplora.formats.errors import brief, nearest_names
from nplora.platform.memory import current_memory
from nplora.serving.api import adapter_routes, encoder_routes, text_routes, tuning_routes
from nplora.serving.api.access import Access, Receive, Scope, Send
from nplora.serving.api.bodies import Body, DisconnectedError
from nplora.serving.api.errors import as_request_error
from nplora.serving.api.prometheus import CONTENT_TYPE, exposition
from nplora.serving.api.service import EncoderService, Service
from nplora.serving.request_error import RequestError

PAGE = Path(__file__).parents[1] / "page"
_PAGE_TYPES = {
    ".html": "text/html",
    ".css": "text/css",
    ".js": "text/javascript",
    ".svg": "image/svg+xml",
}
_PAGE_HEADERS = {
    "content-security-policy": "default-src 'self'; style-src 'self' 'unsafe-inline'; img-src 'self' data:; "
    "frame-ancestors 'none'; base-uri 'none'; form-action 'none'",
    "referrer-policy": "no-referrer",
    "cache-control": "no-cache",
}
_FORM = 1 << 20  # the most bytes of an upload in addition to those of its file
_PIECE = 1 << 20  # bytes of a file that are read at a time
_RETRY = {429: b"1", 503: b"5"}  # {status: seconds after which the client should try again}
# The most bytes of a refused body that are still read. The second limit is for clients without access.
_DRAINED, _DRAINED_OF_STRANGERS = 64 << 20, 64 << 10
_FINAL = {504, 507}  # OpenAI's clients would repeat such a request in vain, so a header asks them not to

Handler = Callable[[Any], Awaitable[Any]]


def page_files(directory: Path = PAGE) -> dict[str, tuple[bytes, str]]:
    """The files of the web page: {path of the route: (content of the file, its media type)}."""
    if not (directory / "index.html").is_file():
        return {}
    found = {
        f"/{file.name}": (file.read_bytes(), _PAGE_TYPES[file.suffix])
        for file in sorted(directory.iterdir())
        if file.suffix in _PAGE_TYPES
    }
    return {"/": found["/index.html"], **found}


class Application:
    """The ASGI application of the server: checks whether a request is allowed, and calls its route.

    Args:
        service: the objects and limits that the routes share.
        keys, origins, hosts: see `Access`.
    """

    def __init__(
        self,
        service: Service,
        keys: tuple[str, ...] = (),
        origins: tuple[str, ...] = (),
        hosts: tuple[str, ...] = (),
    ) -> None:
        self.service = service
        self.responses: Counter[int] = Counter()
        self._page = {} if isinstance(service, EncoderService) else page_files()
        self._access = Access(keys, origins, self._page, hosts)
        self._router = self._routes()
        self._app: Any = self._respond_to
        if origins:
            from starlette.middleware.cors import CORSMiddleware

            methods, any_header = ("GET", "POST", "DELETE"), ("*",)
            self._app = CORSMiddleware(self._app, origins, allow_methods=methods, allow_headers=any_header)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            raise NotImplementedError(scope["type"])
        await self._app(scope, receive, send)

    async def _respond_to(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request. Every error becomes OpenAI's error object."""
        from starlette.requests import ClientDisconnect

        headers = dict(scope["headers"])
        is_upload = scope["path"] == "/v1/files"
        limit = self.service.max_file + _FORM if is_upload else self.service.max_body
        length = headers.get(b"content-length")
        body = Body(receive, None if length is None else length.decode("latin-1"), limit)
        started = False

        async def noted(message: MutableMapping[str, Any]) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
                self.responses[message["status"]] += 1
                message["headers"] = [*message.get("headers", ()), (b"x-content-type-options", b"nosniff")]
            await send(message)

        try:
            client = (scope.get("client") or ("",))[0]
            client = self._access.require(scope["method"], scope["path"], headers, client)
            scope.update({"app": self, "nplora": (body, client)})
            await self._router(scope, body.receive, noted)
        except (DisconnectedError, ClientDisconnect):
            return
        except Exception as error:
            if started:
                raise
            await self._refuse(self._known(error, scope), scope, body, noted)

    async def _refuse(self, error: RequestError, scope: Scope, body: Body, send: Send) -> None:
        """Send an error. If the client is still sending the body of its request, keep reading for a while.

        If the server closed the connection at once, the client could not send the rest of the body, and might
        fail before it reads the error.
        """
        from starlette.responses import JSONResponse

        given = dict(scope["headers"])
        has_body = b"transfer-encoding" in given or given.get(b"content-length", b"0") != b"0"
        headers = {"connection": "close"} if has_body and not body.ended else {}
        if error.status == 401:
            headers["www-authenticate"] = "Bearer"
        if error.status in _RETRY:
            headers["retry-after"] = _RETRY[error.status].decode()
        if error.status in _FINAL:
            headers["x-should-retry"] = "false"
        if error.status == 405 and isinstance(error.__cause__, Exception):
            headers |= dict(getattr(error.__cause__, "headers", None) or {})
        response = JSONResponse(error.body(), error.status, headers)
        start = {"type": "http.response.start", "status": error.status, "headers": response.raw_headers}
        await send(start)
        await send({"type": "http.response.body", "body": response.body, "more_body": True})
        await body.drain(_DRAINED_OF_STRANGERS if error.status in (401, 403) else _DRAINED)
        await send({"type": "http.response.body", "body": b""})

    def _known(self, error: Exception, scope: Scope) -> RequestError:
        """Turn any exception of a route into the error that the client sees."""
        from starlette.exceptions import HTTPException

        if not isinstance(error, HTTPException):
            return as_request_error(error)
        path, text = scope["path"], str(error.detail)
        if error.status_code == 404:
            routes = [route.path for route in self._router.routes if "{" not in route.path]
            near = nearest_names(path, routes, 1)
            text = (
                f"there is no route {brief(path)}{f'; the nearest one is {brief(near[0])}' if near else ''}"
            )
        elif error.status_code == 405:
            allowed = ", ".join(sorted((error.headers or {}).get("Allow", "").split(", ")))
            text = f"the route {brief(path)} does not support {brief(scope['method'])}, only {allowed}"
        code = {404: "unknown_route", 405: "method_not_allowed"}.get(error.status_code)
        made = RequestError(text, error.status_code, code=code)
        made.__cause__ = error
        return made

    # ---- routes ----

    def _routes(self) -> Any:
        from starlette.routing import Route, Router

        by_path: dict[str, dict[str, Handler]] = {}
        for method, path, handler in self._table():
            by_path.setdefault(path, {})[method] = handler
        # There is only one route for each path. With one route for each method, the Allow header of an error
        # 405 would name only the methods of the first route.
        routes = [Route(path, self._endpoint(found), methods=[*found]) for path, found in by_path.items()]
        return Router([*routes, *(Route(path, self._file) for path in self._page)], redirect_slashes=False)

    def _table(self) -> list[tuple[str, str, Handler]]:
        """The method, the path and the handler of each route."""
        is_encoder = isinstance(self.service, EncoderService)
        text = [
            ("POST", "/v1/chat/completions", text_routes.chat),
            ("POST", "/v1/completions", text_routes.completion),
        ]
        vectors = [
            ("POST", "/v1/embeddings", encoder_routes.embeddings),
            ("POST", "/v1/classify", encoder_routes.classify),
            ("POST", "/classify", encoder_routes.classify),
        ]
        own, others = (vectors, text) if is_encoder else (text, vectors)
        return [
            *((method, path, self._answering(function)) for method, path, function in own),
            *((method, path, self._refusing(is_encoder)) for method, path, _ in others),
            *self._adapter_table(),
            *([] if is_encoder else self._tuning_table()),
            ("GET", "/health", self._health),
            ("GET", "/metrics", self._metrics),
        ]

    def _adapter_table(self) -> list[tuple[str, str, Handler]]:
        return [
            ("GET", "/v1/models", self._simple(adapter_routes.models)),
            ("GET", "/v1/models/{name:path}", self._named(adapter_routes.model)),
            ("DELETE", "/v1/models/{name:path}", self._named(adapter_routes.delete_model)),
            ("POST", "/v1/load_lora_adapter", self._with_body(adapter_routes.load)),
            ("POST", "/v1/unload_lora_adapter", self._with_body(adapter_routes.unload)),
            ("GET", "/lora-adapters", self._simple(adapter_routes.scales)),
            ("POST", "/lora-adapters", self._with_body(adapter_routes.set_scales)),
        ]

    def _tuning_table(self) -> list[tuple[str, str, Handler]]:
        def job(name: str) -> Handler:
            return self._named(lambda service, id_: getattr(tuning_routes.jobs_of(service), name)(id_))

        def listed(function: Callable[..., Any]) -> Handler:
            return lambda request: asyncio.to_thread(
                function, self.service, dict(request.query_params), *request.path_params.values()
            )

        job_path, file_path = "/v1/fine_tuning/jobs/{id}", "/v1/files/{id}"
        return [
            ("POST", "/v1/files", lambda request: tuning_routes.create_file(self.service, request)),
            ("GET", "/v1/files", listed(tuning_routes.files)),
            ("GET", file_path, job("file")),
            ("DELETE", file_path, job("delete_file")),
            ("GET", f"{file_path}/content", self._content),
            ("POST", "/v1/fine_tuning/jobs", self._with_body(tuning_routes.create_job)),
            ("GET", "/v1/fine_tuning/jobs", listed(tuning_routes.jobs)),
            ("GET", job_path, job("job")),
            ("GET", f"{job_path}/events", listed(tuning_routes.events)),
            ("GET", f"{job_path}/checkpoints", listed(tuning_routes.checkpoints)),
            ("POST", f"{job_path}/cancel", job("cancel")),
            ("POST", f"{job_path}/pause", job("pause")),
            ("POST", f"{job_path}/resume", job("resume")),
        ]

    def _answering(self, function: Callable[[Any, Body, str], Awaitable[Any]]) -> Handler:
        return lambda request: function(self.service, *request.scope["nplora"])

    def _with_body(self, function: Callable[[Service, Body], Awaitable[Any]]) -> Handler:
        return lambda request: function(self.service, request.scope["nplora"][0])

    def _simple(self, function: Callable[[Service], Any]) -> Handler:
        return lambda request: asyncio.to_thread(function, self.service)

    def _named(self, function: Callable[[Service, str], Any]) -> Handler:
        return lambda request: asyncio.to_thread(function, self.service, *request.path_params.values())

    def _refusing(self, is_encoder: bool) -> Handler:
        """A handler that refuses all requests, for a route that the served model does not support."""
        text = (
            "this server computes embeddings and classes, and does not generate text"
            if is_encoder
            else "this server generates text; start it with --embeddings for embeddings and classes"
        )

        async def refuse(request: Any) -> Any:
            raise RequestError(text, 404, code="unsupported_task")

        return refuse

    def _endpoint(self, by_method: dict[str, Handler]) -> Handler:
        async def endpoint(request: Any) -> Any:
            from starlette.responses import JSONResponse, PlainTextResponse, Response

            made = await by_method["GET" if request.method == "HEAD" else request.method](request)
            if isinstance(made, Response):
                return made
            return PlainTextResponse(made) if isinstance(made, str) else JSONResponse(made)

        return endpoint

    async def _file(self, request: Any) -> Any:
        from starlette.responses import Response

        content, kind = self._page[request.scope["path"]]
        return Response(content, media_type=kind, headers=_PAGE_HEADERS)

    async def _content(self, request: Any) -> Any:
        from starlette.responses import StreamingResponse

        id_ = request.path_params["id"]
        file = await asyncio.to_thread(tuning_routes.open_content, self.service, id_)
        size = str(os.fstat(file.fileno()).st_size)

        class FileResponse(StreamingResponse):  # type: ignore[misc, unused-ignore]
            async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
                with file:  # also if the client has left
                    await super().__call__(scope, receive, send)

        pieces = iter(()) if request.method == "HEAD" else iter(lambda: file.read(_PIECE), b"")
        kind = "application/octet-stream"
        return FileResponse(pieces, media_type=kind, headers={"content-length": size})

    async def _health(self, request: Any) -> Any:
        if self.service.draining:
            raise RequestError("the server is shutting down", 503, code="shutting_down")
        return {"status": "ok"}

    async def _metrics(self, request: Any) -> Any:
        from starlette.responses import Response

        service, adapters = self.service, len(self.service.models.names) - 1
        text = exposition(service.engine.metrics(), self.responses, adapters, current_memory())
        return Response(text, headers={"content-type": CONTENT_TYPE})
