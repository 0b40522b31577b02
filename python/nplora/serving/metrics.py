"""Metrics: counters and histograms of the engine, as plain Python objects."""

from __future__ import annotations

import bisect
import dataclasses
from typing import Any

SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0)


@dataclasses.dataclass
class Histogram:
    """A histogram: how many values are in each interval between two consecutive bounds.

    Attributes:
        bounds: the upper bounds, ascending.
        counts: for each bound, the number of values that are above the previous bound and at most equal to
            this bound. The last entry counts the values above all bounds. (Prometheus expects the cumulative
            sums of these counts.)
        total: the sum of all values.

    >>> histogram = nplora.serving.Histogram(bounds=(0.1, 1.0))
    >>> for seconds in (0.05, 0.5, 0.7, 3.0):
    ...     histogram.add(seconds)
    >>> histogram.counts, histogram.count
    ([1, 2, 1], 4)
    """

    bounds: tuple[float, ...] = SECONDS
    counts: list[int] = dataclasses.field(default_factory=list)
    total: float = 0.0

    def __post_init__(self) -> None:
        self.counts = self.counts or [0] * (len(self.bounds) + 1)

    def add(self, value: float) -> None:
        """Count a value."""
        self.counts[bisect.bisect_left(self.bounds, value)] += 1
        self.total += value

    @property
    def count(self) -> int:
        """The number of values."""
        return sum(self.counts)

    def copy(self) -> Histogram:
        """Return a copy. Another thread may call `add` at the same time."""
        return Histogram(self.bounds, list(self.counts), self.total)


@dataclasses.dataclass
class Metrics:
    """The counters of an engine since the engine's start, and the engine's current state.

    Attributes:
        finished: the number of ended requests for each finish reason ("stop", "length", "cancelled",
            "error").
        prompt_tokens: the number of prompt tokens.
        cached_tokens: the number of prompt tokens whose keys and values were found in the prefix cache.
        generated_tokens: the number of generated tokens.
        put_back: the number of times that a running request lost its cache pages to other requests, and had
            to wait again.
        running: the number of requests that are computed now.
        waiting: the number of requests that wait now.
        pages: the number of pages of the key-value cache.
        pages_used: the number of pages that running requests use.
        pages_cached: the number of pages that no request uses, but that hold the beginning of a prompt.
        page_tokens: the number of tokens in a page.
        rounds: the number of rounds so far.
        compute_seconds: how many seconds all calls of the model have taken. The time that the engine waited
            for `turn` does not count (see `Engine`).
        queue_seconds: a histogram of the seconds from `submit` to the start of a request.
        first_token_seconds: a histogram of the seconds from `submit` to the first token.
        token_seconds: a histogram of the seconds between two consecutive tokens of an answer.
        request_seconds: a histogram of the seconds from `submit` to the end of a request.

    >>> engine = nplora.serving.Engine(nplora.load_model("model.gguf"))
    >>> text = engine.submit([5, 6, 7], nplora.generate.Sampling(max_new_tokens=4)).text()
    >>> metrics = engine.metrics()
    >>> metrics.finished, metrics.prompt_tokens, metrics.generated_tokens
    ({'length': 1}, 3, 4)
    """

    finished: dict[str, int] = dataclasses.field(default_factory=dict)
    prompt_tokens: int = 0
    cached_tokens: int = 0
    generated_tokens: int = 0
    put_back: int = 0
    running: int = 0
    waiting: int = 0
    pages: int = 0
    pages_used: int = 0
    pages_cached: int = 0
    page_tokens: int = 0
    rounds: int = 0
    compute_seconds: float = 0.0
    queue_seconds: Histogram = dataclasses.field(default_factory=Histogram)
    first_token_seconds: Histogram = dataclasses.field(default_factory=Histogram)
    token_seconds: Histogram = dataclasses.field(default_factory=Histogram)
    request_seconds: Histogram = dataclasses.field(default_factory=Histogram)

    def copy(self) -> Metrics:
        """Return a copy. Another thread may change the counters at the same time."""
        held: dict[str, Any] = {
            name: value.copy() for name, value in vars(self).items() if isinstance(value, dict | Histogram)
        }
        return dataclasses.replace(self, **held)
