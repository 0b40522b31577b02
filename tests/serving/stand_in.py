"""A server that speaks the API which the page uses, without a model: its answers and jobs are made up."""

import contextlib
import json
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import nplora

PAGE = Path(nplora.__file__).parent / "serving" / "page"
TYPES = {".html": "text/html", ".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}
# As strict as the server's own header: nothing from elsewhere, no scripts in the page.
POLICY = "default-src 'self'; style-src 'self' 'unsafe-inline'; img-src 'self' data:; form-action 'none'"


class StandIn(ThreadingHTTPServer):
    """The server. Tests read and change its attributes.

    Attributes:
        key: the key that requests must send; None: they need none.
        models: the ids of the base model and of its adapters.
        jobs: the fine-tuning jobs, the newest first; None: the server has no jobs.
        events: the events of each job, the newest first.
        answers: the pieces of the answer of each model.
        pause: seconds between two pieces.
        delay: seconds before a list of jobs.
        requests: the bodies of the chats so far, as they came.
        uploads: the forms of the files so far.
        aborted: how many answers were not read to their end.
        most_tokens: the longest answer, in tokens; None: there is no limit.
    """

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.key: str | None = None
        self.models = ["smollm2"]
        self.jobs: list[dict[str, Any]] | None = None
        self.events: dict[str, list[dict[str, Any]]] = {}
        self.answers: dict[str, list[str]] = {}
        self.pause = self.delay = 0.0
        self.requests: list[dict[str, Any]] = []
        self.uploads: list[bytes] = []
        self.aborted = 0
        self.most_tokens: int | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/"

    @contextlib.contextmanager
    def running(self) -> Iterator["StandIn"]:
        thread = threading.Thread(target=self.serve_forever, args=(0.02,), daemon=True)
        thread.start()
        try:
            yield self
        finally:
            self.shutdown()
            self.server_close()
            thread.join()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that leaves is no error."""


class _Handler(BaseHTTPRequestHandler):
    server: StandIn

    def do_GET(self) -> None:
        path, _, query = self.path.partition("?")
        if file := self._file(path):
            self._send(200, file.read_bytes(), TYPES[file.suffix])
        elif self._is_allowed():
            self._get(path, query)

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if not self._is_allowed():
            return
        if self.path == "/v1/chat/completions":
            self._chat(json.loads(body))
        elif self.path == "/v1/files":
            self.server.uploads.append(body)
            self._json({"id": f"file-{len(self.server.uploads)}", "object": "file"})
        elif self.path == "/v1/fine_tuning/jobs" and self.server.jobs is not None:
            given = json.loads(body)
            job = job_of("ftjob-new", status="queued", user_provided_suffix=given.get("suffix"), given=given)
            self.server.jobs.insert(0, job)
            self._json(job)
        elif self.path.endswith("/cancel") and self.server.jobs is not None:
            job = next(job for job in self.server.jobs if job["id"] == self.path.split("/")[-2])
            job["status"] = "cancelled"
            self._json(job)
        else:
            self._error(404, "there is nothing here")

    def _file(self, path: str) -> Path | None:
        name = "index.html" if path == "/" else path.removeprefix("/")
        return next((file for file in PAGE.iterdir() if file.name == name), None)

    def _is_allowed(self) -> bool:
        if self.server.key and self.headers["Authorization"] != f"Bearer {self.server.key}":
            self._error(401, "wrong key")
            return False
        return True

    def _get(self, path: str, query: str) -> None:
        if path == "/v1/models":
            base, *adapters = self.server.models
            cards = [{"id": base, "parent": None}] + [{"id": name, "parent": base} for name in adapters]
            limit = {} if self.server.most_tokens is None else {"max_tokens": self.server.most_tokens}
            data = [{"object": "model", **card, **limit} for card in cards]
            self._json({"object": "list", "data": data})
        elif path.startswith("/v1/fine_tuning/jobs") and self.server.jobs is not None:
            time.sleep(self.server.delay)
            if path.endswith("/events"):
                self._json(self._page(self.server.events.get(path.split("/")[-2], []), query))
            else:
                self._json({"object": "list", "data": self.server.jobs, "has_more": False})
        else:
            self._error(404, "this server has no fine-tuning jobs")

    def _page(self, events: list[dict[str, Any]], query: str) -> dict[str, Any]:
        """A page of events. It is short, so that a job needs several."""
        options = dict(pair.split("=") for pair in query.split("&"))
        ids = [event["id"] for event in events]
        begin = ids.index(options["after"]) + 1 if "after" in options else 0
        return {"object": "list", "data": events[begin : begin + 40], "has_more": begin + 40 < len(events)}

    def _chat(self, body: dict[str, Any]) -> None:
        self.server.requests.append(body)
        pieces = self.server.answers.get(body["model"])
        if pieces is None:
            self._error(400, f"no answer from {body['model']}")
            return
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.end_headers()
        try:
            for number, piece in enumerate(pieces):
                is_last = number == len(pieces) - 1
                choice = {
                    "index": 0,
                    "delta": {"content": piece},
                    "finish_reason": "stop" if is_last else None,
                }
                self._event({"choices": [choice], "usage": None})
                time.sleep(self.server.pause)
            self._event({"choices": [], "usage": {"prompt_tokens": 9, "completion_tokens": len(pieces)}})
            self.wfile.write(b"data: [DONE]\n\n")
        except OSError:
            self.server.aborted += 1

    def _event(self, event: dict[str, Any]) -> None:
        self.wfile.write(f"data: {json.dumps(event)}\n\n".encode())
        self.wfile.flush()

    def _json(self, value: object, status: int = 200) -> None:
        self._send(status, json.dumps(value).encode(), "application/json")

    def _error(self, status: int, message: str) -> None:
        self._json({"error": {"message": message, "type": "invalid_request_error"}}, status)

    def _send(self, status: int, body: bytes, kind: str) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Security-Policy", POLICY)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *arguments: object) -> None:
        """Tests need no log."""


def job_of(id_: str, **more: Any) -> dict[str, Any]:
    usual = {
        "object": "fine_tuning.job", "model": "smollm2", "created_at": 1_800_000_000, "status": "running",
        "fine_tuned_model": None, "user_provided_suffix": None, "trained_tokens": None, "error": None,
    }  # fmt: skip
    return {"id": id_, **usual, **more}


def event_of(number: int, message: str, level: str = "info", **data: float) -> dict[str, Any]:
    return {
        "object": "fine_tuning.job.event", "id": f"ftevent-{number:05}", "created_at": 1_800_000_000 + number,
        "level": level, "message": message, "type": "metrics" if data else "message", "data": data or None,
    }  # fmt: skip
