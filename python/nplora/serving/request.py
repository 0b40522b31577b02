"""Request: what the engine knows about a request: its tokens, its adapter and its state."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import numpy.typing as npt

from nplora.lm import LanguageModel
from nplora.lm.answer import Answer
from nplora.lm.generation import PAGE
from nplora.lm.sampling import log_probabilities
from nplora.models.invocation import NEVER, start_of
from nplora.serving.page_pool import Key, page_keys
from nplora.serving.ticket import Chunk, Ticket, Token, TopToken, Usage
from nplora.tokenizer import Tokenizer

Array = npt.NDArray[Any]


class Request:
    """A request as the engine sees it. The client sees only the request's `Ticket`.

    Args:
        model: the model with the request's adapter; None: the engine's model without a named adapter. The
            request keeps this model even if the adapter is deleted.
        root: a text that identifies the adapter in the keys of cache pages (see `page_keys`).
        invocation: the invocation tokens, if the adapter is an activated LoRA.
        limit: the largest number of tokens of the prompt plus the answer.
        switch: the number of tokens above which LongRoPE uses its long factors for a sequence; infinity if
            the model does not use LongRoPE.
    Attributes:
        ticket: the `Ticket` through which the client follows the request.
        answer: the object that holds the tokens of the prompt and of the answer, and chooses the next token.
        client, priority: the arguments of `Engine.submit`.
        model: see the arguments.
        slot: the request's slot in the key-value cache while the request runs; otherwise None.
        started: the position of the request in the order in which requests started; None before its start. A
            request that is put back into the queue keeps this number.
        to_read: the scheduler computes the first `to_read` tokens in blocks of many tokens, and all later
            tokens one by one. If the request is put back into the queue, its tokens are computed again in the
            same way, so that the results have the same bits as before.
        keys: the keys of the pages with the first `to_read` tokens. An incomplete last page has no key.
        cached: the number of prompt tokens whose keys and values this request found in pages of other
            requests. Pages that the request finds again after it was put back into the queue do not
            count.
        known: the largest number of this request's tokens whose keys and values have been in the cache at the
            same time.
    """

    def __init__(
        self,
        ticket: Ticket,
        answer: Answer,
        *,
        tokenizer: Tokenizer,
        model: LanguageModel | None,
        root: str,
        invocation: tuple[int, ...] | None,
        limit: int,
        switch: float,
        logprobs: int | None,
        client: str,
        priority: int,
    ) -> None:
        self.ticket, self.answer, self.model = ticket, answer, model
        self.client, self.priority, self.limit, self.switch = client, priority, limit, switch
        self.slot: int | None = None
        self.started: int | None = None
        self.cached = self.known = 0
        self.submitted = self.last_token = time.monotonic()
        self._tokenizer, self._logprobs = tokenizer, logprobs
        self._root, self._invocation = root, invocation
        self.read_all()

    def read_all(self) -> None:
        """Set `to_read` and `keys` so that the scheduler computes all present tokens in blocks."""
        ids = self.answer.ids
        self.to_read = len(ids)
        root = f"{self._root} {'long' if self.to_read > self.switch else 'short'}"
        start = NEVER if self._invocation is None else start_of(self.prompt, self._invocation)
        self.keys = list(page_keys(root, ids, PAGE, int(start)))

    @property
    def prompt(self) -> Array:
        """The tokens of the prompt. An activated LoRA looks for its invocation tokens only in the prompt."""
        return np.asarray(self.answer.ids[: self.answer.prompt])

    @property
    def common_keys(self) -> list[Key]:
        """The keys of the pages that the request can share with other requests.

        The page with the last of the `to_read` tokens is not shared, because that token must be computed to
        get the scores of the next token.
        """
        return self.keys[: (self.to_read - 1) // PAGE]

    @property
    def slot_limit(self) -> int:
        """The most tokens that the request's slot may hold. LongRoPE selects its factors by this limit."""
        return self.limit if self.to_read > self.switch else int(min(self.limit, self.switch))

    @property
    def usage(self) -> Usage:
        """The token counts of the prompt and of the answer so far."""
        return Usage(self.answer.prompt, self.cached, self.answer.generated)

    def advance(self, scores: Array) -> Chunk:
        """Choose the next token by `scores`. Return a chunk with the token and its text.

        Raises:
            FloatingPointError: the scores are NaN, or the largest score is infinite.
        """
        answer = self.answer
        count = len(answer.ids)
        piece = answer.advance(scores, self.limit)
        return Chunk(piece, tuple(self._token(token, scores) for token in answer.ids[count:]))

    def pass_on(self, chunk: Chunk) -> None:
        """Pass a chunk to the client, unless the chunk is empty."""
        if chunk.text or chunk.tokens:
            self.ticket.put(chunk, self.usage)

    def _token(self, token: int, scores: Array) -> Token:
        if self._logprobs is None:
            return Token(token, self._text(token))
        found = log_probabilities(self.answer.own_scores(scores))
        count = min(self._logprobs, len(found))
        best = np.argpartition(found, -count)[-count:] if count else np.empty(0, np.int64)
        best = best[np.lexsort((best, -found[best]))]
        top = tuple(TopToken(int(one), self._text(int(one)), float(found[one])) for one in best)
        return Token(token, self._text(token), float(found[token]), top)

    def _text(self, token: int) -> str:
        return self._tokenizer.decode([token])
