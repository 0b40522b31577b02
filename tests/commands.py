"""Runs commands as a user does."""

import subprocess
import sys
from typing import Any


def command(*arguments: object, **more: Any) -> subprocess.CompletedProcess[str]:
    """Run `nplora` with these arguments in its own process."""
    line = [sys.executable, "-m", "nplora", *map(str, arguments)]
    return subprocess.run(line, capture_output=True, encoding="utf-8", **more)
