"""TimeShare: divides time between urgent work, such as decoding, and training, which can wait."""

from __future__ import annotations

import collections
import statistics
import threading
import time
from collections.abc import Callable

from nplora import _check

WINDOW = 1.0  # seconds
_RECENT = 64  # the number of recent slices that predict the length of the next slice
_MOST_MEDIANS = 2  # the prediction is at most this many times the median of the recent slices
_GAP = 0.02  # after this many seconds without urgent work, urgent work counts as over
_MOST_WAIT = 0.25  # the most seconds that urgent work waits for the end of a slice


class TimeBudget:
    """Computes when the next slice of training may begin, so that training gets at most its share of the
    time.

    A slice is the training between two pauses. Within any window of one second, slices take at most `share`
    seconds. In addition, each slice is followed by a pause whose length is proportional to the length of the
    slice, so that the slices are spread over the window. If the next slice is expected to take longer than
    `share` seconds, it needs a window of more than one second. The length of this window is the expected time
    divided by `share`.

    The next slice is expected to take as long as the longest recent slice, but at most twice the median time
    of the recent slices. So one unusually long slice, for example during a write to a slow disk, may exceed
    training's share, but does not slow training down later.

    >>> budget = TimeBudget(share=0.25)
    >>> budget.add(10.0, 10.125)  # a slice of an eighth of a second
    >>> budget.delay(10.125)
    0.375
    """

    def __init__(self, share: float) -> None:
        self.share = share
        self._slices = collections.deque[tuple[float, float]]()  # the slices in the last window
        self._recent = collections.deque[float](maxlen=_RECENT)

    def add(self, began: float, ended: float, counted_from: float | None = None) -> None:
        """Record a slice.

        Only the part of the slice after `counted_from` counts as training time. If `counted_from` is None,
        the whole slice counts.
        """
        self._recent.append(ended - began)
        begin = began if counted_from is None else max(began, counted_from)
        if begin < ended:
            self._slices.append((begin, ended))

    def delay(self, now: float) -> float:
        """The seconds until the next slice may begin; 0 if it may begin now."""
        if not self._slices:
            return 0.0
        expected = min(max(self._recent), _MOST_MEDIANS * statistics.median(self._recent))
        window = max(WINDOW, expected / self.share)
        while self._slices and self._slices[0][1] <= now - window:
            self._slices.popleft()
        return max(self._until_spread(now), self._until_within(now, expected, window), 0.0)

    def _until_spread(self, now: float) -> float:
        """The seconds until the pause after the last slice is long enough."""
        if not self._slices:
            return 0.0
        began, ended = self._slices[-1]
        return ended + (ended - began) * (1 - self.share) / self.share - now

    def _until_within(self, now: float, expected: float, window: float) -> float:
        """The seconds until the next slice can begin and end without exceeding training's share of a window.

        The window ends when the next slice is expected to end.
        """
        excess = sum(end - begin for begin, end in self._slices) + expected - self.share * window
        delay = 0.0
        for begin, end in self._slices:  # the oldest slice first, because it leaves the window first
            if excess <= 0:
                break
            leaving = min(end - begin, excess)
            delay, excess = begin + leaving + window - expected - now, excess - leaving
        return delay


class TimeShare:
    """Lets urgent work and training take turns.

    Training gets a share of the time while there is urgent work, and all of the time otherwise. Urgent work
    runs in a `with` block. Training calls `pause` between slices, such as the blocks of a model. While
    training waits in `pause`, only urgent work runs. Urgent work waits until a slice ends, but at most a
    quarter of a second. If the slice has not ended by then, urgent work and training run at the same time
    until the slice ends.

    Args:
        share: the share of the time for training, above 0 and at most 1.
        clock: a function that returns the time in seconds.

    >>> turns = TimeShare(0.5)
    >>> with turns:          # urgent work
    ...     pass
    >>> turns.pause()        # training, before its first slice and between two slices
    >>> turns.end()          # training, after its last slice
    """

    def __init__(self, share: float = 0.5, clock: Callable[[], float] = time.monotonic) -> None:
        if not 0 < _check.number("TimeShare", "share", share) <= 1:
            raise ValueError(f"TimeShare: share is {share}, expected above 0 and at most 1")
        self._budget, self._clock = TimeBudget(float(share)), clock
        self._changed = threading.Condition()
        self._urgent = 0  # the number of `with` blocks that wait or run
        self._running = 0  # the number of `with` blocks that run
        # When the first urgent work after a gap came, and when urgent work last ended.
        self._since, self._until = 0.0, float("-inf")
        self._began: float | None = None  # the beginning of the current slice; None: there is no slice
        self._is_long = False  # whether urgent work has stopped waiting for the end of the current slice
        self._waits = False  # whether training waits in `pause`

    @property
    def share(self) -> float:
        """The part of the time that training gets, between 0 and 1."""
        return self._budget.share

    def __enter__(self) -> None:
        with self._changed:
            now = self._clock()
            if not self._is_busy(now):
                self._since = now
            self._urgent += 1
            try:
                self._wait_for_slice(now + _MOST_WAIT)
            except BaseException:  # such as KeyboardInterrupt: `__exit__` is not called then
                self._urgent -= 1
                self._changed.notify_all()
                raise
            self._is_long = self._began is not None
            self._running += 1

    def _wait_for_slice(self, deadline: float) -> None:
        while (now := self._clock()) < deadline and (self._is_slicing() or self._is_due(now)):
            self._changed.wait(deadline - now)

    def __exit__(self, *exception: object) -> None:
        with self._changed:
            self._urgent, self._running, self._until = self._urgent - 1, self._running - 1, self._clock()
            self._changed.notify_all()

    def pause(self) -> None:
        """End the current slice, wait while urgent work runs, and begin the next slice."""
        with self._changed:
            self._end_slice()
            self._waits = True
            now = self._clock()
            try:
                while self._running or (self._is_busy(now) and not self._is_due(now)):
                    self._changed.wait(self._seconds(now))
                    now = self._clock()
            except BaseException:  # Ctrl-C: urgent work need not wait any longer
                self._waits = False
                self._changed.notify_all()
                raise
            self._waits, self._began = False, now

    def end(self) -> None:
        """End the current slice. Training calls `end` before work that may overlap with urgent work."""
        with self._changed:
            self._end_slice()

    def _end_slice(self) -> None:
        began, self._began, self._is_long = self._began, None, False
        if began is not None:
            now = self._clock()
            self._budget.add(began, now, self._since if self._is_busy(now) else now)
            self._changed.notify_all()

    def _is_slicing(self) -> bool:
        """Whether new urgent work must wait for the end of a slice that training is running."""
        return self._began is not None and not self._is_long

    def _is_busy(self, now: float) -> bool:
        """Whether urgent work waits, runs, or has ended less than `_GAP` seconds ago."""
        return self._urgent > 0 or now - self._until < _GAP

    def _is_due(self, now: float) -> bool:
        """Whether training waits in `pause`, but may begin a slice now. If so, new urgent work must wait."""
        return self._waits and self._budget.delay(now) <= 0

    def _seconds(self, now: float) -> float | None:
        """Seconds until training checks again whether a slice may begin; None: until urgent work ends."""
        if self._running:
            return None
        delay = self._budget.delay(now)
        return delay if self._urgent else min(delay, max(0.0, self._until + _GAP - now))
