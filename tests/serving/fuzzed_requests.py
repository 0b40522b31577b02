"""Random requests to the server: valid requests with random changes. The server may never fail.

    python tests/serving/fuzzed_requests.py --seconds 600

runs them for ten minutes, prints the statuses, and ends with status 1 if a request failed.
"""

from __future__ import annotations

import argparse
import asyncio
import copy
import json
import random
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote

import nplora
from nplora.platform.memory import current_memory
from nplora.serving import run
from nplora.serving.api.app import Application
from nplora.serving.api.models import Models
from nplora.serving.api.service import TextService
from nplora.serving.options import ServeOptions

CHAT = [
    {"role": "system", "content": "be brief"},
    {"role": "user", "content": [{"type": "text", "text": "hello"}]},
]
SCHEMA = {
    "type": "object",
    "properties": {"a": {"type": "string", "pattern": "^[a-z]{1,3}$"}},
    "required": ["a"],
}
JSON = {"type": "json_object"}
TOOL = {"type": "function", "function": {"name": "add", "parameters": {"type": "object", "properties": {}}}}
RESULT = {"role": "tool", "tool_call_id": "1", "content": "2"}
HYPERPARAMETERS = {"n_epochs": 1, "batch_size": 1, "learning_rate_multiplier": 1}
_MOST_ADAPTERS = 100  # the most adapters of jobs that are kept
FORM = b'--x\r\ncontent-disposition: form-data; name="file"%s\r\n\r\n{"text": "a"}\r\n--x--\r\n'
CALL = {"id": "1", "type": "function", "function": {"name": "add", "arguments": '{"x": 1}'}}

# Valid requests: method, path, body.
SEEDS: list[tuple[str, str, Any]] = [
    (
        "POST",
        "/v1/chat/completions",
        {
            "model": "base", "messages": CHAT, "max_tokens": 3, "temperature": 0.5, "top_p": 0.9, "top_k": 5,
            "n": 2, "seed": 1, "stop": ["x", "yy"], "presence_penalty": 0.5, "frequency_penalty": -0.5,
            "repetition_penalty": 1.1, "logit_bias": {"5": 3, "6": -100}, "logprobs": True, "top_logprobs": 2,
            "stream": True, "stream_options": {"include_usage": True}, "user": "me",
        },
    ),
    ("POST", "/v1/chat/completions", {"messages": CHAT, "max_tokens": 2, "response_format": JSON}),
    (
        "POST",
        "/v1/chat/completions",
        {
            "messages": CHAT, "max_tokens": 4,
            "response_format": {"type": "json_schema", "json_schema": {"name": "s", "schema": SCHEMA}},
        },
    ),
    (
        "POST",
        "/v1/chat/completions",
        {
            "messages": [*CHAT, {"role": "assistant", "tool_calls": [CALL]}, RESULT],
            "max_tokens": 4, "tools": [TOOL], "tool_choice": "required", "stream": False,
        },
    ),
    ("POST", "/v1/chat/completions", {"messages": CHAT, "max_tokens": 1, "lora": [{"id": 0, "scale": 0.5}]}),
    ("POST", "/v1/completions", {"model": "adapter0", "prompt": "hello", "max_tokens": 2, "logprobs": 3}),
    ("POST", "/v1/completions", {"prompt": [[1, 2], [3]], "max_tokens": 2, "echo": True, "stream": True}),
    ("GET", "/v1/models", None),
    ("GET", "/v1/models/adapter0", None),
    ("DELETE", "/v1/models/nothing", None),
    ("POST", "/v1/load_lora_adapter", {"lora_name": "new", "lora_path": "adapter1", "load_inplace": True}),
    ("POST", "/v1/unload_lora_adapter", {"lora_name": "new"}),
    ("GET", "/lora-adapters", None),
    ("POST", "/lora-adapters", [{"id": 0, "scale": 1.5}]),
    ("GET", "/v1/files?purpose=fine-tune&limit=3&order=asc&after=x", None),
    ("GET", "/v1/files/file-1", None),
    ("GET", "/v1/files/file-1/content", None),
    ("DELETE", "/v1/files/file-1", None),
    ("POST", "/v1/files", {"file": "x"}),
    (
        "POST",
        "/v1/fine_tuning/jobs",
        {
            "model": "base", "training_file": "FILE", "suffix": "s", "seed": 3, "metadata": {"a": "b"},
            "method": {
                "type": "supervised",
                "supervised": {"hyperparameters": HYPERPARAMETERS},
            },
        },
    ),
    ("GET", "/v1/fine_tuning/jobs?limit=2&after=x&metadata[a]=b", None),
    ("GET", "/v1/fine_tuning/jobs/JOB/events?limit=5", None),
    ("GET", "/v1/fine_tuning/jobs/JOB/checkpoints", None),
    ("POST", "/v1/fine_tuning/jobs/JOB/cancel", None),
    ("POST", "/v1/fine_tuning/jobs/JOB/pause", None),
    ("POST", "/v1/fine_tuning/jobs/JOB/resume", None),
    ("GET", "/health", None),
    ("GET", "/metrics", None),
]  # fmt: skip

