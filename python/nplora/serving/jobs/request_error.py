"""RequestError: a request that cannot be carried out, in the terms of OpenAI's API."""

from __future__ import annotations


class RequestError(Exception):
    """A request is wrong, or cannot be carried out now.

    Attributes:
        status: the HTTP status: 400 (a wrong value), 404 (an unknown id), 409 (not in this state), 413 (too
            large) or 507 (the disk is full).
        param: the name of the field that is wrong, or None.
        code: a word for programs, such as "invalid_value", or None.

    >>> from nplora.serving.jobs import RequestError
    >>> raise RequestError("suffix is 5, expected a text", param="suffix", code="invalid_type")
    Traceback (most recent call last):
    nplora.serving.jobs.request_error.RequestError: suffix is 5, expected a text
    """

    def __init__(
        self, message: str, status: int = 400, param: str | None = None, code: str | None = None
    ) -> None:
        super().__init__(message)
        self.status, self.param, self.code = status, param, code
