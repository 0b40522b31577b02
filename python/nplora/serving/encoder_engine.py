"""EncoderEngine: computes the embeddings and the classes of many requests together."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Sequence
from concurrent.futures import Future, InvalidStateError

import numpy as np

from nplora import _check
from nplora.lm import Encoder, TextClassifier
from nplora.serving.encoder_work import Array, Ids, Part, Request, Work
from nplora.serving.engine import QueueFullError, waiting
from nplora.serving.fair_queue import FairQueue
from nplora.serving.memory import MemoryPlan, plan_encoder_memory
from nplora.serving.metrics import Metrics
from nplora.serving.served_encoder import Model, ServedEncoder

_OP = "EncoderEngine.submit"
ROUND = 2048  # the most tokens that are computed at once; a text with more tokens is computed alone
_PART = 1024  # a request with more tokens is divided, so that other requests need not wait for its end
WAITING = 64 << 20  # the most bytes of all requests' token ids and results; a single request may have more


class EncoderEngine:
    """Computes embeddings, and the logits of classifiers, for many requests.

    Clients take turns. Small requests to the same model are computed together. A result does not depend on
    other requests, up to rounding. An error ends only the request that causes it.

        >>> encoder = nplora.load_encoder("encoder-model")
        >>> with nplora.serving.EncoderEngine(encoder) as engine:
        ...     future = engine.submit(encoder.encode(["a cat", "a dog"]))
        ...     future.result().shape == (2, encoder.dim)
        True

    Args:
        encoder: the encoder, which must not be trained or merged while the engine uses it.
        memory: the most bytes that this process may use, as a number or as a text such as "2G". None: the
            memory that the model needs, plus half of the available memory that then remains.
        adapter_memory: how much of `memory` to reserve for adapters that are loaded later. None: an eighth of
            the memory that the model leaves free, but at most `most_adapters`.
        most_adapters: the most bytes that adapters loaded later can need; None: not known.
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
        most_adapters: int | None = None,
        max_waiting: int = 1024,
    ) -> None:
        self.served = encoder if isinstance(encoder, ServedEncoder) else ServedEncoder(encoder)
        self._most = _check.integer("EncoderEngine", "max_waiting", max_waiting, least=1)
        self.plan: MemoryPlan = plan_encoder_memory(
            self.served.encoder, memory, ROUND, adapter_memory, WAITING, most_adapters
        )
        self._metrics = Metrics()
        self._queue = FairQueue[Request]()
        self._open: dict[Future[Array], Request] = {}
        self._bytes = 0  # the bytes of the open requests
        self._lock = threading.RLock()
        self._changed = threading.Condition(self._lock)
        self._thread: threading.Thread | None = None
        self._closed = False

    @property
    def context(self) -> int:
        """The largest number of tokens of a text if no adapter is used."""
        return min(self.longest, self.served.encoder.max_length)

    @property
    def longest(self) -> int:
        """The largest number of tokens of a text for which there is memory, with or without an adapter."""
        return self.plan.longest

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
        held: int = 0,
    ) -> Future[Array]:
        """Add a request. This method may be called from any thread.

        Args:
            ids: the token ids of each text, including special tokens, as `encoder.encode` makes them. Do not
                change the arrays of ids before the result is available.
            model: a model that `served.named_model` has returned; None: the model without an adapter.
            classes: False: the result is embeddings (texts, dim). True: the result is a classifier's logits
                (texts, outputs), or (tokens, outputs) if the classifier labels tokens.
            normalize: whether embeddings have length 1; None: the setting in the model's files.
            client: the name of the client. Clients take turns, and each client's requests are computed in
                order.
            held: the number of bytes that the caller keeps until the result is available. These bytes count
                as memory of the request.
        Returns:
            a future of the result, float32. The future's `cancel()` ends the request.
        Raises:
            TypeError: classes are wanted, but the model is not a classifier; or the ids are not integers.
            ValueError: a text has no tokens or too many, or a token is not in the model's vocabulary.
            QueueFullError: too many requests are waiting, or all requests together take too much memory.
            RuntimeError: the engine was closed.
        """
        model = model or self.served.named_model(None)
        if classes and not isinstance(model, TextClassifier):
            raise TypeError(f"{_OP}: the model is not a classifier")
        work = Work(model, classes, normalize)
        texts = work.checked(_OP, ids, self.longest)
        request = Request(work, texts, client, _PART, held)
        with self._lock:
            self._admit(request)
        request.future.add_done_callback(self._ended)
        if not texts:
            with contextlib.suppress(InvalidStateError):  # `close` in another thread cancelled the request
                request.future.set_result(np.empty((0, work.width()), np.float32))
        return request.future

    def _admit(self, request: Request) -> None:
        """Put a request into the queue. Raise an error if the engine is closed, or the queue is full."""
        if self._closed:
            raise RuntimeError(f"{_OP}: the engine was closed")
        if len(self._open) >= self._most:
            raise QueueFullError(f"{_OP}: {waiting(len(self._open))} waiting already")
        if self._open and self._bytes + request.bytes > WAITING:
            raise QueueFullError(
                f"{_OP}: this request takes {request.bytes:,} bytes, and the waiting requests take "
                f"{self._bytes:,}; expected at most {WAITING:,} bytes together"
            )
        self._open[request.future] = request
        self._bytes += request.bytes
        if request.tokens:
            self._queue.push(request)
        self._changed.notify_all()

    def step(self) -> bool:
        """Compute the next texts. Return False if there was nothing to do.

        An error ends only the requests whose texts cause it.
        """
        parts = self._next_parts()
        if not parts:
            return False
        began = time.monotonic()
        self._compute(parts)
        with self._lock:
            self._metrics.rounds += 1
            self._metrics.compute_seconds += time.monotonic() - began
        return True

    def start(self) -> None:
        """Start a thread that computes all waiting requests, until `close`."""
        with self._lock:
            if self._closed:
                raise RuntimeError("EncoderEngine.start: the engine was closed")
            if self._thread is None:
                self._thread = threading.Thread(target=self._serve, name="nplora-encoder", daemon=True)
                self._thread.start()

    def close(self, drain: bool = True, timeout: float | None = None) -> None:
        """Accept no more requests, and end the thread.

        Args:
            drain: whether to compute all requests first. If False, all requests are cancelled.
            timeout: seconds after which the remaining requests are cancelled; None: no limit.
        """
        with self._lock:
            self._closed = True
            if drain and self._thread is not None:
                self._changed.wait_for(lambda: not self._open, timeout)
        end = None if timeout is None else time.monotonic() + timeout
        while drain and self._thread is None and (end is None or time.monotonic() < end) and self.step():
            pass
        with self._lock:
            remaining = list(self._open)
            self._changed.notify_all()
        for future in remaining:
            future.cancel()
        if self._thread is not None:
            self._thread.join()

    def metrics(self) -> Metrics:
        """A snapshot of the counters."""
        with self._lock:
            self._metrics.running = sum(request.begun for request in self._open.values())
            self._metrics.waiting = len(self._open) - self._metrics.running
            return self._metrics.copy()

    def __enter__(self) -> EncoderEngine:
        """Start the engine."""
        self.start()
        return self

    def __exit__(self, kind: object, *error: object) -> None:
        """Close the engine. After an exception, cancel the remaining requests."""
        self.close(drain=kind is None)

    # ---- rounds ----

    def _serve(self) -> None:
        """The engine's thread."""
        while True:
            with self._lock:
                self._changed.wait_for(lambda: self._open or self._closed)
                if not self._open:
                    return
            try:
                if not self.step():  # the remaining request has no texts, and ends in a moment
                    time.sleep(0.001)
            except BaseException as error:  # a bug in the engine ends all requests, but not the engine
                with self._lock:
                    requests = list(self._open.values())
                for request in requests:
                    _fail(request, error)

    def _next_parts(self) -> list[Part]:
        """Choose the parts of requests that are computed together next, and remove them from the queue."""
        parts, tokens = list[Part](), 0
        with self._lock:
            while (request := self._queue.first()) is not None:
                part = request.next_part()
                tokens += part.tokens
                if parts and (request.work != parts[0].request.work or tokens > ROUND):
                    break
                if not request.begun:
                    self._metrics.queue_seconds.add(time.monotonic() - request.arrived)
                if request.take_part():
                    self._queue.take(request)
                else:
                    self._queue.pass_turn(request)
                parts.append(part)
        return parts

    def _compute(self, parts: Sequence[Part]) -> None:
        """Compute parts of requests together.

        After an error, compute the parts one by one, to find the part that causes the error.
        """
        try:
            rows = parts[0].request.work.compute([ids for part in parts for ids in part.ids])
        except Exception as error:
            if len(parts) == 1:
                _fail(parts[0].request, error)
                return
        else:
            ends = np.cumsum([part.end - part.first for part in parts])
            for part, own in zip(parts, np.split(rows, ends[:-1]), strict=True):
                _store(part, own)
            return
        for part in parts:
            if not part.request.future.done():
                self._compute([part])

    def _ended(self, future: Future[Array]) -> None:
        """Count a request that has ended, and remove its remaining parts from the queue."""
        reason = "cancelled"
        if not future.cancelled():
            reason = "stop" if future.exception() is None else "error"
        with self._lock:
            request, metrics = self._open.pop(future), self._metrics
            self._queue.remove(request)
            self._bytes -= request.bytes
            metrics.finished[reason] = metrics.finished.get(reason, 0) + 1
            metrics.prompt_tokens += request.tokens if reason == "stop" else 0
            metrics.request_seconds.add(time.monotonic() - request.arrived)
            self._changed.notify_all()


def _store(part: Part, rows: Array) -> None:
    """Store the rows of a part in its request. If the request then has all rows, end the request."""
    request = part.request
    try:
        if not np.isfinite(rows).all():
            raise FloatingPointError("the model computed NaN or infinite values for a text")
        made = request.store(part.first, rows)
    except (FloatingPointError, MemoryError) as error:
        _fail(request, error)
        return
    if made is not None:
        with contextlib.suppress(InvalidStateError):  # the request was cancelled
            request.future.set_result(made)


def _fail(request: Request, error: BaseException) -> None:
    with contextlib.suppress(InvalidStateError):  # the request has already ended
        request.future.set_exception(error)
