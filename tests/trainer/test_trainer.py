"""Trainer: steps like those of a loop written by hand; accumulation, schedules, stopping, errors, signals."""

import contextlib
import itertools
import math
import os
import re
import signal
import subprocess
import sys
import textwrap
import threading
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import nplora
import systems
from dead_streams import DEAD
from notebooks import notebook
from nplora.nn import losses, optim
from nplora.platform.processes import ENDING_SIGNALS
from nplora.trainer import Callback, EpochRecord, History, Run, StepRecord, Trainer, interrupts, progress
from nplora.trainer.batches import ArrayBatches
from nplora.trainer.interrupts import Interrupts
from nplora.trainer.run_directory import RunDirectory

Array = np.ndarray[Any, Any]

D_IN, HIDDEN, CLASSES = 6, 8, 3


@pytest.fixture(autouse=True)
def first_ctrl_c(monkeypatch: pytest.MonkeyPatch) -> None:
    """The Ctrl-C of a test is not the second one after that of the test before."""
    monkeypatch.setattr(Interrupts, "_last", -math.inf)


def net(dropout: float = 0.0, dtype: str = "float32", seed: int = 0) -> nplora.Sequential:
    rng = np.random.default_rng(5)
    w1, w2 = rng.normal(0, 0.5, (HIDDEN, D_IN)), rng.normal(0, 0.5, (CLASSES, HIDDEN))
    model = nplora.Sequential(
        nplora.LoRALinear(w1, rank=2, dtype=dtype, dropout=dropout),
        nplora.Tanh(),
        nplora.LoRALinear(w2, rank=2, dtype=dtype),
    )
    model.seed(seed)
    return model


def data(n: int = 40, seed: int = 1) -> tuple[Array, Array]:
    rng = np.random.default_rng(seed)
    return rng.normal(size=(n, D_IN)).astype(np.float32), rng.integers(0, CLASSES, n)


def values(model: nplora.Module) -> dict[str, bytes]:
    return {p.name: p.value.tobytes() for p in model.parameters()}


def state(optimizer: optim.Optimizer) -> dict[str, bytes]:
    return {name: array.tobytes() for name, array in optimizer.state_dict().items()}


def trainer_of(model: nplora.Module, **settings: Any) -> Trainer:
    return Trainer(model, progress=False, **settings)


# ---- what a step is ----


def test_a_run_is_the_loop_written_by_hand() -> None:
    x, y = data()
    mine, theirs = net(dropout=0.3), net(dropout=0.3)
    history = trainer_of(mine, optimizer=nplora.AdamW(lr=0.01)).fit(
        x, y, epochs=2, batch_size=16, shuffle=False
    )

    optimizer, found = nplora.AdamW(lr=0.01), []
    for _ in range(2):
        for start in range(0, 40, 16):
            prediction, saved = theirs.forward(x[start : start + 16])
            loss, gradient = losses.cross_entropy(prediction, y[start : start + 16])
            theirs.backward(gradient, saved)
            optimizer.step(theirs.parameters())
            theirs.zero_grad()
            found.append(loss)
    assert values(mine) == values(theirs)
    assert history.loss == found
    assert [(r.step, r.epoch, r.count) for r in history.steps] == [
        (1, 1, 16), (2, 1, 16), (3, 1, 8), (4, 2, 16), (5, 2, 16), (6, 2, 8),
    ]  # fmt: skip
    assert history.ended == "complete"


@pytest.mark.slow
@pytest.mark.parametrize("loss", ["mse", "huber", "bce"])
@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_every_loss_and_optimiser_learns(loss: str, optimizer: str) -> None:
    x, _ = data(200)
    teacher = net(seed=3)
    teacher.modules[0].A[...] = 0.7  # type: ignore[attr-defined]
    target = teacher(x)
    if loss == "bce":
        target = 1 / (1 + np.exp(-target))
    made = nplora.AdamW(lr=0.02) if optimizer == "adamw" else nplora.SGD(lr=0.005, momentum=0.9)
    trainer = trainer_of(net(), loss=loss, optimizer=made)
    before = trainer.evaluate(x, target)["loss"]
    trainer.fit(x, target, epochs=30, batch_size=20)
    floor = 0.0 if loss != "bce" else Trainer(teacher, loss="bce").evaluate(x, target)["loss"]
    assert trainer.evaluate(x, target)["loss"] - floor < 0.1 * (before - floor)


def test_a_callable_returning_loss_and_gradient_is_a_loss() -> None:
    x, _ = data()
    trainer = trainer_of(net(), loss=lambda p, t: (float((p * p).mean()), 2 * p / p.size))
    history = trainer.fit(x, np.zeros(len(x)), epochs=20)
    assert history.loss[-1] < history.loss[0]


# At most 30 float64 terms are summed in another order: relative differences stay far below 1e-12.
@pytest.mark.parametrize("loss", ["cross_entropy", "mse"])
def test_accumulated_batches_of_any_size_make_the_step_of_one_large_batch(loss: str) -> None:
    x, y = data(30)
    y[[0, 1, 2, 20]] = -100  # the first batch has no labelled row at all
    target = y if loss == "cross_entropy" else np.eye(CLASSES)[np.maximum(y, 0)]
    large, small = net(dtype="float64"), net(dtype="float64")
    edges = [0, 3, 10, 11, 30]
    parts = [(x[a:b], target[a:b]) for a, b in itertools.pairwise(edges)]
    one = trainer_of(large, loss=loss, optimizer=nplora.SGD(lr=0.5)).fit([(x, target)])
    many = trainer_of(small, loss=loss, optimizer=nplora.SGD(lr=0.5), accumulate=4).fit(parts)
    for a, b in zip(large.parameters(), small.parameters(), strict=True):
        np.testing.assert_allclose(b.value, a.value, rtol=1e-12, atol=1e-15)
    assert len(one.steps) == len(many.steps) == 1
    assert many.steps[0].count == one.steps[0].count == (26 if loss == "cross_entropy" else 90)
    np.testing.assert_allclose(many.loss, one.loss, rtol=1e-12)
    np.testing.assert_allclose(many.steps[0].grad_norm, one.steps[0].grad_norm, rtol=1e-12)


