"""merge_lora against `W += s * (A @ B)`: time, and the memory that the process needs at its peak."""

from collections.abc import Callable
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np

from bench import ceilings
from bench.timing import Contestant, assert_within_rounding, on_threads, race

D, RANK, SCALE = 4096, 8, 2.0**-10  # a Python float leaves float32 arrays float32
WEIGHT_BYTES = 4 * D * D
WANTED = 5.0


def case() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    W = np.empty((D, D), np.float32)
    rng.standard_normal(out=W, dtype=np.float32)
    return W, rng.standard_normal((D, RANK), np.float32), rng.standard_normal((RANK, D), np.float32)


def check(merge: Callable[[], object], W: np.ndarray, A: np.ndarray, B: np.ndarray) -> None:
    rows = slice(None, None, 97)
    before, a = W[rows].astype(np.float64), SCALE * A[rows].astype(np.float64)
    merge()
    magnitude = np.abs(before) + np.abs(a) @ np.abs(B)
    assert_within_rounding(W[rows], before + a @ B, magnitude, RANK + 3)


def nplora_merge(threads: int) -> Callable[[], object]:
    import nplora

    nplora.set_num_threads(threads)
    W, A, B = case()

    def merge() -> None:
        nplora.merge_lora(W, A, B, SCALE)

    check(merge, W, A, B)
    return merge


def numpy_idiom() -> Callable[[], object]:
    W, A, B = case()

    def merge() -> None:
        nonlocal W
        W += SCALE * (A @ B)

    check(merge, W, A, B)
    return merge


def numpy_small_side() -> Callable[[], object]:
    """The same with the small factor scaled and one kept temporary: what a careful user writes."""
    W, A, B = case()
    product = np.empty_like(W)

    def merge() -> None:
        np.add(W, np.matmul(SCALE * A, B, out=product), out=W)

    check(merge, W, A, B)
    return merge


def peak_growth(name: str) -> int:
    """Bytes by which one merge raises the process's peak (VmHWM), measured in a fresh process."""
    context = get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(target=_report_growth, args=(there, name))
    process.start()
    there.close()
    growth = int(here.recv())
    process.join()
    return growth


def _report_growth(connection: Any, name: str) -> None:
    W, A, B = case()
    if name == "nplora":
        import nplora

        nplora.merge_lora(W[:64], A[:64], B, SCALE)  # threads and their stacks exist before the reading
        before = _peak()
        nplora.merge_lora(W, A, B, SCALE)
    else:
        W[:64] += SCALE * (A[:64] @ B)
        before = _peak()
        W += SCALE * (A @ B)
    connection.send(_peak() - before)


def _peak() -> int:
    """VmHWM, which starts anew with each program; ru_maxrss would begin at the parent's peak."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:"))


def run(quick: bool, threads: int) -> dict[str, Any]:
    """Print the race on `threads` threads and the peaks; return the figures."""
    contestants = [
        Contestant("nplora.merge_lora", nplora_merge, (threads,)),
        Contestant("W += s * (A @ B)", numpy_idiom, (), threads),
        Contestant("NumPy, kept temporary", numpy_small_side, (), threads),
    ]
    path = ceilings.library()
    if path is not None:
        contestants.append(Contestant("rewrite in place", ceilings.rewrite, (path, threads, D * D)))
        contestants.append(Contestant("FMA ceiling", ceilings.multiply_add, (path, threads)))
    seconds = race(contestants, rounds=3 if quick else 15, calls=5)

    fma = ceilings.flops(path, threads) / seconds.pop("FMA ceiling") if path is not None else None
    print(f"\nmerge, W {D}x{D} float32, r = {RANK}, {on_threads(threads)}")
    for name, time in seconds.items():
        print(f"  {name:22}{time * 1e3:9.2f} ms {2 * WEIGHT_BYTES / time / 1e9:8.1f} GB/s read and written")
    if fma is not None:
        print(f"  {'FMA ceiling':22}{2e3 * D * D * RANK / fma:9.2f} ms for the products alone")
    ratio = seconds["W += s * (A @ B)"] / seconds["nplora.merge_lora"]
    verdict = "met" if ratio >= WANTED else "MISSED"
    print(f"  ratio: {ratio:.2f} times as fast as W += s * (A @ B) (wanted {WANTED:.2f}: {verdict})")
    result: dict[str, Any] = {"threads": threads, "seconds": seconds, "fma_ceiling": fma, "ratio": ratio}
    if fma is not None:
        bound = max(seconds["rewrite in place"], 2 * D * D * RANK / fma)
        result["of_bound"] = bound / seconds["nplora.merge_lora"]
        print(f"  ratio: {result['of_bound']:.1%} of the speed that memory and arithmetic allow")
    return result


def run_memory() -> dict[str, Any]:
    """Print by how much one merge raises the peak; return the bytes."""
    peaks = {name: peak_growth(name) for name in ("nplora", "NumPy")}
    print(f"\nmerge, growth of the peak memory (W is {WEIGHT_BYTES / 2**20:.0f} MiB)")
    for name, growth in peaks.items():
        print(f"  {name:22}{growth / 2**20:9.1f} MiB = {growth / WEIGHT_BYTES:.3f} of W")
    return peaks
