"""Commands, run as a user runs them."""

import subprocess
import sys
from typing import Any


def command(*arguments: object, **more: Any) -> subprocess.CompletedProcess[str]:
    """`nplora` with these arguments in a process of its own."""
    line = [sys.executable, "-m", "nplora", *map(str, arguments)]
    return subprocess.run(line, capture_output=True, text=True, **more)