def test_accumulation_ends_with_the_epoch() -> None:
    x, y = data(40)
    history = trainer_of(net(), accumulate=3).fit(x, y, epochs=2, batch_size=8)  # 5 batches: steps of 3 and 2
    assert [(r.epoch, r.count) for r in history.steps] == [(1, 24), (1, 16), (2, 24), (2, 16)]


def test_a_run_without_a_labelled_row_changes_nothing_and_warns() -> None:
    model, (x, y) = net(), data(8)
    before, optimizer = values(model), nplora.AdamW()
    trainer = trainer_of(model, optimizer=optimizer)
    with pytest.warns(UserWarning, match="no step had a label to train on, so nothing was trained") as caught:
        history = trainer.fit(x, np.full_like(y, -100))
    assert caught[0].filename == __file__
    assert values(model) == before
    assert optimizer.steps == 0
    assert (history.steps[0].count, history.loss) == (0, [0.0])


def test_clipping_bounds_the_norm_of_all_gradients_together() -> None:
    x, y = data()
    norms = []
    for clip in (None, 1e-3):
        model = net(dtype="float64")
        before = [p.value.copy() for p in model.parameters()]
        history = trainer_of(model, optimizer=nplora.SGD(lr=1.0), clip_norm=clip).fit(
            x, y, steps=1, batch_size=40
        )
        moved = [p.value - b for p, b in zip(model.parameters(), before, strict=True)]
        norms.append((math.sqrt(sum(float((m * m).sum()) for m in moved)), history.steps[0].grad_norm))
    (free, grad_norm), (clipped, grad_norm_too) = norms
    assert free == pytest.approx(grad_norm, rel=1e-12)
    assert clipped == pytest.approx(1e-3, rel=1e-9)
    assert grad_norm_too == grad_norm  # the record is of the gradient before clipping


@pytest.mark.parametrize("schedule", optim.SCHEDULES)
def test_the_learning_rate_follows_the_schedule(schedule: str) -> None:
    x, y = data(40)
    optimizer = nplora.AdamW(lr=0.5)
    history = trainer_of(net(), optimizer=optimizer, schedule=schedule, warmup_steps=2).fit(
        x, y, epochs=2, batch_size=10
    )
    assert [r.lr for r in history.steps] == [0.5 * optim.schedule(schedule, s, 8, 2) for s in range(8)]


def test_a_run_that_ends_before_the_learning_rate_has_risen_is_a_warning() -> None:
    x, y = data(40)
    message = "Trainer.fit: the warm-up takes 4 steps, but the run ends after 4"
    for steps in (0, 4, 5):  # at its fifth step the rate has risen
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            trainer_of(net(), warmup_steps=4).fit(x, y, steps=steps)
        assert [str(w.message) for w in caught] == ([message] if steps == 4 else [])
        assert all(w.filename == __file__ for w in caught)


# ---- data ----


def test_an_iterable_of_batches_gives_the_run_of_the_arrays() -> None:
    x, y = data()
    a, b = net(), net()
    batches = [(x[i : i + 8], y[i : i + 8]) for i in range(0, 40, 8)]
    trainer_of(a).fit(x, y, epochs=3, batch_size=8, shuffle=False)
    trainer_of(b).fit(batches, epochs=3)
    assert values(a) == values(b)


def test_a_generator_is_enough_for_one_epoch() -> None:
    x, y = data()
    batches = ((x[i : i + 8], y[i : i + 8]) for i in range(0, 40, 8))
    trainer = trainer_of(net())
    with pytest.raises(ValueError, match="read only once"):
        trainer.fit(batches, epochs=2)
    assert trainer.optimizer.steps == 5


def test_steps_end_the_run_within_an_epoch_and_its_record_is_still_made() -> None:
    x, y = data()
    history = trainer_of(net()).fit(x, y, steps=7, batch_size=8, validation=(x, y))
    assert [(r.epoch, r.step) for r in history.epochs] == [(1, 5), (2, 7)]
    assert history.epochs[1].loss == pytest.approx(np.mean(history.loss[5:]))
    assert len(history.steps) == 7


def test_the_order_of_an_epoch_depends_only_on_seed_and_epoch() -> None:
    numbers = np.arange(8)

    def order(seed: int, epoch: int) -> list[int]:
        batches = ArrayBatches("test", numbers, numbers, batch_size=3, shuffle=True, seed=seed)
        return [int(i) for x, _ in batches.epoch(epoch, 0) for i in x]

    assert order(0, 0) == [6, 3, 1, 4, 5, 2, 7, 0]  # on every machine and with every NumPy
    assert order(0, 0) != order(0, 1)
    assert order(0, 0) != order(1, 0)
    assert sorted(order(1, 5)) == list(range(8))


def test_a_position_in_an_epoch_skips_what_was_used() -> None:
    x = np.arange(11)
    batches = ArrayBatches("test", x, x, batch_size=3, shuffle=True, seed=4)
    whole = [tuple(x) for x, _ in batches.epoch(2, 0)]
    assert len(whole) == batches.length == 4
    for skip in range(5):
        assert [tuple(x) for x, _ in batches.epoch(2, skip)] == whole[skip:]


# ---- evaluation ----


