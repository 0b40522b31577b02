"""Describes the error that ended a job, with the fields of OpenAI's API."""

from __future__ import annotations

import errno
from collections.abc import Mapping
from typing import Any

from nplora.finetuning.planning import BudgetError
from nplora.formats.errors import FormatError
from nplora.nn.losses import NonFiniteLossError
from nplora.serving.request_error import RequestError

_DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_LONGEST = 2000


def is_disk_full(error: BaseException) -> bool:
    """Whether an error means that the disk is full."""
    return isinstance(error, OSError) and error.errno in _DISK_FULL


def job_error(error: Exception, names: Mapping[str, tuple[str, str]]) -> dict[str, Any]:
    """Return OpenAI's description of the error that ended a job: a dict with "code", "message" and "param".

    Args:
        names: a dict from the path of each data file to a pair: the user's name for the file, and the field
            of the request that contains the file's id.
    """
    message, param = str(error) or type(error).__name__, None
    for path, (name, parameter) in names.items():
        if path in message:
            message, param = message.replace(path, name), parameter
    for operation in ("finetune: ", "plan: "):
        message = message.removeprefix(operation)
    if isinstance(error, BudgetError):
        message += (
            ". These sizes are for training alone: the server's --memory must be larger, because requests "
            "need memory too"
        )
    return {"code": _code(error, param), "message": message[:_LONGEST], "param": param}


def _code(error: Exception, param: str | None) -> str:
    if is_disk_full(error):
        return "disk_full"
    if isinstance(error, RequestError) and error.code is not None:
        return error.code
    if isinstance(error, BudgetError | MemoryError):
        return "insufficient_memory"
    if isinstance(error, NonFiniteLossError):
        return "training_diverged"
    if isinstance(error, FormatError):
        return f"invalid_{param}" if param else "invalid_file"
    if isinstance(error, ValueError | TypeError):
        return "invalid_hyperparameters"
    return "server_error"
