"""Clients that send nonsense, pause or vanish get an error of OpenAI's shape, and others are served."""

import contextlib
import json
import os
import socket
import struct
import threading
import time
from collections.abc import Iterator
from typing import Any

import live_server
import pytest
from live_server import connect

from nplora.serving.api import bodies, http_server
from nplora.serving.api.app import Application

pytest.importorskip("uvicorn")

CHAT = {
    "model": "base",
    "messages": [{"role": "user", "content": "hello"}],
    "max_tokens": 4,
    "temperature": 0,
}


def exchange(url: str, raw: bytes) -> tuple[int, Any]:
    """Send bytes, and return the status and the body of the answer."""
    with connect(url) as client:
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            client.sendall(raw)
        return read_answer(client)


def read_answer(client: socket.socket) -> tuple[int, Any]:
    with client.makefile("rb") as file:
        status = int(file.readline().split()[1])
        headers = {}
        while line := file.readline().strip():
            name, _, value = line.partition(b":")
            headers[name.lower()] = value.strip()
        text = file.read(int(headers[b"content-length"]))
        return status, json.loads(text) if headers[b"content-type"] == b"application/json" else text


def request(path: str, body: bytes, method: str = "POST", **headers: str) -> bytes:
    given = {"host": "localhost", "content-length": str(len(body)), "connection": "close"} | {
        name.replace("_", "-"): value for name, value in headers.items()
    }
    lines = [f"{method} {path} HTTP/1.1", *(f"{name}: {value}" for name, value in given.items()), "", ""]
    return "\r\n".join(lines).encode() + body


def post(url: str, body: Any, path: str = "/v1/chat/completions", **headers: str) -> tuple[int, Any]:
    raw = body if isinstance(body, bytes) else json.dumps(body).encode()
    return exchange(url, request(path, raw, **headers))


def assert_serves(url: str) -> None:
    status, answer = post(url, CHAT)
    assert status == 200
    assert answer["choices"][0]["message"]["content"]


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"   ",
        b"{",
        b"nonsense",
        b"\xff\xfe",
        b"[]",
        b"1",
        b"null",
        b'"text"',
        b'{"model": "base", "model": "base"}',
        b'{"model": NaN}',
        b'{"temperature": 1e999, "messages": []}',
        b'{"messages": [{"role": "user", "content": "\\ud800"}]}',
        b"[" * 100_000,
        b'{"a":' * 50_000,
        b'{"messages": ' + b"[" * 60 + b"]" * 60 + b"}",
        b'{"n": ' + b"9" * 5000 + b"}",
        json.dumps({"messages": [{}] * 20_000}).encode(),
        json.dumps({**CHAT, "stop": ["x"] * 17}).encode(),
        json.dumps({**CHAT, "model": 5}).encode(),
        json.dumps({**CHAT, "max_tokens": 10**30}).encode(),
        json.dumps({**CHAT, "seed": 10**30}).encode(),
        json.dumps({**CHAT, "messages": [{"role": "user", "content": "x" * 1_000_000}]}).encode(),
        json.dumps({**CHAT, "tools": [{"type": "function", "function": {"name": "f"}}] * 2}).encode(),
    ],
    ids=lambda body: repr(body[:40]),
)
def test_a_malformed_body_is_a_bad_request(url: str, body: bytes) -> None:
    status, answer = post(url, body)
    assert status == 400
    assert set(answer["error"]) == {"message", "type", "param", "code"}
    assert answer["error"]["type"] == "invalid_request_error"
    assert_serves(url)


def test_an_error_repeats_little_of_a_body(url: str) -> None:
    part = {"type": "x" * 1_000_000, "text": "hello"}
    for body in ({**CHAT, "x" * 1_000_000: 1}, {**CHAT, "messages": [{"role": "user", "content": [part]}]}):
        status, answer = post(url, json.dumps(body).encode())
        assert status == 400
        assert len(json.dumps(answer)) < 1000


@pytest.mark.parametrize("chunked", [False, True])
def test_a_body_beyond_the_limit_is_too_large(url: str, chunked: bool) -> None:
    body = json.dumps({**CHAT, "user": "x" * (10 << 20)}).encode()
    if chunked:
        head = b"POST /v1/chat/completions HTTP/1.1\r\nhost: localhost\r\ntransfer-encoding: chunked\r\n\r\n"
        status, answer = exchange(url, head + b"%x\r\n%s\r\n0\r\n\r\n" % (len(body), body))
    else:
        status, answer = post(url, body)
    assert status == 413
    assert answer["error"]["code"] == "request_too_large"
    assert_serves(url)


