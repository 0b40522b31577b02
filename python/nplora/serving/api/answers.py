"""Makes OpenAI's response objects for chats and completions: whole answers, or pieces of a stream."""

from __future__ import annotations

import secrets
import time
from collections.abc import Iterable, Sequence
from typing import Any

from nplora import _core
from nplora.serving.api.text_request import TextRequest
from nplora.serving.api.tool_calls import CallFilter
from nplora.serving.jobs.shapes import Shape
from nplora.serving.ticket import Chunk, Ticket, Token, TopToken

_REPLACEMENT = "\ufffd"


class AnswerObjects:
    """Makes the response objects for one request.

    Args:
        request: the request.
        tickets: for each answer, the engine's `Ticket`. The answers to the first prompt come first.
    """

    objects = "", ""  # the values of the field "object": for a whole answer, for a piece
    prefix = ""

    def __init__(self, request: TextRequest, tickets: Sequence[Ticket]) -> None:
        self.request, self.tickets = request, tickets
        self._id, self._created = f"{self.prefix}-{secrets.token_hex(12)}", int(time.time())
        self._fingerprint = f"nplora-{_core.config()['version']}"

    def object(self, which: int, choices: list[Shape], **more: Any) -> Shape:
        return {
            "id": self._id,
            "created": self._created,
            "object": self.objects[which],
            "model": self.request.model,
            "system_fingerprint": self._fingerprint,
            "choices": choices,
            **more,
        }

    def whole(self, chunks: Sequence[Sequence[Chunk]]) -> Shape:
        """The response object for whole answers. chunks[i] has the chunks of answer i (OpenAI's "choice"
        i)."""
        made = [self.choice(index, found) for index, found in enumerate(chunks)]
        return self.object(0, made, usage=self.usage())

    def usage(self) -> Shape:
        """The numbers of prompt tokens and generated tokens. A prompt is counted only once, even if it has
        several answers."""
        used = [ticket.usage for ticket in self.tickets]
        prompts = used[:: self.request.n]
        prompt, generated = sum(one.prompt for one in prompts), sum(one.generated for one in used)
        return {
            "prompt_tokens": prompt,
            "completion_tokens": generated,
            "total_tokens": prompt + generated,
            "prompt_tokens_details": {"cached_tokens": sum(one.cached for one in prompts)},
        }

    def last(self) -> list[Shape]:
        """The response objects that a stream sends after all choices have ended."""
        return [self.object(1, [], usage=self.usage())] if self.request.usage else []

    def choice(self, index: int, chunks: Sequence[Chunk]) -> Shape:
        raise NotImplementedError

    def first(self) -> list[Shape]:
        """The response objects that a stream sends before any generated text."""
        return []

    def piece(self, index: int, chunk: Chunk) -> list[Shape]:
        """The response objects that a stream sends for one chunk of generated tokens."""
        raise NotImplementedError

    def end(self, index: int) -> list[Shape]:
        """The response objects that a stream sends at the end of a choice."""
        raise NotImplementedError


