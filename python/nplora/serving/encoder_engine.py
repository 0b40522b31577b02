"""EncoderEngine: computes the embeddings and the classes of many requests together."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import threading
import time
from collections.abc import Sequence
from concurrent.futures import Future, InvalidStateError
from typing import Any

import numpy as np
import numpy.typing as npt

from nplora import _check
from nplora.lm import Encoder, TextClassifier
from nplora.models.packing import cut
from nplora.serving.engine import QueueFullError
from nplora.serving.fair_queue import FairQueue
from nplora.serving.memory import MemoryPlan, plan_encoder_memory
from nplora.serving.metrics import Metrics
from nplora.serving.served_encoder import Model, ServedEncoder

Array = npt.NDArray[Any]
Ids = Sequence[Sequence[int]]

_OP = "EncoderEngine.submit"
ROUND = 2048  # the most tokens that are computed at once, except for one longer text
_PART = 1024  # a request with more tokens is divided, so that other requests need not wait for its end


@dataclasses.dataclass(frozen=True)
class _Work:
    """What is computed. Texts with equal work are computed together."""

    model: Model
    classes: bool
    normalize: bool | None

    def width(self) -> int:
        if not isinstance(self.model, TextClassifier):
            return self.model.dim
        return len(self.model.labels) if self.classes else self.model.encoder.dim

    def compute(self, ids: Ids) -> Array:
        if not isinstance(self.model, TextClassifier):
            return self.model.embed_ids(ids, normalize=self.normalize)
        if self.classes:
            return self.model.logits_of_ids(ids)
        return self.model.encoder.embed_ids(ids, normalize=self.normalize)


@dataclasses.dataclass(eq=False)
class _Request:
    work: _Work
    future: Future[Array]
    rows: Array
    parts_left: int
    tokens: int
    arrived: float
    begun: bool = False


@dataclasses.dataclass(eq=False)
class _Part:
    """Some of a request's texts, from text number `first` on."""

    request: _Request
    first: int
    ids: Ids
    client: str
    priority: int = 0
    started: int | None = None  # only for the queue

    @property
    def tokens(self) -> int:
        return sum(map(len, self.ids))


