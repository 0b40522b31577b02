"""Makes the changes that a guide describes: python scripts/apply_guide.py GUIDE.md TREE

A code block that follows <!-- file: PATH --> becomes that file. One that follows <!-- change: PATH --> changes
it: lines with - or a space in front must be there once, one after the other, and become those with + or a space.
CI tests docs/add-a-block-format.md so.
"""

import argparse
import re
from pathlib import Path

STEP = re.compile(r"^<!-- (file|change): (\S+) -->\n```\w+\n(.*?)^```$", flags=re.MULTILINE | re.DOTALL)


def changed(text: str, change: str) -> str:
    """The text after a change. Raises ValueError where the old lines are not there exactly once."""
    lines = change.splitlines(keepends=True)
    old = "".join(line[1:] for line in lines if line[0] in " -")
    new = "".join(line[1:] for line in lines if line[0] in " +")
    if text.count(old) != 1:
        raise ValueError(f"expected once, found {text.count(old)} times:\n{old}")
    return text.replace(old, new)


def apply(guide: Path, tree: Path) -> list[str]:
    """Make every change of a guide; the paths of the files, in order."""
    steps = STEP.findall(guide.read_text())
    for kind, path, block in steps:
        file = tree / path
        if kind == "file":
            file.write_text(block)
        else:
            file.write_text(changed(file.read_text(), block))
    return [path for _, path, _ in steps]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("guide", type=Path)
    parser.add_argument("tree", type=Path)
    options = parser.parse_args()
    for name in apply(options.guide, options.tree):
        print(f"{options.guide.name}: {name}")
