"""merge_lora against `W += s * (A @ B)`, torch and PEFT: time, and growth of the peak memory."""

from collections.abc import Callable
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np

from bench import ceilings
from bench.peft_layer import has_peft, has_torch, peft_linear
from bench.timing import Calls, Contestant, Runtimes, assert_within_rounding, on_threads

D, RANKS, SCALE = 4096, (8, 16, 64), 2.0**-10  # a Python float keeps float32 arrays in float32
WEIGHT_BYTES = 4 * D * D
NAIVE = "W += s * (A @ B)"


def case(rank: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    W = np.empty((D, D), np.float32)
    rng.standard_normal(out=W, dtype=np.float32)
    return W, rng.standard_normal((D, rank), np.float32), rng.standard_normal((rank, D), np.float32)


def check(merge: Callable[[], object], W: np.ndarray, A: np.ndarray, B: np.ndarray) -> None:
    rows = slice(None, None, 97)
    before, a = W[rows].astype(np.float64), SCALE * A[rows].astype(np.float64)
    merge()
    magnitude = np.abs(before) + np.abs(a) @ np.abs(B)
    assert_within_rounding(W[rows], before + a @ B, magnitude, A.shape[1] + 3)


def nplora_merge(rank: int, threads: int, path: str | None) -> Calls:
    import nplora

    nplora.set_num_threads(threads)
    W, A, B = case(rank)

    def merge() -> None:
        nplora.merge_lora(W, A, B, SCALE)

    check(merge, W, A, B)
    if path is None:
        return {"merge": merge}
    return {
        "rewrite": ceilings.rewrite(path, threads),
        "merge": merge,
        "FMA": ceilings.multiply_add(path, threads),
    }


def numpy_idiom(rank: int) -> Calls:
    W, A, B = case(rank)

    def merge() -> None:
        nonlocal W
        W += SCALE * (A @ B)

    check(merge, W, A, B)
    return {"merge": merge}


def numpy_small_side(rank: int) -> Calls:
    """Like `numpy_idiom`, but scales the smaller factor and keeps one temporary, as a careful user would."""
    W, A, B = case(rank)
    product = np.empty_like(W)

    def merge() -> None:
        np.add(W, np.matmul(SCALE * A, B, out=product), out=W)

    check(merge, W, A, B)
    return {"merge": merge}


def torch_addmm(rank: int, threads: int) -> Calls:
    import torch

    torch.set_num_threads(threads)
    W, A, B = case(rank)
    w, a, b = (torch.from_numpy(array) for array in (W, A, B))

    def merge() -> None:
        w.addmm_(a, b, alpha=SCALE)

    check(merge, W, A, B)
    return {"merge": merge}


def peft_merge(rank: int, threads: int) -> Calls:
    import torch

    torch.set_num_threads(threads)
    W, A, B = case(rank)
    w, a, b = (torch.from_numpy(array) for array in (W, SCALE * A, B))  # an int alpha cannot give 2⁻¹⁰
    layer = peft_linear(w, a, b, rank)

    def merge() -> None:
        layer.merge()
        layer.merged_adapters.clear()

    check(merge, W, A, B)
    return {"merge": merge}


def peak_growth(name: str) -> int:
    """The bytes by which one merge raises the process's peak memory (VmHWM), measured in a new process."""
    context = get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(target=_report_growth, args=(there, name))
    process.start()
    there.close()
    growth = int(here.recv())
    process.join()
    return growth


def _report_growth(connection: Any, name: str) -> None:
    W, A, B = case(RANKS[0])
    if name == "nplora":
        import nplora

        nplora.merge_lora(W[:64], A[:64], B, SCALE)  # creates threads and their stacks before the measurement
        before = _peak()
        nplora.merge_lora(W, A, B, SCALE)
    else:
        W[:64] += SCALE * (A[:64] @ B)
        before = _peak()
        W += SCALE * (A @ B)
    connection.send(_peak() - before)


def _peak() -> int:
    """VmHWM, which starts at zero in each program. ru_maxrss would start at the parent's peak."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:"))


def run(quick: bool, threads: int) -> list[dict[str, Any]]:
    """Print the races on `threads` threads, and return their figures."""
    runtimes = Runtimes(threads)
    return [race(runtimes, rank) for rank in (RANKS[:1] if quick else RANKS)]


def race(runtimes: Runtimes, rank: int) -> dict[str, Any]:
    threads, path = runtimes.threads, ceilings.library()
    contestants = [
        Contestant("nplora", nplora_merge, (rank, threads, path), ceilings=("rewrite", "FMA")),
        Contestant(NAIVE, numpy_idiom, (rank,), "numpy"),
        Contestant("NumPy, kept temporary", numpy_small_side, (rank,), "numpy"),
    ]
    if has_torch():
        contestants.append(Contestant("torch addmm_", torch_addmm, (rank, threads), "torch"))
    if has_peft():
        contestants.append(Contestant("PEFT", peft_merge, (rank, threads), "torch"))
    result = runtimes.race(contestants, rounds=9, seconds=0.05)

    mine = "nplora", "merge"
    over = {c.name: result.ratio((c.name, "merge"), mine) for c in contestants[1:]}
    bounds: dict[str, float] = {}
    if ("nplora", "FMA") in result:
        bounds["read and written in place"] = result.share(2 * WEIGHT_BYTES, mine, ("nplora", "rewrite"))
        bounds["FMA"] = result.share(2 * D * D * rank, mine, ("nplora", "FMA"))
    print(f"\nmerge, W {D}x{D} float32, r = {rank}, {on_threads(threads)}")
    rate = 2 * WEIGHT_BYTES / result.median(*mine) / 1e9
    print(f"  nplora.merge_lora  {result.median(*mine) * 1e3:8.2f} ms {rate:6.1f} GB/s read and written")
    for name, share in bounds.items():
        print(f"  {share:6.1%} of the machine's rate, {name}")
    for name, ratio in over.items():
        print(f"  {ratio:6.2f} times as fast as {name}")
    return {
        "threads": threads,
        "rank": rank,
        "seconds": result.median(*mine),
        "over": over,
        "of_bound": max(bounds.values(), default=None),
    }


def run_memory() -> dict[str, Any]:
    """Print by how much one merge raises the peak memory, and return the bytes."""
    peaks = {name: peak_growth(name) for name in ("nplora", "NumPy")}
    print(f"\nmerge, growth of the peak memory (W is {WEIGHT_BYTES / 2**20:.0f} MiB)")
    for name, growth in peaks.items():
        print(f"  {name:22}{growth / 2**20:9.1f} MiB = {growth / WEIGHT_BYTES:.3f} of W")
    return peaks
