"""Scheduler: chooses the requests of a round, gives them pages, and calls the model."""

from __future__ import annotations

import itertools
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import numpy as np
import numpy.typing as npt

from nplora.lm import LanguageModel
from nplora.lm.generation import PAGE, PIECE, prompt_pieces
from nplora.models.cache import KVCache
from nplora.serving.fair_queue import FairQueue
from nplora.serving.metrics import Metrics
from nplora.serving.page_pool import Key, PagePool
from nplora.serving.request import Request
from nplora.serving.ticket import Chunk

Array = npt.NDArray[Any]

# The prompt tokens that a round reads while other requests generate. The other requests wait meanwhile.
_READ_BETWEEN = 2 * PAGE
# Every fourth piece comes from the oldest prompt. The other pieces come from the prompt that has the fewest
# tokens left to read.
_OLDEST_EVERY = 4


class Scheduler:
    """Computes requests in rounds. A round generates one token for each request whose prompt is complete.

    Args:
        lm: the model.
        slots: how many requests are computed at the same time.
        context: the largest number of tokens of a prompt plus its answer, at most `pages` * PAGE.
        pages: the number of pages of the key-value cache. A page holds PAGE tokens.
        metrics: the counters, which the scheduler updates.
        turn: a context manager that the scheduler enters for each call of the model.
        ended: called with each request that has ended.
    Attributes:
        queue: the waiting requests.
        running: the requests that have a slot in the key-value cache, in the order in which they started.
    """

    def __init__(
        self,
        lm: LanguageModel,
        slots: int,
        context: int,
        pages: int,
        metrics: Metrics,
        turn: AbstractContextManager[object],
        ended: Callable[[Request], None],
    ) -> None:
        self.queue: FairQueue[Request] = FairQueue()
        self.running: list[Request] = []
        self._lm, self._metrics, self._turn, self._ended = lm, metrics, turn, ended
        self._cache = KVCache(lm.config, slots, context, lm, page_tokens=PAGE, pages=pages)
        self._pool = PagePool(pages)
        self._slots = list(range(slots - 1, -1, -1))
        self._started = itertools.count()
        self._pieces = itertools.count()
        self._ending = threading.Lock()  # `end` may be called during a round of another thread

    @property
    def free_slots(self) -> int:
        """The number of free slots of the key-value cache. Each running request needs one slot."""
        return len(self._slots)

    def round(self) -> bool:
        """Run one round. Return False if there was nothing to do."""
        self._admit()
        if not self.running:
            return False
        self._metrics.rounds += 1
        self._read()
        self._decode()
        return True

    def end(self, request: Request, reason: str, error: BaseException | None = None) -> None:
        """End a waiting or running request.

        Another thread may call this method during a round, but only for a request that has not started.
        """
        if error is not None:  # the error's frames have variables that refer to the keys and values
            traceback.clear_frames(error.__traceback__)
        if request.slot is None:
            self.queue.remove(request)
        else:
            self._give_back(request)
        try:
            request.ticket.end(reason, request.usage, error)
        finally:  # a listener may raise KeyboardInterrupt
            with self._ending:
                finished = self._metrics.finished
                finished[reason] = finished.get(reason, 0) + 1
                self._metrics.request_seconds.add(time.monotonic() - request.submitted)
            self._ended(request)

    def close(self) -> None:
        """Free the keys and values. Call this method only when there are no more requests."""
        self.__dict__.pop("_cache", None)

    def counts(self) -> None:
        """Write the current numbers of requests and pages into the metrics."""
        metrics, pool = self._metrics, self._pool
        metrics.running, metrics.waiting = len(self.running), len(self.queue)
        metrics.pages, metrics.pages_cached, metrics.page_tokens = pool.pages, pool.kept, PAGE
        metrics.pages_used = pool.pages - pool.available

    # ---- joining and leaving ----

    def _admit(self) -> None:
        """Start waiting requests, as long as slots are free and there are enough pages for their prompts.

        In addition, a spare page must be available for each request that already runs. Otherwise, the request
        that has just started might be put back into the queue at once.
        """
        while self._slots and (request := self.queue.first()) is not None:
            pages = self._pages_to_come([*self.running, request]) + len(self.running)
            if self.running and pages > self._pool.available:
                return
            if not self.queue.take(request):  # the request has just been cancelled
                continue
            if request.started is None:
                request.started = next(self._started)
                self._metrics.queue_seconds.add(time.monotonic() - request.submitted)
            request.slot = self._slots.pop()
            self.running.append(request)
            self.running.sort(key=lambda one: one.started or 0)
            self._prepare(request)

    def _pages_to_come(self, requests: Sequence[Request]) -> int:
        """Return how many more pages `requests` need, for all their tokens and the next token of each
        request.

        A page that several of these requests can share is counted once. A page that a running request already
        has is not counted.
        """
        own, common = 0, set[Key]()
        for request in requests:
            held = 0 if request.slot is None else int(self._cache.held[request.slot])
            shared = request.common_keys[held:]
            own += max(0, -(-(len(request.answer.ids) + 1) // PAGE) - held - len(shared))
            common.update(shared)
        return own + sum(not self._pool.is_used(key) for key in common)

    def _prepare(self, request: Request) -> None:
        """Set the adapter and the length limit of the slot that the request just received."""
        cache, slot = self._cache, _slot(request)
        cache.adapters.put(slot, request.model)
        cache.limits[slot] = request.slot_limit
        cache.activate(slot, request.prompt)

    def _give_back(self, request: Request) -> None:
        """Release the slot and the pages of a request."""
        slot = _slot(request)
        self._pool.release(self._cache.take(slot))
        self._cache.adapters[slot] = None
        self._slots.append(slot)
        request.slot = None
        self.running.remove(request)
        if not self.running:  # `joint` may keep models whose adapters were deleted
            self._cache.joint = None

    def _missing(self, request: Request, tokens: int) -> int:
        """Return how many more pages a request needs to hold this number of tokens."""
        return max(0, -(-tokens // PAGE) - int(self._cache.held[request.slot]))

    def _make_room(self, request: Request, tokens: int) -> bool:
        """Give a request enough pages for this number of tokens. Return False if the request lost its slot.

        If there are too few pages, one of the running requests loses its slot and its pages, and is put back
        into the queue to be computed again later. Among the running requests with the lowest priority, the
        scheduler chooses the one that started last.
        """
        while self._missing(request, tokens):
            page = self._pool.new()
            if page is not None:
                self._cache.give(_slot(request), page)
                continue
            # A request has at most `context` tokens, for which all pages together suffice. So if no page is
            # left, another running request has pages.
            assert len(self.running) > 1
            last = min(reversed(self.running), key=lambda one: one.priority)
            self._metrics.put_back += 1
            self._give_back(last)
            self.queue.push(last)
            if last is request:
                return False
        return True

    # ---- prompts ----

    def _length(self, request: Request) -> int:
        return int(self._cache.lengths[request.slot])

    def _read(self) -> None:
        """Compute the keys and values of the next prompt tokens. While other requests generate answers,
        compute only a few tokens."""
        left = PIECE if all(self._length(one) < one.to_read for one in self.running) else _READ_BETWEEN
        while left > 0:
            reading = [one for one in self.running if self._length(one) < one.to_read]
            if not reading:
                return
            for request in reading:
                self._share(request)
            oldest = next(self._pieces) % _OLDEST_EVERY == 0
            rest = [one.to_read - self._length(one) for one in reading]
            left -= self._read_pieces(reading[0 if oldest else int(np.argmin(rest))], reading, left)

    def _share(self, request: Request) -> None:
        """Give a request the next pages of its prompt, if another request has already computed them.

        The last token of a prompt is always computed, to get the scores of the first token of the answer.
        """
        cache, slot = self._cache, _slot(request)
        at = self._length(request)
        while at % PAGE == 0 and at + PAGE < request.to_read and cache.held[slot] == at // PAGE:
            page = self._pool.share(request.keys[at // PAGE])
            if page is None:
                return
            cache.give(slot, page)
            at += PAGE
            cache.lengths[slot] = at
            if at > request.known:
                request.known = at
                request.cached += PAGE
                self._metrics.cached_tokens += PAGE

    def _read_pieces(self, first: Request, reading: Sequence[Request], most: int) -> int:
        """Compute the next tokens of the prompt of the request `first`. Return how many tokens were computed.

        If the last page of these tokens is incomplete, the same call of the model also computes the
        incomplete last pages of other prompts. Full pages are computed for one prompt at a time, so that
        other prompts can share these pages.
        """
        begin, end = self._next_piece(first, most)
        together, tokens = [first], end - begin
        for other in reading if end % PAGE else ():
            begin, end = self._next_piece(other, most)
            if other is not first and end % PAGE and tokens + end - begin <= most:
                together.append(other)
                tokens += end - begin
        for request in together:
            if request.slot is not None:  # an earlier request may have put this request back
                self._make_room(request, self._next_piece(request, most)[1])
        ready = [request for request in together if request.slot is not None]
        if not ready:
            return 0
        pieces = [self._next_piece(request, most) for request in ready]
        rows = self._compute(
            [one.answer.ids[begin:end] for one, (begin, end) in zip(ready, pieces, strict=True)], ready
        )
        complete = list[tuple[Request, Array]]()
        for request, (begin, end), scores in zip(ready, pieces, rows, strict=True):
            if scores is not None:
                self._publish(request, begin, end)
                # A request that was put back may already have generated the next tokens.
                if end == len(request.answer.ids):
                    complete.append((request, scores))
        self._advance(complete)
        return sum(end - begin for begin, end in pieces)

    def _next_piece(self, request: Request, most: int) -> tuple[int, int]:
        """Return the positions (begin, end) of the prompt tokens to compute next."""
        pieces = prompt_pieces(self._length(request), request.to_read, max(PAGE, most // PAGE * PAGE))
        return next(pieces)

    def _publish(self, request: Request, begin: int, end: int) -> None:
        """Make the full pages of the tokens `begin` to `end` - 1 available to other requests."""
        request.known = max(request.known, end)
        for page in range(begin // PAGE, end // PAGE):
            self._pool.publish(int(self._cache.table[request.slot, page]), request.keys[page])

    # ---- answers ----

    def _decode(self) -> None:
        """Generate the next token of each request whose prompt is complete."""
        for request in [one for one in self.running if self._length(one) >= one.to_read]:
            if request.slot is not None:  # an earlier request may have put this request back
                self._make_room(request, self._length(request) + 1)
        ready = [one for one in self.running if self._length(one) >= one.to_read]
        if not ready:
            return
        # The tokens of a request that was put back are computed again, although they are known.
        rows = self._compute([one.answer.ids[self._length(one)] for one in ready], ready)
        self._advance(
            [
                (request, scores)
                for request, scores in zip(ready, rows, strict=True)
                if scores is not None and self._length(request) == len(request.answer.ids)
            ]
        )

    def _advance(self, computed: Sequence[tuple[Request, Array]]) -> None:
        """Choose the next token of each request, and then pass all new tokens to the clients together.

        So the thread that serves the clients is woken only once.
        """
        chunks = list[tuple[Request, bool, Chunk]]()
        try:
            for request, scores in computed:
                first = not request.answer.generated
                try:
                    chunks.append((request, first, request.advance(scores)))
                except KeyboardInterrupt:
                    raise
                except BaseException as error:  # a guide may raise anything
                    self.end(request, "error", error)
        finally:
            for request, first, chunk in chunks:
                self._pass_on(request, first, chunk)

    def _pass_on(self, request: Request, first: bool, chunk: Chunk) -> None:
        """Pass a chunk to the client, and end the request if this chunk is the last.

        Args:
            first: whether the chunk has the request's first token.
        """
        request.pass_on(chunk)
        now, metrics = time.monotonic(), self._metrics
        metrics.generated_tokens += 1
        (metrics.first_token_seconds if first else metrics.token_seconds).add(now - request.last_token)
        request.last_token = now
        if first:
            metrics.prompt_tokens += request.answer.prompt
        if request.answer.ended:
            self.end(request, request.answer.reason or "stop")
        elif len(request.answer.ids) == request.switch + 1:
            self._read_again(request)

    def _read_again(self, request: Request) -> None:
        """Compute the tokens of a request again, with LongRoPE's long factors.

        The attention keys in the cache were rotated with the short factors, so they cannot be used any more.
        """
        self._pool.release(self._cache.take(_slot(request)))
        request.read_all()
        self._prepare(request)

    def _compute(self, ids: Sequence[Any], requests: Sequence[Request]) -> Sequence[Array | None]:
        """Compute the given tokens of each request. Return the scores of each request's next token.

        If the computation fails, each request is computed alone, to find the requests that cause the error.
        These requests end, and their scores are None.
        """
        try:
            with self._turn:
                return self._timed_decode(ids, requests)
        except Exception as error:
            if len(requests) == 1:
                self.end(requests[0], "error", error)
                return [None]
        return [self._compute([row], [one])[0] for row, one in zip(ids, requests, strict=True)]

    def _timed_decode(self, ids: Sequence[Any], requests: Sequence[Request]) -> Sequence[Array]:
        began = time.monotonic()
        try:
            return list(self._lm.decode(ids, [_slot(one) for one in requests], self._cache))
        finally:
            self._metrics.compute_seconds += time.monotonic() - began


def _slot(request: Request) -> int:
    """The slot of a running request."""
    assert request.slot is not None
    return request.slot