def test_evaluation_is_the_weighted_mean_and_counts_labelled_rows() -> None:
    x, y = data(37)
    y[[3, 11, 36]] = -100
    model = net(dropout=0.5)
    logits, known = model(x).astype(np.float64), y != -100
    shifted = logits - logits.max(axis=1, keepdims=True)
    log_p = shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    metrics = trainer_of(model).evaluate(x, y, batch_size=10)
    # float32 logits of size about 1 through exp and log: a few eps = 1e-7 of each loss
    assert metrics["loss"] == pytest.approx(-log_p[known, y[known]].mean(), rel=1e-5)
    assert metrics["accuracy"] == pytest.approx((logits.argmax(axis=1) == y)[known].mean())
    assert metrics == pytest.approx(
        trainer_of(model).evaluate([(x[:30], y[:30]), (x[30:], y[30:])]), rel=1e-6
    )


def test_evaluation_of_values_has_no_accuracy() -> None:
    x, _ = data()
    assert set(trainer_of(net(), loss="mse").evaluate(x, np.zeros((40, CLASSES)))) == {"loss"}


@pytest.mark.parametrize("n", [0, 1, 9, 40])
def test_predictions_come_in_order_and_without_dropout(n: int) -> None:
    model, (x, _) = net(dropout=0.5), data()
    np.testing.assert_array_equal(trainer_of(model).predict(x[:n], batch_size=40), model(x[:n]))
    assert trainer_of(model).predict(x[:n], batch_size=4).shape == (n, CLASSES)


class Scripted:
    """Validation data; all targets are offsets[k] when they are read for the k-th time."""

    def __init__(self, offsets: list[float]) -> None:
        self.offsets = iter(offsets)

    def __iter__(self) -> Iterator[tuple[Array, Array]]:
        offset = next(self.offsets)
        yield np.zeros((4, D_IN), np.float32), np.full((4, CLASSES), offset, np.float32)


def test_early_stopping_restores_the_best_factors() -> None:
    x, _ = data()
    model, seen = net(), []

    class Keep(Callback):
        def on_epoch_end(self, run: Run, record: EpochRecord) -> None:
            seen.append(values(run.model))

    trainer = trainer_of(model, loss="mse", callbacks=[Keep()])
    history = trainer.fit(
        x, np.zeros((40, CLASSES)), epochs=20, validation=Scripted([30, 20, 10, 20, math.nan]), patience=2
    )
    assert (history.ended, history.best_epoch, len(history.epochs)) == ("patience", 3, 5)
    assert values(model) == seen[2] != seen[4]


def test_validation_losses_that_are_never_finite_end_the_run_by_patience() -> None:
    x, _ = data()
    model = net()
    history = trainer_of(model, loss="mse").fit(
        x, np.zeros((40, CLASSES)), epochs=20, validation=Scripted([math.nan] * 20), patience=3
    )
    assert (history.ended, history.best_epoch, len(history.epochs)) == ("patience", None, 3)


def test_a_finite_validation_loss_after_others_is_the_best() -> None:
    x, _ = data()
    history = trainer_of(net(), loss="mse").fit(
        x,
        np.zeros((40, CLASSES)),
        epochs=20,
        validation=Scripted([math.nan, math.inf, 9, 10, 11, 12]),
        patience=3,
    )
    assert (history.ended, history.best_epoch, len(history.epochs)) == ("patience", 3, 6)


@pytest.mark.parametrize("batch_size", [1, 4, 6, 256])
@pytest.mark.parametrize("dtype", [np.float32, np.int64])
def test_a_single_example_instead_of_rows_is_refused(batch_size: int, dtype: Any) -> None:
    weight = np.eye(D_IN, dtype=np.float32)
    trainer = trainer_of(nplora.LoRALinear(weight, rank=2), loss="mse")
    x = np.ones(D_IN, dtype)
    with pytest.raises(
        ValueError, match=r"^Trainer\.predict: x has shape \(6,\), .*single example as x\[None\]"
    ):
        trainer.predict(x, batch_size=batch_size)
    with pytest.raises(
        ValueError, match=r"^Trainer\.evaluate: x has shape \(6,\), .*single example as x\[None\]"
    ):
        trainer.evaluate(x, x, batch_size=batch_size)
    assert trainer.predict(x[None], batch_size=batch_size).shape == (1, D_IN)
    narrow = trainer_of(nplora.LoRALinear(np.ones((3, 1)), rank=1), loss="mse")
    with pytest.raises(ValueError, match=r"the output has shape \(3,\)"):
        narrow.predict(x[:1], batch_size=batch_size)


def test_rows_of_a_single_number_are_accepted_if_the_model_accepts_them() -> None:
    class Scalars(nplora.Module):
        def forward(self, x: Any) -> tuple[Array, Any]:
            return np.stack([x, 2 * x], axis=-1), None

    for batch_size in (1, 4, 256):
        found = trainer_of(Scalars()).predict(np.arange(6.0), batch_size=batch_size)
        np.testing.assert_array_equal(found[:, 1], 2 * np.arange(6.0))


# ---- callbacks, history, progress ----


def test_callbacks_are_called_in_order_and_can_stop_the_run() -> None:
    events: list[Any] = []

    class Listen(Callback):
        def on_fit_start(self, run: Run) -> None:
            events.append(("start", run.total_steps))

        def on_step_end(self, run: Run, record: StepRecord) -> None:
            events.append(record.step)
            if record.step == 7:
                run.stop()

        def on_epoch_end(self, run: Run, record: EpochRecord) -> None:
            events.append(("epoch", record.epoch))

        def on_fit_end(self, run: Run) -> None:
            events.append(("end", run.history.ended))

    x, y = data()
    history = trainer_of(net(), callbacks=[Listen()]).fit(x, y, epochs=9, batch_size=8)
    assert events == [
        ("start", 45), 1, 2, 3, 4, 5, ("epoch", 1), 6, 7, ("epoch", 2), ("end", "callback"),
    ]  # fmt: skip
    assert len(history.steps) == 7
    losses = f"loss {history.loss[0]:.4g} -> {history.loss[-1]:.4g}"
    assert repr(history) == f"History(7 steps, 2 epochs, ended='callback', {losses})"


