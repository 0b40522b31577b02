"""Submits requests to the engine, and turns the errors of `submit` into the errors that clients see."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from nplora.serving.request_error import RequestError

T = TypeVar("T")

_ATTEMPTS = 3


def submitted(submit: Callable[[], T]) -> T:
    """Read a request and submit it to the engine.

    An adapter may be unloaded between the reading of a request and its submission. The request is then read
    again. If no adapter has this name any more, the second reading raises an error for the client.

    Args:
        submit: a function that reads the request and submits it to the engine. The function
            raises KeyError if the adapter was unloaded after the request was read.
    """
    for _ in range(_ATTEMPTS):
        try:
            return submit()
        except KeyError as error:
            missing = error
    message = "the adapter of the request was unloaded several times; try again in a moment"
    raise RequestError(message, 503, code="adapter_unloaded") from missing


def refusal(error: BaseException) -> BaseException:
    """Return the error that the client sees for an error of an engine's `submit`."""
    if isinstance(error, ValueError):
        return RequestError(str(error), code="invalid_value")
    if type(error) is RuntimeError:
        return RequestError("the server is shutting down", 503, code="shutting_down")
    return error
