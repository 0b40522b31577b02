"""Check that a release has one version: in pyproject.toml, CMakeLists.txt, CHANGELOG.md and the tag.

Usage: python scripts/check_release.py

The tag is that of GitHub's variable GITHUB_REF, if it is a tag.
"""

import os
import re
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[1]


def versions() -> dict[str, str]:
    """The version that each place names."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    cmake = re.search(r"project\(nplora VERSION (\S+)", (ROOT / "CMakeLists.txt").read_text())
    found = {"pyproject.toml": str(project["version"]), "CMakeLists.txt": cmake[1] if cmake else "none"}
    tag = re.fullmatch(r"refs/tags/v(.+)", os.environ.get("GITHUB_REF", ""))
    if tag:
        found["tag"] = tag[1]
        heading = re.search(r"(?m)^## \[?(\d[^\s\]]*)", (ROOT / "CHANGELOG.md").read_text())
        found["CHANGELOG.md"] = heading[1] if heading else "none"
    return found


def main() -> None:
    found = versions()
    print(", ".join(f"{place}: {version}" for place, version in found.items()))
    if len(set(found.values())) > 1:
        sys.exit("a release has one version")


if __name__ == "__main__":
    main()
