"""Memory and CPU time as the system counts them."""

import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from nplora.platform import host, memory


@pytest.mark.parametrize(("system", "unit"), [("linux", 1024), ("darwin", 1)])
def test_macos_counts_the_peak_in_bytes_and_linux_in_kibibytes(
    system: str, unit: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The manual pages of getrusage(2) say so."""
    import resource

    monkeypatch.setattr(sys, "platform", system)
    monkeypatch.setattr(resource, "getrusage", lambda who: SimpleNamespace(ru_maxrss=5000))
    assert memory.largest_memory() == 5000 * unit


def test_the_use_of_a_process_is_what_the_system_says() -> None:
    size, seconds = memory.usage_of(os.getpid()) or (0, -1.0)
    mapped = re.search(r"VmSize:\s*(\d+) kB", Path("/proc/self/status").read_text(encoding="utf-8"))
    assert mapped is not None
    assert size == pytest.approx(int(mapped[1]) * 1024, rel=0.01)
    times = os.times()
    assert seconds == pytest.approx(times.user + times.system, abs=0.1)


def test_the_cores_are_those_that_the_process_may_use() -> None:
    usable = os.sched_getaffinity(0)
    code = (
        "import os; core = min(os.sched_getaffinity(0)); os.sched_setaffinity(0, {core})\n"
        "from nplora.platform import host; print(host.usable_cores() == {core})"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "True"
    assert len(host.usable_cores()) == len(usable)