VALUES: list[Any] = [
    None, True, False, 0, 1, -1, 2, 1.5, -0.0, 1e308, -1e308, 5e-324, 2**31, 2**63, -(2**63), 10**40, "", "x",
    "auto", "none", "\0", "../../etc/passwd", "a" * 5000, "é😀\u202e", "<|end|>", "{{ 7 * 7 }}", "NaN", "1",
    [], {}, [[]], [{}], {"": None}, {"a": {"b": {"c": []}}}, [1, "x", None], ["x"] * 50, [0] * 600,
    {"type": "object", "properties": {"x": {"$ref": "#"}}}, {"type": "string", "pattern": "(a+)+$"},
    {"anyOf": []}, {"enum": []}, {"type": ["object", "null"]}, {"$ref": "http://example.org"}, {"const": 1},
    {"type": "array", "items": {"type": "array", "minItems": 10**9}}, {"minimum": 5, "maximum": 1},
    {"type": "string", "minLength": 10**12}, {"pattern": "["}, {"type": "string", "format": "date-time"},
]  # fmt: skip


HEADERS = {
    name: [b"", b"http://[", b"[", b"[::1", b"null", b"http://localhost", b"\xff\xfe", b":", b"//", b"*",
           b"x" * 9000, b"Bearer", b"Bearer ", b"Bearer \xe9", b"http://localhost:99999999", b"http://\xef\xbc\x8f@x"]
    for name in (b"host", b"origin", b"authorization")
}  # fmt: skip


def mutated(random_: random.Random, value: Any) -> Any:
    """The value with one or more random changes."""
    value = copy.deepcopy(value)
    for _ in range(random_.choice((0, 1, 1, 1, 2, 4))):
        value = _with_change(random_, value)
    return value


def _with_change(random_: random.Random, value: Any) -> Any:
    if isinstance(value, dict | list) and value and random_.random() < 0.85:
        key = random_.choice(list(value) if isinstance(value, dict) else range(len(value)))
        kind = random_.random()
        if kind < 0.08:
            del value[key]
        elif kind < 0.14 and isinstance(value, dict):
            value[str(random_.choice(VALUES))[:40]] = copy.deepcopy(random_.choice(VALUES))
        elif kind < 0.2 and isinstance(value, list):
            value += [copy.deepcopy(value[key])] * random_.choice((1, 3, 40))
        else:
            value[key] = _with_change(random_, value[key])
        return value
    return copy.deepcopy(random_.choice(VALUES))


def request_of(random_: random.Random, names: dict[str, str]) -> tuple[str, bytes, bytes, dict[bytes, bytes]]:
    """A random request: method, target, body, headers."""
    method, path, body = random_.choice(SEEDS)
    for name, id_ in names.items():
        path = path.replace(name, id_)
    body = mutated(random_, body)
    raw = b"" if body is None else json.dumps(body).replace('"FILE"', json.dumps(names["FILE"])).encode()
    headers = {b"host": b"localhost", b"content-type": b"application/json"}
    if random_.random() < 0.1:
        place = random_.randrange(len(raw) + 1)
        raw = (
            raw[:place]
            + random_.randbytes(random_.choice((0, 1, 8)))
            + raw[place + random_.choice((0, 1, 50)) :]
        )
    if random_.random() < 0.05:
        method = random_.choice(("GET", "POST", "PUT", "DELETE", "PATCH", "HEAD", "OPTIONS", "BREW"))
    if random_.random() < 0.1:
        place = random_.randrange(len(path) + 1)
        path = (
            path[:place]
            + random_.choice(("/", "%00", "..", "?limit=-1", "%2f..", "é", "&order=x"))
            + path[place:]
        )
    for name, texts in HEADERS.items():
        if random_.random() < 0.03:
            headers[name] = random_.choice(texts)
    if path.startswith("/v1/files") and random_.random() < 0.5:
        headers[b"content-type"] = random_.choice(
            (b"multipart/form-data; boundary=x", b"multipart/form-data", b"\xff")
        )
        forms = FORM % b'; filename="a.jsonl"', FORM % b"", b"--x--\r\n", random_.randbytes(50)
        raw = random_.choice(forms)
    return method, path.encode(), raw, headers


