"""Checkpoints: a run resumes to the same bits, from every place where it may stop, and after disk errors."""

import contextlib
import dataclasses
import datetime
import errno
import importlib
import itertools
import json
import math
import mmap
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import nplora
import systems
from nplora.formats import files, safetensors
from nplora.formats.errors import CorruptError, UnsafeError, UnsupportedError
from nplora.trainer import (
    Callback,
    EpochRecord,
    History,
    Run,
    StepRecord,
    Trainer,
    checkpoint,
    fingerprint,
    log_header,
    plot,
    run_checkpoints,
)
from nplora.trainer.checkpoint import Checkpoint
from nplora.trainer.run_directory import RunDirectory

Array = np.ndarray[Any, Any]

D_IN, HIDDEN, CLASSES, ROWS, BATCH, ACCUMULATE, EPOCHS = 6, 8, 3, 52, 4, 3, 8
STEPS = 40  # 13 batches in an epoch make 5 steps, the last of a single batch; 8 epochs
NAMES = ("checkpoint-0.safetensors", "checkpoint-1.safetensors")


def net(rng: int | None = None) -> nplora.Sequential:
    """A small network with dropout, DoRA, a frozen B and a head that is trained whole."""
    weights = np.random.default_rng(5)
    w1, w2, w3 = (weights.normal(0, 0.5, s) for s in ((HIDDEN, D_IN), (HIDDEN, HIDDEN), (CLASSES, HIDDEN)))
    return nplora.Sequential(
        nplora.LoRALinear(w1, rank=2, dropout=0.3, use_dora=True, rng=rng),
        nplora.Tanh(),
        nplora.LoRALinear(w2, rank=2, dropout=0.1, freeze_B=True, rng=rng),
        nplora.Linear(w3, trainable=True),
    )


def data() -> tuple[Array, Array]:
    rng = np.random.default_rng(1)
    return rng.normal(size=(ROWS, D_IN)).astype(np.float32), rng.integers(0, CLASSES, ROWS)


def trainer_of(model: nplora.Module, **settings: Any) -> Trainer:
    usual = {
        "optimizer": nplora.AdamW(lr=0.02),
        "schedule": "cosine",
        "warmup_steps": 3,
        "accumulate": ACCUMULATE,
        "clip_norm": 0.5,
        "seed": 7,
        "progress": False,
    }
    return Trainer(model, **{**usual, **settings})


def fit(trainer: Trainer, **arguments: Any) -> History:
    x, y = data()
    usual = {"epochs": EPOCHS, "batch_size": BATCH, "validation": (x[:10], y[:10])}
    return trainer.fit(x, y, **{**usual, **arguments})


def outcome(trainer: Trainer, history: History) -> dict[str, Any]:
    """Everything that must be equal to the bit in two equal runs."""
    steps = [dataclasses.replace(record, seconds=0) for record in history.steps]
    epochs = [dataclasses.replace(record, seconds=0) for record in history.epochs]
    return {
        "factors": {name: a.tobytes() for name, a in fingerprint.factors(trainer.model).items()},
        "moments": {name: a.tobytes() for name, a in trainer.optimizer.state_dict().items()},
        "streams": trainer.model.random_state(),
        "history": (steps, epochs, history.ended, history.best_epoch, history.best_step),
    }


@pytest.fixture(scope="module")
def uninterrupted() -> dict[str, Any]:
    trainer = trainer_of(net(rng=0))
    history = fit(trainer)
    assert len(history.steps) == STEPS
    return outcome(trainer, history)


class StopAfter(Callback):
    """Ctrl-C after a number of steps, or an epoch."""

    def __init__(self, step: int = 0, epoch: int = 0) -> None:
        self.step, self.epoch = step, epoch

    def on_step_end(self, run: Run, record: StepRecord) -> None:
        if record.step == self.step:
            raise KeyboardInterrupt

    def on_epoch_end(self, run: Run, record: EpochRecord) -> None:
        if record.epoch == self.epoch:
            raise KeyboardInterrupt


class Batch(nplora.Module):
    """A model that gets Ctrl-C at the end of its n-th forward pass."""

    def __init__(self, inner: nplora.Module, n: int) -> None:
        self.inner, self.left = inner, n

    def forward(self, x: Any) -> tuple[Array, Any]:
        self.left -= 1
        if self.left == 0:
            self.inner.forward(x)  # the dropout streams have moved
            raise KeyboardInterrupt
        return self.inner.forward(x)

    def backward(self, dy: Array, saved: Any, need_dx: bool = True) -> Array | None:
        return self.inner.backward(dy, saved, need_dx)


# ---- stopped and resumed ----


@pytest.mark.slow
# All of two epochs, and steps around the ends of the fourth and the last epoch.
@pytest.mark.parametrize("step", [*range(1, 11), 19, 20, 39, STEPS])
def test_a_run_stopped_after_a_step_resumes_to_the_same_bits(
    step: int, uninterrupted: dict[str, Any], tmp_path: Path
) -> None:
    first = trainer_of(net(rng=0), callbacks=[StopAfter(step=step)])
    history = fit(first, checkpoint_dir=tmp_path)
    assert history.interrupted
    assert len(history.steps) == step
    second = trainer_of(net(rng=99))  # other factors, dropout streams and frozen B: all come from the disk
    assert outcome(second, fit(second, checkpoint_dir=tmp_path, resume=True)) == uninterrupted


@pytest.mark.slow
@pytest.mark.parametrize("batch", [*range(1, 15), 20, 26])  # all of one epoch, and some of the next
def test_a_run_stopped_in_a_batch_of_a_step_resumes_to_the_same_bits(
    batch: int, uninterrupted: dict[str, Any], tmp_path: Path
) -> None:
    model = Batch(net(rng=0), 0)
    trainer = trainer_of(model)
    model.left = 2 + batch + (batch > 13)  # two passes check the labels, another validates the first epoch
    history = fit(trainer, checkpoint_dir=tmp_path)
    assert history.interrupted
    assert len(history.steps) == (batch - 1) // 13 * 5 + (batch - 1) % 13 // ACCUMULATE
    second = trainer_of(Batch(net(rng=99), 0))
    found = outcome(second, fit(second, checkpoint_dir=tmp_path, resume=True))
    assert list(found["factors"].values()) == list(uninterrupted["factors"].values())
    assert list(found["moments"].values()) == list(uninterrupted["moments"].values())
    assert found["history"] == uninterrupted["history"]


@pytest.mark.slow
@pytest.mark.parametrize("epoch", range(1, EPOCHS + 1))
def test_a_run_stopped_at_the_end_of_an_epoch_resumes_to_the_same_bits(
    epoch: int, uninterrupted: dict[str, Any], tmp_path: Path
) -> None:
    fit(trainer_of(net(rng=0), callbacks=[StopAfter(epoch=epoch)]), checkpoint_dir=tmp_path)
    second = trainer_of(net(rng=99))
    assert outcome(second, fit(second, checkpoint_dir=tmp_path, resume=True)) == uninterrupted


def test_a_run_of_an_iterable_resumes_by_skipping_the_used_batches(tmp_path: Path) -> None:
    x, y = data()
    batches = [(x[i : i + BATCH], y[i : i + BATCH]) for i in range(0, ROWS, BATCH)]
    whole = trainer_of(net(rng=0))
    expected = outcome(whole, whole.fit(batches, steps=17))
    trainer_of(net(rng=0), callbacks=[StopAfter(step=8)]).fit(batches, steps=17, checkpoint_dir=tmp_path)
    second = trainer_of(net(rng=99))
    history = second.fit(batches, steps=17, checkpoint_dir=tmp_path, resume=True)
    assert outcome(second, history) == expected
    third = trainer_of(net())
    with pytest.raises(ValueError, match="batches was 13, is 12"):
        third.fit(batches[:12], steps=17, checkpoint_dir=tmp_path, resume=True)


def test_a_resumed_run_counts_validation_losses_that_were_not_finite(tmp_path: Path) -> None:
    x, y = data()
    nothing = np.full_like(x[:10], np.nan), y[:10]

    def run(**arguments: Any) -> History:
        stops = arguments.pop("callbacks", [])
        return fit(trainer_of(net(rng=0), callbacks=stops), patience=3, validation=nothing, **arguments)

    run(callbacks=[StopAfter(epoch=2)], checkpoint_dir=tmp_path)
    history = run(checkpoint_dir=tmp_path, resume=True)
    assert (history.ended, history.best_epoch, len(history.epochs)) == ("patience", None, 3)


@pytest.mark.slow
@pytest.mark.parametrize("epoch", [1, 2, 3, 4])
def test_early_stopping_survives_a_stop(epoch: int, tmp_path: Path) -> None:
    """A learning rate that is much too high: the validation loss rises after a while."""

    def run(**arguments: Any) -> tuple[Trainer, dict[str, Any]]:
        stops = arguments.pop("callbacks", [])
        trainer = trainer_of(net(rng=0), optimizer=nplora.AdamW(lr=0.3), schedule="constant", callbacks=stops)
        history = fit(trainer, epochs=60, patience=2, **arguments)
        return trainer, outcome(trainer, history)

    _, expected = run()
    assert expected["history"][2] == "patience"
    assert len(expected["history"][1]) >= 4
    run(callbacks=[StopAfter(epoch=epoch)], checkpoint_dir=tmp_path)
    assert run(checkpoint_dir=tmp_path, resume=True)[1] == expected
    assert run(checkpoint_dir=tmp_path, resume=True)[1] == expected  # a run that is over is over


@pytest.mark.parametrize("patience", [None, 20])
def test_an_epoch_cut_off_by_the_last_step_is_recorded_once(patience: int | None, tmp_path: Path) -> None:
    whole, first, second = trainer_of(net(rng=0)), trainer_of(net(rng=0)), trainer_of(net())
    first.callbacks.append(StopAfter(epoch=2))
    usual: dict[str, Any] = {"epochs": None, "patience": patience}
    for trainer in (whole, first, second):
        trainer.schedule = "constant"
    expected = outcome(whole, fit(whole, **usual, steps=15))
    interrupted = fit(first, **usual, steps=7, checkpoint_dir=tmp_path)
    assert [(r.epoch, r.step) for r in interrupted.epochs] == [(1, 5)]
    with pytest.warns(UserWarning, match="total_steps was 7, is 15"):
        history = fit(second, **usual, steps=15, checkpoint_dir=tmp_path, resume=True)
    assert [(r.epoch, r.step) for r in history.epochs] == [(1, 5), (2, 10), (3, 15)]
    assert outcome(second, history) == expected


