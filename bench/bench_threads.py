"""The gain from a second thread, and how NumPy's spinning workers slow a step right after their product."""

import time
from statistics import median
from typing import Any

import numpy as np

from bench import ceilings
from bench.bench_lora_step import Case
from bench.timing import Calls, Contestant, Runtimes, on_threads

SHAPES, BATCHES = [(576, 576), (1536, 576), (2048, 2048)], (128, 512, 2048)
STEPS = 200  # right after a NumPy product
AFTER = Case(512, 1536, 576, 8, "float32")


def products(shape: tuple[int, int], n: int, dtype: str, threads: int, path: str) -> Calls:
    """forward + backward with one thread and with all threads, and the FMA loop with the same threads."""
    import nplora

    rng = np.random.default_rng(0)
    d_out, d_in = shape
    weight = nplora.FrozenWeight(rng.standard_normal(shape, np.float32), dtype, dtype)
    x, dy = rng.standard_normal((n, d_in), np.float32), rng.standard_normal((n, d_out), np.float32)
    y, dx = np.empty_like(dy), np.empty_like(x)

    def on(count: int) -> Any:
        def both() -> None:
            nplora.set_num_threads(count)
            weight.matmul(x, out=y)
            weight.matmul_t(dy, out=dx)

        return both

    return {
        "FMA 1": ceilings.multiply_add(path, 1),
        "1": on(1),
        "FMA all": ceilings.multiply_add(path, threads),
        "all": on(threads),
    }


def run_scaling(quick: bool, threads: int) -> list[dict[str, Any]]:
    """Print the speed-up from `threads` threads relative to the FMA loop's, and return the figures."""
    path = ceilings.library()
    if path is None:
        return []
    print(f"\n{on_threads(threads)} against one, forward + backward of the product with a frozen weight")
    rows = []
    runtimes = Runtimes(threads)
    for dtype in ("float32", "bfloat16"):
        for shape in SHAPES[:1] if quick else SHAPES:
            for n in BATCHES[:1] if quick else BATCHES:
                contestant = Contestant(
                    "nplora",
                    products,
                    (shape, n, dtype, threads, path),
                    ceilings=("FMA 1", "FMA all"),
                )
                result = runtimes.race([contestant], rounds=9, seconds=0.05)
                speedup = result.ratio(("nplora", "1"), ("nplora", "all"))
                possible = result.ratio(("nplora", "FMA all"), ("nplora", "FMA 1"))
                print(
                    f"  {n:5} rows, W {shape[0]}x{shape[1]} {dtype:9}{speedup:6.2f} of the FMA "
                    f"loop's {possible:.2f} = {speedup / possible:.1%}"
                )
                rows.append(
                    {"shape": shape, "n": n, "dtype": dtype, "speedup": speedup, "possible": possible}
                )
    return rows


def step_after_numpy(threads: int, steps: int) -> Calls:
    """Time a step alone, and right after a NumPy product with as many threads, in one process."""
    import nplora

    nplora.set_num_threads(threads)
    x, dy, W, A, B = AFTER.arrays()
    layer = nplora.LoRALinear(W, rank=AFTER.rank)
    layer.A[...], layer.B[...] = A, B
    left = np.ones((1024, 1024), np.float32)

    def step() -> float:
        start = time.perf_counter()
        layer.backward(dy, layer.forward(x)[1])
        return time.perf_counter() - start

    def measure() -> float:
        nplora.set_num_threads(threads)
        step()
        alone = median(step() for _ in range(steps))
        after = []
        for _ in range(steps):
            np.matmul(left, left)
            after.append(step())
        seen["median"], seen["worst"] = median(after) / alone, max(after) / alone
        return seen["median"]

    seen: dict[str, float] = {}
    return {"median": measure, "worst": lambda: seen["worst"]}


def run_after_numpy(quick: bool, threads: int) -> dict[str, Any]:
    """Print how much a NumPy product right before slows a step, and return the figures."""
    steps = STEPS // 10 if quick else STEPS
    runtimes = Runtimes(threads)
    contestant = Contestant(
        "nplora", step_after_numpy, (threads, steps), "numpy", ceilings=("median", "worst")
    )
    result = runtimes.race([contestant], rounds=5)
    figures = {cell: result.median("nplora", cell) for cell in ("median", "worst")}
    print(f"\na LoRA step right after a NumPy product, {on_threads(threads)}, relative to its time alone")
    print(f"  median {figures['median']:.2f}, worst of {steps} {figures['worst']:.2f}")
    return {"threads": threads, **figures}
