"""The files of a training run by their names, and what the newest checkpoint says about an adapter beside it.

A run that was started with overwrite=True drops what an earlier one left once its first checkpoint is on the
disk. That checkpoint names the dropped adapter by its SHA-256, so a crash in between leaves no doubt whose
adapter is there.
"""

import os
from pathlib import Path

from nplora.formats import safetensors, strict_json
from nplora.formats.errors import FormatError
from nplora.formats.files import StrPath

LOG = "log.jsonl"
LOCK = "lock"
CHECKPOINTS = ("checkpoint-0.safetensors", "checkpoint-1.safetensors")
NAMES = (LOG, LOCK, *CHECKPOINTS)
# Metadata of a checkpoint.
STATE = "state"  # JSON
DROPPED_ADAPTER = "dropped_adapter.sha256"


def holds_run(directory: StrPath) -> bool:
    """Whether a directory has checkpoints, whole or not. Nothing is made, locked or read."""
    return any(os.path.lexists(Path(directory, name)) for name in CHECKPOINTS)


def dropped_adapter(directory: StrPath) -> str | None:
    """The SHA-256 of the adapter that the newest checkpoint of a directory drops, if it drops one."""
    newest: tuple[int, str | None] = (0, None)
    for name in CHECKPOINTS:
        path = Path(directory, name)
        try:
            with safetensors.reading(path, follow_links=False) as content:
                state = strict_json.loads(content.metadata.get(STATE, "").encode(), f"{path}: {STATE}")
                serial = state.get("serial") if isinstance(state, dict) else None
                if type(serial) is int and serial >= newest[0]:
                    newest = serial, content.metadata.get(DROPPED_ADAPTER)
        except (FormatError, OSError):
            continue
    return newest[1]
