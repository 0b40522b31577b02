"""Writes the counters of the engine and of the server in the text format of Prometheus."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping

from nplora.serving.metrics import Histogram, Metrics

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

_COUNTERS = {
    "prompt_tokens": "Tokens in prompts.",
    "cached_tokens": "Prompt tokens whose keys and values were found in the prefix cache.",
    "generated_tokens": "Generated tokens.",
    "put_back": "How often a request lost its cache pages to other requests and was computed again.",
    "rounds": "Rounds of the engine. In a round, all running requests are computed together.",
    "compute_seconds": "Seconds that the engine spent computing.",
}
_GAUGES = {
    "running": "Requests that are computed now.",
    "waiting": "Requests that wait.",
    "pages": "Pages of the key-value cache.",
    "pages_used": "Cache pages that running requests use.",
    "pages_cached": "Cache pages that no request uses now, kept for later prompts with the same beginning.",
    "page_tokens": "Tokens per cache page.",
}
_HISTOGRAMS = {
    "queue_seconds": "Seconds from the arrival of a request to its first computation.",
    "first_token_seconds": "Seconds from the arrival of a request to its first token.",
    "token_seconds": "Seconds between two consecutive tokens of an answer.",
    "request_seconds": "Seconds from the arrival of a request to its end.",
}


def exposition(metrics: Metrics, responses: Mapping[int, int], adapters: int, memory: int) -> str:
    """Return all counters in the text format of Prometheus.

    Args:
        responses: a dict from each HTTP status to its number of responses.
        adapters: the number of loaded adapters.
        memory: the resident memory of the process, in bytes.
    """
    return "\n".join(_lines(metrics, responses, adapters, memory)) + "\n"


def _lines(metrics: Metrics, responses: Mapping[int, int], adapters: int, memory: int) -> Iterator[str]:
    for name, text in _COUNTERS.items():
        yield from _one(f"nplora_{name}_total", "counter", text, {"": getattr(metrics, name)})
    for name, text in _GAUGES.items():
        yield from _one(f"nplora_{name}", "gauge", text, {"": getattr(metrics, name)})
    finished = {f'{{reason="{reason}"}}': count for reason, count in sorted(metrics.finished.items())}
    yield from _one("nplora_finished_total", "counter", "Requests that have ended, by reason.", finished)
    for name, text in _HISTOGRAMS.items():
        yield from _histogram(f"nplora_{name}", text, getattr(metrics, name))
    statuses = {f'{{status="{status}"}}': count for status, count in sorted(Counter(responses).items())}
    yield from _one("nplora_http_responses_total", "counter", "HTTP responses by status.", statuses)
    yield from _one("nplora_adapters", "gauge", "Loaded adapters.", {"": adapters})
    yield from _one("process_resident_memory_bytes", "gauge", "Resident memory in bytes.", {"": memory})


def _one(name: str, kind: str, text: str, values: Mapping[str, float]) -> Iterator[str]:
    yield f"# HELP {name} {text}"
    yield f"# TYPE {name} {kind}"
    for labels, value in values.items():
        yield f"{name}{labels} {value!r}"


def _histogram(name: str, text: str, histogram: Histogram) -> Iterator[str]:
    yield f"# HELP {name} {text}"
    yield f"# TYPE {name} histogram"
    sum_so_far = 0
    counts = histogram.counts or [0] * (len(histogram.bounds) + 1)
    for bound, count in zip((*histogram.bounds, "+Inf"), counts, strict=True):
        sum_so_far += count
        yield f'{name}_bucket{{le="{bound}"}} {sum_so_far}'
    yield f"{name}_sum {histogram.total!r}"
    yield f"{name}_count {sum_so_far}"
