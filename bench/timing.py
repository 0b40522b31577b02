"""Races: contestants take turns, each runtime in its own process. Results are medians over the turns.

Each runtime has its own process because OpenBLAS's workers spin for about 100 ms after a product, which would
disturb the next call in that process. Contestants take turns because a shared machine's speed drifts, and the
drift should affect all alike. Before each turn with several threads there is a pause, so that the earlier
contestant's workers have stopped spinning.
"""

import atexit
import os
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

PAUSE = 0.2  # seconds before each turn with several threads: longer than OpenBLAS's workers spin
END = 2.0  # seconds that a process gets to end by itself
BUSY = 0.05  # figures are not to be quoted if other programs take more than this share of the CPUs
BF16_UNIT = 2.0**-8  # the unit roundoff of bfloat16
LEFT_OUT = ("OPENBLAS_CORETYPE", "OPENBLAS_L2_SIZE")  # variables that could slow down the peer

Call = Callable[[], object]
Calls = dict[str, Call]


@dataclass(frozen=True)
class Contestant:
    """An entry of a race. `prepare(*arguments)` builds data, checks results, and returns the calls by cell.

    A cell that is named in `ceilings` is not timed. It measures and returns operations or bytes per second.
    A cell that is named in `long` lasts so long that one call in each turn suffices. The first of them has an
    earlier one.
    """

    name: str
    prepare: Callable[..., Calls]
    arguments: tuple[Any, ...] = ()
    runtime: str = (
        "nplora"  # contestants of one runtime share a process; nplora's keeps OpenBLAS at one thread
    )
    ceilings: tuple[str, ...] = ()
    long: tuple[str, ...] = ()


@dataclass(frozen=True)
class Result:
    """One value per turn, by contestant and cell: seconds, or a rate for ceilings."""

    turns: dict[tuple[str, str], list[float]] = field(default_factory=dict)

    def __contains__(self, key: tuple[str, str]) -> bool:
        return key in self.turns

    def median(self, name: str, cell: str) -> float:
        return median(self.turns[name, cell])

    def ratio(self, numerator: tuple[str, str], denominator: tuple[str, str]) -> float:
        """The median over the turns of the ratio in each turn."""
        pairs = zip(self.turns[numerator], self.turns[denominator], strict=True)
        return median(a / b for a, b in pairs)

    def share(self, operations: float, timed: tuple[str, str], ceiling: tuple[str, str]) -> float:
        """Operations (or bytes) per second divided by the ceiling's, as the median over the turns."""
        pairs = zip(self.turns[timed], self.turns[ceiling], strict=True)
        return median(operations / seconds / rate for seconds, rate in pairs)


_lanes: dict[
    tuple[str, int], tuple[Any, Connection]
] = {}  # the processes, by runtime and the number of BLAS threads


@atexit.register
def _end_lanes() -> None:
    """End each process by closing its pipe, or by force if Ctrl-C left it in a long call."""
    for process, connection in _lanes.values():
        connection.close()
        process.join(timeout=END)
        process.terminate()
        process.join()


class Runtimes:
    """The processes of the contestants. They are started on first use, and serve every race until `restart`.

    If `once` is true, each race has one turn, which times each call once and measures each ceiling three
    times.
    """

    once = False

    def __init__(self, threads: int) -> None:
        self.threads = threads

    def race(self, contestants: Sequence[Contestant], *, rounds: int, seconds: float = 0.03) -> Result:
        """Run `rounds` turns. In each, every call is timed for about `seconds`, and at least three times.

        If `seconds` is 0, every call is timed once.

        Long calls are timed once in each turn.

        Prints a warning if other programs kept the machine busy.
        """
        for contestant in contestants:
            self._ask(contestant.runtime, ("prepare", contestant))
        if self.once:
            rounds, seconds = 1, 0.0
        result = Result()
        before = _ticks_of_others()
        for _ in range(rounds):
            for contestant in contestants:
                time.sleep(PAUSE if self.threads > 1 else PAUSE / 20)
                turn = self._ask(contestant.runtime, ("turn", contestant.name, seconds))
                for cell, value in turn.items():
                    result.turns.setdefault((contestant.name, cell), []).append(value)
        for contestant in contestants:
            self._ask(contestant.runtime, ("drop", contestant.name))
        busy, total = (now - then for now, then in zip(_ticks_of_others(), before, strict=True))
        if busy > BUSY * total:
            print(f"\nother programs took {busy / total:.0%} of the CPUs: do not quote these figures", end="")
        return result

    def restart(self) -> None:
        """End all processes. New ones start on next use."""
        _end_lanes()
        _lanes.clear()

    def _ask(self, runtime: str, question: tuple[Any, ...]) -> Any:
        lane = runtime, self.threads if runtime != "nplora" else 1
        if lane not in _lanes:
            _lanes[lane] = _start(lane[1])
        connection = _lanes[lane][1]
        connection.send(question)
        answer = connection.recv()
        if isinstance(answer, str):
            raise RuntimeError(answer)
        return answer


