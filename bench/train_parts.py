"""The time of each part of a training step. The core's functions are timed one by one in a new process."""

import time
from collections import defaultdict
from collections.abc import Callable
from multiprocessing import get_context
from statistics import median
from typing import Any

STEPS = 5
PARTS = {
    "lora_forward": "products",
    "lora_backward": "products",
    "attention": "attention",
    "attention_backward": "attention",
    "cross_entropy": "loss",
    "adamw_step": "optimiser",
}
NEAR = "norms, rotation, SwiGLU, conversion"  # all other functions of the core
PYTHON = "Python and NumPy"
HEAD_ROWS = 10_000  # a weight with more outputs is the head's


def measure(make_step: Callable[..., Callable[[], float]], setting: Any, threads: int) -> dict[str, float]:
    """Print and return each part's share of a step of `make_step(setting, threads)`, as a median."""
    context = get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(target=_report, args=(there, make_step, setting, threads))
    process.start()
    there.close()
    shares: dict[str, float] = here.recv()
    process.join()
    parts = ", ".join(f"{name} {share:.0%}" for name, share in sorted(shares.items(), key=lambda s: -s[1]))
    print(f"  {setting.name:>10} {setting.dtype:9} {parts}")
    return shares


def _report(
    connection: Any, make_step: Callable[..., Callable[[], float]], setting: Any, threads: int
) -> None:
    from nplora import _core

    spent: dict[str, float] = defaultdict(float)
    for name, function in list(vars(_core).items()):
        if callable(function) and not isinstance(function, type) and not name.startswith("_"):
            setattr(_core, name, _timed(name, function, spent))
    step = make_step(setting, threads)
    for _ in range(2):
        step()
    seen: dict[str, list[float]] = defaultdict(list)
    for _ in range(STEPS):
        spent.clear()
        start = time.perf_counter()
        step()
        whole = time.perf_counter() - start
        for name in {*PARTS.values(), "head", NEAR}:
            seen[name].append(spent[name] / whole)
        seen[PYTHON].append(1 - sum(spent.values()) / whole)
    connection.send({name: median(shares) for name, shares in seen.items()})


def _timed(name: str, function: Callable[..., Any], spent: dict[str, float]) -> Callable[..., Any]:
    def timed(*arguments: Any, **named: Any) -> Any:
        start = time.perf_counter()
        result = function(*arguments, **named)
        spent[_part(name, arguments)] += time.perf_counter() - start
        return result

    return timed


def _part(name: str, arguments: tuple[Any, ...]) -> str:
    if name in ("lora_forward", "lora_backward"):
        layers = next(argument for argument in arguments if isinstance(argument, list))
        if layers[0].weight.shape[0] > HEAD_ROWS:
            return "head"
    return PARTS.get(name, NEAR)
