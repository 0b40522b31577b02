"""docs/add-a-block-format.md: its changes fit the sources. CI also compiles and tests the result."""

import re
import shutil
from pathlib import Path

import pytest
from scripts import apply_guide

from pages import ROOT

GUIDE = ROOT / "docs" / "add-a-block-format.md"


def test_the_changes_of_the_guide_fit_the_sources(tmp_path: Path) -> None:
    for folder in ("csrc", "tests/cpp"):
        shutil.copytree(ROOT / folder, tmp_path / folder)
    shutil.copy(ROOT / "tests/block_formats.py", tmp_path / "tests")
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
