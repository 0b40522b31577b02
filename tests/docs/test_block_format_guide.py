"""docs/add-a-block-format.md: its changes fit the sources. CI also compiles and tests the result."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from scripts import apply_guide

from pages import ROOT

GUIDE = ROOT / "docs" / "add-a-block-format.md"


def copy_sources(tree: Path) -> None:
    for folder in ("csrc", "tests/cpp"):
        shutil.copytree(ROOT / folder, tree / folder)
    shutil.copy(ROOT / "tests/block_formats.py", tree / "tests")


def test_the_changes_of_the_guide_fit_the_sources(tmp_path: Path) -> None:
    copy_sources(tmp_path)
    apply_guide.apply(GUIDE, tmp_path)
    listed = (tmp_path / "csrc/kernels/formats.h").read_text()
    assert re.search(r" +\\\n  X\(tq2_0, TQ2_0\) +\\\n  // New formats", listed)
    assert '#include "kernels/formats/tq2_0-inl.h"' in listed
    for file in ("csrc/kernels/formats/tq2_0-inl.h", "csrc/ops/quantizers/tq2_0.cpp"):
        assert max(map(len, (tmp_path / file).read_text().splitlines())) <= 110


def test_a_change_whose_old_lines_are_missing_or_there_twice_is_refused() -> None:
    assert apply_guide.changed("a\nb\nc\n", "-b\n+x\n+y\n c\n") == "a\nx\ny\nc\n"
    for text in ("a\n", "b\nb\n"):
        with pytest.raises(ValueError, match="expected once"):
            apply_guide.changed(text, "-b\n+c\n")


@pytest.mark.parametrize("change", ["+x\n b\n", " a\n+x\n", " a\n+x\n b\n", "-c\n+x\n"])
def test_a_change_that_is_already_made_is_refused(change: str) -> None:
    once = apply_guide.changed("a\nb\nc\n", change)
    with pytest.raises(ValueError, match="is already made"):
        apply_guide.changed(once, change)


def test_a_tree_that_has_the_changes_is_refused_and_stays_as_it_is(tmp_path: Path) -> None:
    copy_sources(tmp_path)
    apply_guide.apply(GUIDE, tmp_path)
    file = tmp_path / "csrc/ops/quantizers/tq2_0.cpp"
    file.write_text("mine")
    command = [sys.executable, ROOT / "scripts/apply_guide.py", GUIDE, tmp_path]
    for complaint in ("tq2_0-inl.h: the file is already there", "formats.h: the change is already made"):
        before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
        run = subprocess.run(command, capture_output=True, text=True)
        assert run.returncode == 1
        assert complaint in run.stderr
        assert "Traceback" not in run.stderr
        assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
        file.unlink(missing_ok=True)
        (tmp_path / "csrc/kernels/formats/tq2_0-inl.h").unlink(missing_ok=True)