class ChatObjects(AnswerObjects):
    """The answer to /v1/chat/completions."""

    objects, prefix = ("chat.completion", "chat.completion.chunk"), "chatcmpl"

    def __init__(self, request: TextRequest, tickets: Sequence[Ticket]) -> None:
        super().__init__(request, tickets)
        self._filters = [CallFilter(request.tools) for _ in tickets]

    def choice(self, index: int, chunks: Sequence[Chunk]) -> Shape:
        calls = CallFilter(self.request.tools)
        content = "".join(calls.push(chunk.text) for chunk in chunks)
        rest, called = self._flush(calls)
        content += rest
        message: Shape = {"role": "assistant", "content": content, "refusal": None}
        if called:
            message |= {"content": content.rstrip() or None, "tool_calls": called}
        return {
            "index": index,
            "message": message,
            "logprobs": self._logprobs(token for chunk in chunks for token in chunk.tokens),
            "finish_reason": self._reason(index, bool(called)),
        }

    def _flush(self, calls: CallFilter) -> tuple[str, list[Shape]]:
        rest, called = calls.flush()
        return rest, called[: self.request.most_calls]

    def _reason(self, index: int, called: bool) -> str | None:
        reason = self.tickets[index].finish_reason
        return "tool_calls" if called and reason == "stop" else reason

    def _logprobs(self, tokens: Iterable[Token]) -> Shape | None:
        if self.request.logprobs is None:
            return None
        made = [{**_shown(token), "top_logprobs": [_shown(top) for top in token.top]} for token in tokens]
        return {"content": made, "refusal": None}

    def _delta(self, index: int, delta: Shape, reason: str | None = None, logprobs: Any = None) -> Shape:
        choice = {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": reason}
        return self.object(1, [choice], **({"usage": None} if self.request.usage else {}))

    def first(self) -> list[Shape]:
        head = {"role": "assistant", "content": ""}
        return [self._delta(index, head) for index in range(len(self.tickets))]

    def piece(self, index: int, chunk: Chunk) -> list[Shape]:
        text, logprobs = self._filters[index].push(chunk.text), self._logprobs(chunk.tokens)
        is_empty = not text and not (logprobs and chunk.tokens)
        return [] if is_empty else [self._delta(index, {"content": text}, logprobs=logprobs)]

    def end(self, index: int) -> list[Shape]:
        text, called = self._flush(self._filters[index])
        pieces = [self._delta(index, {"content": text})] if text else []
        if called:
            calls = [{"index": number, **call} for number, call in enumerate(called)]
            pieces.append(self._delta(index, {"tool_calls": calls}))
        return [*pieces, self._delta(index, {}, self._reason(index, bool(called)))]


class CompletionObjects(AnswerObjects):
    """The answer to /v1/completions."""

    objects, prefix = ("text_completion", "text_completion"), "cmpl"

    def __init__(self, request: TextRequest, tickets: Sequence[Ticket]) -> None:
        super().__init__(request, tickets)
        self._offsets = [len(self._echo(index)) for index in range(len(tickets))]

    def _echo(self, index: int) -> str:
        return self.request.texts[index // self.request.n] if self.request.texts else ""

    def choice(self, index: int, chunks: Sequence[Chunk]) -> Shape:
        text = self._echo(index) + "".join(chunk.text for chunk in chunks)
        tokens = [token for chunk in chunks for token in chunk.tokens]
        return self._choice(index, text, self._logprobs(index, tokens), self.tickets[index].finish_reason)

    def _choice(self, index: int, text: str, logprobs: Any, reason: str | None) -> Shape:
        return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": reason}

    def _logprobs(self, index: int, tokens: Iterable[Token]) -> Shape | None:
        if self.request.logprobs is None:
            return None
        made: dict[str, list[Any]] = {
            "tokens": [],
            "token_logprobs": [],
            "top_logprobs": [],
            "text_offset": [],
        }
        for token in tokens:
            made["tokens"].append(token.text)
            made["token_logprobs"].append(token.logprob)
            best = {top.text: top.logprob for top in token.top}
            made["top_logprobs"].append(best | {token.text: token.logprob} if best else {})
            made["text_offset"].append(self._offsets[index])
            self._offsets[index] += len(token.text)
        return made

    def _piece(self, index: int, text: str, logprobs: Any = None, reason: str | None = None) -> Shape:
        usage = {"usage": None} if self.request.usage else {}
        return self.object(1, [self._choice(index, text, logprobs, reason)], **usage)

    def first(self) -> list[Shape]:
        return [
            self._piece(index, self._echo(index)) for index in range(len(self.tickets)) if self._echo(index)
        ]

    def piece(self, index: int, chunk: Chunk) -> list[Shape]:
        logprobs = self._logprobs(index, chunk.tokens)
        is_empty = not chunk.text and not (logprobs and chunk.tokens)
        return [] if is_empty else [self._piece(index, chunk.text, logprobs)]

    def end(self, index: int) -> list[Shape]:
        return [self._piece(index, "", reason=self.tickets[index].finish_reason)]


def _shown(token: Token | TopToken) -> Shape:
    """OpenAI's object for a token. If the token is only a part of a character, its field "bytes" is None."""
    whole = _REPLACEMENT not in token.text
    return {
        "token": token.text,
        "logprob": token.logprob,
        "bytes": list(token.text.encode()) if whole else None,
    }