def test_a_finished_run_can_be_made_longer(tmp_path: Path) -> None:
    long = trainer_of(net(rng=0), schedule="constant")
    expected = outcome(long, fit(long))
    fit(trainer_of(net(rng=0), schedule="constant"), epochs=3, checkpoint_dir=tmp_path)
    second = trainer_of(net(rng=99), schedule="constant")
    with pytest.warns(UserWarning, match="total_steps was 15, is 40"):
        history = fit(second, checkpoint_dir=tmp_path, resume=True)
    assert outcome(second, history) == expected
    with pytest.raises(ValueError, match="of step 40, but this run ends at step 5"):
        fit(trainer_of(net(), schedule="constant"), epochs=1, checkpoint_dir=tmp_path, resume=True)


def test_resuming_in_an_empty_directory_begins_a_run(uninterrupted: dict[str, Any], tmp_path: Path) -> None:
    trainer = trainer_of(net(rng=0))
    assert outcome(trainer, fit(trainer, checkpoint_dir=tmp_path / "a" / "b", resume=True)) == uninterrupted


def test_the_log_of_a_resumed_run_has_every_record_once(tmp_path: Path) -> None:
    directory = tmp_path / "run"
    stop = StopAfter(step=8)
    fit(trainer_of(net(rng=0), callbacks=[stop]), checkpoint_dir=directory, checkpoint_every=3)
    with open(directory / "log.jsonl", "a", encoding="utf-8") as log:
        log.write('{"event":"step","step":9}\n{"event":"st')  # as a killed run might leave it
    fit(trainer_of(net()), checkpoint_dir=directory, checkpoint_every=3, resume=True)
    records = [json.loads(line) for line in (directory / "log.jsonl").read_text().splitlines()]
    assert [r["step"] for r in records if r["event"] == "step"] == list(range(1, STEPS + 1))
    assert [r["epoch"] for r in records if r["event"] == "epoch"] == list(range(1, EPOCHS + 1))
    assert [r["epoch"] for r in records if r["event"] == "evaluation"] == list(range(1, EPOCHS + 1))
    usual = ("step", "evaluation", "epoch")
    others = [record["event"] for record in records if record["event"] not in usual]
    assert others == ["header", "start", "resume", "end"]


class Epochs:
    """Two small batches an epoch."""

    def __init__(self) -> None:
        x, y = data()
        self.batches = [(x[:4], y[:4]), (x[4:8], y[4:8])]

    def __iter__(self) -> Iterator[tuple[Array, Array]]:
        return iter(self.batches)

    def __len__(self) -> int:
        return len(self.batches)


def test_after_a_damaged_checkpoint_was_replaced_two_steps_are_kept_as_usual(
    stopped: Path, tmp_path: Path
) -> None:
    """Later checkpoints of the same step replace each other, so the older one is of an earlier step."""
    path = newest_file(copy_of(stopped, tmp_path))
    raw = bytearray(path.read_bytes())
    damage_tensor(raw)
    path.write_bytes(raw)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about the damage, and about the earlier end
        fit(trainer_of(net()), epochs=3, checkpoint_dir=tmp_path, checkpoint_every=3, resume=True)
    states = [json.loads(safetensors.open(tmp_path / name).metadata["state"]) for name in NAMES]
    assert sorted((state["step"], state["epoch"]) for state in states) == [(12, 2), (15, 3)]


@pytest.mark.parametrize("stop", [0, 15])
def test_two_checkpoints_of_the_same_step_keep_one_of_an_earlier_step(stop: int, tmp_path: Path) -> None:
    """Step 15 ends an epoch, so another checkpoint follows that of the step: at once, or on resuming."""
    callbacks = [StopAfter(step=stop)]
    fit(trainer_of(net(rng=0), callbacks=callbacks), epochs=3, checkpoint_dir=tmp_path, checkpoint_every=3)
    if stop:
        fit(trainer_of(net(rng=0)), epochs=3, checkpoint_dir=tmp_path, checkpoint_every=3, resume=True)
    states = [json.loads(safetensors.open(tmp_path / name).metadata["state"]) for name in NAMES]
    newest, older = sorted(states, key=lambda state: -state["serial"])
    assert (newest["step"], newest["epoch"], older["step"]) == (15, 3, 12)


@pytest.mark.slow
def test_checkpoints_do_not_grow_with_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = []
    for epochs in (100, 400):
        trainer = trainer_of(net(rng=0), schedule="constant", accumulate=1)
        trainer.fit(Epochs(), epochs=epochs, checkpoint_dir=tmp_path / str(epochs), checkpoint_every=10**6)
        sizes.append(newest_file(tmp_path / str(epochs)).stat().st_size)
    assert sizes[1] - sizes[0] < 200  # larger numbers have more digits; there are no more records


@pytest.mark.slow
def test_the_history_of_a_long_run_is_rebuilt_from_the_log(tmp_path: Path) -> None:
    def run(epochs: int, **arguments: Any) -> dict[str, Any]:
        trainer = trainer_of(net(rng=0), schedule="constant", accumulate=1)
        return outcome(trainer, trainer.fit(Epochs(), epochs=epochs, **arguments))

    expected = run(150)
    run(140, checkpoint_dir=tmp_path)
    with pytest.warns(UserWarning, match="total_steps was 280, is 300"):
        assert run(150, checkpoint_dir=tmp_path, resume=True) == expected
    assert len(expected["history"][0]) == 300


def test_a_checkpoint_with_the_whole_history_resumes_without_a_log(
    stopped: Path, uninterrupted: dict[str, Any], tmp_path: Path
) -> None:
    directory = copy_of(stopped, tmp_path)
    (directory / "log.jsonl").unlink()
    second = trainer_of(net())
    with pytest.warns(
        UserWarning, match=r"log is missing, cut or damaged: .*12 of 12 steps and 2 of 2 epochs"
    ):
        history = fit(second, checkpoint_dir=directory, resume=True)
    assert outcome(second, history) == uninterrupted


def lose_all(log: bytes) -> bytes:
    return b""


def lose_the_end(log: bytes) -> bytes:
    return log[: log.index(b'"step":8,') + 20]


def lose_a_line(log: bytes) -> bytes:
    return log.replace(b'"event":"step","step":2,', b'"event":"step","step":[[')


def lose_a_number(log: bytes) -> bytes:
    return log.replace(b'"step":2,"epoch":1,"loss":', b'"step":2,"epoch":1,"loss":true,"was":')


@pytest.mark.parametrize(
    ("damage", "steps"),
    [
        (lose_all, [11, 12]),
        (lose_the_end, [1, 2, 3, 4, 5, 6, 7, 11, 12]),
        (lose_a_line, [1, *range(3, 13)]),
        (lose_a_number, [1, *range(3, 13)]),
    ],
)
def test_a_damaged_log_loses_records_but_not_the_run(
    damage: Callable[[bytes], bytes],
    steps: list[int],
    stopped: Path,
    uninterrupted: dict[str, Any],
    tmp_path: Path,
) -> None:
    directory = copy_of(stopped, tmp_path)
    last = newest(directory)
    rewrite(directory, history={name: a[-2:] for name, a in last.history.items()}, epochs=last.epochs[-1:])
    log = directory / "log.jsonl"
    log.write_bytes(damage(log.read_bytes()))
    second = trainer_of(net())
    with pytest.warns(
        UserWarning, match=rf"log\.jsonl: the log is .*its history has {len(steps)} of 12 steps"
    ):
        history = fit(second, checkpoint_dir=directory, resume=True)
    assert [record.step for record in history.steps] == [*steps, *range(13, STEPS + 1)]
    found = outcome(second, history)
    for part in ("factors", "moments", "streams"):
        assert found[part] == uninterrupted[part]
    lines = log.read_bytes().splitlines()
    assert all(line.count(b'{"event":') == 1 for line in lines), "a line without its end is left"


def test_a_log_begins_with_the_model_the_command_the_version_and_the_machine(tmp_path: Path) -> None:
    model = net(rng=0)
    fit(trainer_of(model, callbacks=[StopAfter(step=8)]), checkpoint_dir=tmp_path)
    fit(trainer_of(net()), checkpoint_dir=tmp_path, resume=True)
    records = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [record["event"] for record in records[:2]] == ["header", "start"]
    resumed = next(record for record in records if record["event"] == "resume")
    for record in (records[0], resumed):
        assert record["nplora"] == nplora.__version__
        assert record["model"] == repr(model)
        words = Path("/proc/self/cmdline").read_bytes().decode().split("\0")[:-1]
        assert systems.words_of(record["command"]) == words
        assert record["machine"].keys() == {"isa", "threads", "cpu"}
        assert datetime.datetime.fromisoformat(record["date"]).tzinfo is not None


def test_a_header_is_short_and_valid_text_whatever_the_model_is_called(tmp_path: Path) -> None:
    class Strange(nplora.LoRALinear):
        def __repr__(self) -> str:
            return "a file named \udcff " + "x" * 10_000

    model = Strange(np.eye(3), rank=1)
    x = np.ones((4, 3))
    Trainer(model, loss="mse", progress=False).fit(x, x, checkpoint_dir=tmp_path)
    header = json.loads((tmp_path / "log.jsonl").read_text().splitlines()[0])
    assert header["model"].startswith("a file named ? x")
    assert len(header["model"]) < 5000
    assert len(plot.read_log(tmp_path / "log.jsonl").steps) == 1
    assert header["event"] == log_header.HEADER
    assert header["data"] == {"rows": 4, "batch_size": 32, "batches": 1}
    assert header["valid"] is None


def test_a_model_whose_repr_fails_has_the_name_of_its_class_in_the_header(tmp_path: Path) -> None:
    class Nameless(nplora.LoRALinear):
        def __repr__(self) -> str:
            raise AttributeError("no title yet")

    x = np.ones((4, 3))
    model = Nameless(np.eye(3), rank=1)
    Trainer(model, loss="mse", progress=False).fit(x, x, checkpoint_dir=tmp_path)
    header = json.loads((tmp_path / "log.jsonl").read_text().splitlines()[0])
    assert header["model"] == "Nameless"


