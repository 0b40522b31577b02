"""Races: every contestant in a process of its own, round by round, medians.

Processes, because OpenBLAS's workers spin for about 100 ms after a product and would disturb whoever runs
next in the same process. Round by round, because a shared machine drifts and the drift should hit all alike.
A pause before each turn, so that the spinning of the contestant before has ended.
"""

import os
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

PAUSE = 0.2  # seconds before each turn: longer than OpenBLAS's workers spin
BUSY = 0.05  # share of the CPUs taken by other programs above which the figures are not to be quoted
LEFT_OUT = ("OPENBLAS_CORETYPE", "OPENBLAS_L2_SIZE")  # would hold the peer below what it can do


@dataclass(frozen=True)
class Contestant:
    """An entry of a race. `prepare(*arguments)` builds data, checks the result, returns the call to time."""

    name: str
    prepare: Callable[..., Callable[[], object]]
    arguments: tuple[Any, ...] = ()
    blas_threads: int = 1  # nplora's own processes keep OpenBLAS at one thread, which never spins


def race(contestants: Sequence[Contestant], *, rounds: int, calls: int) -> dict[str, float]:
    """Median seconds of one call, by contestant: `rounds` turns of a warm-up and `calls` timed calls each.

    Says so where other programs kept the machine busy, as seen in the second half of the pauses.
    """
    lanes = [_start(contestant, calls) for contestant in contestants]
    seconds: dict[str, list[float]] = {contestant.name: [] for contestant in contestants}
    busy, total = 0, 0
    try:
        for _, connection in lanes:
            _receive(connection)  # prepared and checked
        for _ in range(rounds):
            for contestant, (_, connection) in zip(contestants, lanes, strict=True):
                time.sleep(PAUSE / 2)
                before = _cpu_ticks()
                time.sleep(PAUSE / 2)
                busy, total = (
                    sum_ + now - then
                    for sum_, now, then in zip((busy, total), _cpu_ticks(), before, strict=True)
                )
                connection.send(True)
                seconds[contestant.name].append(_receive(connection))
    finally:
        for process, connection in lanes:
            connection.close()
            process.join()
    if busy > BUSY * total:
        print(f"\nother programs took {busy / total:.0%} of the CPUs meanwhile: not to be quoted", end="")
    return {name: median(turns) for name, turns in seconds.items()}


def on_threads(threads: int) -> str:
    """ "1 thread", "2 threads"."""
    return f"{threads} thread" if threads == 1 else f"{threads} threads"


def assert_within_rounding(got: np.ndarray, want: np.ndarray, magnitude: np.ndarray, terms: int) -> None:
    """|got - want| ≤ γ_k · magnitude, elementwise; γ_k = k·u / (1 - k·u), u = 2⁻²⁴ (Higham 2002, 3.1)."""
    gamma = terms * 2.0**-24 / (1 - terms * 2.0**-24)
    worst = float(np.max(np.abs(got - want) - gamma * magnitude))
    if worst > 0:
        raise AssertionError(f"a contestant's result is wrong: {worst:.3g} beyond the rounding bound")


def _start(contestant: Contestant, calls: int) -> tuple[Any, Connection]:
    context = get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(target=_serve, args=(there, contestant, calls), daemon=True)
    with _environment(contestant.blas_threads):
        process.start()
    there.close()
    return process, here


def _serve(connection: Connection, contestant: Contestant, calls: int) -> None:
    try:
        call = contestant.prepare(*contestant.arguments)
        connection.send(0.0)
        while True:
            connection.recv()
            connection.send(_turn(call, calls))
    except EOFError:
        return
    except Exception:
        connection.send(traceback.format_exc())


def _turn(call: Callable[[], object], calls: int) -> float:
    call()  # wakes the threads and warms the caches
    seconds = []
    for _ in range(calls):
        start = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - start)
    return median(seconds)


def _receive(connection: Connection) -> float:
    answer = connection.recv()
    if isinstance(answer, str):
        raise RuntimeError(answer)
    return float(answer)


def _cpu_ticks() -> tuple[int, int]:
    """Ticks that all CPUs were busy, and all ticks, since the machine started (Linux)."""
    user, nice, system, idle, iowait, *rest = map(
        int, Path("/proc/stat").read_text().split("\n")[0].split()[1:9]
    )
    busy = user + nice + system + sum(rest)
    return busy, busy + idle + iowait


@contextmanager
def _environment(blas_threads: int) -> Iterator[None]:
    kept = dict(os.environ)
    for name in LEFT_OUT:
        os.environ.pop(name, None)
    os.environ["OPENBLAS_NUM_THREADS"] = os.environ["MKL_NUM_THREADS"] = str(blas_threads)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(kept)
