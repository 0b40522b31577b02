"""Callbacks: the gradients before a step, and the state that a callback keeps across a stop."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import nplora
from nplora.nn.losses import NonFiniteLossError
from nplora.trainer import Callback, Run, StepRecord, Trainer

Array = np.ndarray[Any, Any]

D_IN, D_OUT, RANK, ROWS = 6, 4, 2, 22


def data() -> tuple[Array, Array]:
    rng = np.random.default_rng(2)
    return rng.normal(size=(ROWS, D_IN)).astype(np.float32), rng.normal(size=(ROWS, D_OUT)).astype(np.float32)


def layer(rng: int = 0) -> nplora.LoRALinear:
    weight = np.random.default_rng(5).normal(0, 0.5, (D_OUT, D_IN))
    return nplora.LoRALinear(weight, rank=RANK, init="gaussian", rng=rng)


def trainer_of(model: nplora.Module, *callbacks: Callback, **settings: Any) -> Trainer:
    usual = {"optimizer": nplora.AdamW(lr=0.02), "accumulate": 4, "clip_norm": 0.5}
    return Trainer(model, loss="mse", progress=False, callbacks=callbacks, **{**usual, **settings})


def fit(trainer: Trainer, **arguments: Any) -> Any:
    return trainer.fit(*data(), **{"epochs": 2, "batch_size": 4, "shuffle": False, **arguments})


def exact_gradients(model: nplora.LoRALinear, x: Array, y: Array) -> dict[str, Array]:
    """The gradients of the mean squared error in float64."""
    W, A, B = (np.asarray(a, np.float64) for a in (model.weight.to_numpy(), model.A, model.B))
    x, y = x.astype(np.float64), y.astype(np.float64)
    dy = 2 * (x @ (W + model.scale * A @ B).T - y) / y.size
    return {"A": model.scale * dy.T @ (x @ B.T), "B": model.scale * (dy @ A).T @ x}


class Gradients(Callback):
    """Copies of the gradients of every step, and of the parameters before it."""

    def __init__(self) -> None:
        self.seen: list[dict[str, Array]] = []
        self.exact: list[dict[str, Array]] = []

    def on_before_optimizer_step(self, run: Run, gradients: Mapping[str, Array]) -> None:
        assert isinstance(run.model, nplora.LoRALinear)
        x, y = data()
        rows = slice(0, 16) if run.step % 2 == 0 else slice(16, None)  # the last batch has two rows
        self.seen.append({name: gradient.copy() for name, gradient in gradients.items()})
        self.exact.append(exact_gradients(run.model, x[rows], y[rows]))


def test_a_callback_sees_the_gradients_of_the_mean_loss_before_they_are_clipped() -> None:
    callback, model = Gradients(), layer()
    history = fit(trainer_of(model, callback))
    assert len(callback.seen) == len(history.steps) == 4
    for seen, exact, record in zip(callback.seen, callback.exact, history.steps, strict=True):
        assert seen.keys() == exact.keys()
        for name in seen:
            np.testing.assert_allclose(seen[name], exact[name], rtol=1e-4, atol=1e-6)
        norm = math.sqrt(sum(np.sum(np.square(g, dtype=np.float64)) for g in seen.values()))
        assert record.grad_norm == pytest.approx(norm, rel=1e-6)
        assert norm > 0.5, "the test needs gradients that are clipped"


@pytest.mark.parametrize("clip_norm", [None, 0.5])
def test_a_callback_that_only_looks_changes_no_bit(clip_norm: float | None) -> None:
    """In the second step of an epoch, the batches have different numbers of rows."""
    plain, seen = layer(), layer()
    fit(trainer_of(plain, clip_norm=clip_norm), epochs=5)
    fit(trainer_of(seen, Gradients(), clip_norm=clip_norm), epochs=5)
    assert (plain.A.tobytes(), plain.B.tobytes()) == (seen.A.tobytes(), seen.B.tobytes())


class Edit(Callback):
    """Writes a value into the gradient of A."""

    def __init__(self, value: float) -> None:
        self.value = value

    def on_before_optimizer_step(self, run: Run, gradients: Mapping[str, Array]) -> None:
        gradients["A"][...] = self.value


def test_a_callback_may_change_the_gradients_in_place() -> None:
    model = layer()
    before = model.A.copy(), model.B.copy()
    history = fit(trainer_of(model, Edit(0), optimizer=nplora.SGD(lr=0.1), clip_norm=None), epochs=1)
    assert np.array_equal(model.A, before[0])
    assert not np.array_equal(model.B, before[1])
    assert all(record.grad_norm > 0 for record in history.steps)


def test_not_a_number_from_a_callback_ends_the_run_before_the_update(tmp_path: Path) -> None:
    model = layer()
    before = model.A.copy(), model.B.copy()
    with pytest.raises(
        NonFiniteLossError, match=r"step 1 .*the loss is finite, but the gradient of A is not"
    ):
        fit(trainer_of(model, Edit(math.nan)), checkpoint_dir=tmp_path)
    assert np.array_equal(model.A, before[0])
    assert np.array_equal(model.B, before[1])


def test_other_arrays_cannot_take_the_place_of_the_gradients() -> None:
    class Replace(Callback):
        def on_before_optimizer_step(self, run: Run, gradients: Any) -> None:
            gradients["A"] = np.zeros((D_OUT, RANK), np.float32)

    with pytest.raises(TypeError, match="does not support item assignment"):
        fit(trainer_of(layer(), Replace()))


def test_a_step_without_labels_has_no_gradients() -> None:
    callback = Gradients()
    trainer = Trainer(layer(), progress=False, callbacks=[callback])
    with pytest.warns(UserWarning, match="nothing was trained"):
        trainer.fit(data()[0], np.full(ROWS, -100), epochs=1)
    assert not callback.seen


def test_ctrl_c_in_the_hook_leaves_the_last_whole_step(tmp_path: Path) -> None:
    class Stop(Callback):
        def on_before_optimizer_step(self, run: Run, gradients: Any) -> None:
            if run.step == 2:
                raise KeyboardInterrupt

    whole, first, second = layer(), layer(), layer(9)
    fit(trainer_of(whole), epochs=3)
    history = fit(trainer_of(first, Stop()), epochs=3, checkpoint_dir=tmp_path)
    assert (history.ended, len(history.steps)) == ("interrupted", 2)
    fit(trainer_of(second), epochs=3, checkpoint_dir=tmp_path, resume=True)
    assert (whole.A.tobytes(), whole.B.tobytes()) == (second.A.tobytes(), second.B.tobytes())


def test_what_a_callback_logs_is_found_without_the_log(tmp_path: Path) -> None:
    class Note(Callback):
        before: Any = None

        def on_fit_start(self, run: Run) -> None:
            self.before = run.logged("note")

        def on_step_end(self, run: Run, record: StepRecord) -> None:
            run.log("note", {"step": run.step, "nan": math.nan})
            if run.step == 2:
                raise SystemError

    with pytest.raises(SystemError):
        fit(trainer_of(layer(), Note()), epochs=4, checkpoint_dir=tmp_path, checkpoint_every=1)
    (tmp_path / "log.jsonl").unlink()
    second = Note()
    with pytest.warns(UserWarning, match="log is missing"):
        fit(trainer_of(layer(), second), epochs=4, checkpoint_dir=tmp_path, resume=True)
    assert second.before == {"event": "note", "step": 2, "nan": None}


class Momentum(Callback):
    """Replaces each gradient of A by a running mean, which it keeps in the log."""

    mean: Array | None = None

    def on_fit_start(self, run: Run) -> None:
        logged = run.logged("mean")
        if logged:
            assert logged["step"] == run.step
            self.mean = np.array(logged["mean"])

    def on_before_optimizer_step(self, run: Run, gradients: Mapping[str, Array]) -> None:
        g = gradients["A"].astype(np.float64)
        self.mean = g if self.mean is None else 0.9 * self.mean + 0.1 * g
        gradients["A"][...] = self.mean

    def on_step_end(self, run: Run, record: StepRecord) -> None:
        assert self.mean is not None
        run.log("mean", {"step": run.step, "mean": self.mean.tolist()})


@pytest.mark.parametrize("step", range(1, 9))
def test_what_a_callback_logs_lets_it_resume_to_the_same_bits(step: int, tmp_path: Path) -> None:
    class Stop(Callback):
        def on_step_end(self, run: Run, record: StepRecord) -> None:
            if record.step == step:
                raise KeyboardInterrupt

    whole, first, second = layer(), layer(), layer(9)
    fit(trainer_of(whole, Momentum()), epochs=4)
    fit(trainer_of(first, Momentum(), Stop()), epochs=4, checkpoint_dir=tmp_path)
    fit(trainer_of(second, Momentum()), epochs=4, checkpoint_dir=tmp_path, resume=True)
    assert (whole.A.tobytes(), whole.B.tobytes()) == (second.A.tobytes(), second.B.tobytes())


class Order(Callback):
    def __init__(self) -> None:
        self.calls: list[str] = []

    def on_step_begin(self, run: Run) -> None:
        self.calls.append(f"begin {run.step}")

    def on_step_end(self, run: Run, record: StepRecord) -> None:
        self.calls.append(f"end {run.step}")


def test_every_step_begins_once_before_its_first_batch() -> None:
    order = Order()
    fit(trainer_of(layer(), order))  # 6 batches make steps of 4 and 2 batches, in each of 2 epochs
    assert order.calls == [f"{what} {i + (what == 'end')}" for i in range(4) for what in ("begin", "end")]
