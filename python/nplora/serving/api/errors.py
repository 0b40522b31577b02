"""Turns exceptions into the errors that clients see."""

from __future__ import annotations

import sys
import traceback

from nplora.formats.errors import CorruptError
from nplora.runtime.stderr import stderr
from nplora.serving.engine import QueueFullError
from nplora.serving.jobs.job_error import is_disk_full
from nplora.serving.request_error import RequestError


def as_request_error(error: BaseException) -> RequestError:
    """The error that a client sees. An unexpected exception is also written to stderr."""
    if isinstance(error, RequestError):
        return error
    if isinstance(error, QueueFullError):
        reason = str(error).partition(": ")[2]  # without the name of the method
        return RequestError(f"the server is busy: {reason}", 429, code="queue_full")
    if is_disk_full(error):
        return RequestError("the server's disk is full", 507, code="disk_full")
    if isinstance(error, MemoryError):
        return RequestError("the server has too little memory for this request", 503, code="out_of_memory")
    if isinstance(
        error, FloatingPointError | CorruptError
    ):  # the model's scores are NaN, or the model's file has changed
        return RequestError(str(error), 500, code="model_error")
    traceback.print_exception(error, file=stderr if sys.stderr is None else sys.stderr)
    return RequestError("the server failed; its log has the reason", 500, code="internal_error")