def test_a_run_whose_log_has_no_header_resumes_and_is_read(
    uninterrupted: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As an early version wrote it."""
    real = RunDirectory.log

    def log(directory: RunDirectory, record: Any) -> None:
        if record["event"] != "header":
            real(directory, record)

    with monkeypatch.context() as early:
        early.setattr(RunDirectory, "log", log)
        fit(trainer_of(net(rng=0), callbacks=[StopAfter(step=8)]), checkpoint_dir=tmp_path)
    second = trainer_of(net())
    assert outcome(second, fit(second, checkpoint_dir=tmp_path, resume=True)) == uninterrupted
    assert (tmp_path / "log.jsonl").read_text().startswith('{"event":"start",')
    assert len(plot.read_log(tmp_path / "log.jsonl").steps) == STEPS


def test_the_log_is_on_the_disk_before_the_checkpoint_that_relies_on_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []

    def noting(name: str, real: Any) -> Any:
        def call(*arguments: Any, **keywords: Any) -> Any:
            path = str(arguments[0]) if name == "replace" else systems.path_of(arguments[0])
            calls.append(f"{name} {Path(path).suffix}")
            return real(*arguments, **keywords)

        return call

    with monkeypatch.context() as patched:
        for name in ("fsync", "replace"):
            patched.setattr(os, name, noting(name, getattr(os, name)))
        fit(trainer_of(net()), checkpoint_dir=tmp_path, checkpoint_every=7)
    renames = [i for i, call in enumerate(calls) if call.startswith("replace")]
    assert len(renames) >= 6
    assert all(calls[i - 2 : i] == ["fsync .jsonl", "fsync .tmp"] for i in renames)


def test_epochs_shorter_than_a_second_share_a_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Count(Callback):
        def __init__(self) -> None:
            self.steps: list[int] = []

        def on_checkpoint(self, run: Run) -> None:
            self.steps.append(run.step)

    def saved(seconds: float, directory: Path) -> list[int]:
        monkeypatch.setattr(run_checkpoints, "EPOCH_CHECKPOINT_SECONDS", seconds)
        count = Count()
        fit(trainer_of(net(), callbacks=[count]), epochs=3, checkpoint_dir=directory)
        return count.steps

    assert saved(0, tmp_path / "each") == [0, 1, 5, 10, 15]
    assert saved(3600, tmp_path / "few") == [0, 1, 15]


class Clock(Callback):
    """A clock that advances by these seconds at the end of every step and every epoch."""

    def __init__(self, step: float, epoch: float = 0.0) -> None:
        self.now, self.step, self.epoch = 0.0, step, epoch

    def __call__(self) -> float:
        return self.now

    def on_step_end(self, run: Run, record: StepRecord) -> None:
        self.now += self.step

    def on_epoch_end(self, run: Run, record: EpochRecord) -> None:
        self.now += self.epoch


class Saves(Callback):
    """The steps at which checkpoints were made."""

    def __init__(self) -> None:
        self.steps: list[int] = []

    def on_checkpoint(self, run: Run) -> None:
        self.steps.append(run.step)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("often", "clock", "saved"),
    [
        ({"checkpoint_every": 40}, Clock(120), [0, 1, 4, 7, 10, 13, 15]),
        ({"checkpoint_every": 40}, Clock(0, 400), [0, 1, 5, 10, 15]),
        ({"checkpoint_every": 40, "save_minutes": 2}, Clock(30), [0, 1, 5, 9, 13, 15]),
        ({"checkpoint_every": 4, "save_minutes": 0}, Clock(1000), [0, 1, 4, 8, 12, 15]),
        (
            {"checkpoint_every": 6},
            Clock(120),
            [0, 1, 4, 6, 9, 12, 15, 15],
        ),  # one after the step, one after its epoch
        ({}, Clock(120), [0, 1, 4, 5, 8, 10, 13, 15]),
    ],
    ids=["steps", "validations", "two minutes", "no time", "both", "epochs"],
)
def test_a_checkpoint_is_made_after_the_first_step_and_when_the_last_one_is_old(
    often: dict[str, Any], clock: Clock, saved: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = trainer_of(net(rng=0))
    expected = outcome(whole, fit(whole, epochs=3))
    count = Saves()
    trainer = trainer_of(net(rng=0), callbacks=[clock, count])
    with monkeypatch.context() as patched:
        patched.setattr(run_checkpoints.time, "monotonic", clock)
        history = fit(trainer, epochs=3, checkpoint_dir=tmp_path, **often)
    assert count.steps == saved
    assert outcome(trainer, history) == expected  # checkpoints do not change the run


def test_the_time_between_checkpoints_is_not_negative(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="save_minutes is -1, expected at least 0"):
        fit(trainer_of(net()), checkpoint_dir=tmp_path / "run", save_minutes=-1)
    assert not (tmp_path / "run").exists()


# ---- errors outside of a step ----


class FailAt(Callback):
    """Fails in one of the hooks, from this step on."""

    def __init__(self, hook: str, step: int) -> None:
        self.step = step
        setattr(self, hook, self._fail)

    def _fail(self, run: Run, *record: Any) -> None:
        if run.step >= self.step:
            raise ArithmeticError("of a callback")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("hook", "step", "saved"),
    [("on_step_end", 8, 8), ("on_epoch_end", 8, 10), ("on_checkpoint", 9, 15), ("on_fit_end", 1, STEPS)],
)
def test_an_error_in_a_callback_loses_nothing(
    hook: str, step: int, saved: int, uninterrupted: dict[str, Any], tmp_path: Path
) -> None:
    first = trainer_of(net(rng=0), callbacks=[FailAt(hook, step)])
    with pytest.raises(ArithmeticError, match="of a callback") as raised:
        fit(first, checkpoint_dir=tmp_path, checkpoint_every=15)
    assert newest(tmp_path).step == saved
    if hook != "on_fit_end":
        assert raised.value.__notes__ == [
            f"the run is saved at step {saved}: --resume (resume=True) continues the run"
        ]
    second = trainer_of(net(rng=99))
    assert outcome(second, fit(second, checkpoint_dir=tmp_path, resume=True)) == uninterrupted


def test_an_error_in_the_data_or_the_validation_loses_nothing(tmp_path: Path) -> None:
    x, y = data()
    batches = [(x[i : i + BATCH], y[i : i + BATCH]) for i in range(0, ROWS, BATCH)]

    class Broken:
        """Batches; one of them cannot be read."""

        def __init__(self, at: int) -> None:
            self.at = at

        def __len__(self) -> int:
            return len(batches)

        def __iter__(self) -> Iterator[tuple[Array, Array]]:
            yield from batches[: self.at]
            if self.at < len(batches):
                raise OSError(errno.EIO, "a tape is torn")

    whole = trainer_of(net(rng=0))
    expected = outcome(whole, whole.fit(batches, steps=12, validation=batches))
    for name, train, held_out, saved in (
        ("data", Broken(7), batches, 2),
        ("validation", batches, Broken(0), 5),
    ):
        with pytest.raises(OSError, match="a tape is torn"):
            trainer_of(net(rng=0)).fit(
                train, steps=12, validation=held_out, checkpoint_dir=tmp_path / name, checkpoint_every=50
            )
        assert newest(tmp_path / name).step == saved
        second = trainer_of(net(rng=99))
        arguments = {"steps": 12, "validation": batches, "checkpoint_dir": tmp_path / name, "resume": True}
        assert outcome(second, second.fit(batches, **arguments)) == expected


@pytest.mark.slow
@pytest.mark.parametrize("patience", [None, 20])
@pytest.mark.parametrize("line", ['{"event":"step","step":8,', '{"event":"epoch","epoch":2,'])
def test_a_log_that_fails_once_loses_nothing(
    line: str, patience: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, whole, cut = os.write, trainer_of(net(rng=0)), list[int]()
    expected = outcome(whole, fit(whole, patience=patience))

    def write(descriptor: int, chunk: Any) -> int:
        if bytes(chunk).startswith(line.encode()):
            cut.append(descriptor)
            return real(descriptor, bytes(chunk)[:30])  # a short write first
        if descriptor in cut:
            cut.clear()
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(descriptor, chunk)

    with monkeypatch.context() as full:
        full.setattr(os, "write", write)
        with pytest.raises(OSError, match="No space left on device") as raised:
            fit(trainer_of(net(rng=0)), checkpoint_dir=tmp_path, checkpoint_every=50, patience=patience)
    saved = 8 if '"step"' in line else 10
    assert raised.value.__notes__[0].startswith(f"the run is saved at step {saved}: --resume")
    second = trainer_of(net(rng=99))
    found = outcome(second, fit(second, checkpoint_dir=tmp_path, resume=True, patience=patience))
    assert found == expected
    records = [json.loads(text) for text in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [r["step"] for r in records if r["event"] == "step"] == list(range(1, STEPS + 1))
    assert [r["epoch"] for r in records if r["event"] == "epoch"] == list(range(1, EPOCHS + 1))


def test_an_error_after_which_saving_fails_is_still_raised(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(directory: RunDirectory, point: Checkpoint) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    class Fail(Callback):
        def on_step_end(self, run: Run, record: StepRecord) -> None:
            if record.step == 4:
                monkeypatch.setattr(RunDirectory, "save", full)
                raise ArithmeticError("first")

    with pytest.raises(ArithmeticError, match="first") as raised:
        fit(trainer_of(net(), callbacks=[Fail()]), checkpoint_dir=tmp_path, checkpoint_every=3)
    [note] = raised.value.__notes__
    assert note.startswith("the run is saved at step 3, but step 4 could not be saved (no space")
    assert newest(tmp_path).step == 3


def test_an_update_that_failed_halfway_is_not_saved(tmp_path: Path) -> None:
    class Torn(nplora.AdamW):
        def step(self, parameters: Any, *arguments: Any, **keywords: Any) -> float | None:
            if self.steps == 4:
                parameters[0].value[...] = 7
                raise ArithmeticError("halfway")
            return super().step(parameters, *arguments, **keywords)

    with pytest.raises(ArithmeticError, match="halfway") as raised:
        fit(trainer_of(net(), optimizer=Torn(lr=0.02)), checkpoint_dir=tmp_path, checkpoint_every=3)
    assert raised.value.__notes__ == ["the run is saved at step 3: --resume (resume=True) continues the run"]
    assert not any((array == 7).all() for array in newest(tmp_path).parameters.values())


# ---- losses that are not finite ----


class Explodes:
    """A mean of squares that is NaN for parameters beyond a bound, as in a run that diverges."""

    def __init__(self, model: nplora.Module, bound: float) -> None:
        self.parameter, self.bound = model.parameters()[0].value, bound

    def __call__(self, prediction: Array, target: Any) -> tuple[float, Array]:
        if np.abs(self.parameter).max() > self.bound:
            return math.nan, prediction
        return float((prediction**2).mean()), np.full_like(prediction, 1.0)

    def count(self, prediction: Array, target: Any) -> int:
        return len(prediction)


def exploding(lr: float, directory: Path, every: int, **arguments: Any) -> tuple[Trainer, History]:
    """SGD on a constant gradient, with factors that grow step by step until the loss is NaN."""
    model = net(rng=0)
    trainer = trainer_of(
        model, loss=Explodes(model, 0.5), optimizer=nplora.AdamW(lr=lr), schedule="constant", warmup_steps=0
    )
    x, y = data()
    return trainer, trainer.fit(
        x, y, steps=12, batch_size=BATCH, checkpoint_dir=directory, checkpoint_every=every, **arguments
    )


@pytest.mark.slow
@pytest.mark.parametrize("every", [1, 2, 4, 100])
def test_a_run_that_diverged_continues_with_a_lower_lr_and_not_with_the_same(
    every: int, tmp_path: Path
) -> None:
    with pytest.raises(nplora.NonFiniteLossError, match=r"step 8 .* is nan.*a lower lr may help") as raised:
        exploding(0.09, tmp_path, every)
    good = {1: 6, 2: 6, 4: 4, 100: 1}[every]  # the parameters of step 7 lead to NaN with any rate
    assert newest(tmp_path).step == 7
    assert raised.value.good_step == good
    [note] = raised.value.__notes__
    advice, _, ruined = note.partition(", where the loss had risen from 0.3936 to ")
    assert advice == f"--resume with a lower --lr (resume=True, a lower lr) continues from step {good}"
    loss = {6: "51.01", 4: "16.01"}.get(good)
    assert ruined == (f"{loss}: a new run with --overwrite and a lower --lr would be better" if loss else "")
    disk = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    with pytest.raises(
        ValueError,
        match=rf"the run ended with step 8 .*same settings .* lower --lr .* from step {good}; --over",
    ):
        exploding(0.09, tmp_path, every, resume=True)
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == disk
    with pytest.warns(UserWarning, match=r"lr was 0\.09, is 0\.001"):
        trainer, history = exploding(0.001, tmp_path, every, resume=True)
    assert [record.step for record in history.steps] == list(range(1, 13))
    assert [record.lr for record in history.steps] == [0.09] * good + [0.001] * (12 - good)
    assert newest(tmp_path).step == 12
    assert outcome(*exploding(0.001, tmp_path, every, resume=True)) == outcome(trainer, history)
    log = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert "nonfinite" not in {record["event"] for record in log}


def test_a_run_that_went_back_and_was_killed_does_not_resume_from_what_led_to_nan(tmp_path: Path) -> None:
    with pytest.raises(nplora.NonFiniteLossError):
        exploding(0.09, tmp_path, 100)

    class Killed(BaseException):
        pass

    class Kill(Callback):
        def on_fit_start(self, run: Run) -> None:
            raise Killed

    model = net(rng=0)
    trainer = trainer_of(
        model, loss=Explodes(model, 0.5), optimizer=nplora.AdamW(lr=0.001), schedule="constant",
        warmup_steps=0, callbacks=[Kill()],
    )  # fmt: skip
    with pytest.raises(Killed), pytest.warns(UserWarning, match=r"lr was 0\.09, is 0\.001"):
        trainer.fit(*data(), steps=12, batch_size=BATCH, checkpoint_dir=tmp_path, resume=True)
    assert newest(tmp_path).step == 1
    with pytest.warns(UserWarning, match=r"lr was 0\.001, is 0\.002"):
        _, history = exploding(0.002, tmp_path, 100, resume=True)
    assert [record.lr for record in history.steps] == [0.09] + [0.002] * 11


def test_a_diverged_run_without_an_earlier_checkpoint_is_refused(tmp_path: Path) -> None:
    with pytest.raises(nplora.NonFiniteLossError):
        exploding(0.09, tmp_path, 100)
    older = min((tmp_path / name for name in NAMES), key=lambda path: checkpoint.read(path).serial)
    older.unlink()
    with pytest.raises(ValueError, match=r"no earlier checkpoint is left; --overwrite"):
        exploding(0.001, tmp_path, 100, resume=True)


@pytest.mark.slow
@pytest.mark.parametrize(("at", "good"), [(1, 0), (5, 3)])
def test_parameters_that_an_update_made_infinite_leave_the_checkpoint_before(
    at: int, good: int, tmp_path: Path
) -> None:
    class Overflowing(nplora.AdamW):
        def step(self, parameters: Any, *arguments: Any, **keywords: Any) -> float | None:
            norm = super().step(parameters, *arguments, **keywords)
            if self.steps == at and self.lr == 0.02:
                parameters[0].value[0, 0] = np.inf
            return norm

    def run(lr: float, **arguments: Any) -> History:
        trainer = trainer_of(net(rng=0), optimizer=Overflowing(lr=lr))
        return fit(trainer, checkpoint_dir=tmp_path, checkpoint_every=3, **arguments)

    with pytest.raises(nplora.NonFiniteLossError, match="a lower lr may help") as raised:
        run(0.02)
    assert raised.value.good_step == newest(tmp_path).step == good
    with pytest.raises(ValueError, match=f"lower --lr .*continues from step {good}; --overwrite"):
        run(0.02, resume=True)
    with pytest.warns(UserWarning, match=r"lr was 0\.02, is 0\.01"):
        history = run(0.01, resume=True)
    assert [record.step for record in history.steps] == list(range(1, STEPS + 1))


def test_ctrl_c_while_the_step_before_an_error_is_saved_is_not_lost(tmp_path: Path) -> None:
    class Fail(Callback):
        def on_step_end(self, run: Run, record: StepRecord) -> None:
            raise ArithmeticError("first")

    real = RunDirectory.save

    def save(directory: RunDirectory, point: Checkpoint) -> None:
        real(directory, point)
        if point.step:
            signal.raise_signal(signal.SIGINT)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(RunDirectory, "save", save)
        with pytest.raises(KeyboardInterrupt) as raised:
            fit(trainer_of(net(), callbacks=[Fail()]), checkpoint_dir=tmp_path)
    assert isinstance(raised.value.__context__, ArithmeticError)
    assert newest(tmp_path).step == 1


def test_a_log_that_fails_at_the_end_says_that_the_run_is_saved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = RunDirectory.log

    def log(directory: RunDirectory, record: dict[str, Any]) -> None:
        if record["event"] == "end":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(directory, record)

    monkeypatch.setattr(RunDirectory, "log", log)
    with pytest.raises(OSError, match="No space") as raised:
        fit(trainer_of(net()), epochs=1, checkpoint_dir=tmp_path)
    assert raised.value.__notes__ == ["the run is saved at step 5: --resume (resume=True) continues the run"]


def test_bad_data_are_not_blamed_on_the_learning_rate(tmp_path: Path) -> None:
    x, y = data()
    batches = [(x[i : i + BATCH], y[i : i + BATCH]) for i in range(0, ROWS, BATCH)]
    batches[7] = (np.full_like(x[:4], np.nan), y[:4])
    trainer = trainer_of(net(rng=0))
    with pytest.raises(nplora.NonFiniteLossError, match=r"the input x is not finite") as raised:
        trainer.fit(batches, checkpoint_dir=tmp_path, checkpoint_every=50)
    assert raised.value.__notes__ == ["the run is saved at step 2"]
    assert newest(tmp_path).step == 2
    batches[7] = (x[28:32], y[28:32])
    whole, second = trainer_of(net(rng=0)), trainer_of(net(rng=99))
    expected = outcome(whole, whole.fit(batches))
    assert outcome(second, second.fit(batches, checkpoint_dir=tmp_path, resume=True)) == expected


# ---- damaged, foreign and contested checkpoints ----


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two generations: steps 9 and 12, the newer one in checkpoint-1."""
    directory = tmp_path_factory.mktemp("stopped")
    fit(trainer_of(net(rng=0), callbacks=[StopAfter(step=12)]), checkpoint_dir=directory, checkpoint_every=3)
    assert newest(directory).step == 12
    return directory


def copy_of(directory: Path, target: Path) -> Path:
    for name in (*NAMES, "log.jsonl"):
        (target / name).write_bytes((directory / name).read_bytes())
    return target


def newest(directory: Path) -> Checkpoint:
    with RunDirectory(directory) as opened:
        assert opened.newest is not None
        return opened.newest


def newest_file(directory: Path) -> Path:
    return max((directory / name for name in NAMES), key=lambda path: checkpoint.read(path).serial)


def rewrite(directory: Path, **changes: Any) -> None:
    """Replace fields of the newest checkpoint, checksum and all."""
    changed = dataclasses.replace(newest(directory), **changes)
    files.replace([checkpoint.new_file(newest_file(directory), changed)])


def damage_header(raw: bytearray) -> None:
    raw[20] ^= 1


def damage_state(raw: bytearray) -> None:
    at = raw.index(b'\\"step\\": 12')
    raw[at + len(b'\\"step\\": 1')] ^= 1  # 12 becomes 13


def damage_tensor(raw: bytearray) -> None:
    raw[-5] ^= 0x10


def cut_short(raw: bytearray) -> None:
    del raw[-1:]


def empty(raw: bytearray) -> None:
    raw.clear()


@pytest.mark.slow
@pytest.mark.parametrize("damage", [damage_header, damage_state, damage_tensor, cut_short, empty])
def test_a_damaged_checkpoint_is_skipped_with_a_warning(
    damage: Callable[[bytearray], None], stopped: Path, uninterrupted: dict[str, Any], tmp_path: Path
) -> None:
    directory = copy_of(stopped, tmp_path)
    path = newest_file(directory)
    raw = bytearray(path.read_bytes())
    damage(raw)
    path.write_bytes(raw)
    second = trainer_of(net())
    with pytest.warns(UserWarning, match=rf"{path.name}.*the other checkpoint, of step 9, is used"):
        history = fit(second, checkpoint_dir=directory, resume=True)
    assert outcome(second, history) == uninterrupted
    assert newest(directory).step == STEPS


def test_a_damaged_checkpoint_is_the_next_to_be_replaced(stopped: Path, tmp_path: Path) -> None:
    directory = copy_of(stopped, tmp_path)
    path = newest_file(directory)
    raw = bytearray(path.read_bytes())
    damage_tensor(raw)
    path.write_bytes(raw)
    with RunDirectory(directory) as opened:
        assert opened.newest is not None
        opened.save(opened.newest)
    assert [checkpoint.read(directory / name).step for name in NAMES] == [9, 9]


def test_the_older_checkpoint_is_not_read_if_the_newer_one_is_whole(stopped: Path, tmp_path: Path) -> None:
    directory = copy_of(stopped, tmp_path)
    (older,) = {directory / name for name in NAMES} - {newest_file(directory)}
    raw = bytearray(older.read_bytes())
    damage_tensor(raw)
    older.write_bytes(raw)
    with RunDirectory(directory) as opened:
        assert opened.latest() is not None
        assert not opened.damaged


PEAK = """
import sys
import numpy as np, nplora
from nplora.finetuning.planning import peak_memory
model = nplora.Sequential(nplora.LoRALinear(np.ones((2048, 2048), np.float32), rank=512, rng=0))
trainer = nplora.Trainer(model, "mse", nplora.AdamW(), seed=0)
x = np.ones((2, 2048), np.float32)
trainer.fit(x, x, steps=int(sys.argv[2]), batch_size=2, checkpoint_dir=sys.argv[1], resume=True)
values = sum(parameter.value.size for parameter in model.parameters())
print(peak_memory(), values)
"""


@pytest.mark.slow
def test_resuming_holds_only_the_mapped_checkpoint_twice(tmp_path: Path) -> None:
    def peak(steps: int) -> tuple[int, int]:
        command = [sys.executable, "-c", PEAK, str(tmp_path), str(steps)]
        result = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
        return int(result[0]), int(result[1])

    (first, values), (resumed, _) = peak(1), peak(2)
    # For each value 12 bytes are mapped, before the first gradient takes 4. We measured 5.
    assert resumed - first <= 9 * values


def test_the_arrays_of_a_checkpoint_are_mapped(stopped: Path) -> None:
    base: Any = next(iter(newest(stopped).optimizer.values()))
    while not isinstance(base, memoryview):
        base = base.base
    assert isinstance(base.obj, mmap.mmap)


def test_two_damaged_checkpoints_are_an_error_that_names_both(stopped: Path, tmp_path: Path) -> None:
    directory = copy_of(stopped, tmp_path)
    for name in NAMES:
        raw = bytearray((directory / name).read_bytes())
        damage_tensor(raw)
        (directory / name).write_bytes(raw)
    with pytest.raises(CorruptError, match=r"no undamaged checkpoint is left: .*checkpoint-1.*checkpoint-0"):
        fit(trainer_of(net()), checkpoint_dir=directory, resume=True)
    with pytest.raises(FileExistsError):
        fit(trainer_of(net()), checkpoint_dir=directory)


def test_a_checkpoint_of_a_later_schema_is_not_skipped(
    stopped: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = copy_of(stopped, tmp_path)
    changed, path = newest(directory), newest_file(directory)
    with monkeypatch.context() as later:
        later.setattr(checkpoint, "SCHEMA", 4)
        files.replace([checkpoint.new_file(path, changed)])
    with pytest.raises(
        UnsupportedError, match=r"the checkpoint has schema '4', but this nplora reads only schemas 1 to 3"
    ):
        fit(trainer_of(net()), checkpoint_dir=directory, resume=True)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"step": -1}, "step is -1"),
        ({"step": 41}, "step is 41, but total_steps is 40"),
        ({"epoch": True}, "epoch is True"),
        ({"random_state": []}, r"random_state is \[\]"),
        ({"serial": -3}, "serial is -3"),
        ({"best": {}}, r"best is \{\}"),
        ({"best": {"loss": "low", "epoch": 1, "step": 5, "since": 0}}, "best is .*expected"),
        ({"best": {"loss": 1.0, "epoch": 1, "step": 5, "since": None}}, "best is .*expected"),
        ({"best": {"loss": 1.0, "epoch": 1, "since": 0}}, "best is .*expected"),
        ({"random_state": {"0": 3}}, r"random_state of '0' is 3, expected"),
        ({"random_state": {"0": [1, 2.5]}}, r"random_state of '0' is \[1, 2\.5\], expected"),
        ({"random_state": {"0": [1 << 64, 0]}}, r"random_state of '0' is .*expected"),
        ({"batch": 1 << 63}, "batch is 9223372036854775808, expected below"),
        ({"epoch": 13}, "epoch is 13, but step is only 12"),
    ],
)
def test_a_checkpoint_that_contradicts_itself_is_corrupt(
    changes: dict[str, Any], message: str, stopped: Path, tmp_path: Path
) -> None:
    directory = copy_of(stopped, tmp_path)
    path = newest_file(directory)
    rewrite(directory, **changes)
    with pytest.raises(CorruptError, match=message):
        checkpoint.read(path)


