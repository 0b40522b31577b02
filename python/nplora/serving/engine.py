"""The engine: one model answers many requests at the same time, each with its own adapter."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager

from nplora.lm import LanguageModel
from nplora.lm.generation import Sampling
from nplora.serving.metrics import Metrics
from nplora.serving.ticket import Chunk, Guide, Ticket, Token, TopToken, Usage

__all__ = ["Chunk", "Engine", "Guide", "QueueFullError", "Ticket", "Token", "TopToken", "Usage"]


class QueueFullError(RuntimeError):
    """Too many requests are waiting."""


class Engine:
    """Generates the answers of many requests together.

    Requests join and leave between rounds. A round reads a piece of the waiting prompts, and then generates
    one token of every running request. The greedy text of a request has the same bits alone and beside any
    other requests, and it is the text that `lm.generate` returns.

    Args:
        lm: the model, which may not be trained or merged meanwhile. Its named adapters may be loaded and
            deleted at any time.
        memory: the most bytes that this process may use, as a number or as a text such as "2G". The keys and
            values take what the weights and the work space leave. None: a part of the available memory.
        max_requests: how many requests are computed at the same time. The others wait.
        max_waiting: how many requests may wait.
        turn: entered for the computation of each round. With a lock here, other work (training) can alternate
            with the rounds.
    Raises:
        ValueError: the memory does not suffice for one short request, or an argument is out of range.
    """

    def __init__(
        self,
        lm: LanguageModel,
        *,
        memory: int | str | None = None,
        max_requests: int = 8,
        max_waiting: int = 1024,
        turn: AbstractContextManager[object] | None = None,
    ) -> None:
        raise NotImplementedError

    @property
    def lm(self) -> LanguageModel:
        """The model."""
        raise NotImplementedError

    @property
    def context(self) -> int:
        """The most tokens of a prompt and its answer together: the model's context, or what memory allows."""
        raise NotImplementedError

    def submit(
        self,
        ids: Sequence[int],
        sampling: Sampling | None = None,
        *,
        adapter: str | None = None,
        logprobs: int | None = None,
        client: str = "",
        priority: int = 0,
        index: int = 0,
        guide: Guide | None = None,
    ) -> Ticket:
        """Add a request. It may be called from any thread.

        Args:
            ids: the tokens of the prompt (`lm.tokenizer.encode_prompt` or `encode_chat`).
            sampling: how tokens are chosen, or None for always the most likely one, up to 128 tokens.
            adapter: the name of one of `lm.adapters`, or None for the model without a named adapter. A request
                keeps its adapter to the end, even if the adapter is deleted meanwhile.
            logprobs: None: no log-probabilities; n: those of each token and of the n most likely tokens.
            client: clients take turns, and each client's requests are computed in order.
            priority: requests with a higher priority start first.
            index: which one of several answers to the same prompt; each draws other random numbers. With
                index i, the answer is that of row i of `lm.generate`.
            guide: restricts the tokens, for example to a grammar.
        Raises:
            KeyError: no adapter has this name.
            ValueError: the prompt is empty, has tokens outside the vocabulary, or fills `context`; or an
                option is out of range.
            QueueFullError: `max_waiting` requests are waiting.
            RuntimeError: the engine was closed.
        """
        raise NotImplementedError

    def step(self) -> bool:
        """Run one round. Return False if there was nothing to do.

        An error of one request ends this request only. Only one thread may run rounds.
        """
        raise NotImplementedError

    @property
    def busy(self) -> bool:
        """Whether requests are running or waiting."""
        raise NotImplementedError

    def start(self) -> None:
        """Run rounds in a thread of its own, whenever there is something to do, until `close`."""
        raise NotImplementedError

    def close(self, drain: bool = True, timeout: float | None = None) -> None:
        """Take no more requests, and end the thread.

        Args:
            drain: first compute all requests to their end; False: cancel them.
            timeout: seconds after which the rest is cancelled; None: no limit.
        """
        raise NotImplementedError

    def metrics(self) -> Metrics:
        """A snapshot of the counters, which does not change any more."""
        raise NotImplementedError

    def __enter__(self) -> Engine:
        """Start the engine."""
        raise NotImplementedError

    def __exit__(self, *error: object) -> None:
        """Close the engine; without draining if there was an exception."""
        raise NotImplementedError
