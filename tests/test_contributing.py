"""CONTRIBUTING.md, CMake's presets and the steps of CI name each other by names that exist."""

import json
import re
import subprocess
from pathlib import Path

import pytest
from scripts import check_contributing

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "CONTRIBUTING.md").read_text()
COMMANDS = "".join(block.commands for block in check_contributing.blocks())
PRESETS = json.loads((ROOT / "CMakePresets.json").read_text())
CI = ROOT / ".ci"

ci_is_there = pytest.mark.skipif(not CI.is_dir(), reason="a source distribution has no .ci")


def steps() -> dict[str, str]:
    """The text of each step of CI."""
    return {path.stem: path.read_text() for path in (CI / "steps").glob("*.sh")}


def test_every_preset_that_contributors_use_exists() -> None:
    used = set(re.findall(r"--preset (\w+)", COMMANDS))
    assert used == {"debug", "asan", "tsan", "aarch64"}
    for kind in ("configurePresets", "buildPresets"):
        assert {preset["name"] for preset in PRESETS[kind]} - {"tests"} == {*used, "release"}


@ci_is_there
def test_every_step_that_contributing_names_exists() -> None:
    named = {
        name
        for words in re.findall(r"step(?:s)? ((?:`\w+`(?:, | and )?)+)", TEXT)
        for name in re.findall(r"`(\w+)`", words)
    }
    named |= {
        word
        for line in re.findall(r"^\.ci/run ((?:\w+ ?)+)$", COMMANDS, re.MULTILINE)
        for word in line.split()
    }
    assert len(named) > 4
    assert named <= steps().keys()


@ci_is_there
def test_ci_runs_every_step_after_those_that_it_needs() -> None:
    listed = re.search(r"^steps=\((.*)\)$", (CI / "run").read_text(), re.MULTILINE)
    assert listed
    order = listed[1].split()
    assert sorted(order) == sorted(steps())
    for name, text in steps().items():
        lines = text.splitlines()
        assert re.fullmatch(r"# [A-Z].{10,}", lines[1]), f"{name}: the second line describes the step"
        needs = re.fullmatch(r"# needs:(.*)", lines[2])
        assert needs
        assert set(needs[1].split()) <= set(order)


@ci_is_there
def test_the_list_of_steps_describes_each_of_them() -> None:
    printed = subprocess.run([CI / "run", "--list"], capture_output=True, text=True, check=True).stdout
    for name, text in steps().items():
        assert re.search(rf"^  {name} +{re.escape(text.splitlines()[1][2:])}$", printed, re.MULTILINE), name


@ci_is_there
def test_an_unknown_step_is_an_error_that_names_it() -> None:
    run = subprocess.run([CI / "run", "no_such_step"], capture_output=True, text=True)
    assert (run.returncode, run.stdout) == (2, "")
    assert run.stderr == "no_such_step is no step; .ci/run --list prints them\n"
