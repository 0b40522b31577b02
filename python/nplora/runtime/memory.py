"""The largest memory of this process."""

import re
import resource
from pathlib import Path

_STATUS = Path("/proc/self/status")
_KIBIBYTE = 1024


def peak_memory() -> int:
    """The peak memory of this process in bytes, including mapped files.

    `getrusage` is only the fallback: in a child process, its peak begins at the peak of the parent.

    >>> from nplora.runtime.memory import peak_memory
    >>> peak_memory() > 1e6
    True
    """
    try:
        found = re.search(r"(?m)^VmHWM:\s*(\d+) kB$", _STATUS.read_text(errors="replace"))
    except OSError:  # not Linux
        found = None
    return int(found[1]) * _KIBIBYTE if found else largest_memory()


def largest_memory() -> int:
    """The peak memory in bytes that `getrusage` reports."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * _KIBIBYTE
