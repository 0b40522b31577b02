"""Checkpoints of a training run: what they hold, and how they lie on disk so that a crash loses nothing.

A run directory holds

    checkpoint-0.safetensors, checkpoint-1.safetensors     two generations, written in turn
    log.jsonl                                              a line for every step and epoch
    lock                                                   while a run writes here; its text is the PID

A checkpoint is written beside its target and renamed over the older generation (`formats.files.replace`), so
at every moment a whole one is there. A SHA-256 over everything in it tells whether it still is whole. All
that touches the disk here are the calls of `formats.files` and those of the class `RunDirectory`.
"""

import contextlib
import dataclasses
import errno
import fcntl
import functools
import hashlib
import json
import os
import stat
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from nplora import _core
from nplora.formats import files, peft_adapter, safetensors, strict_json
from nplora.formats.errors import CorruptError, FormatError, UnsupportedError, brief
from nplora.formats.files import StrPath
from nplora.formats.safetensors import SafetensorsFile
from nplora.layers import LoRALayer
from nplora.module import Module
from nplora.weights import FrozenWeight

SCHEMA = 1
LOG = "log.jsonl"

_SLOTS = ("checkpoint-0.safetensors", "checkpoint-1.safetensors")
_LOCK = "lock"
_GROUPS = ("parameters", "optimizer", "best", "history")
_SAMPLE_BYTES = 1 << 16
_MAX_LOG = 1 << 30
_LONGEST_LINE = 1 << 16

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class Checkpoint:
    """The state of a run between two steps.

    Attributes:
        step, epoch, batch: steps made, epochs finished, and batches used of the epoch under way.
        total_steps: where the run is to end, if that is known.
        random_state: the dropout streams, as `Module.random_state` gives them.
        settings: what the run was started with, to be compared when it goes on.
        base: `base_fingerprint` of the model.
        best: the best epoch for early stopping: "loss", "epoch", and "since", the epochs after it.
        epochs: the records of the last epochs finished.
        log_bytes: how long the log was, which has the records of all steps and epochs.
        parameters, optimizer, best_parameters: arrays by name.
        history: the columns of the last step records: a checkpoint does not grow with its run.
        isa, version: the instruction set and the nplora that made it.
        serial: counts the checkpoints of a directory.
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
    log_bytes: int
    parameters: Mapping[str, Array]
    optimizer: Mapping[str, Array]
    best_parameters: Mapping[str, Array]
    history: Mapping[str, Array]
    isa: str = dataclasses.field(default_factory=lambda: str(_core.config()["isa"]))
    version: str = dataclasses.field(default_factory=lambda: str(_core.config()["version"]))
    serial: int = 0

    def warn_if_moved(self) -> None:
        """Warn where the bits of the run may change: another instruction set or another nplora."""
        config = _core.config()
        for what, then, now in (
            ("instruction set", self.isa, config["isa"]),
            ("nplora", self.version, config["version"]),
        ):
            if then != now:
                warnings.warn(
                    f"the checkpoint was made with {what} {then}, this is {now}: "
                    "the run goes on with results that are equal up to rounding, not to the bit",
                    stacklevel=7,  # the line that calls `Trainer.fit`
                )


# ---- bytes ----

_ARRAYS = dict(zip(("parameters", "optimizer", "best_parameters", "history"), _GROUPS, strict=True))
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
    "log_bytes": int,
    "isa": str,
    "version": str,
    "serial": int,
}


def _new_file(path: Path, checkpoint: Checkpoint) -> files.NewFile:
    arrays = {
        f"{group}.{name}": array
        for field, group in _ARRAYS.items()
        for name, array in getattr(checkpoint, field).items()
    }
    state = json.dumps({name: getattr(checkpoint, name) for name in _KINDS}, allow_nan=False)
    metadata = {"schema": str(SCHEMA), "state": state, "sha256": _digest(state, sorted(arrays.items()))}
    return safetensors.new_file(path, arrays, metadata)


def _read(path: Path) -> Checkpoint:
    """Check a generation, read array by array, so that the disk's errors are OSErrors; then map it.

    A run that goes on has no memory for all arrays.

    Raises:
        UnsupportedError: a later nplora made it. FormatError: it is damaged. OSError: it cannot be read.
    """
    with files.reading(path) as reader:
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
    """Whether a safetensors file with these metadata is one."""
    return metadata.keys() >= {"schema", "state", "sha256"}


def _serial(path: Path) -> int:
    """A generation's number by its header alone, 0 where there is none. UnsupportedError: as `_read`."""
    try:
        with safetensors.reading(path) as content:
            serial: int = _parsed(_state(content.metadata, path), path)["serial"]
            return serial
    except UnsupportedError:
        raise
    except (FormatError, OSError):
        return 0