async def answer(
    app: Application, request: tuple[str, bytes, bytes, dict[bytes, bytes]]
) -> tuple[int, bytes]:
    """Send a request to the application, without a network. Return the status and the body of the answer."""
    method, target, body, headers = request
    path, _, query = target.partition(b"?")
    scope = {
        "type": "http", "asgi": {"version": "3.0", "spec_version": "2.3"}, "http_version": "1.1",
        "method": method, "path": unquote(path.decode()), "raw_path": path, "root_path": "",
        "query_string": query, "headers": list(headers.items()), "client": ("127.0.0.1", 1), "scheme": "http",
        "server": ("127.0.0.1", 80), "state": {},
    }  # fmt: skip
    parts = [body[: len(body) // 2], body[len(body) // 2 :]]
    sent, done, messages = bytearray(), asyncio.Event(), iter((True, False))

    async def receive() -> dict[str, Any]:
        for more in messages:
            return {"type": "http.request", "body": parts[not more], "more_body": more}
        await done.wait()
        return {"type": "http.disconnect"}

    status = 0

    async def send(message: dict[str, Any]) -> None:
        nonlocal status
        status = message.get("status", status)
        sent.extend(message.get("body", b""))
        if message["type"] == "http.response.body" and not message.get("more_body"):
            done.set()

    await app(scope, receive, send)
    return status, bytes(sent)


def problem_of(status: int, body: bytes) -> str | None:
    """The reason why an answer is wrong, or None."""
    if not 200 <= status < 500:
        return f"status {status}"
    if status >= 400:
        error = json.loads(body)["error"] if body else {"message": "", "type": "", "param": "", "code": ""}
        if set(error) != {"message", "type", "param", "code"} or not isinstance(error["message"], str):
            return f"no error object: {body!r}"
    if b'"type":"server_error"' in body:
        return "a failure inside a stream"
    return None


async def fuzz(
    app: Application, seed: int, count: int, seconds: float, names: dict[str, str]
) -> Counter[int]:
    """Send random requests, eight at a time, and return how often each status came.

    Raises:
        AssertionError: an answer is wrong.
    """
    random_, statuses, end = random.Random(seed), Counter[int](), time.monotonic() + seconds

    async def one() -> None:
        request = request_of(random_, names)
        try:
            status, body = await asyncio.wait_for(answer(app, request), 60)
            problem = problem_of(status, body)
        except Exception as error:
            status, body, problem = 0, b"", f"{type(error).__name__}: {error}"
        assert problem is None, f"{problem}\n{request!r}\n{body!r}"
        statuses[status] += 1

    while sum(statuses.values()) < count and time.monotonic() < end:
        await asyncio.gather(*(one() for _ in range(8)))
        await delete_oldest_adapters(app)
    return statuses


async def delete_oldest_adapters(app: Application) -> None:
    """Delete the oldest adapters of jobs. After some minutes, they would fill the memory for adapters."""
    names = [name for name in app.service.models.names if name.startswith("ft:")]
    for name in names[:-_MOST_ADAPTERS]:
        target = f"/v1/models/{quote(name)}".encode()
        status, body = await answer(app, ("DELETE", target, b"", {b"host": b"localhost"}))
        assert status in (200, 404), body  # 404: another request deleted it


def run_fuzzer(directory: Path, seed: int, count: int, seconds: float) -> Counter[int]:
    import live_server

    model = live_server.save_model(directory)
    paths = live_server.save_adapters(model, directory)
    lm = nplora.load_model(model)
    models = Models(lm, "base")
    models.load("adapter0", paths[0])
    limit = str(current_memory() + (1 << 30))  # earlier tests may have left this process with much memory
    options = ServeOptions(jobs=str(directory / "jobs"), memory=limit)
    with run.running(lm, models, options) as (engine, jobs):
        assert jobs is not None
        jobs.start()
        file = jobs.create_file(b'{"prompt": "a", "completion": "b"}\n' * 4, "rows.jsonl")
        job = jobs.create_job({"model": "base", "training_file": file["id"]})
        service = TextService(engine, models, jobs, directory, most_tokens=16, max_body=1 << 20)
        names = {"FILE": file["id"], "JOB": job["id"]}
        return asyncio.run(fuzz(Application(service), seed, count, seconds, names))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=600)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        statuses = run_fuzzer(Path(directory), given.seed, sys.maxsize, given.seconds)
    print(f"{sum(statuses.values()):,} requests: {dict(sorted(statuses.items()))}")
    return 0


if __name__ == "__main__":
    sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1])]
    sys.exit(main())
