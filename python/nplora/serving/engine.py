"""Engine: one model answers many requests at the same time. Each request may use a different adapter."""

from __future__ import annotations

import contextlib
import contextvars
import itertools
import operator
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import TypeVar

from nplora import _check
from nplora.formats.errors import brief
from nplora.lm import LanguageModel
from nplora.lm.answer import Answer, Guide
from nplora.lm.generation import PAGE, checked_ids
from nplora.lm.sampling import Sampling
from nplora.models.invocation import invocation_of
from nplora.serving.memory import PROMPT_TOKEN, WAITING, MemoryPlan, plan_memory
from nplora.serving.metrics import Metrics
from nplora.serving.request import Request
from nplora.serving.scheduler import Scheduler
from nplora.serving.ticket import Chunk, Ticket, Token, TopToken, Usage

__all__ = ["Chunk", "Engine", "Guide", "QueueFullError", "Ticket", "Token", "TopToken", "Usage"]

_OP = "Engine.submit"
T = TypeVar("T")


class QueueFullError(RuntimeError):
    """Too many requests are waiting, or their prompts together take too much memory.

    >>> engine = nplora.serving.Engine(nplora.load_model("model.gguf"), max_requests=1, max_waiting=0)
    >>> ticket = engine.submit([5])
    >>> try:
    ...     engine.submit([6])
    ... except nplora.serving.QueueFullError as error:
    ...     print(error)
    Engine.submit: 1 request is waiting already
    """


