"""Submits requests to the engine, and turns the errors of `submit` into those that clients see."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from nplora.serving.request_error import RequestError

T = TypeVar("T")

_ATTEMPTS = 3


def submitted(submit: Callable[[], T]) -> T:
    """Read a request and submit it.

    If the adapter is unloaded in between, the request is read again. After that, the request is refused, or
    uses another adapter that now has the same name.

    Args:
        submit: raises KeyError if the adapter was unloaded.
    """
    for _ in range(_ATTEMPTS):
        try:
            return submit()
        except KeyError as error:
            missing = error
    message = "the adapter of the request was unloaded several times; try again in a moment"
    raise RequestError(message, 503, code="adapter_unloaded") from missing


def refusal(error: BaseException) -> BaseException:
    """Turn an error of an engine's `submit` into the one that the client sees."""
    if isinstance(error, ValueError):
        return RequestError(str(error), code="invalid_value")
    if type(error) is RuntimeError:
        return RequestError("the server is shutting down", 503, code="shutting_down")
    return error
