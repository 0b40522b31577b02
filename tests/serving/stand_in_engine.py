"""A small engine for tests of the server: one thread for each request, and no batching."""

import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from nplora.lm import LanguageModel
from nplora.lm.generation import Sampling, StopText, choose
from nplora.serving import Metrics, QueueFullError
from nplora.serving.ticket import Chunk, Token, TopToken, Usage


class StandInTicket:
    def __init__(self, prompt: int) -> None:
        self.usage = Usage(prompt)
        self.finish_reason: str | None = None
        self.error: BaseException | None = None
        self.cancelled = threading.Event()
        self._chunks: list[Chunk | None] = []
        self._callback: Callable[[Chunk | None], None] | None = None
        self._lock = threading.Lock()

    def put(self, chunk: Chunk | None) -> None:
        with self._lock:
            if self._callback is None:
                self._chunks.append(chunk)
            else:
                self._callback(chunk)

    def listen(self, callback: Callable[[Chunk | None], None]) -> None:
        with self._lock:
            self._callback = callback
            for chunk in self._chunks:
                callback(chunk)

    def cancel(self) -> None:
        self.cancelled.set()


class StandInEngine:
    """Attributes:
    pause: seconds between two tokens.
    failure: raised in every request after its first token.
    tickets: all tickets so far.
    """

    def __init__(self, lm: LanguageModel, context: int | None = None, max_waiting: int = 64) -> None:
        self.lm, self.context = lm, context or lm.config.max_position_embeddings
        self.pause, self.max_waiting, self.failure = 0.0, max_waiting, None
        self.tickets: list[StandInTicket] = []
        self.clients: list[str] = []
        self._lock = threading.Lock()

    @property
    def most_requests(self) -> int:
        return self.max_waiting

    def submit(
        self,
        ids: Sequence[int],
        sampling: Sampling | None = None,
        *,
        adapter: LanguageModel | None = None,
        logprobs: int | None = None,
        client: str = "",
        priority: int = 0,
        index: int = 0,
        guide: Any = None,
    ) -> StandInTicket:
        if sum(ticket.finish_reason is None for ticket in self.tickets) >= self.max_waiting:
            raise QueueFullError("the queue is full")
        ticket = StandInTicket(len(ids))
        self.tickets.append(ticket)
        self.clients.append(client)
        arguments = (ticket, list(ids), sampling or Sampling(), adapter, logprobs, index, guide)
        threading.Thread(target=self._run, args=arguments, daemon=True).start()
        return ticket

    def _run(self, ticket: StandInTicket, *arguments: Any) -> None:
        try:
            ticket.finish_reason = self._generate(ticket, *arguments)
        except Exception as error:
            ticket.error, ticket.finish_reason = error, "error"
        ticket.put(None)

    def _generate(
        self,
        ticket: StandInTicket,
        ids: list[int],
        sampling: Sampling,
        adapter: LanguageModel | None,
        logprobs: int | None,
        index: int,
        guide: Any,
    ) -> str:
        lm = self.lm if adapter is None else adapter
        tokenizer, cache = lm.tokenizer, lm.new_cache(1, self.context)
        text, stop = tokenizer.stream(context=ids[-8:]), StopText(sampling.stop)
        rng = np.random.Generator(np.random.PCG64(np.random.SeedSequence(sampling.seed, spawn_key=(index,))))
        new, limit = ids, min(self.context, len(ids) + sampling.max_new_tokens)
        for count in range(limit - len(ids)):
            with self._lock:
                scores = np.array(lm.decode([new], [0], cache)[0][: tokenizer.vocab_size], np.float64)
            reported = scores - np.log(np.exp(scores - scores.max()).sum()) - scores.max()
            if guide is not None:
                guide.restrict(scores)
            token = choose(scores, ids, sampling, rng, ticket.usage.prompt)
            if guide is not None:
                guide.advance(token)
            ticket.usage = Usage(ticket.usage.prompt, 0, count + 1)
            if token in tokenizer.eos_ids:
                break
            ids = [*ids, token]
            new = [token]
            piece = stop.push(text.push(token))
            ticket.put(Chunk(piece, (self._token(token, reported, logprobs),)))
            time.sleep(self.pause)
            if ticket.cancelled.is_set():
                return "cancelled"
            if self.failure is not None:
                raise self.failure
            if stop.found:
                return "stop"
        else:
            ticket.put(Chunk(stop.push(text.flush()) + stop.flush()))
            return "length"
        ticket.put(Chunk(stop.push(text.flush()) + stop.flush()))
        return "stop"

    def _token(self, id_: int, scores: Any, logprobs: int | None) -> Token:
        decode = self.lm.tokenizer.decode
        if logprobs is None:
            return Token(id_, decode([id_]))
        best = np.argsort(-scores, kind="stable")[:logprobs]
        top = tuple(TopToken(int(one), decode([int(one)]), float(scores[one])) for one in best)
        return Token(id_, decode([id_]), float(scores[id_]), top)

    def start(self) -> None: ...

    def close(self, drain: bool = True, timeout: float | None = None) -> None:
        for ticket in self.tickets:
            ticket.cancel()

    def metrics(self) -> Metrics:
        return Metrics(finished={"stop": len(self.tickets)})
