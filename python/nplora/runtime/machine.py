"""Describes the machine for bug reports and logs."""

import functools

from nplora import _core
from nplora.platform import host


def machine() -> dict[str, str | int]:
    """The instruction set in use, the number of threads, and the processor's name."""
    return {"isa": _core.config()["isa"], "threads": _core.get_num_threads(), "cpu": cpu_name()}


def has_bfloat16_instructions() -> bool:
    """Whether the instruction set in use computes products faster in bfloat16 than in float32."""
    return _core.config()["isa"] in ("avx512bf16", "amx", "neonbf16", "neoni8mm")


@functools.cache
def cpu_name() -> str:
    """The processor's name, such as "AMD EPYC 9B45", or its architecture if the system gives no name."""
    return host.cpu_name()