@pytest.mark.parametrize(
    "raw",
    [
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + b"x" * 200,  # TLS
        b"GET\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: -5\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: 5\r\ncontent-length: 6\r\n\r\n",
        b"GET / HTTP/1.1\r\nhost: x\r\n" + b"a: b\r\n" * 20_000,
    ],
    ids=lambda raw: repr(raw[:30]),
)
def test_what_is_no_http_gets_an_error_object(url: str, raw: bytes) -> None:
    status, answer = exchange(url, raw)
    assert status == 400
    assert answer["error"]["type"] == "invalid_request_error"
    assert_serves(url)


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/nowhere", 404),
        ("GET", "/v1/models/..%2f..%2fetc%2fpasswd", 404),
        ("GET", "/v1/models/", 404),
        ("DELETE", "/v1/models/base", 400),
        ("GET", "/../etc/passwd", 404),
        ("GET", "//etc/passwd", 404),
        ("GET", "/%00", 404),
        ("PUT", "/v1/models", 405),
        ("GET", "/v1/chat/completions", 405),
        ("OPTIONS", "/v1/chat/completions", 405),
        ("GET", "/v1/files", 404),
        ("GET", "/v1/files/..%2f..%2fetc%2fpasswd/content", 404),
        ("GET", "/v1/fine_tuning/jobs?limit=x", 404),
        ("HEAD", "/health", 200),
    ],
)
def test_routes_that_do_not_exist(url: str, method: str, path: str, status: int) -> None:
    with connect(url) as client:
        client.sendall(request(path, b"", method))
        assert int(client.makefile("rb").readline().split()[1]) == status


@pytest.mark.parametrize(
    ("path", "allowed"),
    [
        ("/v1/files", {"GET", "HEAD", "POST"}),
        ("/v1/files/file-1", {"GET", "HEAD", "DELETE"}),
        ("/v1/models/x", {"GET", "HEAD", "DELETE"}),
        ("/lora-adapters", {"GET", "HEAD", "POST"}),
        ("/v1/chat/completions", {"POST"}),
    ],
)
def test_a_wrong_method_learns_the_right_ones(url: str, path: str, allowed: set[str]) -> None:
    with connect(url) as client:
        client.sendall(request(path, b"", "PATCH"))
        head = client.makefile("rb").read().decode().lower()
    line = next(line for line in head.splitlines() if line.startswith("allow: "))
    assert set(line.removeprefix("allow: ").upper().split(", ")) == allowed


@pytest.mark.parametrize(
    ("path", "headers", "status"),
    [
        ("/v1/chat/completions", {"content-length": str(10 << 20)}, 413),
        ("/v1/chat/completions", {"content-length": "1000", "host": "evil.example"}, 403),
        ("/nowhere", {"content-length": "1000"}, 404),
        ("/nowhere", {"transfer-encoding": "chunked"}, 404),
    ],
)
def test_a_refused_request_is_answered_before_its_body_comes(
    url: str, monkeypatch: pytest.MonkeyPatch, path: str, headers: dict[str, str], status: int
) -> None:
    monkeypatch.setattr(bodies, "_DRAIN_SECONDS", 600)
    given = {"host": "localhost", **headers}
    head = [f"POST {path} HTTP/1.1", *(f"{name}: {value}" for name, value in given.items()), "", ""]
    with connect(url) as client:
        client.sendall("\r\n".join(head).encode())
        found, answer = read_answer(client)
    assert found == status
    assert "error" in answer


def test_a_connection_is_kept_after_an_error(url: str) -> None:
    with connect(url) as client:
        for status in (404, 404):
            client.sendall(b"GET /nowhere HTTP/1.1\r\nhost: localhost\r\n\r\n")
            assert read_answer(client)[0] == status


@contextlib.contextmanager
def slow_answers(app: Application) -> Iterator[Any]:
    engine: Any = app.service.engine
    engine.pause = 0.05
    engine.tickets.clear()
    try:
        yield engine
    finally:
        engine.pause = 0.0


def wait_for(condition: Any, seconds: float = 10) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


