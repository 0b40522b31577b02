"""The time of `import nplora` compared with `import numpy`, and the size of a wheel."""

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

WANTED_SECONDS, WANTED_BYTES = 0.050, 3_000_000
STATEMENTS = {"numpy": "import numpy", "nplora": "import numpy, nplora"}


def interpreter_seconds(statement: str, compiled: str) -> float:
    """The wall time of a new interpreter that runs `statement`.

    Its compiled modules are in the directory `compiled`, as pip leaves them beside an installed package. In a
    checkout, PYTHONDONTWRITEBYTECODE would make each interpreter compile all modules again.
    """
    environment = {**os.environ, "PYTHONPYCACHEPREFIX": compiled, "PYTHONDONTWRITEBYTECODE": ""}
    start = time.perf_counter()
    subprocess.run([sys.executable, "-c", statement], check=True, env=environment)
    return time.perf_counter() - start


def run(quick: bool) -> dict[str, Any]:
    """Print the medians of interleaved new interpreters, and return the figures."""
    turns: dict[str, list[float]] = {name: [] for name in STATEMENTS}
    with tempfile.TemporaryDirectory() as compiled:
        for turn in range(6 if quick else 21):
            for name, statement in STATEMENTS.items():
                seconds = interpreter_seconds(statement, compiled)
                if turn > 0:  # the first turn compiles, and fills the page cache
                    turns[name].append(seconds)
    medians = {name: median(seconds) for name, seconds in turns.items()}
    over = medians["nplora"] - medians["numpy"]
    verdict = f"wanted at most {WANTED_SECONDS * 1e3:.0f}: {'met' if over <= WANTED_SECONDS else 'MISSED'}"
    print(f"\nimport in new interpreters, median of {len(turns['numpy'])}")
    for name, seconds in medians.items():
        print(f"  import {name:15}{seconds * 1e3:9.1f} ms")
    print(f"  nplora above numpy    {over * 1e3:9.1f} ms ({verdict})")
    print(f"  ratio: {medians['nplora'] / medians['numpy']:.2f} times import numpy")
    return {"seconds": medians, "over": over}


def run_wheel(wheel: Path) -> dict[str, Any]:
    """Print the wheel's size and its limit, and return the bytes."""
    size = wheel.stat().st_size
    verdict = f"wanted at most {WANTED_BYTES / 1e6:.0f}: {'met' if size <= WANTED_BYTES else 'MISSED'}"
    print(f"\nwheel {wheel.name}")
    print(f"  {size / 1e6:.2f} MB ({verdict})")
    print(f"  ratio: {size / WANTED_BYTES:.2f} of the limit")
    return {"wheel": wheel.name, "bytes": size}
