"""A communicator of several threads of this process, for tests without MPI."""

import contextlib
import copy
import threading
import warnings
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import numpy as np

Array = np.ndarray[Any, Any]
T = TypeVar("T")


class _Table:
    """The place where the threads lay down their values."""

    def __init__(self, size: int) -> None:
        self.barrier = threading.Barrier(size, timeout=60)
        self.values: list[Any] = [None] * size


class ThreadRank:
    """One of the threads."""

    def __init__(self, table: _Table, rank: int) -> None:
        self.table, self.rank, self.size = table, rank, len(table.values)
        self.waited = self.exchanged = 0.0
        self.started: list[tuple[Array, Array, Sequence[int]]] = []

    def gather(self, value: T, place: str = "") -> list[T]:
        self.table.values[self.rank] = place, value
        self.table.barrier.wait()
        values = copy.deepcopy(self.table.values)  # as another process would get them
        # A rank that has these values may have failed since.
        with contextlib.suppress(threading.BrokenBarrierError):
            self.table.barrier.wait()
        assert len({other for other, _ in values}) == 1, values
        return [value for _, value in values]

    def broadcast(self, value: T, place: str = "") -> T:
        return self.gather(value, place)[0]

    def start_exchange(self, parts: Array, out: Array, senders: Sequence[int]) -> None:
        out[list(senders)] = np.nan if out.dtype.kind == "f" else 12345  # nothing has arrived yet
        self.started.append((parts, out, senders))

    def wait_for_exchanges(self) -> None:
        for parts, out, senders in self.started:
            rows = self.gather(parts)
            for rank in senders:
                out[rank] = rows[rank][self.rank]
        self.started.clear()

    def join(self, part: Array, out: Array) -> None:
        out[...] = np.stack(self.gather(part))


def on_threads(size: int, work: Callable[[ThreadRank], T]) -> list[T]:
    """The results of `work` on several ranks. An error of one rank is raised here."""
    table = _Table(size)
    results: dict[int, T] = {}
    errors: dict[int, BaseException] = {}

    def one(rank: int) -> None:
        try:
            results[rank] = work(ThreadRank(table, rank))
        except BaseException as error:
            errors[rank] = error
            table.barrier.abort()

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        threads = [threading.Thread(target=one, args=(rank,)) for rank in range(size)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    causes = [error for error in errors.values() if not isinstance(error, threading.BrokenBarrierError)]
    if causes:
        raise causes[0]
    assert not errors
    return [results[rank] for rank in range(size)]
