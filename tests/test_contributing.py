"""CONTRIBUTING.md, CMake's presets and the steps of CI name each other by names that exist."""

import json
import re
import subprocess
from pathlib import Path

import pytest
from scripts import check_contributing

import systems

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
COMMANDS = "".join(block.commands for block in check_contributing.blocks())
PRESETS = json.loads((ROOT / "CMakePresets.json").read_text(encoding="utf-8"))
CI = ROOT / ".ci"

ci_is_there = pytest.mark.skipif(not CI.is_dir(), reason="a source distribution has no .ci")


def steps() -> dict[str, str]:
    """The text of each step of CI."""
    return {path.stem: path.read_text(encoding="utf-8") for path in (CI / "steps").glob("*.sh")}


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
    listed = re.search(r"^steps=\(([^)]*)\)$", (CI / "run").read_text(encoding="utf-8"), re.MULTILINE)
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
@systems.needs_bash
def test_the_list_of_steps_describes_each_of_them() -> None:
    printed = subprocess.run([CI / "run", "--list"], capture_output=True, text=True, check=True).stdout
    for name, text in steps().items():
        assert re.search(rf"^  {name} +{re.escape(text.splitlines()[1][2:])}$", printed, re.MULTILINE), name


@ci_is_there
@systems.needs_bash
def test_an_unknown_step_is_an_error_that_names_it() -> None:
    run = subprocess.run([CI / "run", "no_such_step"], capture_output=True, text=True)
    assert (run.returncode, run.stdout) == (2, "")
    assert run.stderr == "no_such_step is no step; .ci/run --list prints them\n"


def ci_with(directory: Path, fake_steps: dict[str, tuple[str, str]]) -> Path:
    """.ci/run with other steps: by their names what they need, and their commands."""
    (directory / ".ci" / "steps").mkdir(parents=True)
    real, listed = (CI / "run").read_text(encoding="utf-8"), f"steps=({' '.join(fake_steps)})"
    text, count = re.subn(r"^steps=\([^)]*\)$", listed, real, flags=re.MULTILINE)
    assert count == 1
    program = directory / ".ci" / "run"
    program.write_text(text)
    program.chmod(0o755)
    for name, (needs, commands) in fake_steps.items():
        lines = ("#!/usr/bin/env bash", "# A step of a test", f"# needs: {needs}", "set -eu", commands)
        (directory / ".ci" / "steps" / f"{name}.sh").write_text("\n".join(lines) + "\n")
    return program


COUNTED = 'mkdir -p "$NPLORA_CI_DIR/{0}"; echo "= {1} passed, 2 skipped" >"$NPLORA_CI_DIR/{0}/tests.count"'


@ci_is_there
@systems.needs_bash
def test_ci_runs_two_steps_at_a_time_and_adds_up_what_passed(tmp_path: Path) -> None:
    ci = ci_with(
        tmp_path,
        {
            "base": ("", 'echo "jobs: $NPLORA_CI_JOBS"'),
            "first": (
                "base",
                f"touch first; until [ -e second ]; do sleep 0.01; done; {COUNTED.format('first', 3)}",
            ),
            "second": (
                "base",
                f"until [ -e first ]; do sleep 0.01; done; touch second; {COUNTED.format('second', 4)}",
            ),
            "last": ("first second", '[ -e first ] && [ -e second ]; echo "jobs: $NPLORA_CI_JOBS"'),
        },
    )
    run = subprocess.run([ci], cwd=tmp_path, capture_output=True, text=True, timeout=30)
    lines = run.stdout.splitlines()
    assert run.returncode == 0, run.stdout + run.stderr
    assert {"base: jobs: 2", "last: jobs: 2"} <= set(lines)
    assert lines[-1] == "7 passed, 0 failed"


@ci_is_there
@systems.needs_bash
def test_a_third_step_has_the_lowest_priority(tmp_path: Path) -> None:
    wait = "until [ -e third ]; do sleep 0.01; done"
    fake = {"first": ("", wait), "second": ("", wait), "threads": ("", "touch third; echo nice: $(nice)")}
    run = subprocess.run([ci_with(tmp_path, fake)], cwd=tmp_path, capture_output=True, text=True, timeout=30)
    assert run.returncode == 0, run.stdout + run.stderr
    assert "threads: nice: 19" in run.stdout.splitlines()


@ci_is_there
@systems.needs_bash
def test_a_step_that_fails_ends_the_others(tmp_path: Path) -> None:
    ci = ci_with(tmp_path, {"slow": ("", "sleep 60"), "bad": ("", "exit 3"), "later": ("bad", "touch later")})
    run = subprocess.run([ci], cwd=tmp_path, capture_output=True, text=True, timeout=30)
    assert run.returncode == 1
    assert "FAILED in bad\n" in run.stdout
    assert run.stdout.splitlines()[-1].startswith("FAILED, after ")
    assert not (tmp_path / "later").exists()


def test_no_two_test_files_have_the_same_name() -> None:
    """pytest imports them by name, so a run of the whole folder would refuse the second one."""
    names = [path.name for path in (ROOT / "tests").rglob("test_*.py")]
    assert len(names) > 100
    assert sorted(set(names)) == sorted(names)