@pytest.mark.slow
@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("reset", [False, True])
def test_the_request_of_a_client_that_leaves_is_cancelled(
    url: str, app: Application, stream: bool, reset: bool
) -> None:
    body = json.dumps({**CHAT, "stream": stream, "max_tokens": 400, "n": 2}).encode()
    for _ in range(8):  # some leave just when a token comes
        with slow_answers(app) as engine:
            client = connect(url)
            client.sendall(request("/v1/chat/completions", body))
            if stream:
                assert client.recv(4096)
            wait_for(lambda engine=engine: len(engine.tickets) == 2)
            if reset:
                client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            client.close()
            wait_for(lambda engine=engine: {one.finish_reason for one in engine.tickets} == {"cancelled"})
    assert_serves(url)


def test_a_client_that_stops_in_the_middle_of_its_body_is_dropped(url: str) -> None:
    raw = request("/v1/chat/completions", json.dumps(CHAT).encode())
    with connect(url) as client:
        client.sendall(raw[:-5])
    assert_serves(url)


def test_a_pause_inside_a_body_has_a_limit(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bodies, "_STALL", 0.1)
    monkeypatch.setattr(bodies, "_DRAIN_SECONDS", 0.1)
    raw = request("/v1/chat/completions", json.dumps(CHAT).encode())
    with connect(url) as client:
        client.sendall(raw[:-5])
        status, answer = read_answer(client)
    assert status == 408
    assert answer["error"]["code"] == "timeout"


@pytest.mark.parametrize("begun", [b"", b"POST /v1/chat", b"GET /health HTTP/1.1\r\nhost: localhost\r\n\r\n"])
def test_a_client_that_sends_no_whole_head_is_dropped(
    url: str, monkeypatch: pytest.MonkeyPatch, begun: bytes
) -> None:
    monkeypatch.setattr(http_server, "_HEADER_SECONDS", 0.2)
    with connect(url) as client:
        client.sendall(begun)
        if begun.endswith(b"\r\n\r\n"):  # one request, and the beginning of another
            assert client.recv(4096)
            client.sendall(b"G")
        with contextlib.suppress(ConnectionResetError):
            while client.recv(4096):
                pass