class EncoderEngine:
    """Computes embeddings, and the logits of classifiers, for many requests.

    Clients take turns. Small requests to the same model are computed together. A result does not depend on
    other requests, up to rounding.

        >>> encoder = nplora.load_encoder("encoder-model")
        >>> with nplora.serving.EncoderEngine(encoder) as engine:
        ...     future = engine.submit(encoder.encode(["a cat", "a dog"]))
        ...     future.result().shape == (2, encoder.dim)
        True

    Args:
        encoder: the encoder, which may not be trained or merged meanwhile.
        memory: the most bytes that this process may use, as a number or as a text such as "2G". None: a part
            of the available memory.
        adapter_memory: a part of `memory` that stays free for adapters that are loaded later; None: an eighth
            of what the model leaves.
        max_waiting: how many requests may wait or be computed at the same time.
    Attributes:
        served: the encoder and its named adapters.
        plan: how the memory is divided.
    Raises:
        ValueError: the memory does not suffice, or an argument is out of range.
    """

    def __init__(
        self,
        encoder: Encoder | ServedEncoder,
        *,
        memory: int | str | None = None,
        adapter_memory: int | str | None = 0,
        max_waiting: int = 1024,
    ) -> None:
        self.served = encoder if isinstance(encoder, ServedEncoder) else ServedEncoder(encoder)
        self._most = _check.integer("EncoderEngine", "max_waiting", max_waiting, least=1)
        self.plan: MemoryPlan = plan_encoder_memory(self.served.encoder, memory, ROUND, adapter_memory)
        self._metrics = Metrics()
        self._queue = FairQueue[_Part]()
        self._open: dict[Future[Array], _Request] = {}
        self._lock = threading.RLock()
        self._changed = threading.Condition(self._lock)
        self._thread: threading.Thread | None = None
        self._closed = False

    @property
    def context(self) -> int:
        """The most tokens of a text."""
        return self.served.encoder.max_length

    @property
    def most_requests(self) -> int:
        """The most requests that can wait or be computed at the same time."""
        return self._most

    def submit(
        self,
        ids: Ids,
        *,
        model: Model | None = None,
        classes: bool = False,
        normalize: bool | None = None,
        client: str = "",
    ) -> Future[Array]:
        """Add a request. It may be called from any thread.

        Args:
            ids: the token ids of each text, including special tokens (`encoder.encode` makes them).
            model: one of `served.named_model`; None: the model without an adapter.
            classes: whether the result is a classifier's logits (texts, outputs), instead of embeddings
                (texts, dim).
            normalize: whether embeddings have length 1; None: as the model's files say.
            client: clients take turns, and each client's requests are computed in order.
        Returns:
            the result, float32, once it is computed. `cancel()` ends the request.
        Raises:
            TypeError: classes are wanted, but the model is not a classifier.
            ValueError: a text has no tokens.
            QueueFullError: too many requests are waiting.
            RuntimeError: the engine was closed.
        """
        model = model or self.served.named_model(None)
        if classes and not isinstance(model, TextClassifier):
            raise TypeError(f"{_OP}: the model is not a classifier")
        lengths = np.array([len(one) for one in ids], np.int64)
        if not lengths.all():
            raise ValueError(f"{_OP}: ids[{int(lengths.argmin())}] is empty, expected at least one token")
        work, cuts = _Work(model, classes, normalize), cut(lengths, _PART)
        rows = np.empty((len(ids), work.width()), np.float32)
        request = _Request(work, Future(), rows, len(cuts) - 1, int(lengths.sum()), time.monotonic())
        with self._lock:
            if self._closed:
                raise RuntimeError(f"{_OP}: the engine was closed")
            if len(self._open) >= self._most:
                raise QueueFullError(f"{_OP}: {len(self._open):,} requests are waiting already")
            self._open[request.future] = request
            for first, end in itertools.pairwise(cuts):
                self._queue.push(_Part(request, first, ids[first:end], client))
            self._changed.notify_all()
        request.future.add_done_callback(self._ended)
        if not len(ids):
            request.future.set_result(rows)
        return request.future

    def step(self) -> bool:
        """Compute the next texts. Return False if there was nothing to do.

        An error ends the requests of these texts only.
        """
        parts = self._next_parts()
        if not parts:
            return False
        began = time.monotonic()
        try:
            rows = parts[0].request.work.compute([ids for part in parts for ids in part.ids])
            if not np.isfinite(rows).all():
                raise FloatingPointError("the model's values are NaN or infinite for a text")
            self._store(parts, rows)
        except Exception as error:
            for part in parts:
                with contextlib.suppress(InvalidStateError):  # it has ended already
                    part.request.future.set_exception(error)
        with self._lock:
            self._metrics.rounds += 1
            self._metrics.compute_seconds += time.monotonic() - began
        return True

    def start(self) -> None:
        """Compute in a thread of its own, whenever there is something to do, until `close`."""
        with self._lock:
            if self._closed:
                raise RuntimeError("EncoderEngine.start: the engine was closed")
            if self._thread is None:
                self._thread = threading.Thread(target=self._serve, name="nplora-encoder", daemon=True)
                self._thread.start()

    def close(self, drain: bool = True, timeout: float | None = None) -> None:
        """Take no more requests, and end the thread.

        Args:
            drain: first compute all requests to their end; False: cancel them.
            timeout: seconds after which the rest is cancelled; None: no limit.
        """
        with self._lock:
            self._closed = True
            if drain and self._thread is not None:
                self._changed.wait_for(lambda: not self._open, timeout)
            remaining = list(self._open)
            self._changed.notify_all()
        for future in remaining:
            future.cancel()
        if self._thread is not None:
            self._thread.join()

    def metrics(self) -> Metrics:
        """A snapshot of the counters, which does not change any more."""
        with self._lock:
            self._metrics.running = sum(request.begun for request in self._open.values())
            self._metrics.waiting = len(self._open) - self._metrics.running
            return self._metrics.copy()

    def __enter__(self) -> EncoderEngine:
        """Start the engine."""
        self.start()
        return self

    def __exit__(self, kind: object, *error: object) -> None:
        """Close the engine; without draining if there was an exception."""
        self.close(drain=kind is None)

    # ---- rounds ----

    def _serve(self) -> None:
        """The engine's thread."""
        while True:
            with self._lock:
                self._changed.wait_for(lambda: self._open or self._closed)
                if not self._open:
                    return
            if not self.step():  # the last parts are computed, and their requests end in a moment
                time.sleep(0.001)

    def _next_parts(self) -> list[_Part]:
        """Take the parts of the next round out of the queue."""
        parts, tokens = list[_Part](), 0
        with self._lock:
            while (part := self._queue.first()) is not None:
                request = part.request
                is_open = request.future in self._open
                if is_open and parts:
                    is_alike = request.work == parts[0].request.work
                    if not is_alike or tokens + part.tokens > ROUND:
                        break
                self._queue.remove(part)
                if is_open:
                    parts.append(part)
                    tokens += part.tokens
                    if not request.begun:
                        request.begun = True
                        self._metrics.queue_seconds.add(time.monotonic() - request.arrived)
        return parts

    def _store(self, parts: Sequence[_Part], rows: Array) -> None:
        """Copy the rows of a round to their requests. Requests that are complete end."""
        start = 0
        for part in parts:
            request, count = part.request, len(part.ids)
            request.rows[part.first : part.first + count] = rows[start : start + count]
            start += count
            request.parts_left -= 1
            if not request.parts_left:
                with contextlib.suppress(InvalidStateError):  # it was cancelled
                    request.future.set_result(request.rows)

    def _ended(self, future: Future[Array]) -> None:
        """Count a request that has ended."""
        reason = "cancelled"
        if not future.cancelled():
            reason = "stop" if future.exception() is None else "error"
        with self._lock:
            request, metrics = self._open.pop(future), self._metrics
            metrics.finished[reason] = metrics.finished.get(reason, 0) + 1
            metrics.prompt_tokens += request.tokens if reason == "stop" else 0
            metrics.request_seconds.add(time.monotonic() - request.arrived)
            self._changed.notify_all()
