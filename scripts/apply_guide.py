"""Makes the changes that a guide describes: python scripts/apply_guide.py GUIDE.md TREE

A code block below the comment <!-- file: PATH --> becomes that file. A block below <!-- change: PATH -->
changes a file: its lines that begin with - or a space must be there exactly once, one after the other. They
are replaced by its lines that begin with + or a space. If the tree has a file or a change already, nothing
is written. CI tests docs/add-a-block-format.md with this script.
"""

import argparse
import re
import sys
from pathlib import Path

STEP = re.compile(r"^<!-- (file|change): (\S+) -->\n```\w+\n(.*?)^```$", flags=re.MULTILINE | re.DOTALL)


def changed(text: str, change: str) -> str:
    """The text after a change.

    Raises ValueError where the old lines are not there exactly once, or where the change is already made.
    """
    lines = change.splitlines(keepends=True)
    old = "".join(line[1:] for line in lines if line[0] in " -")
    new = "".join(line[1:] for line in lines if line[0] in " +")
    if new in text and (old in new or old not in text):
        raise ValueError(f"the change is already made:\n{new}")
    if text.count(old) != 1:
        raise ValueError(f"expected once, found {text.count(old)} times:\n{old}")
    return text.replace(old, new)


def apply(guide: Path, tree: Path) -> list[str]:
    """Make every change of a guide; the paths of the files, in order."""
    steps = STEP.findall(guide.read_text())
    texts: dict[Path, str] = {}
    for kind, path, block in steps:
        file = tree / path
        try:
            if kind == "change":
                texts[file] = changed(texts[file] if file in texts else file.read_text(), block)
            elif file.exists():
                raise ValueError("the file is already there")
            else:
                texts[file] = block
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None
    for file, text in texts.items():
        file.write_text(text)
    return [path for _, path, _ in steps]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("guide", type=Path)
    parser.add_argument("tree", type=Path)
    options = parser.parse_args()
    try:
        names = apply(options.guide, options.tree)
    except ValueError as error:
        sys.exit(f"{options.guide.name}: {error}")
    for name in names:
        print(f"{options.guide.name}: {name}")
