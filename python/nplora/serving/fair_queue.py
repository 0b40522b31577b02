"""FairQueue: the waiting requests. Clients take turns, so one client does not block the other clients."""

from __future__ import annotations

import itertools
import threading
from collections import OrderedDict, deque
from typing import Generic, Protocol, TypeVar


class Waiting(Protocol):
    """The attributes of a request that the queue needs."""

    @property
    def client(self) -> str: ...
    @property
    def priority(self) -> int: ...
    @property
    def started(self) -> int | None: ...


Item = TypeVar("Item", bound=Waiting)


class FairQueue(Generic[Item]):
    """The waiting requests, in the order in which they will start.

    Requests with the highest priority come first. Among requests with equal priority, requests that have
    started before and were put back come first, in the order of their start. Requests that have never started
    come last. Among these, the clients take turns, and each client's requests keep their order. All methods
    may be called from any thread.
    """

    def __init__(self) -> None:
        self._resumed: list[Item] = []
        self._lines: dict[int, OrderedDict[str, deque[Item]]] = {}
        self._count = 0
        self._lock = threading.RLock()

    def __len__(self) -> int:
        return self._count + len(self._resumed)

    def items(self) -> list[Item]:
        """All requests, in no particular order."""
        with self._lock:
            lines = (own for line in self._lines.values() for own in line.values())
            return [*self._resumed, *itertools.chain.from_iterable(lines)]

    def push(self, item: Item) -> None:
        """Add a request."""
        with self._lock:
            self._push(item)

    def _push(self, item: Item) -> None:
        if item.started is not None:
            self._resumed.append(item)
            self._resumed.sort(key=lambda one: (-one.priority, one.started))
            return
        line = self._lines.setdefault(item.priority, OrderedDict())
        line.setdefault(item.client, deque()).append(item)
        self._count += 1

    def first(self) -> Item | None:
        """The request that starts next; None if there is none."""
        with self._lock:
            highest = max(self._lines, default=None)
            if self._resumed and (highest is None or self._resumed[0].priority >= highest):
                return self._resumed[0]
            return None if highest is None else next(iter(self._lines[highest].values()))[0]

    def pass_turn(self, item: Item) -> None:
        """If `item` is the request that starts next, move its client behind the other clients.

        `item` is not removed, and remains the first request of its client.
        """
        with self._lock:
            line = self._lines.get(item.priority)
            if line is not None and item is self.first():
                line.move_to_end(item.client)

    def take(self, item: Item) -> bool:
        """Remove a request to start it, and move its client behind the other clients.

        Return False if the queue does not contain the request.
        """
        with self._lock:
            if item.started is None:  # a request that was put back has had its turn
                self.pass_turn(item)
            return self.remove(item)

    def remove(self, item: Item) -> bool:
        """Remove a request, without moving its client. Return False if the queue does not contain it."""
        with self._lock:
            if item in self._resumed:
                self._resumed.remove(item)
                return True
            line = self._lines.get(item.priority, OrderedDict())
            own = line.get(item.client, deque())
            if item not in own:
                return False
            own.remove(item)
            self._count -= 1
            if not own:
                del line[item.client]
            if not line:
                del self._lines[item.priority]
            return True
