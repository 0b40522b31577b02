"""How a request is given to the engine, and which error its client sees if that fails."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from nplora.serving.request_error import RequestError

T = TypeVar("T")

_ATTEMPTS = 3


def submitted(submit: Callable[[], T]) -> T:
    """Read a request and submit it.

    If its adapter is unloaded meanwhile, the request is read again: then it is refused, or gets another one.

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
    """The error of an engine's `submit` as a client should see it."""
    if isinstance(error, ValueError):
        return RequestError(str(error), code="invalid_value")
    if type(error) is RuntimeError:
        return RequestError("the server is shutting down", 503, code="shutting_down")
    return error