@pytest.mark.skipif(not hasattr(socket, "TCP_USER_TIMEOUT"), reason="this system lacks the option")
def test_the_system_looks_for_clients_that_have_vanished(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Half-open connections: a client without power or network sends no end of its connection."""
    made, detect = list[socket.socket](), http_server.processes.detect_vanished_peer

    def noted(connection: socket.socket) -> None:
        detect(connection)
        made.append(connection)

    monkeypatch.setattr(http_server.processes, "detect_vanished_peer", noted)
    with connect(url):
        wait_for(lambda: made)
        options = {
            name: made[0].getsockopt(socket.IPPROTO_TCP, getattr(socket, name))
            for name in ("TCP_KEEPIDLE", "TCP_KEEPINTVL", "TCP_KEEPCNT", "TCP_USER_TIMEOUT")
        }
        assert made[0].getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE) == 1
    silent = options["TCP_KEEPIDLE"] + options["TCP_KEEPINTVL"] * options["TCP_KEEPCNT"]
    assert silent <= 60  # seconds of a connection without traffic
    assert options["TCP_USER_TIMEOUT"] == 60_000  # milliseconds in which sent data are not acknowledged


def test_answers_do_not_wait_for_requests_that_use_the_disk(
    url: str, app: Application, monkeypatch: pytest.MonkeyPatch
) -> None:
    count, waiting, disk = 40, threading.Semaphore(0), threading.Event()

    def load(*arguments: object) -> None:
        waiting.release()
        assert disk.wait(30)

    monkeypatch.setattr(app.service.models, "load", load)
    body = json.dumps({"lora_name": "x", "lora_path": "adapter0"}).encode()
    with contextlib.ExitStack() as stack:
        stack.callback(disk.set)
        clients = [stack.enter_context(connect(url)) for _ in range(count)]
        for client in clients:
            client.sendall(request("/v1/load_lora_adapter", body))
        for _ in range(min(32, (os.cpu_count() or 1) + 4)):  # the threads for the disk, all busy
            assert waiting.acquire(timeout=10)
        with connect(url) as other:
            other.settimeout(5)
            other.sendall(request("/v1/chat/completions", json.dumps(CHAT).encode()))
            assert read_answer(other)[0] == 200
        disk.set()
        for client in clients:
            assert read_answer(client)[0] == 200


@pytest.mark.slow
def test_a_client_that_reads_nothing_is_dropped(
    url: str, app: Application, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(http_server, "_STALL_SECONDS", 0.2)
    many = {"stream": True, "max_tokens": 450, "n": 16, "logprobs": True, "top_logprobs": 20}
    with slow_answers(app) as engine, connect(url) as client:
        engine.pause = 0.01
        client.sendall(request("/v1/chat/completions", json.dumps(CHAT | many).encode()))
        wait_for(lambda: len(engine.tickets) == 16)
        wait_for(lambda: {ticket.finish_reason for ticket in engine.tickets} == {"cancelled"}, 20)
    assert_serves(url)


def test_connections_beyond_the_limit_are_refused(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_server, "_MOST_CONNECTIONS", 2)
    with connect(url), connect(url):
        time.sleep(0.1)
        with connect(url) as third:
            status, answer = read_answer(third)
    assert status == 503
    assert answer["error"]["code"] == "too_many_connections"
    wait_for(lambda: post(url, CHAT)[0] == 200)


def test_a_full_queue_is_reported_and_the_other_answers_are_cancelled(url: str, app: Application) -> None:
    many = {"n": 8, "max_tokens": 400}
    with slow_answers(app) as engine:
        engine.max_waiting = 10
        try:
            with connect(url) as first:
                first.sendall(request("/v1/chat/completions", json.dumps({**CHAT, **many}).encode()))
                wait_for(lambda: len(engine.tickets) == 8)
                status, answer = post(url, {**CHAT, **many})
            assert (status, answer["error"]["code"]) == (429, "queue_full")
            wait_for(lambda: all(ticket.finish_reason == "cancelled" for ticket in engine.tickets))
        finally:
            engine.max_waiting = 64
    assert_serves(url)


def test_more_answers_than_the_queue_holds_are_a_bad_request(url: str, app: Application) -> None:
    engine: Any = app.service.engine
    engine.max_waiting, before = 3, len(engine.tickets)
    try:
        for path, body in (
            ("/v1/chat/completions", {**CHAT, "n": 4}),
            ("/v1/completions", {"prompt": ["a"] * 2, "n": 2}),
        ):
            status, answer = post(url, body, path)
            assert (status, answer["error"]["param"]) == (400, "n")
        assert len(engine.tickets) == before
    finally:
        engine.max_waiting = 64


def test_an_answer_that_takes_too_long_is_cancelled(url: str, app: Application) -> None:
    app.service.timeout = 0.2
    with slow_answers(app) as engine:
        try:
            status, answer = post(url, {**CHAT, "max_tokens": 400})
            assert (status, answer["error"]["code"]) == (504, "timeout")
            raw = request("/v1/chat/completions", json.dumps({**CHAT, "max_tokens": 400}).encode())
            with connect(url) as client:
                client.sendall(raw)
                assert b"x-should-retry: false" in client.recv(4096)
            with connect(url) as client:
                body = json.dumps({**CHAT, "max_tokens": 400, "stream": True}).encode()
                client.sendall(request("/v1/chat/completions", body))
                assert b'"code":"timeout"' in client.makefile("rb").read()
            wait_for(lambda: all(ticket.finish_reason == "cancelled" for ticket in engine.tickets))
        finally:
            app.service.timeout = 600


def test_a_failure_of_the_model_ends_one_request(url: str, app: Application) -> None:
    engine: Any = app.service.engine
    engine.failure = FloatingPointError("the scores are NaN")
    try:
        status, answer = post(url, CHAT)
    finally:
        engine.failure = None
    assert (status, answer["error"]["code"]) == (500, "model_error")
    assert_serves(url)


def test_an_unexpected_failure_is_logged_and_hides_its_text(
    url: str, app: Application, capfd: pytest.CaptureFixture[str]
) -> None:
    engine: Any = app.service.engine
    engine.failure = ZeroDivisionError("a secret")
    try:
        status, answer = post(url, CHAT)
    finally:
        engine.failure = None
    assert status == 500
    assert "a secret" not in answer["error"]["message"]
    assert "a secret" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"host": "localhost:8080"}, 200),
        ({"host": "127.0.0.1"}, 200),
        ({"host": "[::1]:80"}, 200),
        ({"host": "evil.example"}, 403),  # DNS rebinding
        ({"host": "localhost", "origin": "http://evil.example"}, 403),
        ({"host": "localhost", "origin": "null"}, 403),
        ({"host": "localhost", "origin": "http://["}, 403),
        ({"host": "[", "origin": "http://["}, 403),
        ({"host": "localhost", "origin": "http://localhost"}, 200),
    ],
)
def test_hosts_and_origins_without_a_key(url: str, headers: dict[str, str], status: int) -> None:
    assert post(url, CHAT, **headers)[0] == status


def test_requests_need_a_key_if_there_is_one(tmp_path: Any) -> None:
    app = live_server.application(tmp_path, keys=("secret", "other"), origins=("http://page.example",))
    with live_server.running(app) as url:
        for headers, expected in [
            ({}, 401),
            ({"authorization": "Bearer wrong"}, 401),
            ({"authorization": "Basic secret"}, 401),
            ({"authorization": "Bearer secret"}, 200),
            ({"authorization": "bearer other", "host": "any.example"}, 200),
            ({"authorization": "Bearer secret", "origin": "http://page.example"}, 200),
            ({"authorization": "Bearer secret", "origin": "http://evil.example"}, 403),
        ]:
            status, answer = post(url, CHAT, **headers)
            assert status == expected, headers
            assert expected == 200 or "error" in answer
        assert len(set(app.service.engine.clients)) == 2  # type: ignore[attr-defined]
        assert exchange(url, request("/health", b"", "GET"))[0] == 200
        for path in ("/metrics", "/v1/models", "/lora-adapters"):
            assert exchange(url, request(path, b"", "GET"))[0] == 401
        preflight = {"origin": "http://page.example", "access_control_request_method": "POST"}
        with connect(url) as client:
            client.sendall(request("/v1/chat/completions", b"", "OPTIONS", **preflight))
            assert b"access-control-allow-origin: http://page.example" in client.recv(4096)


@pytest.mark.slow
def test_a_server_that_stops_finishes_what_has_begun(tmp_path: Any) -> None:
    app = live_server.application(tmp_path)
    engine: Any = app.service.engine
    engine.pause = 0.05
    found = []
    body = {**CHAT, "max_tokens": 20}
    with live_server.running(app) as url:
        asking = threading.Thread(target=lambda: found.append(post(url, body)))
        asking.start()
        wait_for(lambda: engine.tickets)
    asking.join()
    assert [status for status, _ in found] == [200]
    assert found[0][1]["usage"]["completion_tokens"] == 20
    with pytest.raises(ConnectionRefusedError):
        connect(url)


def test_answers_that_outlast_the_drain_end_with_an_error(
    tmp_path: Any, capfd: pytest.CaptureFixture[str]
) -> None:
    app = live_server.application(tmp_path)
    engine: Any = app.service.engine
    engine.pause = 0.05
    found: list[Any] = []

    def follow(url: str) -> None:
        with connect(url) as client:
            body = json.dumps({**CHAT, "max_tokens": 400, "stream": True}).encode()
            client.sendall(request("/v1/chat/completions", body))
            found.append(client.makefile("rb").read())

    def ask(url: str) -> None:
        found.append(post(url, {**CHAT, "max_tokens": 400}))

    with live_server.running(app, drain_seconds=0.3) as url:
        asking = [threading.Thread(target=one, args=(url,)) for one in (ask, follow)]
        for thread in asking:
            thread.start()
        wait_for(lambda: len(engine.tickets) == 2)
        time.sleep(0.1)
    for thread in asking:
        thread.join()
    engine.close()
    wait_for(lambda: {one.finish_reason for one in engine.tickets} == {"cancelled"})
    [(status, answer), stream] = sorted(found, key=lambda one: isinstance(one, bytes))
    assert (status, answer["error"]["code"]) == (503, "shutting_down")
    assert b'"code":"shutting_down"' in stream
    assert capfd.readouterr().err == ""


def test_metrics_are_read_by_prometheus_rules(url: str) -> None:
    status, text = exchange(url, request("/metrics", b"", "GET"))
    assert status == 200
    seen = dict[str, str]()
    for line in text.decode().splitlines():
        if line.startswith("# TYPE"):
            seen[line.split()[2]] = line.split()[3]
        elif not line.startswith("#"):
            name, value = line.rsplit(" ", 1)
            float(value)
            bare = name.partition("{")[0]
            assert any(
                bare in (known, *(f"{known}_{end}" for end in ("bucket", "sum", "count"))) for known in seen
            )
    assert seen["nplora_first_token_seconds"] == "histogram"
    assert seen["nplora_http_responses_total"] == "counter"