class Engine:
    """Generates the answers of many requests together.

    The engine works in rounds. A round computes the keys and values of the next prompt tokens, and then
    generates one token for every request whose prompt is complete. Requests start and end between rounds. A
    request with greedy decoding always gets the text that `lm.generate` returns. Other requests do not
    influence this text.

        >>> lm = nplora.load_model("model.gguf")
        >>> sampling = nplora.generate.Sampling(max_new_tokens=4)
        >>> prompts = [lm.tokenizer.encode_prompt(word) for word in ("Hi", "Hello")]
        >>> with nplora.serving.Engine(lm) as engine:
        ...     tickets = [engine.submit(ids, sampling) for ids in prompts]
        ...     texts = [ticket.text() for ticket in tickets]
        >>> texts == [lm.generate(word, max_new_tokens=4) for word in ("Hi", "Hello")]
        True

    Args:
        lm: the model, which must not be trained or merged while the engine uses it. Its named adapters may be
            loaded and deleted at any time.
        memory: the largest number of bytes that this process may use, as a number or as a text such as "2G".
            The keys and values get the memory that weights and working memory do not need. None: the memory
            that the model needs, plus half of the available memory that then remains.
        adapter_memory: how much of `memory` to reserve for adapters that are loaded later. None: an eighth of
            the memory that the model leaves free, but at most `most_adapters`.
        most_adapters: the most bytes that adapters loaded later can need; None: not known.
        max_requests: how many requests are computed at the same time. The others wait.
        max_waiting: how many requests may wait.
        turn: a context manager that the engine enters for each call of the model. The engine calls the model
            several times in each round, for the next tokens of prompts and for the next tokens of answers. If
            `turn` is a lock, other code, such as training, can use the processors between two calls.
    Raises:
        ValueError: the memory does not suffice for one short request, or an argument is out of range.
    """

    def __init__(
        self,
        lm: LanguageModel,
        *,
        memory: int | str | None = None,
        adapter_memory: int | str | None = 0,
        most_adapters: int | None = None,
        max_requests: int = 8,
        max_waiting: int = 1024,
        turn: AbstractContextManager[object] | None = None,
    ) -> None:
        self._slots = slots = _check.integer("Engine", "max_requests", max_requests, least=1)
        self._most_waiting = _check.integer("Engine", "max_waiting", max_waiting, least=0)
        self._lm, self._metrics = lm, Metrics()
        self._plan = plan_memory(lm, memory, slots, adapter_memory, most_adapters, self._most_waiting)
        self._context = min(int(lm.config.max_position_embeddings), self._plan.pages * PAGE)
        self._scheduler = Scheduler(
            lm,
            slots,
            self._context,
            self._plan.pages,
            self._metrics,
            turn or contextlib.nullcontext(),
            self._ended,
        )
        self._requests: dict[Ticket, Request] = {}
        self._cancelled: deque[Ticket] = deque()
        self._roots = weakref.WeakKeyDictionary[LanguageModel, str]()
        self._numbers = itertools.count()
        self._lock = threading.RLock()  # for the queue and everything else that `submit` changes
        self._changed = threading.Condition(self._lock)
        self._rounds = threading.Lock()
        self._in_round: int | None = None  # the thread that holds `_rounds`
        self._thread: threading.Thread | None = None
        self._closed = self._stopping = False

    @property
    def lm(self) -> LanguageModel:
        """The model."""
        return self._lm

    @property
    def context(self) -> int:
        """The largest number of tokens of a prompt plus its answer.

        This number is limited by the model's context length and by the memory.
        """
        return self._context

    @property
    def most_requests(self) -> int:
        """The largest number of requests in the engine at the same time: running plus waiting requests."""
        return self._slots + self._most_waiting

    @property
    def plan(self) -> MemoryPlan:
        """The plan by which the engine uses its memory."""
        return self._plan

    def submit(
        self,
        ids: Sequence[int],
        sampling: Sampling | None = None,
        *,
        adapter: str | LanguageModel | None = None,
        logprobs: int | None = None,
        client: str = "",
        priority: int = 0,
        index: int = 0,
        guide: Guide | None = None,
    ) -> Ticket:
        """Add a request. This method may be called from any thread.

        Args:
            ids: the tokens of the prompt (`lm.tokenizer.encode_prompt` or `encode_chat`).
            sampling: how tokens are chosen. None: choose the most likely token each time, up to 128 tokens.
            adapter: the name of an adapter in `lm.adapters`, or the model that `lm.named_model` returned for
                this name. None, or `lm` itself: no named adapter. A request keeps its adapter to the end,
                even if the adapter is deleted in the meantime. If the adapter adds tokens, pass the model
                whose tokenizer encoded `ids`, not the name: the name may now stand for another adapter.
            logprobs: a number n, which adds log-probabilities to the answer: for each generated token, and
                for the n most likely tokens at its position. None: no log-probabilities.
            client: the name of the client. Clients take turns, and each client's requests are computed in
                order.
            priority: requests with a higher priority start first.
            index: the index of this answer among several answers to the same prompt. Submit the prompt once
                for each answer. Answers with different indices use different random numbers. The answer with
                index i equals row i of the result of `lm.generate`.
            guide: an object that restricts the tokens, for example to those that a grammar allows.
        Raises:
            KeyError: no adapter has this name.
            TypeError: `ids` are not integers, or `adapter` has a wrong type.
            ValueError: the prompt is empty, has tokens outside the vocabulary, or leaves no room in `context`
                for an answer; or an option is out of range; or `adapter` is a copy of a model that
                is not the engine's model.
            QueueFullError: `max_waiting` requests are waiting, or their prompts take too much memory.
            RuntimeError: the engine was closed.
        """
        sampling = sampling or Sampling()
        if logprobs is not None:
            _check.integer(_OP, "logprobs", logprobs, least=0)
        _check.integer(_OP, "index", index, least=0)
        _check.integer(_OP, "priority", priority, least=-(2**31))
        tokens = _integers(ids)
        model = self._model(adapter)
        tokenizer = unselected(lambda: model.tokenizer)
        prompt = unselected(lambda: checked_ids(_OP, model, tokens, self._context))
        ticket = Ticket(len(prompt), self._run, self._cancel)
        request = Request(
            ticket,
            Answer(tokenizer, index, prompt, sampling, guide),
            tokenizer=tokenizer,
            model=None if model is self._lm else model,
            root="base" if model is self._lm else self._root(model),
            invocation=invocation_of(model),
            limit=min(self._context, len(prompt) + sampling.max_new_tokens),
            switch=model.config.rope.longest_short,
            logprobs=logprobs,
            client=client,
            priority=priority,
        )
        with self._lock:
            if self._closed:
                raise RuntimeError(f"{_OP}: the engine was closed")
            if not sampling.max_new_tokens:
                self._scheduler.end(request, "length")
                return ticket
            if len(self._scheduler.queue) >= self._most_waiting + self._scheduler.free_slots:
                raise QueueFullError(f"{_OP}: {waiting(len(self._scheduler.queue))} waiting already")
            size = PROMPT_TOKEN * len(prompt)
            held = PROMPT_TOKEN * sum(one.answer.prompt for one in self._scheduler.queue.items())
            if held and held + size > WAITING:
                raise QueueFullError(
                    f"{_OP}: the prompt takes {size:,} bytes, and the waiting prompts take "
                    f"{held:,}; expected at most {WAITING:,} bytes together"
                )
            self._requests[ticket] = request
            self._scheduler.queue.push(request)
            self._changed.notify_all()
        return ticket

    def step(self) -> bool:
        """Run one round. Return False if there was nothing to do.

        An error in one request ends only this request.

        Raises:
            RuntimeError: a listener, a guide or `turn` called this method during a round.
        """
        with self._round("Engine.step"):
            while self._cancelled:
                request = self._requests.get(self._cancelled.popleft())
                if request is not None:
                    self._scheduler.end(request, "cancelled")
            return unselected(self._scheduler.round)

    @property
    def busy(self) -> bool:
        """Whether requests are running or waiting."""
        return bool(self._requests)

    def start(self) -> None:
        """Start a thread that runs rounds whenever there are requests, until `close`."""
        with self._lock:
            if self._closed:
                raise RuntimeError("Engine.start: the engine was closed")
            if self._thread is None:
                self._thread = threading.Thread(target=self._serve, name="nplora-engine", daemon=True)
                self._thread.start()

    def close(self, drain: bool = True, timeout: float | None = None) -> None:
        """Accept no more requests, and end the engine's thread.

        Args:
            drain: whether to compute all accepted requests before the engine ends. If False, all requests are
                cancelled.
            timeout: seconds after which the remaining requests are cancelled; None: no limit.
        Raises:
            RuntimeError: a listener, a guide or `turn` called this method during a round.
        """
        self._require_no_round("Engine.close")
        with self._lock:
            self._closed = True
            self._changed.notify_all()
        end = None if timeout is None else time.monotonic() + timeout
        while drain and self.busy and (end is None or time.monotonic() < end):
            if self._is_served:
                with self._lock:
                    self._changed.wait(0.05 if end is None else max(0.0, min(0.05, end - time.monotonic())))
            elif not self.step():
                break
        with self._lock:
            self._stopping = True
            self._changed.notify_all()
        thread = self._thread
        if thread is not None and thread is not threading.current_thread():
            thread.join()
        self._end_all("cancelled")
        with self._round("Engine.close"):
            self._cancelled.clear()
            self._scheduler.close()

    def metrics(self) -> Metrics:
        """A copy of the counters. Later requests do not change the copy."""
        with self._lock:
            self._scheduler.counts()
            return self._metrics.copy()

    def __enter__(self) -> Engine:
        """Start the engine."""
        self.start()
        return self

    def __exit__(self, kind: object, *error: object) -> None:
        """Close the engine. If the `with` block raised an exception, cancel the remaining requests."""
        self.close(drain=kind is None)

    # ---- rounds ----

    def _serve(self) -> None:
        """The engine's thread."""
        while not self._stopping:
            try:
                active = self.step()
            except BaseException as error:  # a bug in the engine ends all requests, but not the engine
                active = True
                self._end_all("error", error)
            if not active:
                with self._lock:
                    while not (self._stopping or self._requests):
                        self._changed.wait()

    def _end_all(self, reason: str, error: BaseException | None = None) -> None:
        with self._round("Engine"):
            for request in list(self._requests.values()):
                self._scheduler.end(request, reason, error)

    def _run(self) -> bool:
        """Run a round in the calling thread. If the engine has its own thread, only return False."""
        self._require_no_round("Ticket")
        if self._is_served:
            return False
        self.step()
        return True

    @property
    def _is_served(self) -> bool:
        """Whether the engine's own thread runs the rounds."""
        return self._thread is not None and self._thread.is_alive()

    @contextlib.contextmanager
    def _round(self, op: str) -> Iterator[None]:
        """A context for a round, or for other work that must not run during a round."""
        self._require_no_round(op)
        with self._rounds:
            self._in_round = threading.get_ident()
            try:
                yield
            finally:
                self._in_round = None

    def _require_no_round(self, op: str) -> None:
        """Raise RuntimeError if the calling thread is in a round. Waiting for the round would never end."""
        if self._in_round == threading.get_ident():
            raise RuntimeError(
                f"{op}: a listener, guide or turn called this method during a round, and would wait forever"
            )

    def _cancel(self, ticket: Ticket) -> None:
        """Cancel a request. The request ends before the next round.

        A waiting request leaves the queue at once, to make room for a new request.
        """
        with self._lock:
            request = self._requests.get(ticket)
            if request is not None:
                self._scheduler.queue.remove(request)
                self._cancelled.append(ticket)

    def _ended(self, request: Request) -> None:
        with self._lock:
            self._requests.pop(request.ticket, None)
            self._changed.notify_all()

    def _model(self, adapter: str | LanguageModel | None) -> LanguageModel:
        if adapter is None:
            return self._lm
        if isinstance(adapter, str):
            return self._lm.named_model(adapter, _OP)
        if not isinstance(adapter, LanguageModel):
            kind = _check.kind(adapter)
            raise TypeError(
                f"{_OP}: adapter is {kind}, expected a name, or a model that lm.named_model returned"
            )
        if adapter.config is not self._lm.config:  # copies of a model share its configuration
            raise ValueError(
                f"{_OP}: adapter is a copy of another model, expected a copy of this engine's model"
            )
        return adapter

    def _root(self, model: LanguageModel) -> str:
        """Return a text that identifies a model and its adapter: the argument `root` of `page_keys`."""
        with self._lock:
            return self._roots.setdefault(model, f"adapter {next(self._numbers)}")


def _integers(ids: Sequence[int]) -> list[int]:
    try:
        if not isinstance(ids, str | bytes):
            return [operator.index(one) for one in ids]
    except TypeError:
        pass
    raise TypeError(f"{_OP}: ids is {brief(ids)}, expected integers (lm.tokenizer.encode_prompt makes them)")


def unselected(function: Callable[[], T]) -> T:
    """Call a function in an empty context, so that an adapter selected by the calling thread has no
    effect."""
    return contextvars.Context().run(function)


def waiting(count: int) -> str:
    """Return "1 request is" or, for example, "5 requests are"."""
    return "1 request is" if count == 1 else f"{count:,} requests are"
