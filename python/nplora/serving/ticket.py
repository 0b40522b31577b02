"""Ticket: the client's view of a request. With a ticket, the client follows or cancels the request."""

from __future__ import annotations

import contextlib
import dataclasses
import threading
from collections import deque
from collections.abc import Callable, Iterator

from nplora.runtime.user_warning import warn_user

_LONGEST_WAIT = 0.5  # seconds after which a waiting thread checks whether the engine's thread still runs


@dataclasses.dataclass(frozen=True, slots=True)
class TopToken:
    """One of the most likely tokens at a position of the answer.

    Attributes:
        id: the token.
        text: the text of this token alone. U+FFFD stands for a part of a character.
        logprob: the natural logarithm of the token's probability, before temperature, penalties and biases.

    >>> nplora.serving.TopToken(id=7, text=" the", logprob=-0.5).text
    ' the'
    """

    id: int
    text: str
    logprob: float


@dataclasses.dataclass(frozen=True, slots=True)
class Token:
    """A generated token.

    Attributes:
        id: the token.
        text: the text of this token alone. U+FFFD stands for a part of a character.
        logprob: the natural logarithm of the token's probability, before temperature, penalties and biases;
            None if the request did not ask for log-probabilities.
        top: the most likely tokens at this position, the likeliest first. The argument `logprobs` of
            `Engine.submit` sets how many there are.

    >>> engine = nplora.serving.Engine(nplora.load_model("model.gguf"))
    >>> ticket = engine.submit([5, 6], nplora.generate.Sampling(max_new_tokens=2), logprobs=3)
    >>> token = next(token for chunk in ticket for token in chunk.tokens)
    >>> token.id == token.top[0].id, token.logprob == token.top[0].logprob, len(token.top)
    (True, True, 3)
    """

    id: int
    text: str
    logprob: float | None = None
    top: tuple[TopToken, ...] = ()


@dataclasses.dataclass(frozen=True, slots=True)
class Chunk:
    """The next piece of an answer.

    Attributes:
        text: the new text, in whole characters. Text that may be the beginning of a stop text is held back
            until the next tokens show whether it is a stop text.
        tokens: the tokens that were generated since the last chunk, without the end token. `text` may differ
            from the joined texts of these tokens, because text may be held back.

    >>> nplora.serving.Chunk("Hello").tokens
    ()
    """

    text: str
    tokens: tuple[Token, ...] = ()


@dataclasses.dataclass(frozen=True, slots=True)
class Usage:
    """The token counts of a request's prompt and of its answer.

    Attributes:
        prompt: the number of tokens of the prompt.
        cached: the number of prompt tokens that were not computed, because their keys and values were found
            in the prefix cache.
        generated: the number of generated tokens, including the end token if there is one.

    >>> nplora.serving.Usage(prompt=5)
    Usage(prompt=5, cached=0, generated=0)
    """

    prompt: int
    cached: int = 0
    generated: int = 0