def unchanged_by_failing_resume(
    directory: Path, model: nplora.Module, error: type[Exception], message: str
) -> None:
    before = {name: array.tobytes() for name, array in fingerprint.factors(model).items()}
    log, trainer = (directory / "log.jsonl").read_bytes(), trainer_of(model)
    with pytest.raises(error, match=message):
        fit(trainer, checkpoint_dir=directory, resume=True)
    assert {name: array.tobytes() for name, array in fingerprint.factors(model).items()} == before
    assert (directory / "log.jsonl").read_bytes() == log
    assert trainer.optimizer.steps == 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch": 14}, "batch 14, but an epoch has only 13"),
        ({"epochs": [{}]}, "the checkpoint's history is not valid"),
        ({"epochs": [dict.fromkeys(("epoch", "step", "loss", "val_loss", "val_accuracy", "seconds"), "1")]},
         "the checkpoint's history is not valid"),
        ({"evaluations": [{"step": 1}]}, "the checkpoint's history is not valid"),
        ({"evaluations": [dict.fromkeys(("step", "epoch", "val_loss", "val_accuracy", "seconds"), "1")]},
         "step of an evaluation is '1', expected a number"),
    ],
)  # fmt: skip
def test_an_impossible_position_or_history_changes_nothing(
    changes: dict[str, Any], message: str, stopped: Path, tmp_path: Path
) -> None:
    directory = copy_of(stopped, tmp_path)
    rewrite(directory, **changes)
    unchanged_by_failing_resume(directory, net(), CorruptError, message)