def on_threads(threads: int) -> str:
    """ "1 thread", "2 threads"."""
    return f"{threads} thread" if threads == 1 else f"{threads} threads"


def assert_within_rounding(
    got: np.ndarray, want: np.ndarray, magnitude: np.ndarray, terms: int, unit: float = 2.0**-24
) -> None:
    """|got - want| ≤ γ_k · magnitude, elementwise; γ_k = k·u / (1 - k·u) (Higham 2002, 3.1)."""
    gamma = terms * unit / (1 - terms * unit)
    worst = float(np.max(np.abs(got - want) - gamma * magnitude))
    if not worst <= 0:
        raise AssertionError(f"a contestant's result is wrong: {worst:.3g} beyond the rounding bound")


def _start(blas_threads: int) -> tuple[Any, Connection]:
    context = get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(target=_serve, args=(there,), daemon=True)
    with _environment(blas_threads):
        process.start()
    there.close()
    return process, here


def _serve(connection: Connection) -> None:
    entries: dict[str, tuple[Calls, Contestant]] = {}
    while True:
        try:
            match connection.recv():
                case ("prepare", contestant):
                    calls = contestant.prepare(*contestant.arguments)
                    entries[contestant.name] = calls, contestant
                    connection.send(None)
                case ("turn", name, seconds):
                    calls, contestant = entries[name]
                    for cell in contestant.long[:1]:  # wakes the threads and brings back what was paged out
                        calls[cell]()
                    connection.send(
                        {cell: _measure(call, cell, contestant, seconds) for cell, call in calls.items()}
                    )
                case ("drop", name):
                    del entries[name]
                    calls = {}  # frees the last contestant's data
                    connection.send(None)
        except EOFError:
            return
        except Exception:
            connection.send(traceback.format_exc())


def _measure(call: Call, cell: str, contestant: Contestant, budget: float) -> float:
    if cell in contestant.ceilings:
        return _rate(call)
    return _time_once(call) if cell in contestant.long else _time(call, budget)


def _time_once(call: Call) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def _time(call: Call, budget: float) -> float:
    """Median seconds of a call, after one call that wakes the threads and warms the caches."""
    once = _time_once(call)
    count = min(200, max(3, int(budget / once))) if budget > 0 else 1
    return median(_time_once(call) for _ in range(count))


def _rate(ceiling: Callable[[], Any]) -> float:
    return median(float(ceiling()) for _ in range(3))


def _ticks_of_others() -> tuple[int, int]:
    """CPU ticks spent on processes other than a race's, and all ticks, since the start (Linux)."""
    user, nice, system, idle, iowait, *rest = map(
        int, Path("/proc/stat").read_text().split("\n")[0].split()[1:9]
    )
    busy = user + nice + system + sum(rest)
    return busy - _ticks_of(os.getpid()), busy + idle + iowait


def _ticks_of(pid: int) -> int:
    """CPU ticks of a process and its descendants, in user mode and in the kernel; 0 if it has ended."""
    children = list[str]()
    try:
        after_name = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        for task in Path(f"/proc/{pid}/task").iterdir():
            with suppress(OSError):  # a thread has ended, or the kernel lists no children
                children += (task / "children").read_text().split()
    except OSError:
        return 0
    return sum(map(int, after_name[11:15])) + sum(_ticks_of(int(child)) for child in children)


@contextmanager
def _environment(blas_threads: int) -> Iterator[None]:
    kept = dict(os.environ)
    for name in LEFT_OUT:
        os.environ.pop(name, None)
    for name in ("OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
        os.environ[name] = str(blas_threads)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(kept)
