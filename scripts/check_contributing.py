"""Runs the commands of CONTRIBUTING.md, as a newcomer would: in a fresh clone, in one shell, in order.

    python scripts/check_contributing.py [--keep DIRECTORY]

Every ```sh block runs, except those under <!-- not run: REASON -->. The script prints each command, and the
seconds that each block took. The first command that fails ends the script.
"""

import argparse
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
BLOCK = re.compile(r"^(<!-- not run: [^\n]+ -->\n)?```sh\n(.*?)^```$", flags=re.MULTILINE | re.DOTALL)
FENCE = re.compile(r"^```sh$", flags=re.MULTILINE)
MARK = "----- nplora check_contributing"


class Block(NamedTuple):
    commands: str
    runs: bool


def blocks() -> list[Block]:
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    text = re.sub(r"^ {3}", "", text, flags=re.MULTILINE)  # in lists, too
    found = [Block(commands, not_run == "") for not_run, commands in BLOCK.findall(text)]
    if len(found) != len(FENCE.findall(text)):
        raise ValueError("CONTRIBUTING.md: a block of shell commands is not closed")
    return found


def clone(directory: Path) -> Path:
    """The last commit, with the changes of tracked files since."""
    tree = directory / "nplora"
    subprocess.run(["git", "clone", "--quiet", str(ROOT), str(tree)], check=True)
    changes = subprocess.run(["git", "diff", "HEAD", "--binary"], cwd=ROOT, check=True, capture_output=True)
    if changes.stdout:
        subprocess.run(["git", "apply", "-"], cwd=tree, input=changes.stdout, check=True)
    return tree


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--keep", type=Path, help="clone into this directory, which stays")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="contributing-") as temporary:
        return run(clone(options.keep or Path(temporary)))


def run(tree: Path) -> int:
    """One shell for all blocks, so that the environment that a block activates serves the next."""
    wanted = [block.commands for block in blocks() if block.runs]
    script = "".join(f"{commands}echo '{MARK} {i}'\n" for i, commands in enumerate(wanted))
    shell = subprocess.Popen(
        ["bash", "-e", "-o", "pipefail", "-c", script],
        cwd=tree,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert shell.stdout is not None
    done, begin = 0, time.monotonic()
    print("".join(f"$ {line}\n" for line in wanted[0].splitlines()), end="", flush=True)
    for line in shell.stdout:
        if not line.startswith(MARK):
            print(line, end="", flush=True)
            continue
        print(f"--- {time.monotonic() - begin:.0f} s\n", flush=True)
        done, begin = done + 1, time.monotonic()
        if done < len(wanted):
            print("".join(f"$ {line}\n" for line in wanted[done].splitlines()), end="", flush=True)
    status = shell.wait()
    print(f"{done} of {len(wanted)} blocks of CONTRIBUTING.md ran")
    print(f"{done} passed, {int(status != 0)} failed")
    return int(status != 0)


if __name__ == "__main__":
    sys.exit(main())
