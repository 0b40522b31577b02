"""Run the blocks of a page as one session: blocks as JSON on standard input, results on standard output.

A block is {"where": ..., "language": "python" or "sh", "text": ...}. Its result is {"printed": ..., "error":
...}. The session stops at the first block that fails. The last result then has its error.
"""

import contextlib
import io
import json
import subprocess
import sys
import traceback
from typing import Any


def main() -> None:
    results: list[dict[str, str]] = []
    names: dict[str, Any] = {"__name__": "__main__"}
    for block in json.load(sys.stdin):
        run = run_python if block["language"] == "python" else run_shell
        results.append(run(block["text"], block["where"], names))
        if results[-1]["error"]:
            break
    print(json.dumps(results))


def run_python(text: str, where: str, names: dict[str, Any]) -> dict[str, str]:
    error = ""
    with contextlib.redirect_stdout(io.StringIO()) as out:
        try:
            exec(compile(text, where, "exec"), names)
        except (Exception, SystemExit):
            error = traceback.format_exc()
    return {"printed": out.getvalue(), "error": error}


def run_shell(text: str, where: str, names: dict[str, Any]) -> dict[str, str]:
    run = subprocess.run(
        ["bash", "-e", "-o", "pipefail", "-c", text],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        encoding="utf-8",
        errors="backslashreplace",
    )
    error = f"exit status {run.returncode}\n{run.stdout}" if run.returncode else ""
    return {"printed": run.stdout, "error": error}


if __name__ == "__main__":
    main()
