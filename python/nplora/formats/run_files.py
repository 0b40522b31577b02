"""The names of a training run's files, and what a checkpoint records about an earlier run.

A run can overwrite an earlier run. The files of the earlier run are deleted as soon as the first checkpoint
of the new run is on disk. This checkpoint contains the new log and the SHA-256 of the old adapter. So even if
nplora crashes before the old files are deleted, the checkpoint shows which log and adapter are old.
"""

import os
from pathlib import Path

from nplora.formats import safetensors, strict_json
from nplora.formats.errors import FormatError
from nplora.formats.files import StrPath

LOG = "log.jsonl"
LOCK = "lock"
CHECKPOINTS = ("checkpoint-0.safetensors", "checkpoint-1.safetensors")
REFERENCE = "reference.safetensors"  # log-probabilities of the model without its adapter
NAMES = (LOG, LOCK, *CHECKPOINTS, REFERENCE)
# Metadata keys of a checkpoint. FIRST_LOG and DROPPED_ADAPTER appear only in the first checkpoint of a run
# that overwrites another run.
STATE = "state"  # JSON
REFERENCE_MARK = "reference"  # a metadata key that every file of log-probabilities has
FIRST_LOG = "log"
DROPPED_ADAPTER = "dropped_adapter.sha256"


def holds_run(directory: StrPath) -> bool:
    """Whether a directory has checkpoint files. The files are not read, so they may be damaged."""
    return any(os.path.lexists(Path(directory, name)) for name in CHECKPOINTS)


def dropped_adapter(directory: StrPath) -> str | None:
    """The SHA-256 of an earlier run's adapter, if the newest checkpoint contains it; else None."""
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
