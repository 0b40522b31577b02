"""Profiler: measures the time that a thread spends in activities of the core and sections of the program."""

from __future__ import annotations

import contextlib
import threading
import time
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field

from nplora import _core

_of_thread = threading.local()  # its attribute `profiler`: the Profiler that records this thread, or None


@dataclass
class Total:
    """Totals over all calls of an activity: the number of calls, the seconds, and the operations.

    Attributes:
        operations: a dictionary from an arithmetic, such as "float32", to the number of operations in
            matrix products with this arithmetic.
    """

    calls: int = 0
    seconds: float = 0.0
    operations: dict[str, float] = field(default_factory=lambda: defaultdict(float))

    def add(self, calls: int, seconds: float, operations: dict[str, float]) -> None:
        self.calls += calls
        self.seconds += seconds
        for arithmetic, number in operations.items():
            self.operations[arithmetic] += number


class Profiler:
    """Records the calls of the core that one thread makes between `start` and `stop`.

    Attributes:
        totals: a dictionary from (section, activity) to a `Total`. For calls outside all sections, the
            section is "".
        sections: a dictionary from a section to its seconds, including the time spent in Python code.

    >>> import nplora, numpy as np
    >>> from nplora.runtime.profile import Profiler, section
    >>> weight, profiler = nplora.FrozenWeight(np.ones((64, 32))), Profiler()
    >>> profiler.start()
    >>> with section("head"):
    ...     y = weight.matmul(np.ones((16, 32)))
    >>> profiler.stop()
    >>> {key: dict(total.operations) for key, total in profiler.totals.items()}
    {('head', 'forward'): {'float32': 65536.0}}
    """

    def __init__(self) -> None:
        self.totals: dict[tuple[str, str], Total] = defaultdict(Total)
        self.sections: dict[str, float] = defaultdict(float)
        self._section = ""
        self._rows: list[tuple[str, str, int, float, dict[str, float]]] = []  # since `start`
        self._spans: list[tuple[str, float]] = []

    def start(self) -> None:
        """Record the calls of this thread from now on.

        Discard earlier calls that `stop` did not add to the totals.
        """
        self.cancel()
        _of_thread.profiler = self
        _core.start_profile()

    def stop(self) -> None:
        """Add all calls since `start` to the totals."""
        self._take()
        for section, activity, calls, seconds, operations in self._rows:
            self.totals[section, activity].add(calls, seconds, operations)
        for section, seconds in self._spans:
            self.sections[section] += seconds
        self.cancel()

    def cancel(self) -> None:
        """Stop recording, and drop the calls recorded since `start`."""
        _core.stop_profile()
        _of_thread.profiler = None
        self._section, self._rows, self._spans = "", [], []

    @contextlib.contextmanager
    def inside(self, section: str) -> Iterator[None]:
        """Record the calls in the `with` block as calls of a section."""
        self._take()
        outer, self._section = self._section, section
        started = time.perf_counter()
        try:
            yield
        finally:
            self._spans.append((section, time.perf_counter() - started))
            self._take()
            self._section = outer

    def _take(self) -> None:
        self._rows += [(self._section, *row) for row in _core.take_profile()]


@contextlib.contextmanager
def section(name: str) -> Iterator[None]:
    """If a Profiler records this thread, the calls in the `with` block belong to this section."""
    profiler: Profiler | None = getattr(_of_thread, "profiler", None)
    if profiler is None:
        yield
        return
    with profiler.inside(name):
        yield
