"""The routes that generate text: /v1/chat/completions and /v1/completions."""

from __future__ import annotations

import contextlib
import json
from collections.abc import AsyncIterator, Callable
from typing import Any

from nplora.lm import LanguageModel
from nplora.serving.api.answers import AnswerObjects, ChatObjects, CompletionObjects
from nplora.serving.api.bodies import Body, unless_disconnected
from nplora.serving.api.errors import as_request_error
from nplora.serving.api.service import TextService
from nplora.serving.api.submitting import refusal, submitted
from nplora.serving.api.text_request import Reader, TextRequest
from nplora.serving.api.ticket_stream import TicketStream
from nplora.serving.memory import PROMPT_TOKEN, WAITING
from nplora.serving.request_error import RequestError
from nplora.serving.ticket import Chunk, Ticket

# A stream that has nothing else to send sends a comment at this interval, to detect that the client is gone.
_PING_SECONDS = 10.0
_SSE_HEADERS = {"cache-control": "no-cache", "x-accel-buffering": "no"}

Read = Callable[[Reader, object], tuple[LanguageModel, TextRequest]]


async def chat(service: TextService, body: Body, client: str) -> Any:
    """POST /v1/chat/completions"""
    return await _answer(service, body, client, Reader.chat, ChatObjects)


async def completion(service: TextService, body: Body, client: str) -> Any:
    """POST /v1/completions"""
    return await _answer(service, body, client, Reader.completion, CompletionObjects)


async def _answer(
    service: TextService, body: Body, client: str, read: Read, shape: type[AnswerObjects]
) -> Any:
    from starlette.responses import JSONResponse

    values = await body.json()
    request, tickets = await service.in_thread(_submit, service, values, client, read)
    answers = TicketStream(tickets, service.timeout)
    service.follow(answers)
    try:
        made = shape(request, tickets)
        if request.stream:
            return _stream(made, answers)
        chunks = await unless_disconnected(body.receive, _collect(answers))
        return JSONResponse(made.whole(chunks))
    except BaseException:
        answers.cancel()
        raise


def _submit(
    service: TextService, values: object, client: str, read: Read
) -> tuple[TextRequest, list[Ticket]]:
    """Read a request, and submit it to the engine once for each wanted answer.

    If an error occurs, the answers for which the request was already submitted are cancelled.
    """
    return submitted(lambda: _submit_once(service, values, client, read))


def _submit_once(
    service: TextService, values: object, client: str, read: Read
) -> tuple[TextRequest, list[Ticket]]:
    lm, request = read(service.reader, values)
    wanted, most = len(request.prompts) * request.n, service.engine.most_requests
    param = "n" if request.n > 1 else "prompt"
    if wanted > most:
        message = f"the request wants {wanted} answers, but this server's queue has room for {most}"
        raise RequestError(message, param=param, code="invalid_value")
    tokens = request.n * sum(map(len, request.prompts))
    if wanted > 1 and tokens * PROMPT_TOKEN > WAITING:
        message = (
            f"the prompts of the {wanted} answers have {tokens:,} tokens, but this server accepts at most "
            f"{WAITING // PROMPT_TOKEN:,} at a time"
        )
        raise RequestError(message, param=param, code="invalid_value")
    tickets = list[Ticket]()
    try:
        for ids in request.prompts:
            for index in range(request.n):
                ticket = service.engine.submit(
                    ids,
                    request.sampling,
                    adapter=lm,
                    logprobs=request.logprobs,
                    client=client,
                    index=index,
                    guide=service.reader.guide(lm, request),
                )
                tickets.append(ticket)
    except BaseException as error:
        for ticket in tickets:
            ticket.cancel()
        raise refusal(error) from error
    return request, tickets


async def _collect(answers: TicketStream) -> list[list[Chunk]]:
    """Wait until all answers have ended. Return one list of chunks for each answer."""
    chunks: list[list[Chunk]] = [[] for _ in answers.tickets]
    async for found in answers.follow():
        if found is not None and found[1] is not None:
            chunks[found[0]].append(found[1])
    return chunks


def _stream(made: AnswerObjects, answers: TicketStream) -> Any:
    """The response that sends the answers as server-sent events."""
    from starlette.responses import StreamingResponse

    class EventStream(StreamingResponse):  # type: ignore[misc, unused-ignore]
        async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
            try:
                await super().__call__(scope, receive, send)
            finally:  # also if the client has left
                answers.cancel()

    return EventStream(_events(made, answers), media_type="text/event-stream", headers=_SSE_HEADERS)


async def _events(made: AnswerObjects, answers: TicketStream) -> AsyncIterator[str]:
    try:
        for piece in made.first():
            yield _event(piece)
        async with contextlib.aclosing(answers.follow(_PING_SECONDS)) as following:
            async for found in following:
                if found is None:
                    yield ": waiting\n\n"
                    continue
                index, chunk = found
                for piece in made.end(index) if chunk is None else made.piece(index, chunk):
                    yield _event(piece)
        for piece in made.last():
            yield _event(piece)
        yield "data: [DONE]\n\n"
    except Exception as error:
        yield _event(as_request_error(error).body())


def _event(value: Any) -> str:
    return f"data: {json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(',', ':'))}\n\n"
