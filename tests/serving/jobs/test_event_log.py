"""The events of a job in their file."""

import json
import math
from pathlib import Path

import pytest

from nplora.serving.jobs.event_log import EventLog


def test_a_step_that_is_repeated_after_a_crash_makes_no_second_event(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    for _ in range(2):
        log = EventLog(path, "a", clock=lambda: 5.0)
        for step in (1, 2):
            log.add(f"Step {step}", data={"step": step, "train_loss": 1.0})
        log.add("evaluated", data={"step": 2, "valid_loss": 1.0})
    events = EventLog(path, "a").newest_first()
    assert [event["message"] for event in events] == ["evaluated", "Step 2", "Step 1"]
    assert [event["id"] for event in events] == ["ftevent-a-000002", "ftevent-a-000001", "ftevent-a-000000"]
    assert {event["created_at"] for event in events} == {5}


def test_a_loss_that_is_not_finite_is_null(tmp_path: Path) -> None:
    log = EventLog(tmp_path / "events.jsonl", "a")
    log.add("diverged", data={"step": 1, "train_loss": math.nan})
    [line] = (tmp_path / "events.jsonl").read_text().splitlines()
    assert json.loads(line, parse_constant=pytest.fail)["data"] == {"step": 1, "train_loss": None}


def test_a_damaged_line_is_ignored_and_ids_stay_different(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    log = EventLog(path, "a")
    for word in ("one", "two", "three"):
        log.add(word)
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(lines[0] + b"\0\0\n{}\n[]\n5\n" + lines[2])
    log = EventLog(path, "a")
    log.add("four")
    assert len({event["id"] for event in log.newest_first()}) == 3
