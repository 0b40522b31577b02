"""The header of a run's log: the model, the data, the command, the version and the machine."""

import datetime
import sys
from typing import Any

from nplora import _core
from nplora.nn.module import Module
from nplora.platform import processes
from nplora.runtime.machine import machine
from nplora.trainer.batches import Batches

HEADER = "header"  # the event of the log's first line

_MOST = 4000  # the most characters of a text, so that a line of the log stays short


def log_header(model: Module, batches: Batches, validation: Batches | None) -> dict[str, Any]:
    """Make the log record that describes a run. A run logs this record when it begins and when it is resumed.

    "command" is the command line that started this process. In a notebook, this process is the kernel. "data"
    and "valid" describe the training and the validation data and their batches.
    """
    return {
        "nplora": str(_core.config()["version"]),
        "date": datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
        "command": _text(processes.command_line(sys.orig_argv)),
        "model": _text(_shown(model)),
        "data": _summary(batches),
        "valid": None if validation is None else _summary(validation),
        "machine": machine(),
    }


def _shown(model: Module) -> str:
    """The model's `repr`, or the name of its class if a user's `__repr__` fails."""
    try:
        return repr(model)
    except Exception:
        return type(model).__name__


def _summary(batches: Batches) -> dict[str, Any]:
    """The description of the batches, and the number of batches in an epoch."""
    summary: dict[str, Any] = getattr(batches, "log_summary", dict)()
    shown = {name: _text(value) if isinstance(value, str) else value for name, value in summary.items()}
    return shown | {"batches": batches.length}


def _text(text: str) -> str:
    """Shorten a text; replace characters that UTF-8 cannot encode, which some file names contain."""
    cut = text if len(text) <= _MOST else f"{text[:_MOST]}…"
    return cut.encode(errors="replace").decode()
