"""The machine that a program runs on, in the words of a bug report or a log."""

import functools
import platform
from pathlib import Path

from nplora import _core

_CPU_INFO = Path("/proc/cpuinfo")
_KEYS = ("model name", "Model", "Hardware")  # the first is x86-64's; some ARM boards have one of the others


def machine() -> dict[str, str | int]:
    """The instruction set in use, the number of threads, and the processor's name."""
    return {"isa": _core.config()["isa"], "threads": _core.get_num_threads(), "cpu": cpu_name()}


@functools.cache
def cpu_name() -> str:
    """The name of the processor, such as "AMD EPYC 9B45"; the architecture if the system does not name it."""
    try:
        lines = _CPU_INFO.read_text(errors="replace").splitlines()
    except OSError:
        lines = []
    named = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    found = next((named[key] for key in _KEYS if named.get(key)), "")
    return " ".join(found.split()) or platform.processor() or platform.machine()
