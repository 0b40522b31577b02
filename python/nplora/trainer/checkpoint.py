"""Checkpoint: the state of a run, stored in a file. A SHA-256 shows whether the file is damaged."""

import dataclasses
import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from nplora import _core
from nplora.formats import files, safetensors, strict_json
from nplora.formats.errors import CorruptError, FormatError, UnsupportedError, brief
from nplora.formats.safetensors import SafetensorsFile
from nplora.runtime.user_warning import warn_user

SCHEMA = 3  # schema 2 has no `logged`
OLDEST = 1  # this schema also has no evaluations, and no step in `best`

MARKS = {"schema", "state", "sha256"}  # the metadata keys of every checkpoint
_GROUPS = ("parameters", "optimizer", "best", "history", "outer")

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class Checkpoint:
    """The state of a run between two steps.

    Attributes:
        step, epoch: the number of finished steps, and the number of finished epochs.
        batch: the number of batches used in the current epoch.
        total_steps: the number of steps in the whole run; None if unknown.
        random_state: the state of each layer's random numbers for dropout, from `Module.random_state`.
        settings: the settings of the run, for a comparison with the settings of a resumed run.
        base: the fingerprint of the model's frozen weights, from `base_fingerprint`.
        best: the evaluation with the lowest validation loss, as a dictionary with the keys "loss", "epoch",
            "step" and "since". "since" is the number of evaluations after the best one.
        epochs, evaluations: the records of the last finished epochs, and the records of the last evaluations.
            Each of the two lists has at most `history.KEPT` records.
        log_bytes: the length of the log in bytes when the checkpoint was written. The log holds all records.
        logged: a dict from the name of each event to the last line of the log with this event. A resumed run
            needs the lines of its callbacks, and the log may be lost.
        parameters, best_parameters: the result of `fingerprint.factors(model)` at this step, and the result
            at the best evaluation. Both are dicts from names to arrays.
        optimizer: a dict from names to the optimiser's moments.
        history: the records of the last steps (at most `history.KEPT`), as one array for each field of
            `StepRecord`. Earlier records are only in the log, so the size of a checkpoint does not grow
            during a run.
        outer: a dict from names to the outer optimiser's momentum arrays; empty if the ranks make no local
            steps.
        isa, version: the instruction set and the version of nplora that were in use when the checkpoint was
            made.
        serial: the number of the checkpoint. Each new checkpoint in a directory gets a higher number.
    """

    step: int
    epoch: int
    batch: int
    total_steps: int | None
    random_state: dict[str, list[int]]
    settings: dict[str, Any]
    base: str
    best: dict[str, Any] | None
    epochs: list[dict[str, Any]]
    evaluations: list[dict[str, Any]]
    log_bytes: int
    parameters: Mapping[str, Array]
    optimizer: Mapping[str, Array]
    best_parameters: Mapping[str, Array]
    history: Mapping[str, Array]
    outer: Mapping[str, Array] = dataclasses.field(default_factory=dict)
    logged: dict[str, Any] = dataclasses.field(default_factory=dict)
    isa: str = dataclasses.field(default_factory=lambda: str(_core.config()["isa"]))
    version: str = dataclasses.field(default_factory=lambda: str(_core.config()["version"]))
    serial: int = 0

    def warn_if_moved(self) -> None:
        """Warn if the instruction set or nplora's version has changed, because rounding may then differ."""
        config = _core.config()
        for what, then, now in (
            ("instruction set", self.isa, config["isa"]),
            ("nplora", self.version, config["version"]),
        ):
            if then != now:
                warn_user(
                    f"the checkpoint was made with {what} {then}, but this is {now}: "
                    "the results of the run will be equal up to rounding, not bit for bit"
                )


# ---- the file ----

_ARRAYS = dict(zip(("parameters", "optimizer", "best_parameters", "history", "outer"), _GROUPS, strict=True))
_KINDS: dict[str, type | tuple[type, ...]] = {
    "step": int,
    "epoch": int,
    "batch": int,
    "total_steps": (int, type(None)),
    "random_state": dict,
    "settings": dict,
    "base": str,
    "best": (dict, type(None)),
    "epochs": list,
    "evaluations": list,
    "log_bytes": int,
    "logged": dict,
    "isa": str,
    "version": str,
    "serial": int,
}


def new_file(path: Path, checkpoint: Checkpoint, more: Mapping[str, str] | None = None) -> files.NewFile:
    arrays = {
        f"{group}.{name}": array
        for field, group in _ARRAYS.items()
        for name, array in getattr(checkpoint, field).items()
    }
    state = json.dumps({name: getattr(checkpoint, name) for name in _KINDS}, allow_nan=False)
    metadata = {"schema": str(SCHEMA), "state": state, "sha256": _digest(state, sorted(arrays.items()))}
    return safetensors.new_file(path, arrays, metadata | dict(more or {}))


