"""RequestError: the error of a request, with the fields of OpenAI's error object."""

from __future__ import annotations

from typing import Any

_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    429: "rate_limit_error",
}


class RequestError(Exception):
    """Raised for a request that is wrong or cannot be carried out now. The client gets the error as JSON.

    Attributes:
        status: the HTTP status.
        param: the name of the field that is wrong, or None.
        code: a machine-readable word such as "invalid_value", or None.

    >>> from nplora.serving.request_error import RequestError
    >>> error = RequestError("n is 0, expected at least 1", param="n", code="invalid_value")
    >>> error.body()["error"]["type"]
    'invalid_request_error'
    """

    def __init__(
        self, message: str, status: int = 400, param: str | None = None, code: str | None = None
    ) -> None:
        super().__init__(message)
        self.status, self.param, self.code = status, param, code

    def body(self) -> dict[str, Any]:
        """OpenAI's error object."""
        kind = _TYPES.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        return {
            "error": {"message": str(self), "type": kind, "param": self.param, "code": self.code},
        }
