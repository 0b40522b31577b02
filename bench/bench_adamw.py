"""An AdamW step over the factors of a language model, against torch's fused step and expert NumPy code."""

from collections.abc import Callable
from typing import Any

import numpy as np

from bench import ceilings
from bench.peft_layer import has_torch
from bench.timing import Calls, Contestant, Runtimes, on_threads

# SmolLM2-135M: seven linear layers (d_out, d_in) in each of 30 blocks.
LINEARS = [(576, 576), (192, 576), (192, 576), (576, 576), (1536, 576), (1536, 576), (576, 1536)]
RANK, BLOCKS = 16, 30
SHAPES = [shape for _ in range(BLOCKS) for d_out, d_in in LINEARS for shape in ((d_out, RANK), (RANK, d_in))]
LR, BETA1, BETA2, EPS, DECAY = 1e-3, 0.9, 0.999, 1e-8, 0.01


def case() -> tuple[list[np.ndarray], list[np.ndarray]]:
    rng = np.random.default_rng(0)
    values = [rng.standard_normal(shape, np.float32) for shape in SHAPES]
    return values, [rng.standard_normal(shape, np.float32) for shape in SHAPES]


def check(step: Callable[[], object], values: list[np.ndarray], grads: list[np.ndarray]) -> None:
    """The first step decays, then moves by lr · g / (|g| + eps) (Loshchilov & Hutter 2019, algorithm 2)."""
    exact = [
        (1 - LR * DECAY) * value.astype(np.float64) - LR * grad / (np.abs(grad.astype(np.float64)) + EPS)
        for value, grad in zip(values, grads, strict=True)
    ]
    step()
    for value, want in zip(values, exact, strict=True):
        # a few roundings of the value and of the moments, relative to a move of lr
        if np.max(np.abs(value - want) - 2.0**-22 * np.abs(want)) > LR * 2.0**-12:
            raise AssertionError("AdamW: a contestant's first step is wrong")


def nplora_adamw(threads: int, path: str | None) -> Calls:
    import nplora
    from nplora.nn.module import Parameter

    nplora.set_num_threads(threads)
    values, grads = case()
    parameters = [
        Parameter(f"{i}.B", value, grad) for i, (value, grad) in enumerate(zip(values, grads, strict=True))
    ]
    optimizer = nplora.AdamW(lr=LR, betas=(BETA1, BETA2), eps=EPS, weight_decay=DECAY)
    optimizer.init(parameters)

    def step() -> None:
        optimizer.step(parameters)

    check(step, values, grads)
    return {"step": step} if path is None else {"bound": ceilings.rewrite(path, threads), "step": step}


def torch_fused(threads: int) -> Calls:
    import torch

    torch.set_num_threads(threads)
    values, grads = case()
    parameters = [torch.nn.Parameter(torch.from_numpy(value)) for value in values]
    for parameter, grad in zip(parameters, grads, strict=True):
        parameter.grad = torch.from_numpy(grad)
    optimizer = torch.optim.AdamW(
        parameters, lr=LR, betas=(BETA1, BETA2), eps=EPS, weight_decay=DECAY, fused=True
    )
    check(optimizer.step, values, grads)
    return {"step": optimizer.step}


def numpy_adamw() -> Calls:
    values, grads = case()
    firsts = [np.zeros_like(value) for value in values]
    seconds = [np.zeros_like(value) for value in values]
    scratch = {shape: np.empty((2, *shape), np.float32) for shape in set(SHAPES)}
    steps = 0

    def step() -> None:
        nonlocal steps
        steps += 1
        rate = LR / (1 - BETA1**steps)
        correction = (1 - BETA2**steps) ** 0.5
        for value, grad, m, v in zip(values, grads, firsts, seconds, strict=True):
            t, u = scratch[value.shape]
            np.subtract(grad, m, out=t)
            np.multiply(t, 1 - BETA1, out=t)
            np.add(m, t, out=m)
            np.multiply(grad, grad, out=t)
            np.multiply(t, 1 - BETA2, out=t)
            np.multiply(v, BETA2, out=v)
            np.add(v, t, out=v)
            np.sqrt(v, out=t)
            np.divide(t, correction, out=t)
            np.add(t, EPS, out=t)
            np.divide(m, t, out=u)
            np.multiply(u, rate, out=u)
            np.multiply(value, 1 - LR * DECAY, out=value)
            np.subtract(value, u, out=value)

    check(step, values, grads)
    return {"step": step}


def run(quick: bool, threads: int) -> dict[str, Any]:
    """Print the race on `threads` threads, and return its figures."""
    path = ceilings.library()
    contestants = [
        Contestant("nplora.AdamW", nplora_adamw, (threads, path), ceilings=("bound",)),
        Contestant("NumPy, out=", numpy_adamw, (), "numpy"),
    ]
    if has_torch():
        contestants.append(Contestant("torch, fused", torch_fused, (threads,), "torch"))
    runtimes = Runtimes(threads)
    result = runtimes.race(contestants, rounds=15)
    count = sum(int(np.prod(shape)) for shape in SHAPES)
    print(f"\nAdamW, {count / 1e6:.2f} million values in {len(SHAPES)} tensors, {on_threads(threads)}")
    mine, bound = ("nplora.AdamW", "step"), ("nplora.AdamW", "bound")
    seconds = result.median(*mine)
    moved = 28 * count  # bytes: value, gradient and two moments are read, all but the gradient written
    share = result.share(moved, mine, bound) if bound in result else None
    of_bound = f", {share:.1%} of a stream in place" if share is not None else ""
    print(
        f"  nplora.AdamW {seconds * 1e3:7.2f} ms {moved / seconds / 1e9:8.1f} GB/s read and written{of_bound}"
    )
    over = {c.name: result.ratio((c.name, "step"), mine) for c in contestants[1:]}
    for name, ratio in over.items():
        print(f"  {ratio:6.2f} times as fast as {name}")
    return {"threads": threads, "seconds": seconds, "of_bound": share, "over": over}