def read(path: Path) -> Checkpoint:
    """Check the arrays of a checkpoint, then map the file into memory.

    The file is mapped because a copy of all arrays might not fit into memory. For the check, the arrays are
    read from the file one by one, because a disk error then raises an OSError. In a mapped file, a disk error
    would end the process.

    Raises:
        UnsupportedError: a later version of nplora made the file. FormatError: the file is damaged. OSError:
            the file cannot be read.
    """
    with files.reading(path, follow_links=False) as reader:
        content = SafetensorsFile(reader, str(path))
        state = _state(content.metadata, path)
        arrays = ((name, content[name].array) for name in sorted(content))
        if content.metadata.get("sha256") != _digest(state, arrays):
            raise CorruptError(f"{path}: the content does not match its SHA-256")
        mapped = SafetensorsFile(memoryview(reader.map()), str(path))
    fields = _parsed(state, path)
    groups: dict[str, dict[str, Array]] = {group: {} for group in _GROUPS}
    for name, tensor in mapped.items():
        group, _, rest = name.partition(".")
        if group not in groups:
            raise CorruptError(f"{path}: tensor {brief(name)} belongs to none of {', '.join(_GROUPS)}")
        groups[group][rest] = tensor.array
    fields |= {field: groups[group] for field, group in _ARRAYS.items()}
    return Checkpoint(**fields)


def is_checkpoint(metadata: Mapping[str, str]) -> bool:
    """Whether the metadata of a safetensors file show that the file is a checkpoint."""
    return metadata.keys() >= MARKS


def read_header(path: Path) -> tuple[int, int]:
    """A checkpoint's serial number and its step, from the file's header; (0, 0) if the header is unreadable.

    Raises:
        UnsupportedError: a later version of nplora made the file.
    """
    try:
        with safetensors.reading(path, follow_links=False) as content:
            state = _parsed(_state(content.metadata, path), path)
            return state["serial"], state["step"]
    except UnsupportedError:
        raise
    except (FormatError, OSError):
        return 0, 0


def _state(metadata: Mapping[str, str], path: Path) -> str:
    schema = metadata.get("schema")
    if schema is None:
        raise CorruptError(f"{path}: the metadata has no schema, so this is not a checkpoint")
    if schema not in map(str, range(OLDEST, SCHEMA + 1)):
        raise UnsupportedError(
            f"{path}: the checkpoint has schema {brief(schema)}, "
            f"but this nplora reads only schemas {OLDEST} to {SCHEMA}"
        )
    return metadata.get("state", "")


def _parsed(state: str, path: Path) -> dict[str, Any]:
    return _fields(strict_json.loads(state.encode(), f"{path}: state"), path)


def _fields(state: object, path: Path) -> dict[str, Any]:
    """Check the type and range of every field of the state; return the fields."""
    state = _completed(state)
    if not isinstance(state, dict) or state.keys() != _KINDS.keys():
        found = sorted(state) if isinstance(state, dict) else state
        raise CorruptError(f"{path}: the state holds {brief(found)}, expected {', '.join(sorted(_KINDS))}")
    for name, kind in _KINDS.items():
        value = state[name]
        if not isinstance(value, kind) or isinstance(value, bool):
            raise CorruptError(f"{path}: {name} is {brief(value)}, which has the wrong type")
        if isinstance(value, int) and value < 0:
            raise CorruptError(f"{path}: {name} is {value}, expected at least 0")
        if isinstance(value, int) and value >= 1 << 63:
            raise CorruptError(f"{path}: {name} is {value}, expected below {1 << 63}")
    if state["total_steps"] is not None and state["step"] > state["total_steps"]:
        raise CorruptError(f"{path}: step is {state['step']}, but total_steps is {state['total_steps']}")
    if state["epoch"] > state["step"]:
        raise CorruptError(f"{path}: epoch is {state['epoch']}, but step is only {state['step']}")
    for name, stream in state["random_state"].items():
        if not isinstance(stream, list) or len(stream) != 2 or not all(_count(n, 1 << 64) for n in stream):
            wanted = "expected [seed, calls]"
            raise CorruptError(f"{path}: random_state of {brief(name)} is {brief(stream)}, {wanted}")
    if state["best"] is not None and not _is_best(state["best"]):
        wanted = "expected the keys loss, epoch, step, since"
        raise CorruptError(f"{path}: best is {brief(state['best'])}, {wanted}")
    return state


def _completed(state: object) -> object:
    """Add the fields that an older schema lacks, and convert settings of early versions.

    If `best` has no step, the step is set to 0 (unknown).
    """
    if not isinstance(state, dict):
        return state
    state = {"logged": {}, **state}
    settings = state.get("settings")
    fixed = settings.get("fixed") if isinstance(settings, dict) else None
    if isinstance(fixed, dict) and isinstance(fixed.get("int8_head"), bool):
        # Early runs in int8 stored whether the backward pass of the head was in int8.
        fixed["int8_head"] = "on" if fixed["int8_head"] else "forward"
    if "evaluations" in state:
        return state
    best = state.get("best")
    return {**state, "evaluations": [], "best": {"step": 0, **best} if isinstance(best, dict) else best}


def _count(value: object, end: int = 1 << 63) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < end


def _is_best(best: dict[str, Any]) -> bool:
    if best.keys() != {"loss", "epoch", "step", "since"}:
        return False
    loss = best["loss"]
    return (loss is None or isinstance(loss, float)) and all(
        map(_count, (best[n] for n in best if n != "loss"))
    )


def _digest(state: str, arrays: Iterable[tuple[str, Array]]) -> str:
    """SHA-256 of the state and of each array's name, dtype, shape and bytes, in the order of the names."""
    digest = hashlib.sha256(state.encode())
    for name, array in arrays:
        digest.update(f"\n{name} {array.dtype.str} {array.shape}\n".encode())
        digest.update(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
    return digest.hexdigest()
