"""Progress: prints lines about the progress of a long computation."""

from __future__ import annotations

import time
from collections.abc import Callable

EVERY = 10.0  # seconds between two lines


class Progress:
    """Prints how much of a computation is done, its speed, and the time left.

    Args:
        what: name of the computation. Each line that `add` prints begins with this name, which may be empty.
        unit: the name of the items that are counted, in the plural.
        total: the number of items in the whole computation.
        say: a function that prints one line.
    """

    def __init__(self, what: str, unit: str, total: int, say: Callable[[str], None]) -> None:
        self._what, self._unit, self._total, self._say = what, unit, total, say
        self._done = self._done_before = 0
        self._begun = self._shown = 0.0

    def begin(self, text: str) -> None:
        """Print `text`, and let `add` print lines from now on. If `begin` was called before, do nothing."""
        if not self._begun:
            self._begun = self._shown = time.monotonic()
            self._done_before = self._done
            self._say(text)

    def add(self, count: int) -> None:
        """Add `count` to the number of finished items. Print a line if EVERY seconds have passed."""
        self._done += count
        now = time.monotonic()
        if not self._begun or now - self._shown < EVERY:
            return
        self._shown = now
        rate = (self._done - self._done_before) / (now - self._begun)
        left = f", {(self._total - self._done) / rate:.0f} s left" if rate else ""
        what = f"{self._what}: " if self._what else ""
        self._say(f"{what}{self._done:,} of {self._total:,} {self._unit}, {rate:.0f} {self._unit}/s{left}")