def test_a_checkpoint_of_another_base_model_is_corrupt(stopped: Path, tmp_path: Path) -> None:
    other = net()
    w = other.modules[0].weight.to_numpy()  # type: ignore[attr-defined]
    w[3, 1] += 1
    other.modules[0] = nplora.LoRALinear(w, rank=2, dropout=0.3, use_dora=True)
    unchanged_by_failing_resume(copy_of(stopped, tmp_path), other, CorruptError, "another base model")


def test_a_checkpoint_of_other_shapes_lists_them_all(stopped: Path, tmp_path: Path) -> None:
    other = net()
    w = other.modules[0].weight  # type: ignore[attr-defined]
    other.modules[0] = nplora.LoRALinear(w, rank=3, dropout=0.3, use_dora=True)
    unchanged_by_failing_resume(
        copy_of(stopped, tmp_path),
        other,
        ValueError,
        r"0\.rank was 2, is 3; --overwrite",
    )


def test_arrays_of_another_rank_are_listed_up_to_five(stopped: Path, tmp_path: Path) -> None:
    directory, other = copy_of(stopped, tmp_path), net()
    settings = newest(directory).settings  # an old checkpoint does not have the ranks of its layers
    settings["fixed"] = {k: v for k, v in settings["fixed"].items() if k != "layers"}
    rewrite(directory, settings=settings)
    for n in (0, 2):
        w, dora = other.modules[n].weight, n == 0  # type: ignore[attr-defined]
        other.modules[n] = nplora.LoRALinear(w, rank=3, dropout=0.1, use_dora=dora, freeze_B=not dora)
    message = r"the checkpoint is of another model: 0\.A is (?:[^;]*; ){4}[^;]*; and \d+ more; --overwrite"
    unchanged_by_failing_resume(directory, other, CorruptError, message)


def test_a_moment_of_the_wrong_shape_is_corrupt(stopped: Path, tmp_path: Path) -> None:
    directory = copy_of(stopped, tmp_path)
    moments = {**newest(directory).optimizer, "exp_avg.3.weight": np.zeros((2, 2), np.float32)}
    rewrite(directory, optimizer=moments)
    unchanged_by_failing_resume(directory, net(), CorruptError, r"exp_avg\.3\.weight is float32 \(2, 2\)")