def _state(metadata: Mapping[str, str], path: Path) -> str:
    schema = metadata.get("schema")
    if schema is None:
        raise CorruptError(f"{path}: the metadata has no schema, so this is not a checkpoint")
    if schema != str(SCHEMA):
        raise UnsupportedError(f"{path}: a checkpoint of schema {brief(schema)}, this nplora reads {SCHEMA}")
    return metadata.get("state", "")


def _parsed(state: str, path: Path) -> dict[str, Any]:
    return _fields(strict_json.loads(state.encode(), f"{path}: state"), path)


def _fields(state: object, path: Path) -> dict[str, Any]:
    """The fields of the JSON object, each of its kind, counts not negative."""
    if not isinstance(state, dict) or state.keys() != _KINDS.keys():
        found = sorted(state) if isinstance(state, dict) else state
        raise CorruptError(f"{path}: the state holds {brief(found)}, expected {', '.join(sorted(_KINDS))}")
    for name, kind in _KINDS.items():
        value = state[name]
        if not isinstance(value, kind) or isinstance(value, bool):
            raise CorruptError(f"{path}: {name} is {brief(value)}")
        if isinstance(value, int) and value < 0:
            raise CorruptError(f"{path}: {name} is {value}, expected at least 0")
        if isinstance(value, int) and value >= 1 << 63:
            raise CorruptError(f"{path}: {name} is {value}, expected below {1 << 63}")
    if state["total_steps"] is not None and state["step"] > state["total_steps"]:
        raise CorruptError(f"{path}: step {state['step']} of a run of {state['total_steps']} steps")
    if state["epoch"] > state["step"]:
        raise CorruptError(f"{path}: {state['epoch']} epochs in {state['step']} steps")
    for name, stream in state["random_state"].items():
        if not isinstance(stream, list) or len(stream) != 2 or not all(_count(n, 1 << 64) for n in stream):
            wanted = "expected [seed, calls]"
            raise CorruptError(f"{path}: random_state of {brief(name)} is {brief(stream)}, {wanted}")
    if state["best"] is not None and not _is_best(state["best"]):
        raise CorruptError(f"{path}: best is {brief(state['best'])}, expected a loss, an epoch and since")
    return state


def _count(value: object, end: int = 1 << 63) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < end


def _is_best(best: dict[str, Any]) -> bool:
    if best.keys() != {"loss", "epoch", "since"}:
        return False
    loss = best["loss"]
    return (loss is None or isinstance(loss, float)) and _count(best["epoch"]) and _count(best["since"])


