"""One request to the engine: what it yields, how it is followed, and how it is cancelled."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import numpy.typing as npt

Array = npt.NDArray[Any]


@dataclasses.dataclass(frozen=True, slots=True)
class TopToken:
    """One of the most likely tokens at a position.

    Attributes:
        id: the token.
        text: the token decoded alone; U+FFFD stands for bytes that are not a whole character.
        logprob: the natural logarithm of the model's probability.
    """

    id: int
    text: str
    logprob: float


@dataclasses.dataclass(frozen=True, slots=True)
class Token:
    """A generated token.

    Attributes:
        id: the token.
        text: the token decoded alone; U+FFFD stands for bytes that are not a whole character.
        logprob: the natural logarithm of the model's probability, before temperature, penalties and biases;
            None if the request did not ask for log-probabilities.
        top: the most likely tokens at this position, as many as the request asked for, the likeliest first.
    """

    id: int
    text: str
    logprob: float | None = None
    top: tuple[TopToken, ...] = ()


@dataclasses.dataclass(frozen=True, slots=True)
class Chunk:
    """The next piece of an answer.

    Attributes:
        text: whole characters. Text that may be the beginning of a stop text is held back until it is clear.
        tokens: the tokens that were generated since the chunk before, without the end token. Because text is
            held back, the joined texts of the tokens may differ from `text`.
    """

    text: str
    tokens: tuple[Token, ...] = ()


@dataclasses.dataclass(frozen=True, slots=True)
class Usage:
    """The number of tokens of a request.

    Attributes:
        prompt: the tokens of the prompt.
        cached: how many of them were not computed, because the prefix cache had them.
        generated: the generated tokens. An end token counts.
    """

    prompt: int
    cached: int = 0
    generated: int = 0


class Guide(Protocol):
    """Restricts the tokens of an answer, for example to a grammar. Each request needs its own guide."""

    def restrict(self, scores: Array) -> None:
        """Set the scores (vocab,) float64 of the tokens that may not come next to -inf, in place.

        At least one score must stay finite. End tokens are tokens like any others.
        """

    def advance(self, token: int) -> None:
        """Accept the token that was chosen."""


class Ticket(Protocol):
    """A request in the engine. `Engine.submit` returns it. All methods may be called from any thread."""

    @property
    def usage(self) -> Usage:
        """The number of tokens so far."""

    @property
    def finish_reason(self) -> str | None:
        """How the answer ended; None while it has not ended.

        "stop": an end token or a stop text. "length": `max_new_tokens`, or the context or the memory for keys
        and values is full. "cancelled": `cancel` was called, or the engine was closed. "error": see `error`.
        """

    @property
    def error(self) -> BaseException | None:
        """The exception that ended the request, if `finish_reason` is "error"."""

    def cancel(self) -> None:
        """End the request. It ends before the next round; nothing happens if it has ended already."""

    def __iter__(self) -> Iterator[Chunk]:
        """Yield the chunks as they come, until the request ends. Each chunk is yielded once.

        If no thread runs the engine (`Engine.start`), the iterator runs rounds itself.

        Raises:
            BaseException: `error`, after the chunks before it.
        """

    def listen(self, callback: Callable[[Chunk | None], None]) -> None:
        """Pass the chunks to a callback instead of an iterator: each chunk once, in order, then None once.

        Chunks that came before are passed at once, from the calling thread; the later ones from the engine's
        thread, which waits for the callback. So it must return quickly, as `loop.call_soon_threadsafe(...)`
        does. An exception of the callback cancels the request.

        Raises:
            RuntimeError: the ticket has a listener already.
        """

    def text(self) -> str:
        """Wait for the end, and return the whole text. Raises `error` if there is one."""
