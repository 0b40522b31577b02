#!/usr/bin/env python3
"""Make the headers of Pyodide's Python from those of the Python that runs this.

Usage: python3.12 headers.py SYSCONFIGDATA DIRECTORY

Python's headers are the same on all systems, except for pyconfig.h. Pyodide does not publish its pyconfig.h,
but its SYSCONFIGDATA (_sysconfigdata*.py) has the value of each macro.
"""

import re
import runpy
import shutil
import sys
import sysconfig
from pathlib import Path

MACRO = re.compile(r"(?:#define (\w+)\b.*|/\* #undef (\w+) \*/)")
ALWAYS_DEFINED = ("SIZEOF_", "ALIGNOF_")


def line_for(line: str, values: dict[str, object]) -> str:
    """The line of pyconfig.h with the value that Pyodide has. Text has the same value everywhere."""
    found = MACRO.fullmatch(line)
    name = found and (found[1] or found[2])
    if not name or not isinstance(values.get(name), int):
        return line
    if values[name] == 0 and not name.startswith(ALWAYS_DEFINED):
        return f"/* #undef {name} */"
    return f"#define {name} {values[name]}"


def main() -> None:
    data, directory = sys.argv[1], Path(sys.argv[2])
    values = runpy.run_path(data)["build_time_vars"]
    source = Path(sysconfig.get_path("include"))
    if values["VERSION"] != sysconfig.get_python_version():
        sys.exit(f"Python is {sysconfig.get_python_version()}, expected {values['VERSION']}")
    shutil.copytree(source, directory, dirs_exist_ok=True)
    lines = (source / "pyconfig.h").read_text(encoding="utf-8").splitlines()
    text = "".join(f"{line_for(line, values)}\n" for line in lines)
    (directory / "pyconfig.h").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