def test_a_run_cannot_resume_with_other_data_or_batches(stopped: Path, tmp_path: Path) -> None:
    directory = copy_of(stopped, tmp_path)
    x, y = data()
    advice = "to continue, use the run's earlier settings: "
    with pytest.raises(ValueError, match=f"batch_size was 4, is 5; {advice}batch_size=4; --overwrite"):
        fit(trainer_of(net()), batch_size=5, checkpoint_dir=directory, resume=True)
    changes = "shuffle was True, is False, seed was 7, is 8, accumulate was 3, is 2"
    advice += "shuffle=True, seed=7 and accumulate=3"
    with pytest.raises(ValueError, match=f"{changes}; {advice}; --overwrite"):
        fit(trainer_of(net(), seed=8, accumulate=2), shuffle=False, checkpoint_dir=directory, resume=True)
    x[51, 5] += 1
    with pytest.raises(ValueError, match=r"x has changed; --overwrite"):
        trainer_of(net()).fit(x, y, epochs=EPOCHS, batch_size=BATCH, checkpoint_dir=directory, resume=True)
    with pytest.raises(ValueError, match="optimizer was AdamW, is SGD"):
        fit(trainer_of(net(), optimizer=nplora.SGD(lr=0.1)), checkpoint_dir=directory, resume=True)


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"alpha": 64}, r"0\.alpha was 16\.0, is 64\.0"),
        ({"use_rslora": True}, r"0\.use_rslora was False, is True"),
        ({"dropout": 0.5}, r"0\.dropout was 0\.3, is 0\.5"),
        ({"compute": "bfloat16"}, r"0\.compute was float32, is bfloat16"),
        ({"compute": "int8"}, r"0\.compute was float32, is int8"),
        ({"compute": "int8", "alpha": 64}, r"0\.alpha was 16\.0, is 64\.0, 0\.compute was float32, is int8"),
    ],
)
def test_a_run_cannot_resume_with_other_settings_of_a_layer(
    other: dict[str, Any], message: str, stopped: Path, tmp_path: Path
) -> None:
    model = net()
    w = model.modules[0].weight.to_numpy()  # type: ignore[attr-defined]
    usual = {"rank": 2, "dropout": 0.3, "use_dora": True}
    model.modules[0] = nplora.LoRALinear(w, **{**usual, **other})
    change = r"--change-compute \(change_compute=True\) continues the run in the new arithmetic; "
    whole = f"settings: {message}; {change * (other.keys() == {'compute'})}--overwrite"
    unchanged_by_failing_resume(copy_of(stopped, tmp_path), model, ValueError, whole)


def test_no_setting_of_layers_but_the_arithmetic_is_advised(stopped: Path, tmp_path: Path) -> None:
    directory, model = copy_of(stopped, tmp_path), net()
    for n in (0, 2):
        w, dora = model.modules[n].weight, n == 0  # type: ignore[attr-defined]
        dropout = 0.3 if dora else 0.1
        model.modules[n] = nplora.LoRALinear(
            w, rank=2, alpha=8, dropout=dropout, use_dora=dora, freeze_B=not dora
        )
    message = r"settings: alpha was 16\.0, is 8\.0 in 2 layers; --overwrite"
    unchanged_by_failing_resume(directory, model, ValueError, message)
    both = r"batch_size was 4, is 5, alpha was 16\.0, is 8\.0 in 2 layers; --overwrite"
    with pytest.raises(ValueError, match=both):
        fit(trainer_of(model), batch_size=5, checkpoint_dir=directory, resume=True)
    x, y = data()
    with pytest.raises(ValueError, match=r"alpha was 16\.0, is 8\.0 in 2 layers; --overwrite"):
        trainer_of(model).fit(x, y, epochs=1, batch_size=BATCH, checkpoint_dir=directory, resume=True)


def test_a_change_of_the_arithmetic_is_not_offered_if_the_run_would_be_refused(
    stopped: Path, tmp_path: Path
) -> None:
    directory, model = copy_of(stopped, tmp_path), net()
    w = model.modules[0].weight.to_numpy()  # type: ignore[attr-defined]
    model.modules[0] = nplora.LoRALinear(w, rank=2, dropout=0.3, use_dora=True, compute="int8")
    rewrite(directory, batch=14)
    unchanged_by_failing_resume(directory, model, ValueError, r"0\.compute was float32, is int8; --overwrite")


def test_a_checkpoint_without_the_settings_of_layers_resumes(
    stopped: Path, uninterrupted: dict[str, Any], tmp_path: Path
) -> None:
    directory, trainer = copy_of(stopped, tmp_path), trainer_of(net())
    settings = newest(directory).settings
    settings["fixed"] = {k: v for k, v in settings["fixed"].items() if k != "layers"}
    rewrite(directory, settings=settings)
    assert outcome(trainer, fit(trainer, checkpoint_dir=directory, resume=True)) == uninterrupted


def test_a_run_resumes_with_other_settings_after_a_warning(stopped: Path, tmp_path: Path) -> None:
    trainer = trainer_of(net(), optimizer=nplora.AdamW(lr=0.01))
    with pytest.warns(UserWarning, match=r"differ from the checkpoint's: lr was 0\.02, is 0\.01$"):
        fit(trainer, checkpoint_dir=copy_of(stopped, tmp_path), resume=True)


def test_another_instruction_set_is_a_warning(stopped: Path, tmp_path: Path) -> None:
    directory = copy_of(stopped, tmp_path)
    rewrite(directory, isa="abacus")
    with pytest.warns(
        UserWarning, match="instruction set abacus, but this is .*equal up to rounding"
    ) as warned:
        fit(trainer_of(net()), checkpoint_dir=directory, resume=True)
    assert [warning.filename for warning in warned] == [__file__]


def test_every_warning_of_a_resumed_run_names_the_line_that_calls_fit(stopped: Path, tmp_path: Path) -> None:
    directory = copy_of(stopped, tmp_path)
    newer = newest_file(directory)
    [older] = {directory / name for name in NAMES} - {newer}
    other = dataclasses.replace(checkpoint.read(older), isa="abacus", history={}, epochs=[])
    columns = {name: array[:1] for name, array in checkpoint.read(older).history.items()}
    files.replace([checkpoint.new_file(older, dataclasses.replace(other, history=columns))])
    raw = bytearray(newer.read_bytes())
    damage_tensor(raw)
    newer.write_bytes(raw)
    (directory / ".checkpoint-1.safetensors.0123456789ab.tmp").touch()
    (directory / "log.jsonl").unlink()
    trainer = trainer_of(net(), optimizer=nplora.AdamW(lr=0.01))
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        fit(trainer, checkpoint_dir=directory, resume=True)
    found = [str(warning.message) for warning in warned]
    parts = (
        "left this file unfinished",
        "the other checkpoint, of step",
        "the log is",
        "settings of the resumed run",
        "abacus",
    )
    assert [part for part, text in zip(parts, found, strict=True) if part in text] == list(parts)
    assert {warning.filename for warning in warned} == {__file__}


def test_another_run_is_not_written_over_by_accident(
    stopped: Path, uninterrupted: dict[str, Any], tmp_path: Path
) -> None:
    directory = copy_of(stopped, tmp_path)
    before = {name: (directory / name).read_bytes() for name in NAMES}
    with pytest.raises(
        FileExistsError, match=r"holds a run \(step 12\): resume=True continues the run, overwrite"
    ):
        fit(trainer_of(net()), checkpoint_dir=directory)
    assert {name: (directory / name).read_bytes() for name in NAMES} == before

    class FailAfterCheckpoint(Callback):
        def on_checkpoint(self, run: Run) -> None:
            raise ArithmeticError

    with pytest.raises(ArithmeticError):
        fit(
            trainer_of(net(rng=3), callbacks=[FailAfterCheckpoint()]),
            checkpoint_dir=directory,
            overwrite=True,
        )
    assert [checkpoint.read(directory / name).step for name in NAMES] == [0, 0], (
        "a generation is the old run's"
    )
    trainer = trainer_of(net(rng=0))
    assert outcome(trainer, fit(trainer, checkpoint_dir=directory, overwrite=True)) == uninterrupted
    with pytest.raises(ValueError, match="exclude each other"):
        fit(trainer_of(net()), checkpoint_dir=directory, overwrite=True, resume=True)


