"""Describes the machine, for bug reports and logs."""

import functools
import platform
from pathlib import Path

from nplora import _core

_CPU_INFO = Path("/proc/cpuinfo")
_KEYS = ("model name", "Model", "Hardware")  # x86-64 has the first; some ARM boards have one of the others


def machine() -> dict[str, str | int]:
    """The instruction set in use, the number of threads, and the processor's name."""
    return {"isa": _core.config()["isa"], "threads": _core.get_num_threads(), "cpu": cpu_name()}


def has_bfloat16_instructions() -> bool:
    """Whether products in bfloat16 are faster than in float32 with the instruction set in use."""
    return _core.config()["isa"] in ("avx512bf16", "amx", "neonbf16", "neoni8mm")


@functools.cache
def cpu_name() -> str:
    """The processor's name, such as "AMD EPYC 9B45", or its architecture if the system gives no name."""
    try:
        lines = _CPU_INFO.read_text(errors="replace").splitlines()
    except OSError:
        lines = []
    named = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    found = next((named[key] for key in _KEYS if named.get(key)), "")
    return " ".join(found.split()) or platform.processor() or platform.machine()