class Ticket:
    """A client's handle for a request, from `Engine.submit`. All methods may be called from any thread.

        >>> engine = nplora.serving.Engine(nplora.load_model("model.gguf"))
        >>> ticket = engine.submit([5, 6, 7], nplora.generate.Sampling(max_new_tokens=4))
        >>> text = "".join(chunk.text for chunk in ticket)
        >>> ticket.finish_reason, ticket.usage
        ('length', Usage(prompt=3, cached=0, generated=4))

    Args:
        prompt: the number of tokens of the prompt.
        run: a function that runs a round of the engine in the calling thread, or returns False if another
            thread runs the rounds.
        cancel: called with this ticket when the client cancels the request.
    """

    def __init__(self, prompt: int, run: Callable[[], bool], cancel: Callable[[Ticket], None]) -> None:
        self._changed = threading.Condition()
        self._chunks: deque[Chunk | None] = deque()  # for a listener, the last entry is None
        self._is_passing = False  # whether a thread is passing a chunk to the listener
        self._listener: Callable[[Chunk | None], None] | None = None
        self._reason: str | None = None
        self._error: BaseException | None = None
        self._usage = Usage(prompt)
        self._run, self._cancel = run, cancel

    @property
    def usage(self) -> Usage:
        """The token counts of the prompt and of the answer so far."""
        return self._usage

    @property
    def finish_reason(self) -> str | None:
        """How the answer ended; None before the end of the answer.

        "stop": the answer ended with an end token or a stop text. "length": the answer has `max_new_tokens`
        tokens, or prompt and answer fill `Engine.context`. "cancelled": `cancel` was called, or
        the engine was closed. "error": see `error`.
        """
        return self._reason

    @property
    def error(self) -> BaseException | None:
        """The exception that ended the request, if `finish_reason` is "error"."""
        return self._error

    def cancel(self) -> None:
        """Cancel the request. The request ends before the next round.

        If the request has already ended, this method does nothing.
        """
        if self._reason is None:
            self._cancel(self)

    def __iter__(self) -> Iterator[Chunk]:
        """Yield each new chunk once, until the request ends.

        If the engine has no thread of its own (see `Engine.start`), the iterator runs the engine's rounds.

        Raises:
            BaseException: the exception `error`, after all chunks have been yielded.
        """
        while (chunk := self._next()) is not None:
            yield chunk
        if self._error is not None:
            raise self._error

    def _next(self) -> Chunk | None:
        """Wait for the next chunk, and return it. Return None if there are no more chunks."""
        while True:
            with self._changed:
                if self._chunks and self._listener is None:
                    return self._chunks.popleft()
                if self._reason is not None:
                    return None
            if not self._run():
                with self._changed:
                    if (not self._chunks or self._listener is not None) and self._reason is None:
                        self._changed.wait(_LONGEST_WAIT)

    def listen(self, callback: Callable[[Chunk | None], None]) -> None:
        """Pass the chunks to a callback instead of an iterator.

        The callback gets each chunk once, in order, and then None.

        For the chunks that already exist, the callback is called in the calling thread. For later chunks, the
        callback is called in the engine's thread, which waits until the callback returns. So the callback
        must return quickly, as `loop.call_soon_threadsafe(...)` does. If the callback raises an exception,
        the request is cancelled, and a warning reports the exception. The callback must not close the engine
        or wait for another answer.

        Raises:
            RuntimeError: the ticket has a listener already.
        """
        with self._changed:
            if self._listener is not None:
                raise RuntimeError("Ticket.listen: the ticket has a listener already")
            self._listener = callback
            if self._reason is not None:
                self._chunks.append(None)
        self._pass_chunks()

    def text(self) -> str:
        """Wait for the end of the answer, and return the whole text. If the request has failed, raise the
        exception `error`."""
        return "".join(chunk.text for chunk in self)

    # ---- the engine's side ----

    def put(self, chunk: Chunk, usage: Usage) -> None:
        """Add a chunk for the client. Only the engine calls this method."""
        with self._changed:
            self._usage = usage
            self._chunks.append(chunk)
            self._changed.notify_all()
        self._pass_chunks()

    def end(self, reason: str, usage: Usage, error: BaseException | None = None) -> None:
        """End the request, and release the references to the engine. Only the engine calls this method."""
        with self._changed:
            self._usage, self._error, self._reason = usage, error, reason
            self._run, self._cancel = _no_round, _ignore
            if self._listener is not None:
                self._chunks.append(None)
            self._changed.notify_all()
        self._pass_chunks()

    def _pass_chunks(self) -> None:
        """Pass the chunks to the listener.

        This method does not hold the lock while it calls the listener: the listener may have to wait for
        another thread that needs the lock. Only one thread at a time passes chunks, so that the chunks keep
        their order.
        """
        while True:
            with self._changed:
                listener = self._listener
                if listener is None or self._is_passing or not self._chunks:
                    return
                chunk, self._is_passing = self._chunks.popleft(), True
            try:
                listener(chunk)
            except KeyboardInterrupt:
                raise
            except BaseException as error:
                self._leave_out(error)
            finally:
                with self._changed:
                    self._is_passing = False
                    if chunk is None:  # the listener is not needed any more
                        self._listener = _ignore

    def _leave_out(self, error: BaseException) -> None:
        """Drop the listener, which has failed, and cancel the request."""
        self._listener = _ignore
        self.cancel()
        with contextlib.suppress(Warning):  # if warnings are errors, the other requests must go on
            warn_user(
                f"Engine: a ticket's listener failed and is not called again: {type(error).__name__}: {error}"
            )


def _ignore(value: object) -> None:
    """Do nothing. This function replaces the `cancel` of an ended request, and a listener that must not be
    called again."""


def _no_round() -> bool:
    """Return False. When a request has ended, this function replaces the `run` of its ticket."""
    return False
