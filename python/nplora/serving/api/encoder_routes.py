"""The routes of encoders: /v1/embeddings and /v1/classify."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

from numpy.typing import NDArray

from nplora.serving.api.bodies import Body, unless_disconnected
from nplora.serving.api.encoder_request import EncoderReader, EncoderRequest
from nplora.serving.api.service import EncoderService
from nplora.serving.api.submitting import refusal, submitted
from nplora.serving.jobs.shapes import Shape
from nplora.serving.request_error import RequestError

Rows = NDArray[Any]
Read = Callable[[EncoderReader, object], EncoderRequest]
Make = Callable[[EncoderRequest, Rows], Shape]


async def embeddings(service: EncoderService, body: Body, client: str) -> Any:
    """POST /v1/embeddings"""
    return await _answer(service, body, client, EncoderReader.embeddings, EncoderRequest.embeddings)


async def classify(service: EncoderService, body: Body, client: str) -> Any:
    """POST /v1/classify, as in vLLM"""
    return await _answer(service, body, client, EncoderReader.classes, EncoderRequest.classes)


async def _answer(service: EncoderService, body: Body, client: str, read: Read, make: Make) -> Any:
    from starlette.responses import JSONResponse

    request, future = await _submitted(service, body, client, read)
    answer = FutureAnswer(future, service.timeout)
    service.follow(answer)
    rows = await unless_disconnected(body.receive, answer.rows())
    return await service.in_thread(lambda: JSONResponse(make(request, rows)))


async def _submitted(
    service: EncoderService, body: Body, client: str, read: Read
) -> tuple[EncoderRequest, Future[Rows]]:
    """Read and submit a request. The texts stay in memory only if a classifier labels their words."""
    values = await body.json()

    def submit() -> tuple[EncoderRequest, Future[Rows]]:
        return submitted(lambda: _submit_once(service, values, client, read))

    return await service.in_thread(submit)


def _submit_once(
    service: EncoderService, values: object, client: str, read: Read
) -> tuple[EncoderRequest, Future[Rows]]:
    request = read(service.reader, values)
    try:
        future = service.engine.submit(
            request.ids,
            model=request.model,
            classes=request.classifier is not None,
            normalize=request.normalize,
            client=client,
            held=0 if request.sentences is None else request.sentences.nbytes,
        )
    except (ValueError, RuntimeError) as error:
        raise refusal(error) from error
    return request, future


class FutureAnswer:
    """The answer to one HTTP request.

    Args:
        timeout: seconds after which the answer is cancelled.
    """

    def __init__(self, future: Future[Rows], timeout: float) -> None:
        self._future, self._timeout = future, timeout

    def stop(self) -> None:
        """End the answer now, because the server shuts down. A running `rows` raises an error at once."""
        self._future.cancel()

    async def rows(self) -> Rows:
        """Wait for the computed rows.

        Raises:
            RequestError: the answer took too long, or the server is shutting down.
        """
        done = asyncio.wrap_future(self._future)
        try:
            await asyncio.wait({done}, timeout=self._timeout)
            if not done.done():
                raise RequestError(
                    f"the answer was not complete after {self._timeout:g} s", 504, code="timeout"
                )
            if done.cancelled():
                raise RequestError("the server is shutting down", 503, code="shutting_down")
            return done.result()
        finally:
            self._future.cancel()