def _digest(state: str, arrays: Iterable[tuple[str, Array]]) -> str:
    """SHA-256 over the state and every array's name, dtype, shape and bytes; in the order of their names."""
    digest = hashlib.sha256(state.encode())
    for name, array in arrays:
        digest.update(f"\n{name} {array.dtype.str} {array.shape}\n".encode())
        digest.update(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
    return digest.hexdigest()


# ---- what a model is told by ----


def base_fingerprint(model: Module) -> str:
    """SHA-256 over names, shapes and a sample of rows of all that is frozen: it tells another base model.

    It does not find every changed bit: reading all of a large model would take longer than the first steps.
    """
    digest = hashlib.sha256()
    for name, module in model.named_modules():
        for frozen in module.local_frozen():
            if (
                isinstance(module, LoRALayer) and frozen is module.B
            ):  # part of the checkpoint, not of the base
                continue
            digest.update(f"\n{name} {fingerprint(frozen)}".encode())
    return digest.hexdigest()


def fingerprint(array: FrozenWeight | Array) -> str:
    """Dtype, shape and a SHA-256 over at most 64 KiB of evenly spaced rows of an array."""
    table = array if isinstance(array, FrozenWeight) else np.atleast_1d(array)
    rows = table.shape[0]
    row_bytes = max(1, table.nbytes // max(1, rows))
    count = min(rows, max(1, _SAMPLE_BYTES // row_bytes))
    ids = np.arange(count, dtype=np.int64) * (rows - 1) // max(1, count - 1)
    sample = table.take(ids) if isinstance(table, FrozenWeight) else table[ids]
    return f"{array.dtype} {array.shape} {hashlib.sha256(sample.tobytes()).hexdigest()}"


def factors(model: Module) -> dict[str, Array]:
    """The live arrays that a checkpoint keeps: the parameters, and the B of layers that train A alone."""
    arrays = {p.name: p.value for p in model.parameters()}
    for name, module in model.named_modules():
        if isinstance(module, LoRALayer) and module.freeze_B:
            arrays[f"{name}.B" if name else "B"] = module.B
    return arrays


def differences(found: Mapping[str, Array], wanted: Mapping[str, Array]) -> list[str]:
    """One sentence for every array that is missing, unknown, or of another shape or dtype."""
    problems = [f"{name} is missing" for name in wanted if name not in found]
    problems += [f"{name} is not in the model" for name in found if name not in wanted]
    for name, want in wanted.items():
        have = found.get(name, want)
        if have.shape != want.shape or have.dtype != want.dtype:
            problems.append(f"{name} is {have.dtype} {have.shape}, in the model {want.dtype} {want.shape}")
    return problems


# ---- the directory ----


def holds_run(directory: StrPath) -> bool:
    """Whether checkpoints lie in a directory, whole or not. Nothing is made, locked or read."""
    return any(os.path.lexists(Path(directory, name)) for name in _SLOTS)


def trained(directory: StrPath) -> str | None:
    """Words for what training left in a directory: checkpoints, or an adapter alone; None: neither."""
    if holds_run(directory):
        return "a run"
    return "an adapter" if peft_adapter.lies_in(directory) else None


def require_untouched(directory: StrPath) -> None:
    """Refuse a directory in which training left something.

    Raises:
        NotADirectoryError: it is something else. FileExistsError: training left something in it.
    """
    files.require_directory(directory)
    found = trained(directory)
    if found is not None:
        raise _occupied(directory, f"{found}; {files.OTHER_OR} drops it")


def require_no_other(directory: StrPath, overwrite: bool) -> None:
    """Refuse to put an adapter beside the checkpoints of a run, or unasked in the place of another one.

    Raises:
        ValueError: the directory's name is empty. NotADirectoryError: it is something else.
        FileExistsError: the directory holds a run; or it holds an adapter, and `overwrite` is not set.
    """
    files.require_named("adapter", output=directory)
    files.require_directory(directory)
    if holds_run(directory):
        raise _occupied(directory, "a run, whose adapter it would replace; name another one")
    if peft_adapter.lies_in(directory) and not overwrite:
        raise _occupied(directory, f"an adapter; {files.OTHER_OR} replaces it")


def _occupied(directory: StrPath, found: str) -> FileExistsError:
    return FileExistsError(errno.EEXIST, f"the directory holds {found}", files.name(directory))


class RunDirectory:
    """A directory that one run writes: made if needed, locked until `close`.

    Attributes:
        path: where it is.
        newest: the newest whole checkpoint, or None; read when asked for, let go of by the first `save`.
        damaged: one sentence for every checkpoint that is not whole, but for one that is older by its header
            than a whole one: no more of it is read.
        occupied: whether there was a checkpoint, whole or damaged.
    Raises:
        BlockingIOError: another run writes there; the message names its PID.
        UnsupportedError: a later nplora's checkpoint is there.
        OSError: the directory cannot be made or written.
    Warns:
        UserWarning: a crashed run left an unfinished file, which is removed.
    """

    def __init__(self, path: StrPath) -> None:
        self.path = Path(path)
        self.damaged: list[str] = []
        self._serials = [0, 0]  # the generations' numbers
        self._slot = 0  # the generation to be replaced next
        self._descriptors: list[int] = []
        self._locked_by = 0  # a process, whose forked children do not unlock
        try:
            try:
                os.makedirs(self.path, exist_ok=True)
                self._lock()
                self._log = self._open(LOG, os.O_RDWR | os.O_CREAT | os.O_APPEND)
                self.log_bytes = os.fstat(self._log).st_size
                self._remove_unfinished()
            except BlockingIOError:
                raise
            except OSError as error:
                raise OSError(
                    error.errno, f"the run directory cannot be written: {error.strerror}", str(self.path)
                ) from error
            self.occupied = holds_run(self.path)
            self._serials = [_serial(self.path / name) for name in _SLOTS]
            self._slot = self._serials.index(min(self._serials))
        except BaseException:
            self.close()
            raise

    def _open(self, name: str, flags: int) -> int:
        # O_NONBLOCK: a FIFO would otherwise be waited for.
        descriptor = os.open(self.path / name, flags | os.O_NONBLOCK | os.O_CLOEXEC, 0o666)
        self._descriptors.append(descriptor)
        kind = stat.S_IFMT(os.fstat(descriptor).st_mode)
        if kind != stat.S_IFREG:
            what = files.kind_name(kind)
            raise FileExistsError(errno.EEXIST, f"{name} is {what}, expected a regular file")
        return descriptor

    def _lock(self) -> None:
        """Lock the file; once more where the run before took it away between its opening and its locking."""
        while not self._locked_by:
            descriptor = self._open(_LOCK, os.O_RDWR | os.O_CREAT)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                pid = os.pread(descriptor, 20, 0).decode(errors="replace").strip() or "unknown"
                reason = f"another run, of process {pid}, writes to this directory"
                raise BlockingIOError(error.errno, reason, str(self.path)) from error
            if self._has_lock():
                self._locked_by = os.getpid()
            else:
                os.close(self._descriptors.pop())
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"{os.getpid()}\n".encode(), 0)

    def _has_lock(self) -> bool:
        """Whether the file that was locked is the one that others find there."""
        try:
            return os.path.samestat(os.fstat(self._descriptors[0]), os.stat(self.path / _LOCK))
        except FileNotFoundError:
            return False

    def _remove_unfinished(self) -> None:
        for file in sorted(self.path.glob(".checkpoint-*.tmp")):
            os.unlink(file)
            warnings.warn(f"{file}: left unfinished by a run that was killed, removed", stacklevel=4)

    @functools.cached_property
    def newest(self) -> Checkpoint | None:
        newest: Checkpoint | None = None
        for serial, slot in sorted(zip(self._serials, (0, 1), strict=True), reverse=True):
            path = self.path / _SLOTS[slot]
            if (newest is not None and serial) or not os.path.lexists(path):
                continue
            try:
                found = _read(path)
            except UnsupportedError:
                raise
            except (FormatError, OSError) as error:
                self.damaged.append(str(error))
                self._slot = slot
                continue
            newest = newest or found
        return newest

    def latest(self) -> Checkpoint | None:
        """The checkpoint to go on from; None: there is none.

        Raises:
            CorruptError: there are checkpoints, but none is whole.
        Warns:
            UserWarning: one is damaged, and the other is used.
        """
        if self.newest is None and self.damaged:
            raise CorruptError(f"{self.path}: no whole checkpoint is left: {'; '.join(self.damaged)}")
        if self.newest is not None:
            for problem in self.damaged:
                warnings.warn(
                    f"{problem}; the other checkpoint is used, of step {self.newest.step}", stacklevel=5
                )
        return self.newest

    def before(self, step: int) -> Checkpoint | None:
        """The whole checkpoint of the latest step before this one; None if there is none."""
        found: Checkpoint | None = None
        for name in _SLOTS:
            with contextlib.suppress(FormatError, OSError):
                checkpoint = _read(self.path / name)
                if checkpoint.step < step and (found is None or found.step < checkpoint.step):
                    found = checkpoint
        return found

    def read_log(self, size: int) -> bytes:
        """The whole lines among the first `size` bytes of the log, or of what is left of it.

        Raises:
            FormatError, OSError: it cannot be read.
        """
        log = bytes(files.read(self.path / LOG, _MAX_LOG)[:size])
        return log[: log.rfind(b"\n") + 1]

    def cut_log(self, size: int) -> None:
        """Drop what stands in the log after `size` bytes, and before them a last line without its end."""
        with files.disk_errors(self.path / LOG, f"the log was to end after byte {size:,}"):
            self.log_bytes = min(self.log_bytes, size)
            start = max(0, self.log_bytes - _LONGEST_LINE)
            self.log_bytes = start + os.pread(self._log, self.log_bytes - start, start).rfind(b"\n") + 1
            os.ftruncate(self._log, self.log_bytes)

    def save(self, checkpoint: Checkpoint) -> None:
        """Write a checkpoint over the older generation.

        Raises:
            OSError: the disk refuses; both generations are as they were, and the message says how many bytes
                were needed.
        """
        numbered = dataclasses.replace(checkpoint, serial=max(self._serials) + 1, log_bytes=self.log_bytes)
        with files.disk_errors(self.path / LOG, "the log may have lost lines, no checkpoint is written"):
            os.fsync(self._log)  # the checkpoint relies on it for the history
        files.replace([_new_file(self.path / _SLOTS[self._slot], numbered)])
        self.newest, self._serials[self._slot], self._slot = None, numbered.serial, 1 - self._slot

    def log(self, record: Mapping[str, Any]) -> None:
        """Append a line of JSON to the log, NaN and infinities as null."""
        line = json.dumps(dict(_finite(record.items())), allow_nan=False, separators=(",", ":"))
        data = f"{line}\n".encode()
        progress = files.Progress(len(data))
        try:
            with files.disk_errors(self.path / LOG, progress):
                files.write(self._log, data, progress)
        finally:
            self.log_bytes += progress.done

    def close(self) -> None:
        """Let the next run in. The lock is taken away while it is held, so that it is this run's own."""
        if self._locked_by == os.getpid():
            with contextlib.suppress(OSError):
                if self._has_lock():
                    os.unlink(self.path / _LOCK)
        self._locked_by = 0
        while self._descriptors:
            os.close(self._descriptors.pop())

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def _finite(items: Iterable[tuple[str, Any]]) -> Iterable[tuple[str, Any]]:
    for name, value in items:
        yield name, None if isinstance(value, float) and not np.isfinite(value) else value
