#!/usr/bin/env python3
"""Print requirements of pyproject.toml, one per line, in the form of `pip install -r`.

Usage: python3 scripts/requirements.py KIND...

KIND is build, to compile nplora; run, to import it; or test, for the tests that release.yml runs with most
wheels.
"""

import sys
import tomllib
from pathlib import Path


def requirements(kind: str) -> list[str]:
    settings = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text(encoding="utf-8"))
    if kind == "build":
        return settings["build-system"]["requires"]
    if kind == "run":
        return settings["project"]["dependencies"]
    if kind == "test":
        return settings["tool"]["cibuildwheel"]["test-requires"]
    raise ValueError(f"{kind}: expected build, run or test")


if __name__ == "__main__":
    if not sys.argv[1:]:
        sys.exit(__doc__)
    print(*(line for kind in sys.argv[1:] for line in requirements(kind)), sep="\n")
