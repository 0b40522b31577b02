"""Communicator: how the processes of a distributed run exchange values. Each process is called a rank."""

from collections.abc import Sequence
from typing import Any, Protocol, Self, TypeVar

import numpy.typing as npt

from nplora import _check

Array = npt.NDArray[Any]
T = TypeVar("T")


class RankError(ConnectionError):
    """Another rank has failed or does not respond. The message names the rank and the reason.

    Attributes:
        rank: the number of the failed rank.
        reason: why the rank counts as failed.

    >>> import nplora
    >>> raise nplora.distributed.RankError(1, "out of memory")
    Traceback (most recent call last):
    nplora.distributed.communicator.RankError: rank 1: out of memory
    """

    def __init__(self, rank: int, reason: str) -> None:
        super().__init__(f"rank {rank}: {reason}")
        self.rank, self.reason = rank, reason

    def __reduce__(self) -> tuple[Any, ...]:
        return RankError, (self.rank, self.reason)


def mark_reported(error: BaseException) -> None:
    """Record that rank 0 reports `error`, so that the rank on which it occurred does not print it too."""
    vars(error)["_is_reported"] = True


def is_reported(error: BaseException) -> bool:
    """Whether rank 0 reports this error. If it does, this rank must not report the error again.

    >>> from nplora.distributed.communicator import is_reported
    >>> is_reported(ValueError("wrong"))
    False
    """
    return bool(vars(error).get("_is_reported"))


class Ranks(Protocol):
    """The methods by which processes (ranks) exchange small values.

    Every rank must call the same methods in the same order. Each method returns when this rank has all the
    values that it needs. `place` says where in the program the call is, such as "step 3". If the place of a
    rank differs from that of rank 0, the ranks raise a `RankError` that names both places.
    """

    @property
    def rank(self) -> int: ...

    @property
    def size(self) -> int: ...

    def gather(self, value: T, place: str = "") -> list[T]:
        """Return the values of all ranks, in the order of the ranks. Every rank gets the list."""

    def broadcast(self, value: T, place: str = "") -> T:
        """Return the value of rank 0. The values of the other ranks are ignored."""


class Communicator(Ranks, Protocol):
    """The methods and attributes that a `Trainer` needs for the connection between its ranks.

    Every rank must call the same methods in the same order. Each method returns when this rank has all the
    values that it needs. `place` says where in the program the call is. A communicator may check that all
    ranks pass the same place.

    Attributes:
        rank: the number of this process, from 0.
        size: the number of processes.
        waited: the seconds that this process has waited in `gather` and `broadcast`.
        exchanged: the seconds that this process has spent in `start_exchange`, `wait_for_exchanges` and
            `join`.

    >>> import nplora, numpy as np
    >>> class Watched(nplora.distributed.Alone):
    ...     "The communicator of a single process. It prints the size of the arrays that it joins."
    ...     def join(self, part, out):
    ...         print("joins", part.size, "gradients")
    ...         super().join(part, out)
    >>> layer = nplora.LoRALinear(np.eye(4), rank=1, rng=0)
    >>> trainer = nplora.Trainer(layer, "mse", communicator=Watched())
    >>> history = trainer.fit(np.eye(4), np.ones((4, 4)))
    joins 8 gradients
    """

    waited: float
    exchanged: float

    def start_exchange(self, parts: Array, out: Array, senders: Sequence[int]) -> None:
        """Start to send row r of `parts` to rank r, and to receive row s of `out` from rank s.

        The exchange may run while this process computes. Until `wait_for_exchanges` returns, `parts` must not
        change, and `out` must not be read. Several exchanges may run at the same time.

        Args:
            parts: array (size, m), one row for each rank. Only the ranks in `senders` send their `parts`.
            out: array (size, m), one row for each rank. The rows of ranks that do not send stay unchanged.
        """

    def wait_for_exchanges(self) -> None:
        """Wait until this process has sent and received all rows of the exchanges that it has started."""

    def join(self, part: Array, out: Array) -> None:
        """Send array `part` (m,) to all ranks; write the ranks' arrays into the rows of `out` (size, m)."""


def require_communicator(op: str, given: Any) -> None:
    """Raise a TypeError if an argument lacks an attribute or a method of a `Communicator`."""
    exchanges = ("start_exchange", "wait_for_exchanges", "join")
    names = ("rank", "size", "gather", "broadcast", *exchanges, "waited", "exchanged")
    if missing := [name for name in names if not hasattr(given, name)]:
        raise TypeError(
            f"{op}: communicator is {_check.kind(given)}, expected a Communicator, which has the attribute "
            f"{missing[0]}"
        )


class Alone:
    """The communicator of a single process.

    >>> import nplora
    >>> nplora.distributed.Alone().gather("value")
    ['value']
    """

    rank, size = 0, 1

    def __init__(self) -> None:
        self.waited = self.exchanged = 0.0

    def gather(self, value: T, place: str = "") -> list[T]:
        return [value]

    def broadcast(self, value: T, place: str = "") -> T:
        return value

    def start_exchange(self, parts: Array, out: Array, senders: Sequence[int]) -> None:
        out[...] = parts

    def wait_for_exchanges(self) -> None:
        pass

    def join(self, part: Array, out: Array) -> None:
        out[0] = part

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        pass