def test_a_bar_of_tqdm_starts_no_thread_where_none_can_start(monkeypatch: pytest.MonkeyPatch) -> None:
    tqdm = pytest.importorskip("tqdm").tqdm
    monkeypatch.setattr(tqdm, "monitor_interval", 10)
    monkeypatch.setattr(progress, "has_threads", lambda: False)
    assert progress.progress_line(True) is not None
    assert tqdm.monitor_interval == 0


@pytest.mark.parametrize("installed", [True, False], ids=["tqdm", "plain"])
def test_progress_is_shown_on_request(
    installed: bool, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    if not installed:
        monkeypatch.setitem(sys.modules, "tqdm", None)
    else:
        pytest.importorskip("tqdm")
    x, y = data()
    Trainer(net(), progress=True).fit(x, y, epochs=2, batch_size=8, validation=(x, y))
    shown = capsys.readouterr()
    assert "10/10" in shown.err
    assert "epoch 2" in shown.err
    assert installed or "validation loss" in shown.err
    Trainer(net(), progress=False).fit(x, y)
    Trainer(net()).fit(x, y)  # stderr is not a terminal here
    assert capsys.readouterr() == ("", "")
    assert shown.out == ""


@pytest.mark.parametrize("installed", [True, False], ids=["tqdm", "plain"])
def test_progress_is_shown_by_default_in_a_terminal_and_in_a_notebook(
    installed: bool, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    if not installed:
        monkeypatch.setitem(sys.modules, "tqdm", None)
    else:
        pytest.importorskip("tqdm")
    x, y = data()
    with notebook(monkeypatch):
        Trainer(net()).fit(x, y, epochs=2, batch_size=8)
        shown = capsys.readouterr().err
        assert "10/10" in shown
        assert "\r" in shown, "the line is redrawn"
        Trainer(net(), progress=False).fit(x, y)
        assert not capsys.readouterr().err
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    Trainer(net()).fit(x, y, epochs=2, batch_size=8)
    assert "10/10" in capsys.readouterr().err


def test_a_trainer_an_optimiser_and_a_run_describe_themselves() -> None:
    trainer = Trainer(net(), "mse", nplora.SGD(0.1), schedule="cosine", seed=3, progress=False)
    assert repr(trainer).splitlines() == [
        "Trainer(loss='mse', optimizer=SGD(lr=0.1, weight_decay=0.0, lr_ratio=1.0, momentum=0.0, "
        "nesterov=False, steps=0), schedule='cosine', seed=3)",
        *(f"  {line}" for line in repr(trainer.model).splitlines()),
    ]
    runs: list[str] = []

    class Note(Callback):
        def on_step_end(self, run: Run, record: StepRecord) -> None:
            runs.append(repr(run))

    x, y = data()
    trainer_of(net(), callbacks=[Note()]).fit(x, y, steps=2)
    assert runs == ["Run(step 1 of 2, epoch 0)", "Run(step 2 of 2, epoch 0)"]


@pytest.mark.parametrize("progress", [None, True])
def test_a_program_without_stderr_trains_without_a_progress_line(
    progress: bool | None, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stderr", None)
    assert len(Trainer(net(), progress=progress).fit(*data(), batch_size=8).steps) == 5
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("kind", DEAD)
@pytest.mark.parametrize("installed", [True, False], ids=["tqdm", "plain"])
def test_a_progress_line_that_nobody_reads_ends_no_run(
    installed: bool, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not installed:
        monkeypatch.setitem(sys.modules, "tqdm", None)
    else:
        pytest.importorskip("tqdm")
    x, y = data()
    monkeypatch.setattr(sys, "stderr", DEAD[kind])
    history = Trainer(net(), progress=True).fit(x, y, epochs=2, batch_size=8, validation=(x, y))
    assert (len(history.steps), history.ended) == (10, "complete")


# ---- losses that are not finite ----


def failing_run(
    model: nplora.Module, x: Any, y: Any, directory: Path, **settings: Any
) -> tuple[str, Trainer, dict[str, bytes], dict[str, bytes]]:
    """Fit until NonFiniteLossError; return its message, and parameters and moments of the last whole step."""
    kept: list[Any] = [values(model), None]
    trainer = trainer_of(model, **settings)
    trainer.optimizer.init(model.parameters())
    kept[1] = state(trainer.optimizer)

    class Keep(Callback):
        def on_step_end(self, run: Run, record: StepRecord) -> None:
            kept[:] = values(run.model), state(trainer.optimizer)

    trainer.callbacks.append(Keep())
    with pytest.raises(nplora.NonFiniteLossError) as raised:
        trainer.fit(x, y, batch_size=8, shuffle=False, checkpoint_dir=directory, checkpoint_every=1)
    return str(raised.value), trainer, kept[0], kept[1]


@pytest.mark.parametrize(
    ("poison", "where"),
    [
        ("x", "the input x is not finite"),
        ("y", "the targets y are not finite"),
        ("layer", "the first layer whose output is not finite is '2' (LoRALinear)"),
        ("layer and y", "the first layer whose output is not finite is '2' (LoRALinear)"),
        ("loss", "the output of every layer is finite, but the loss is not"),
    ],
)
def test_a_loss_that_is_not_finite_stops_within_its_step_and_touches_nothing(
    poison: str, where: str, tmp_path: Path
) -> None:
    x, _ = data()
    model, target = net(dropout=0.2), np.zeros((40, CLASSES), np.float32)
    if poison == "x":
        x[26, 0] = np.nan
    elif poison == "loss":
        target[26, 1] = 3e38
    elif poison in ("y", "layer and y"):
        target[26, 1] = np.nan
    if poison.startswith("layer"):
        original, calls = model.modules[2].forward, [0]

        def forward(h: Array) -> tuple[Array, Any]:
            y, saved = original(h)
            calls[0] += 1
            return (y * np.float32(np.inf) if calls[0] > 3 else y), saved

        model.modules[2].forward = forward  # type: ignore[method-assign]
    message, trainer, before, moments = failing_run(model, x, target, tmp_path, loss="mse", accumulate=2)
    value = "inf" if poison in ("layer", "loss") else "nan"
    hint = "" if poison in ("x", "y") else "; a lower lr may help"
    assert message == f"step 2 (epoch 1): the loss of batch 4 is {value}: {where}{hint}"
    assert values(model) == before
    assert state(trainer.optimizer) == moments
    assert all(not p.grad.any() for p in model.parameters())
    with RunDirectory(tmp_path) as directory:
        assert directory.newest is not None
        assert directory.newest.step == 1
        assert model.random_state() == directory.newest.random_state
    assert poison.startswith("layer") or "forward" not in vars(model.modules[2])


def test_targets_that_are_not_an_array_are_searched_too() -> None:
    x, _ = data(8)
    for y, where in (
        ((np.ones(3), [1.0, np.nan]), "the targets y are not finite"),
        ((np.ones(3), [1.0, 2.0], "name"), "the output of every layer is finite, but the loss is not"),
    ):
        trainer = trainer_of(net(), loss=lambda prediction, target: (np.inf, np.zeros_like(prediction)))
        with pytest.raises(nplora.NonFiniteLossError, match=f"the loss of batch 1 is inf: {where}$"):
            trainer.fit([(x, y)], epochs=1)


def test_a_gradient_that_is_not_finite_stops_the_run_as_a_loss_does(tmp_path: Path) -> None:
    x, y = data()
    model = net()

    def loss(prediction: Array, target: Any) -> tuple[float, Array]:
        return 1.0, np.full_like(prediction, np.nan if target[0] < 0 else 0.1)

    y[16:] = -1
    message, trainer, before, moments = failing_run(model, x, y, tmp_path, loss=loss)
    hint = "; a lower lr may help"
    assert (
        message
        == f"step 3 (epoch 1): the loss is finite, but the gradient of 0.A, 0.B, 2.A, 2.B is not{hint}"
    )
    assert values(model) == before
    assert state(trainer.optimizer) == moments


def test_the_search_for_the_layer_sees_the_dropout_of_the_failing_pass() -> None:
    x, _ = data()
    model, keys = net(dropout=0.2), []
    original = model.modules[0].forward

    def forward(x: Array) -> tuple[Array, Any]:
        keys.append(model.modules[0].dropout_stream)
        return original(x)

    model.modules[0].forward = forward  # type: ignore[method-assign]
    target = np.zeros((40, CLASSES), np.float32)
    target[39] = 3e38
    with pytest.raises(nplora.NonFiniteLossError, match="batch 5"):
        trainer_of(model, loss="mse").fit(x, target, batch_size=8, shuffle=False)
    assert [calls for _, calls in keys] == [0, 1, 2, 3, 4, 4]


def test_parameters_that_an_update_made_infinite_are_not_saved(tmp_path: Path) -> None:
    x, y = data()

    def loss(prediction: Array, target: Any) -> tuple[float, Array]:
        return 1.0, np.full_like(prediction, 100)

    trainer = trainer_of(net(), loss=loss, optimizer=nplora.SGD(lr=1e38))
    with pytest.raises(
        nplora.NonFiniteLossError, match=r"step 1 made 0\.A, 2\.A not finite, so this step is not saved"
    ):
        trainer.fit(x, y, batch_size=8, checkpoint_dir=tmp_path, checkpoint_every=1)
    assert saved_step(tmp_path) == 0


# ---- bad input ----


@pytest.mark.parametrize("bad", [-1, CLASSES, 250])
def test_labels_out_of_range_are_found_before_the_first_step(bad: int, tmp_path: Path) -> None:
    model, (x, y) = net(), data()
    y[39] = bad
    before = values(model)
    with pytest.raises(ValueError, match=f"y holds {bad}, expected integers from 0 to 2"):
        trainer_of(model).fit(x, y, batch_size=4, checkpoint_dir=tmp_path / "run")
    with pytest.raises(ValueError, match=f"holds {bad}"):
        trainer_of(model).fit([(x, y)])
    assert values(model) == before
    assert all(not p.grad.any() for p in model.parameters())
    assert not (tmp_path / "run").exists()


def test_an_error_in_a_batch_leaves_the_last_whole_step() -> None:
    x, y = data()
    bad = y.copy()
    bad[:] = 99
    model, alone = net(dropout=0.5), net(dropout=0.5)
    trainer = trainer_of(model, accumulate=2)
    with pytest.raises(ValueError, match="99"):
        trainer.fit([(x[:8], y[:8]), (x[8:16], y[8:16]), (x[16:24], y[16:24]), (x, bad)])
    trainer_of(alone, accumulate=2).fit([(x[:8], y[:8]), (x[8:16], y[8:16])])
    assert values(model) == values(alone)
    assert model.random_state() == alone.random_state()
    assert all(not p.grad.any() for p in model.parameters())


def foreign_optimizer() -> Any:
    """An object that looks like torch's."""
    kind = type("AdamW", (), {"__module__": "torch.optim.adamw", "lr": 0.1, "step": lambda self: None})
    return kind()


def test_an_optimizer_of_another_package_is_refused_when_it_is_assigned_later() -> None:
    x, y = data(8)
    trainer = trainer_of(net())
    trainer.fit(x, y)
    before = values(trainer.model)
    trainer.optimizer = foreign_optimizer()
    with pytest.raises(
        TypeError, match=r"^Trainer\.fit: optimizer is a torch\.optim\.adamw\.AdamW, expected"
    ):
        trainer.fit(x, y)
    assert values(trainer.model) == before


X, Y = data(8)
BAD_CALLS: dict[str, tuple[dict[str, Any], dict[str, Any], type[Exception], str]] = {
    "no such loss": ({"loss": "l2"}, {}, ValueError, "'l2' is not available"),
    "optimizer by name": ({"optimizer": "adamw"}, {}, TypeError, "optimizer is 'adamw', expected an AdamW"),
    "optimizer class": (
        {"optimizer": nplora.AdamW},
        {},
        TypeError,
        "optimizer is the class AdamW, not an instance",
    ),
    "torch's optimizer": (
        {"optimizer": foreign_optimizer()},
        {},
        TypeError,
        r"^Trainer: optimizer is a torch\.optim\.adamw\.AdamW, expected an AdamW",
    ),
    "function in callbacks": ({"callbacks": [print]}, {}, TypeError, r"callbacks\[0\] is a builtin_f"),
    "callback class": ({"callbacks": (Callback(), Callback)}, {}, TypeError, r"\[1\] is the class Callback"),
    "callbacks no list": ({"callbacks": print}, {}, TypeError, "callbacks is a builtin_f.* a list of Callb"),
    "no such schedule": ({"schedule": "poly"}, {}, ValueError, "schedule='poly'"),
    "accumulate 0": ({"accumulate": 0}, {}, ValueError, "accumulate is 0"),
    "clip_norm 0": ({"clip_norm": 0}, {}, ValueError, "clip_norm is 0"),
    "warmup -1": ({"warmup_steps": -1}, {}, ValueError, "warmup_steps is -1"),
    "epochs and steps": ({}, {"epochs": 1, "steps": 1}, ValueError, "both given"),
    "epochs -1": ({}, {"epochs": -1}, ValueError, "epochs is -1"),
    "steps 1.5": ({}, {"steps": 1.5}, TypeError, "steps is 1.5"),
    "batch_size 0": ({}, {"batch_size": 0}, ValueError, "batch_size is 0"),
    "patience alone": ({}, {"patience": 2}, ValueError, "patience needs validation"),
    "resume alone": ({}, {"resume": True}, ValueError, "need a checkpoint_dir"),
    "no y": ({}, {"y": None}, ValueError, "y is missing"),
    "lengths differ": ({}, {"y": Y[:7]}, ValueError, "x has 8 rows, y has 7"),
    "no rows": ({}, {"x": X[:0], "y": Y[:0]}, ValueError, "no rows"),
    "objects": ({}, {"y": np.array([None] * 8)}, ValueError, "dtype object"),
    "not an iterable": ({}, {"x": 5, "y": None}, TypeError, "got a int"),
    "not batches": ({}, {"x": [X], "y": None}, TypeError, "batch 1 is a ndarray of 8"),
    "no batches": ({}, {"x": [], "y": None}, ValueError, "the iterable has no batch"),
    "float labels": ({}, {"y": Y * 0.5}, ValueError, "labels have dtype float64"),
    "last axis": ({}, {"x": X[:, :5]}, ValueError, "last axis 5, expected d_in=6"),
    "validation x alone": ({}, {"validation": X}, TypeError, r"validation is an array of shape \(8, 6\)"),
    "validation list": ({}, {"validation": [X, Y]}, TypeError, r"a list of 2 .* a tuple \(x, y\)"),
    "validation lengths": (
        {},
        {"validation": (X, Y[:7])},
        ValueError,
        r"fit: validation: validation\[0\] has 8 rows, validation\[1\] has 7$",
    ),
    "validation empty": ({}, {"validation": (X[:0], Y[:0])}, ValueError, r"validation\[0\] and .*no rows"),
    "validation number": ({}, {"validation": 5}, TypeError, "validation is a int, expected a tuple"),
    "validation generator": (
        {},
        {"validation": iter([(X, Y)]), "epochs": 2},
        ValueError,
        "validation is a list_iterator, which can be read only once",
    ),
    "open end": ({"schedule": "linear"}, {"x": iter([(X, Y)]), "y": None}, ValueError, "the number of steps"),
}


@pytest.mark.parametrize("case", BAD_CALLS.values(), ids=BAD_CALLS)
def test_bad_arguments_are_errors_that_change_nothing(
    case: tuple[dict[str, Any], dict[str, Any], type[Exception], str],
) -> None:
    settings, arguments, error, message = case
    model = net()
    before = values(model)
    with pytest.raises(error, match=message):
        trainer_of(model, **settings).fit(**{"x": X, "y": Y, **arguments})
    assert values(model) == before


def test_progress_is_true_false_or_none() -> None:
    with pytest.raises(TypeError, match=r"progress is 'yes', expected True, False or None"):
        Trainer(net(), progress="yes")  # type: ignore[arg-type]


def test_a_generator_that_is_read_twice_is_an_error_that_names_the_epoch() -> None:
    batches = ((X, Y) for _ in range(2))
    with pytest.raises(ValueError, match=r"epoch 2 has no batch; a generator can be read only once. Instead"):
        trainer_of(net()).fit(batches, epochs=2)


class Plain(nplora.Module):
    """A linear model written by a user, with one mistake."""

    def __init__(self, mistake: str = "") -> None:
        self.w, self.dw = np.ones((CLASSES, D_IN), np.float32), np.zeros((CLASSES, D_IN), np.float32)
        self.mistake = mistake

    def local_parameters(self) -> list[nplora.Parameter]:
        return [nplora.Parameter("w", self.w.view(), self.dw[:])]  # views of the same elements are accepted

    def forward(self, x: Any) -> Any:
        if self.mistake == "value":
            self.w = self.w * 1
        y = x @ self.w.T
        return y if self.mistake == "y" else (y, x, x) if self.mistake == "three" else (y, x)

    def backward(self, dy: Array, saved: Any, need_dx: bool = True) -> Array | None:
        if self.mistake == "gradient":
            self.dw = dy.T @ saved
        else:
            self.dw += dy.T @ saved
        return None


@pytest.mark.parametrize(
    ("mistake", "error", "message"),
    [
        ("y", TypeError, r"^Plain\.forward returned \(ndarray\), expected \(y, saved\)"),
        (
            "three",
            TypeError,
            r"^Plain\.forward returned \(ndarray, ndarray, ndarray\), expected \(y, saved\)",
        ),
        ("gradient", RuntimeError, r"^Plain: .* the gradient array of parameter 'w': .*self\.dw \+= "),
        ("value", RuntimeError, r"^Plain: .* has replaced the value array of parameter 'w'"),
    ],
)
def test_the_mistakes_of_a_users_module_are_named(mistake: str, error: type[Exception], message: str) -> None:
    model = Plain(mistake)
    with pytest.raises(error, match=message):
        trainer_of(model, loss="mse").fit(X, np.zeros((8, CLASSES)), epochs=3)
    np.testing.assert_array_equal(model.w, 1)
    history = trainer_of(Plain(), loss="mse").fit(X, np.zeros((8, CLASSES)), epochs=9)
    assert history.loss[-1] < history.loss[0]


def test_a_users_loss_with_a_count_is_checked_too() -> None:
    class Wrong:
        def __call__(self, prediction: Array, target: Any) -> Any:
            return prediction, 1.0

        def count(self, prediction: Array, target: Any) -> int:
            return len(prediction)

    for call in ("fit", "evaluate"):
        with pytest.raises(
            TypeError, match=r"loss: Wrong returned \(ndarray, float\), expected \(loss, dpre"
        ):
            getattr(trainer_of(net(), loss=Wrong()), call)(X, Y)


def test_a_model_that_cannot_be_trained_is_refused() -> None:
    frozen = nplora.Sequential(nplora.Linear(np.ones((CLASSES, D_IN), np.float32)))
    with pytest.raises(ValueError, match="no trainable parameters"):
        trainer_of(frozen).fit(X, Y)
    merged = net()
    merged.merge()
    with pytest.raises(RuntimeError, match=r"LoRALinear\.fit: the layer is merged"):
        trainer_of(merged).fit(X, Y)
    with pytest.raises(TypeError, match="model is a function"):
        Trainer(lambda x: x)  # type: ignore[arg-type]


def test_a_users_backward_without_need_dx_is_called_without_it() -> None:
    class Plain(nplora.Module):
        def __init__(self) -> None:
            self.inner = net()

        def forward(self, x: Any) -> tuple[Array, Any]:
            return self.inner.forward(x)

        def backward(self, dy: Array, saved: Any) -> Array | None:  # type: ignore[override]
            return self.inner.backward(dy, saved)

    plain, usual = Plain(), net()
    plain.inner.seed(0)
    trainer_of(plain).fit(X, Y, epochs=3)
    trainer_of(usual).fit(X, Y, epochs=3)
    assert list(values(plain).values()) == list(values(usual).values())


# ---- signals ----


def interrupted_fit(trainer: Trainer, **arguments: Any) -> History:
    x, y = data()
    return trainer.fit(x, y, batch_size=8, **{"epochs": 4, **arguments})


def test_ctrl_c_returns_what_was_trained() -> None:
    class Interrupt(Callback):
        def on_step_end(self, run: Run, record: StepRecord) -> None:
            if record.step == 7:
                signal.raise_signal(signal.SIGINT)

    model, alone = net(), net()
    history = interrupted_fit(trainer_of(model, callbacks=[Interrupt()]))
    assert history.interrupted
    assert len(history.steps) == 7
    interrupted_fit(trainer_of(alone), epochs=None, steps=7)
    assert values(model) == values(alone)


def test_a_second_ctrl_c_while_the_first_is_saving_is_not_lost(tmp_path: Path) -> None:
    class Impatient(Callback):
        def on_step_end(self, run: Run, record: StepRecord) -> None:
            if record.step == 7:
                raise KeyboardInterrupt

        def on_checkpoint(self, run: Run) -> None:
            if run.step == 7:
                signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        interrupted_fit(
            trainer_of(net(), callbacks=[Impatient()]), checkpoint_dir=tmp_path, checkpoint_every=50
        )
    assert saved_step(tmp_path) == 7


def test_a_second_ctrl_c_soon_after_the_first_leaves_the_program_after_saving(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Interrupt(Callback):
        def on_step_end(self, run: Run, record: StepRecord) -> None:
            if record.step == 3:
                signal.raise_signal(signal.SIGINT)

    assert interrupted_fit(trainer_of(net(), callbacks=[Interrupt()])).interrupted
    with pytest.raises(KeyboardInterrupt):  # the program had begun its next fit
        interrupted_fit(
            trainer_of(net(), callbacks=[Interrupt()]), checkpoint_dir=tmp_path, checkpoint_every=50
        )
    assert saved_step(tmp_path) == 3
    monkeypatch.setattr(interrupts, "REPEAT_SECONDS", 0)
    assert interrupted_fit(trainer_of(net(), callbacks=[Interrupt()])).interrupted


def test_a_second_ctrl_c_does_not_wait_for_the_callbacks_of_the_end() -> None:
    later: list[str] = []

    class Impatient(Callback):
        def on_step_end(self, run: Run, record: StepRecord) -> None:
            raise KeyboardInterrupt

        def on_fit_end(self, run: Run) -> None:
            signal.raise_signal(signal.SIGINT)
            later.append("continued")

    with pytest.raises(KeyboardInterrupt):
        interrupted_fit(trainer_of(net(), callbacks=[Impatient()]))
    assert later == []


def test_leaving_the_process_from_a_callback_saves(tmp_path: Path) -> None:
    class Leave(Callback):
        def on_step_end(self, run: Run, record: StepRecord) -> None:
            if record.step == 7:
                sys.exit(3)

    with pytest.raises(SystemExit, match="3"):
        interrupted_fit(trainer_of(net(), callbacks=[Leave()]), checkpoint_dir=tmp_path, checkpoint_every=50)
    assert saved_step(tmp_path) == 7


@pytest.mark.parametrize("signum", ENDING_SIGNALS)
def test_a_signal_at_the_very_end_exits_like_any_other(tmp_path: Path, signum: signal.Signals) -> None:
    class Late(Callback):
        def on_fit_end(self, run: Run) -> None:
            signal.raise_signal(signum)

    before = signal.getsignal(signum)
    with pytest.raises(SystemExit, match=str(128 + signum)):
        interrupted_fit(trainer_of(net(), callbacks=[Late()]), checkpoint_dir=tmp_path)
    assert saved_step(tmp_path) == 20
    assert signal.getsignal(signum) is before


def test_sighup_stays_ignored_under_nohup(tmp_path: Path) -> None:
    class HangUp(Callback):
        def on_step_end(self, run: Run, record: StepRecord) -> None:
            signal.raise_signal(signal.SIGHUP)

    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        history = interrupted_fit(trainer_of(net(), callbacks=[HangUp()]), checkpoint_dir=tmp_path)
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)
    assert (history.ended, len(history.steps)) == ("complete", 20)


def saved_step(directory: Path) -> int:
    with RunDirectory(directory) as opened:
        assert opened.newest is not None
        return opened.newest.step


def test_ctrl_c_during_an_update_waits_until_it_is_whole() -> None:
    class Interrupted(nplora.AdamW):
        def step(self, *arguments: Any, **keywords: Any) -> float | None:
            signal.raise_signal(signal.SIGINT)
            return super().step(*arguments, **keywords)

    model, alone = net(), net()
    history = interrupted_fit(trainer_of(model, optimizer=Interrupted()))
    assert history.interrupted
    assert len(history.steps) == 1
    interrupted_fit(trainer_of(alone), epochs=None, steps=1)
    assert values(model) == values(alone)


def test_signal_handlers_are_called_during_a_run_and_restored_after_it() -> None:
    heard: list[int] = []

    class Interrupt(Callback):
        def on_step_end(self, run: Run, record: StepRecord) -> None:
            signal.raise_signal(signal.SIGINT)

    def own(signum: int, frame: Any) -> None:
        heard.append(signum)

    before = signal.signal(signal.SIGINT, own)
    try:
        history = interrupted_fit(trainer_of(net(), callbacks=[Interrupt()]), epochs=1)
        assert signal.getsignal(signal.SIGINT) is own
    finally:
        signal.signal(signal.SIGINT, before)
    assert heard == [signal.SIGINT] * 5
    assert not history.interrupted


def test_a_run_outside_the_main_thread_leaves_signals_alone() -> None:
    found: list[History] = []
    thread = threading.Thread(target=lambda: found.append(interrupted_fit(trainer_of(net()))))
    thread.start()
    thread.join()
    assert found[0].ended == "complete"


def test_a_run_inside_disable_adapter_is_refused() -> None:
    trainer = trainer_of(net())
    with trainer.model.disable_adapter(), pytest.raises(RuntimeError, match="adapters are switched off here"):
        trainer.fit(*data(), steps=1)
    assert len(trainer.fit(*data(), steps=1).steps) == 1


@pytest.mark.slow
@systems.needs_signals
@pytest.mark.parametrize("signum", ENDING_SIGNALS)
def test_a_signal_that_ends_the_process_saves_first(tmp_path: Path, signum: signal.Signals) -> None:
    program = textwrap.dedent(
        f"""
        import sys, time
        sys.path[:0] = [{str(Path(__file__).parent)!r}, {str(Path(__file__).parents[1])!r}]
        from test_trainer import Callback, data, net, trainer_of

        class Slow(Callback):
            def on_step_end(self, run, record):
                print(record.step, flush=True)
                time.sleep(0.01)

        x, y = data()
        try:
            trainer_of(net(), callbacks=[Slow()]).fit(x, y, epochs=10**6, checkpoint_dir={str(tmp_path)!r})
        except SystemExit as end:
            print(*end.__notes__)
            raise
        """
    )
    child = subprocess.Popen(
        [sys.executable, "-c", program], stdout=subprocess.PIPE, text=True, env=os.environ
    )
    assert child.stdout is not None
    with contextlib.closing(child.stdout) as out:
        while int(out.readline()) < 5:
            pass
        child.send_signal(signum)
        assert child.wait(timeout=20) == 128 + signum
        last = out.read().splitlines()[-1]
    assert re.fullmatch(r"the run is saved at step \d+: --resume \(resume=True\) continues the run", last)
    assert saved_step(tmp_path) >= 5


def test_ctrl_c_in_a_validation_or_a_checkpoint_loses_nothing(tmp_path: Path) -> None:
    class Interrupted(Callback):
        def on_checkpoint(self, run: Run) -> None:
            if run.step == 6:
                raise KeyboardInterrupt

    class Validation:
        def __iter__(self) -> Iterator[tuple[Array, Array]]:
            raise KeyboardInterrupt
            yield X, Y

    for name, callbacks, validation, step in (
        ("validation", [], Validation(), 5),  # the last step of the first epoch
        ("checkpoint", [Interrupted()], None, 6),
    ):
        directory = tmp_path / name
        trainer = trainer_of(net(), callbacks=callbacks)
        history = interrupted_fit(
            trainer, checkpoint_dir=directory, checkpoint_every=3, validation=validation
        )
        assert history.interrupted
        assert saved_step(directory) == step
