"""Submits requests to the engine, and turns the errors of `submit` into the errors that clients see."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from nplora.serving.request_error import RequestError

T = TypeVar("T")

_ATTEMPTS = 3


def submitted(submit: Callable[[], T]) -> T:
    """Read a request and submit it to the engine.

    If the request's adapter is unloaded between reading and submitting, the request is read again. The second
    reading refuses the request, unless a new adapter has the same name.

    Args:
        submit: a function that reads and submits the request, or raises KeyError if the adapter was unloaded.
    """
    for _ in range(_ATTEMPTS):
        try:
            return submit()
        except KeyError as error:
            missing = error
    message = "the adapter of the request was unloaded several times; try again in a moment"
    raise RequestError(message, 503, code="adapter_unloaded") from missing


def refusal(error: BaseException) -> BaseException:
    """Turn an error of an engine's `submit` into the error that the client sees."""
    if isinstance(error, ValueError):
        return RequestError(str(error), code="invalid_value")
    if type(error) is RuntimeError:
        return RequestError("the server is shutting down", 503, code="shutting_down")
    return error
