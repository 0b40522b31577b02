"""EventLog: stores the events of a job in a file, one JSON object per line."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from pathlib import Path

from nplora.formats import files, strict_json
from nplora.platform.files import open_file
from nplora.serving.jobs.shapes import Shape


class EventLog:
    """Stores the events of one job in a file, the oldest event first.

    If a crash left the last line incomplete, this line is removed. Damaged lines are ignored.

    A job that continues after a crash repeats the training steps after its last checkpoint, with the same
    results. The losses of a repeated step are added only if the log does not have them yet.

    Args:
        path: the file, which is created when the first event is added.
        key: a text that the id of each event contains.
        clock: returns the Unix time.
    """

    def __init__(self, path: Path, key: str, clock: Callable[[], float] = time.time) -> None:
        self._path, self._key, self._clock = path, key, clock
        self._events = list[Shape]()
        if path.exists():
            content = bytes(files.read(path, follow_links=False))
            whole = content.rfind(b"\n") + 1
            if whole < len(content):
                os.truncate(path, whole)
            read = map(_event, content[:whole].splitlines())
            self._events = [event for event in read if event is not None]
        self._seen = {_subject(event) for event in self._events} - {None}

    def add(self, message: str, level: str = "info", data: Shape | None = None) -> None:
        """Add an event of the type "metrics" if `data` is given, otherwise of the type "message".

        Args:
            data: a dict with the number of a training step ("step"), and the training loss or the validation
                loss of this step. If the log already has the same kind of loss for this step, the event is
                not added.
        Raises:
            OSError: the event cannot be written to the file. `newest_first` returns the event anyway.
        """
        number = 1 + int(self._events[-1]["id"].rpartition("-")[2]) if self._events else 0
        event: Shape = {
            "id": f"ftevent-{self._key}-{number:06}",
            "object": "fine_tuning.job.event",
            "created_at": int(self._clock()),
            "level": level,
            "message": message,
            "type": "message" if data is None else "metrics",
            "data": strict_json.json_values(data),
        }
        subject = _subject(event)
        if subject is not None and subject in self._seen:
            return
        self._seen.add(subject)
        self._events.append(event)
        _append(self._path, json.dumps(event, allow_nan=False).encode() + b"\n")

    def newest_first(self) -> list[Shape]:
        """All events, the newest first."""
        return self._events[::-1]


def _event(line: bytes) -> Shape | None:
    """Return the event that a line holds; None if the line is damaged."""
    try:
        event = strict_json.loads(line, "event")
        int(event["id"].rpartition("-")[2])
        _subject(event)
    except (ValueError, TypeError, LookupError, AttributeError):
        return None
    return dict(event)


def _subject(event: Shape) -> tuple[str, int] | None:
    """Return ("train" or "valid", step) for an event with losses; None for an event without losses."""
    data = event["data"]
    return None if data is None else ("train" if "train_loss" in data else "valid", int(data["step"]))


def _append(path: Path, line: bytes) -> None:
    """Append a line to a file. After an error, remove the part of the line that was written.

    If this process is killed, the line is not lost. If the operating system crashes, the line may be lost,
    because the system writes data to the disk with a delay.
    """
    progress = files.Progress(len(line))
    with files.disk_errors(path, progress):
        descriptor = open_file(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, follow_links=False)
        try:
            size = os.fstat(descriptor).st_size
            try:
                files.write(descriptor, line, progress)
            except BaseException:
                os.ftruncate(descriptor, size)
                raise
        finally:
            os.close(descriptor)
