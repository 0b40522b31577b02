"""`nplora serve` as a process, and requests to it."""

import json
import os
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

_NO_END = -100  # the bias of end tokens, the lowest that OpenAI's API has


@dataclass
class Server:
    """A running server, and what it printed at its start."""

    process: "subprocess.Popen[str]"
    port: int
    plan: float  # MB

    def ask(self, method: str, path: str, body: Any = None, kind: str = "application/json") -> Any:
        data = body if isinstance(body, bytes | None) else json.dumps(body).encode()
        with closing(HTTPConnection("127.0.0.1", self.port, timeout=600)) as connection:
            connection.request(method, path, data, {"content-type": kind})
            response = connection.getresponse()
            text = response.read().decode()
        if response.status != 200:
            raise RuntimeError(f"{method} {path}: {response.status}: {text}")
        return json.loads(text) if text.startswith("{") else text

    def events(self, body: dict[str, Any]) -> Iterator[dict[str, Any]]:
        """Stream a completion, and yield its events. After the last one, the answer was complete.

        Raises:
            RuntimeError: the server refused the request, or the answer broke off.
        """
        body = {**body, "stream": True, "stream_options": {"include_usage": True}}
        head = {"content-type": "application/json"}
        with closing(HTTPConnection("127.0.0.1", self.port, timeout=600)) as connection:
            connection.request("POST", "/v1/completions", json.dumps(body), head)
            response = connection.getresponse()
            if response.status != 200:
                raise RuntimeError(f"{response.status}: {response.read().decode()}")
            for line in response:
                if not line.startswith(b"data: "):
                    continue
                if line.strip() == b"data: [DONE]":
                    return
                event = json.loads(line.removeprefix(b"data: "))
                if "error" in event:
                    raise RuntimeError(str(event["error"]))
                yield event
        raise RuntimeError("the answer broke off")

    def generate(self, prompt: Sequence[int], count: int, model: str, ends: Sequence[int]) -> int:
        """Stream `count` tokens after a prompt, and return the number that the server reports.

        Args:
            ends: the end tokens, which are ruled out.
        """
        body = {
            "model": model, "prompt": list(prompt), "max_tokens": count, "temperature": 0,
            "logit_bias": {str(end): _NO_END for end in ends},
        }  # fmt: skip
        usage = [event["usage"] for event in self.events(body) if event.get("usage")]
        return int(usage[-1]["completion_tokens"])

    def memory(self, name: str) -> float:
        """VmRSS or VmHWM of the process, in MB."""
        text = Path(f"/proc/{self.process.pid}/status").read_text()
        return int(re.search(rf"(?m)^{name}:\s*(\d+) kB$", text)[1]) * 1024 / 1e6  # type: ignore[index]


@contextmanager
def running(model: Path, *options: object, threads: int | None = None) -> Iterator[Server]:
    """Run the server for a model with these options of its command line."""
    command = [sys.executable, "-m", "nplora", "serve", *map(str, (model, "--port", 0, *options))]
    environment = dict(os.environ) if threads is None else {**os.environ, "OMP_NUM_THREADS": str(threads)}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
    try:
        assert process.stdout is not None
        address = process.stdout.readline()
        if not address.startswith("serving at "):
            raise RuntimeError("the server did not start")
        lines = [address]
        while not lines[-1].startswith("memory: "):
            lines.append(process.stdout.readline())
            if not lines[-1]:
                raise RuntimeError("the server ended at its start")
        plan = float(lines[-1].split()[1].replace(",", ""))
        threading.Thread(target=shutil.copyfileobj, args=(process.stdout, sys.stdout), daemon=True).start()
        yield Server(process, int(address.rpartition(":")[2]), plan)
    finally:
        process.terminate()
        process.wait()