def test_a_run_that_is_dropped_is_not_read(
    stopped: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = copy_of(stopped, tmp_path)
    before = newest(directory).serial
    with monkeypatch.context() as patched:
        patched.setattr(checkpoint, "read", lambda path: pytest.fail(f"{path} is read"))
        fit(trainer_of(net()), checkpoint_dir=directory, overwrite=True)
    assert newest(directory).serial > before + 1  # neither generation is the old run's


@systems.needs_locks
def test_two_writers_get_an_error_with_the_pid(tmp_path: Path) -> None:
    with (
        RunDirectory(tmp_path),
        pytest.raises(
            BlockingIOError, match=rf"another run \(process {os.getpid()}\) is writing to this directory"
        ),
    ):
        fit(trainer_of(net()), checkpoint_dir=tmp_path)
    fit(trainer_of(net()), checkpoint_dir=tmp_path)  # the lock is gone


@systems.needs_locks
def test_only_a_kill_leaves_a_lock_file_and_that_does_not_lock(tmp_path: Path) -> None:
    (tmp_path / "lock").write_text("12345\n")
    with RunDirectory(tmp_path):
        assert (tmp_path / "lock").read_text() == f"{os.getpid()}\n"
    assert sorted(file.name for file in tmp_path.iterdir()) == ["log.jsonl"]
    with RunDirectory(tmp_path), pytest.raises(BlockingIOError):
        RunDirectory(tmp_path)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["log.jsonl"]


def test_a_lock_file_that_was_removed_after_it_was_opened_does_not_lock(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import fcntl

    before, flock = RunDirectory(tmp_path), fcntl.flock

    def late(descriptor: int, operation: int) -> None:
        before.close()
        flock(descriptor, operation)

    monkeypatch.setattr(fcntl, "flock", late)
    with RunDirectory(tmp_path):
        monkeypatch.undo()
        with pytest.raises(BlockingIOError):
            RunDirectory(tmp_path)


def test_a_lock_file_that_cannot_be_written_does_not_lock(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*arguments: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patched:
        patched.setattr(os, "ftruncate", full)
        with pytest.raises(OSError, match="No space left on device"):
            RunDirectory(tmp_path)
    RunDirectory(tmp_path).close()


@systems.needs_fork
def test_a_forked_child_leaves_the_lock_to_its_parent(tmp_path: Path) -> None:
    with RunDirectory(tmp_path) as directory:
        child = os.fork()
        if not child:
            directory.close()
            os._exit(0)
        os.waitpid(child, 0)
        with pytest.raises(BlockingIOError):
            RunDirectory(tmp_path)


ENTER = """
import os, sys, time
from nplora.trainer.run_directory import RunDirectory
entered, end = 0, time.monotonic() + 1.5
while time.monotonic() < end:
    try:
        with RunDirectory(sys.argv[1]):
            os.close(os.open(sys.argv[2], os.O_CREAT | os.O_EXCL))  # fails if another run is inside
            os.unlink(sys.argv[2])
        entered += 1
    except BlockingIOError:
        pass
print(entered)
"""


@pytest.mark.slow
def test_two_runs_are_never_in_one_directory(tmp_path: Path) -> None:
    line = [sys.executable, "-c", ENTER, str(tmp_path / "run"), str(tmp_path / "inside")]
    found = [
        subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in "abcd"
    ]
    done = [(*process.communicate(timeout=60), process.returncode) for process in found]
    assert [status for _, _, status in done] == [0] * 4, done
    assert sum(int(printed) for printed, _, _ in done) > (20 if systems.IS_WINE else 100)  # Wine is slow


def test_what_a_killed_writer_left_is_removed_and_named(stopped: Path, tmp_path: Path) -> None:
    directory = copy_of(stopped, tmp_path)
    left = directory / ".checkpoint-1.safetensors.0123456789ab.tmp"
    left.write_bytes(b"half")
    with pytest.warns(UserWarning, match=r"0123456789ab\.tmp: removed, because"):
        assert newest(directory).step == 12
    assert not left.exists()


# ---- files that are not the run's ----

FOREIGN = {
    "log.jsonl": b'{"prompt": "1+1=", "completion": "2"}\n',
    "lock": b"the lock of another program\n",
    "checkpoint-0.safetensors": safetensors.dumps({"weight": np.zeros(3)}),
    "checkpoint-1.safetensors": safetensors.dumps({"weight": np.zeros(3)}, {"format": "pt"}),
}


def content_of(directory: Path) -> dict[str, bytes | None]:
    return {file.name: file.read_bytes() if file.is_file() else None for file in directory.iterdir()}


def is_refused(directory: Path, error: type[Exception], message: str) -> None:
    before = content_of(directory)
    for arguments in ({}, {"resume": True}, {"overwrite": True}):
        with pytest.raises(error, match=message):
            fit(trainer_of(net()), checkpoint_dir=directory, **arguments)
    assert content_of(directory) == before


@pytest.mark.parametrize("name", FOREIGN)
def test_a_file_that_no_run_made_is_left_unchanged(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(FOREIGN[name])
    is_refused(
        tmp_path,
        FileExistsError,
        rf"cannot be written: the file {name} was not made by a run: move that file",
    )


@pytest.mark.parametrize("name", FOREIGN)
def test_a_link_in_a_run_directory_is_not_followed(name: str, stopped: Path, tmp_path: Path) -> None:
    """A downloaded directory may contain links to any file of the user."""
    directory = tmp_path / "run"
    directory.mkdir()
    copy_of(stopped, directory)
    target = tmp_path / "users"
    target.write_bytes((stopped / name).read_bytes() if (stopped / name).exists() else b"")
    for path in (target, tmp_path / "nothing"):
        (directory / name).unlink(missing_ok=True)
        (directory / name).symlink_to(path)
        is_refused(directory, UnsafeError, rf"{name}: a symbolic link, expected a regular file")
    assert not (tmp_path / "nothing").exists()


@pytest.mark.parametrize("name", FOREIGN)
def test_a_directory_with_the_name_of_a_file_is_refused(name: str, tmp_path: Path) -> None:
    (tmp_path / name).mkdir()
    is_refused(tmp_path, OSError, rf"cannot be written: .*{name}|cannot be written: Is a directory")


def test_an_unfinished_file_of_another_program_is_kept(tmp_path: Path) -> None:
    other = tmp_path / ".checkpoint-of-mine.tmp"
    other.write_text("a user's")
    RunDirectory(tmp_path).close()
    assert other.read_text() == "a user's"


def test_a_first_record_that_a_full_disk_cut_short_is_a_log(tmp_path: Path) -> None:
    (tmp_path / "log.jsonl").write_text('{"event":"sta')
    history = fit(trainer_of(net(rng=0)), epochs=1, checkpoint_dir=tmp_path)
    assert len(history.steps) == 5
    assert (tmp_path / "log.jsonl").read_text().startswith('{"event":"header",')


class Move(Callback):
    """Renames the run's directory and changes the working directory, then has the run interrupted."""

    def __init__(self, source: Path, target: Path) -> None:
        self.source, self.target = source, target

    def on_step_end(self, run: Run, record: StepRecord) -> None:
        if record.step == 4:
            os.chdir("/")
            self.source.rename(self.target)
        if record.step == 11:
            raise KeyboardInterrupt


@systems.needs_new_paths
def test_a_run_stays_in_its_directory_when_that_is_renamed_and_the_process_moves(
    uninterrupted: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    move = Move(tmp_path / "run", tmp_path / "moved")
    first = trainer_of(net(rng=0), callbacks=[move])
    fit(first, checkpoint_dir="run", checkpoint_every=2)
    assert os.listdir(tmp_path) == ["moved"]
    assert sorted(os.listdir(tmp_path / "moved")) == [*NAMES, "log.jsonl"]
    second = trainer_of(net())
    history = fit(second, checkpoint_dir=tmp_path / "moved", resume=True)
    assert outcome(second, history) == uninterrupted


# ---- a run that overwrites another ----


def adapted(seed: int = 0) -> nplora.Module:
    """A model whose adapter can be saved."""
    return nplora.Sequential(nplora.LoRALinear(np.ones((CLASSES, D_IN)), rank=2, rng=seed))


class Crash(BaseException):
    """The process is gone."""


def crash_at(monkeypatch: pytest.MonkeyPatch, number: int) -> list[None]:
    """After the first n calls that change the disk for good, every such call fails.

    Returns the list of calls, to which they are added.
    """
    calls: list[None] = []

    def crashing(real: Callable[..., Any], error: BaseException) -> Callable[..., Any]:
        def call(*arguments: Any, **keywords: Any) -> Any:
            calls.append(None)
            if len(calls) > number:
                raise error
            return real(*arguments, **keywords)

        return call

    for name in ("fsync", "replace", "ftruncate"):
        monkeypatch.setattr(os, name, crashing(getattr(os, name), Crash()))
    # An OSError here, because the code that closes files stops at any other error.
    monkeypatch.setattr(os, "unlink", crashing(os.unlink, OSError(errno.EIO, "gone")))
    return calls


@pytest.mark.slow
def test_a_crash_of_a_run_that_overwrites_another_leaves_one_of_them_whole(
    stopped: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def lasting(directory: Path) -> dict[str, bytes | None]:
        names = content_of(directory)
        return {name: names[name] for name in names if name != "lock" and not name.endswith(".tmp")}

    def run(directory: Path, **arguments: Any) -> dict[str, Any]:
        trainer = trainer_of(net(rng=0), schedule="linear", optimizer=nplora.AdamW(lr=0.01))
        return outcome(trainer, fit(trainer, epochs=1, checkpoint_dir=directory, **arguments))

    (tmp_path / "old").mkdir()
    nplora.save_adapter(adapted(), copy_of(stopped, tmp_path / "old"))
    expected, states = run(tmp_path / "fresh"), list[str]()
    for number in itertools.count():
        directory = shutil.copytree(tmp_path / "old", tmp_path / str(number))
        old = lasting(directory)
        with monkeypatch.context() as patched:
            calls = crash_at(patched, number)
            with contextlib.suppress(Crash, OSError):
                run(directory, overwrite=True)
        assert len(calls) > number
        if lasting(directory) == old:
            states.append("old")
            nplora.load_adapter(adapted(), directory)
            continue
        if checkpoint.read(newest_file(directory)).step:
            break  # the new run is well under way
        states.append("new")
        with pytest.raises(FileNotFoundError, match="has no adapter yet: continue it with --resume"):
            nplora.load_adapter(adapted(), directory)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*a run that was killed left this file unfinished")
            assert run(directory, resume=True) == expected
        events = [json.loads(line)["event"] for line in (directory / "log.jsonl").read_text().splitlines()]
        assert events == ["header", "start", "resume", *["step"] * 5, "evaluation", "epoch", "end"]
        assert not (directory / "adapter_model.safetensors").exists()
    assert states == sorted(states, reverse=True)
    assert states.count("old") >= 4  # no call yet, the lock, and the flushes of the new files
    assert states.count("new") >= 9


def test_the_first_checkpoint_of_a_run_that_overwrites_another_drops_both_of_the_other(
    stopped: Path, tmp_path: Path
) -> None:
    found: list[int] = []

    class Look(Callback):
        def on_checkpoint(self, run: Run) -> None:
            found.extend(checkpoint.read(path).step for path in tmp_path.glob("checkpoint-*"))

    copy_of(stopped, tmp_path)
    fit(trainer_of(net(), callbacks=[Look()]), epochs=1, checkpoint_dir=tmp_path, overwrite=True)
    assert found[:2] == [0, 0]


def test_only_a_run_that_overwrites_drops_an_adapter(tmp_path: Path) -> None:
    nplora.save_adapter(adapted(), tmp_path)
    fit(trainer_of(net(), callbacks=[StopAfter(step=2)]), epochs=1, checkpoint_dir=tmp_path)
    nplora.load_adapter(adapted(), tmp_path)
    fit(trainer_of(net()), epochs=1, checkpoint_dir=tmp_path, resume=True)
    nplora.load_adapter(adapted(), tmp_path)
    fit(trainer_of(net()), epochs=1, checkpoint_dir=tmp_path, overwrite=True)
    assert not list(tmp_path.glob("adapter*"))


# ---- the disk ----


def test_a_full_disk_leaves_the_last_checkpoint(
    stopped: Path, uninterrupted: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = copy_of(stopped, tmp_path)
    files_before = {name: (directory / name).read_bytes() for name in NAMES}
    real_write = os.write

    def write(descriptor: int, chunk: Any) -> int:
        if systems.path_of(descriptor).endswith(".tmp"):
            if len(chunk) > 512:
                return real_write(descriptor, bytes(chunk)[:512])  # a short write first
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real_write(descriptor, chunk)

    with monkeypatch.context() as full:
        full.setattr(os, "write", write)
        with pytest.raises(
            OSError, match=r"No space left on device: [\d,]+ of [\d,]+ bytes were written"
        ) as raised:
            fit(trainer_of(net()), checkpoint_dir=directory, resume=True)
    assert raised.value.errno == errno.ENOSPC
    assert {name: (directory / name).read_bytes() for name in NAMES} == files_before
    assert not list(directory.glob(".*"))
    second = trainer_of(net())
    assert outcome(second, fit(second, checkpoint_dir=directory, resume=True)) == uninterrupted


def fail_for_a_while(monkeypatch: pytest.MonkeyPatch, failures: float) -> None:
    """The disk is full for the first files that are written to it."""
    real, left = os.write, [failures]

    def write(descriptor: int, chunk: Any) -> int:
        if left[0] > 0 and systems.path_of(descriptor).endswith(".tmp"):
            left[0] -= 1
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(descriptor, chunk)

    monkeypatch.setattr(os, "write", write)


def test_a_checkpoint_that_cannot_be_written_is_tried_again_at_the_next(
    stopped: Path, uninterrupted: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory, trainer = copy_of(stopped, tmp_path), trainer_of(net())
    before = newest(directory).step
    fail_for_a_while(monkeypatch, 2)
    with pytest.warns(UserWarning, match="could not be written") as warned:
        history = fit(trainer, checkpoint_dir=directory, resume=True, checkpoint_every=3)
    assert outcome(trainer, history) == uninterrupted
    first = -(-(before + 1) // 3) * 3
    assert [str(warning.message).partition(" could")[0] for warning in warned] == [
        f"the checkpoint of step {step}" for step in (first, first + 3)
    ]
    message = str(warned[0].message)
    assert "No space left on device" in message
    assert "Errno" not in message
    assert message.endswith(f"The newest checkpoint is still from step {before}")
    assert sorted(checkpoint.read(directory / name).step for name in NAMES) == [STEPS - 1, STEPS]
    assert not list(directory.glob(".*"))


def test_a_last_checkpoint_that_cannot_be_written_is_an_error(
    stopped: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = copy_of(stopped, tmp_path)
    before = {name: (directory / name).read_bytes() for name in NAMES}
    fail_for_a_while(monkeypatch, math.inf)
    with (
        pytest.warns(UserWarning, match="could not be written"),
        pytest.raises(OSError, match="No space left on device") as raised,
    ):
        fit(trainer_of(net()), checkpoint_dir=directory, resume=True, checkpoint_every=3)
    assert re.match(r"the run is saved at step \d+, but step 40 could not be", raised.value.__notes__[0])
    assert {name: (directory / name).read_bytes() for name in NAMES} == before


def test_a_first_checkpoint_that_cannot_be_written_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before any work: the disk may be wrong, and there is nothing yet to go back to."""
    fail_for_a_while(monkeypatch, 1)
    stop = StopAfter(step=1)
    with pytest.raises(OSError, match="No space left on device"):
        fit(trainer_of(net(), callbacks=[stop]), checkpoint_dir=tmp_path)


def test_the_older_checkpoint_is_replaced_after_one_of_the_same_step_failed(
    stopped: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = copy_of(stopped, tmp_path)
    with RunDirectory(directory) as opened:
        point = opened.newest
        assert point is not None
        with monkeypatch.context() as full:
            fail_for_a_while(full, 1)
            with pytest.raises(OSError, match="No space"):
                opened.save(point)
        opened.save(dataclasses.replace(point, step=point.step + 1))
    steps = sorted(checkpoint.read(directory / name).step for name in NAMES)
    assert steps == [point.step, point.step + 1]


class Fault:
    """Counts the calls that change the disk, and makes one of them fail."""

    CALLS = ("write", "fsync", "replace")

    def __init__(self, monkeypatch: pytest.MonkeyPatch, fails: int) -> None:
        self.count = 0
        for name in self.CALLS:
            monkeypatch.setattr(os, name, self._counting(getattr(os, name), fails))

    def _counting(self, call: Any, fails: int) -> Any:
        def counting(*arguments: Any, **keywords: Any) -> Any:
            self.count += 1
            if self.count == fails:
                raise OSError(errno.EIO, os.strerror(errno.EIO))
            return call(*arguments, **keywords)

        return counting


def short_run(directory: Path, resume: bool) -> tuple[Trainer, History]:
    trainer = trainer_of(net(rng=0))
    return trainer, fit(trainer, epochs=1, checkpoint_dir=directory, checkpoint_every=2, resume=resume)


@pytest.mark.slow
def test_an_error_at_any_write_fsync_or_rename_loses_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = outcome(*short_run(tmp_path / "whole", resume=False))
    for fails in itertools.count(1):
        directory = tmp_path / str(fails)
        with monkeypatch.context() as patched, warnings.catch_warnings():
            warnings.filterwarnings("ignore", "the checkpoint of step . could not be written")
            fault = Fault(patched, fails)
            with contextlib.suppress(OSError):
                short_run(directory, resume=False)
        assert not list(directory.glob(".*")), "a temporary file is left"
        assert outcome(*short_run(directory, resume=True)) == expected, f"call {fails}"
        if fault.count < fails:
            break
    assert fails > 20


def test_ctrl_c_while_a_directory_is_opened_lets_the_next_run_in(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(directory: RunDirectory) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(RunDirectory, "_remove_unfinished", interrupt)
        with pytest.raises(KeyboardInterrupt):
            RunDirectory(tmp_path)
    RunDirectory(tmp_path).close()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["log.jsonl", "lock"])
def test_a_fifo_with_the_name_of_a_file_is_an_error(name: str, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / name)
    script = f"from nplora.trainer.run_directory import RunDirectory; RunDirectory({str(tmp_path)!r})"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=30)
    assert f"cannot be written: {name} is a FIFO, expected a regular file: '{tmp_path}'" in done.stderr


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ("write", r"0 of [\d,]+ bytes were written"),
        ("fsync", r"no checkpoint is written"),
        ("ftruncate", r"cutting the log to 0 bytes failed"),
    ],
)
def test_an_error_of_the_log_names_it(
    call: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = getattr(os, call)

    def fail(descriptor: int, *arguments: Any) -> Any:
        if systems.path_of(descriptor).endswith("log.jsonl"):
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return real(descriptor, *arguments)

    monkeypatch.setattr(os, call, fail)
    with pytest.raises(OSError, match=rf"{re.escape(os.strerror(errno.EIO))}: .*{message}: '.*log\.jsonl'"):
        fit(trainer_of(net()), checkpoint_dir=tmp_path)


def test_a_directory_that_cannot_be_written_is_an_error_before_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = net()
    before = {name: array.tobytes() for name, array in fingerprint.factors(model).items()}
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match=r"the run directory cannot be written: .*: '.*file[\\/]+run'"):
        fit(trainer_of(model), checkpoint_dir=tmp_path / "file" / "run")

    def refuse(*arguments: Any, **keywords: Any) -> int:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    module, name = (importlib.import_module("_winapi"), "CreateFile") if systems.IS_WINDOWS else (os, "open")
    with monkeypatch.context() as readonly:
        readonly.setattr(module, name, refuse)
        with pytest.raises(PermissionError, match="the run directory cannot be written: Permission denied"):
            fit(trainer_of(model), checkpoint_dir=tmp_path)
    assert {name: array.tobytes() for name, array in fingerprint.factors(model).items()} == before


def test_a_checkpoint_is_a_safetensors_file_with_readable_state(stopped: Path) -> None:
    content = safetensors.open(newest_file(stopped))
    assert json.loads(content.metadata["state"])["step"] == 12
    assert content["parameters.0.A"].shape == (HIDDEN, 2)
    assert content["optimizer.exp_avg.0.A"].shape == (HIDDEN, 2)
    assert content["history.loss"].shape == (12,)


# ---- kill -9 ----

NURSERY = """
import os, sys
sys.path[:0] = [sys.argv[1], os.path.dirname(sys.argv[1])]
from test_checkpoint import fit, net, trainer_of
for directory in map(str.rstrip, sys.stdin):
    if os.fork() == 0:
        print(os.getpid(), flush=True)
        fit(trainer_of(net(rng=0)), checkpoint_dir=directory, checkpoint_every=1, resume=True)
        print("done", flush=True)
        os._exit(0)
    print(os.waitstatus_to_exitcode(os.wait()[1]), flush=True)
"""


@pytest.mark.slow
@systems.needs_fork
def test_a_run_killed_at_random_moments_ends_in_the_same_bits(
    uninterrupted: dict[str, Any], tmp_path: Path
) -> None:
    """tests/attack kills 240 runs. This test also compares moments, streams and histories."""
    moments = random.Random(20260101)
    runs = (tmp_path / str(n) for n in itertools.count())
    start = time.perf_counter()
    check_killed_run(next(runs), uninterrupted)  # not killed: it measures the time of a whole run
    seconds = time.perf_counter() - start
    directory, kills = next(runs), 0
    command = [sys.executable, "-W", "ignore", "-c", NURSERY, str(Path(__file__).parent)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as nursery:
        while kills < 20:
            if kill_after(moments.uniform(0, seconds / 2), directory, nursery):
                kills += 1
            else:
                check_killed_run(directory, uninterrupted)
                directory = next(runs)
    check_killed_run(directory, uninterrupted)


def kill_after(seconds: float, directory: Path, nursery: subprocess.Popen[str]) -> bool:
    """Have a child begin or resume the run, and kill it after a while; return False if it was done before."""
    assert nursery.stdin is not None
    assert nursery.stdout is not None
    print(directory, file=nursery.stdin, flush=True)
    child = int(nursery.stdout.readline())
    time.sleep(seconds)
    with contextlib.suppress(ProcessLookupError):
        os.kill(child, signal.SIGKILL)
    line = nursery.stdout.readline()
    if line == "done\n":
        nursery.stdout.readline()
        return False
    assert int(line) == -signal.SIGKILL
    return True


def check_killed_run(directory: Path, uninterrupted: dict[str, Any]) -> None:
    trainer = trainer_of(net(rng=0))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*a run that was killed left this file unfinished")
        history = fit(trainer, checkpoint_dir=directory, checkpoint_every=1, resume=True)
    assert outcome(trainer, history) == uninterrupted
    assert not list(directory.glob(".*")), "what a killed run left unfinished is still there"
