"""Evaluations at steps, early stopping by them, and the best factors kept, also by a resumed run."""

import dataclasses
import itertools
import json
import math
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import nplora
from nplora.formats import files
from nplora.trainer import Callback, EvaluationRecord, History, Run, Trainer, checkpoint, fingerprint, plot
from nplora.trainer.run_directory import RunDirectory

Array = np.ndarray[Any, Any]

ROWS, BATCH, STEPS = 26, 4, 18  # 7 batches an epoch, 2 in a step: epochs end after steps 4, 8, 12 and 16


def data() -> tuple[Array, Array]:
    rng = np.random.default_rng(1)
    return rng.normal(size=(ROWS, 6)).astype(np.float32), rng.integers(0, 3, ROWS)


def trainer_of(rng: int, *callbacks: Callback) -> Trainer:
    """A learning rate that is much too high: the validation loss rises and falls."""
    weights = np.random.default_rng(5)
    model = nplora.Sequential(
        nplora.LoRALinear(weights.normal(0, 0.5, (8, 6)), rank=2, dropout=0.3, rng=rng),
        nplora.Tanh(),
        nplora.LoRALinear(weights.normal(0, 0.5, (3, 8)), rank=2, freeze_B=True, rng=rng),
    )
    return Trainer(
        model, optimizer=nplora.AdamW(lr=0.3), accumulate=2, seed=7, progress=False, callbacks=callbacks
    )


def fit(trainer: Trainer, **arguments: Any) -> History:
    x, y = data()
    usual = {"steps": STEPS, "batch_size": BATCH, "validation": (x[:10], y[:10]), "eval_every": 3}
    return trainer.fit(x, y, **{**usual, **arguments})


def values(trainer: Trainer) -> dict[str, bytes]:
    return {name: array.tobytes() for name, array in fingerprint.factors(trainer.model).items()}


def outcome(trainer: Trainer, history: History) -> dict[str, Any]:
    """Everything that must be equal to the bit in two equal runs."""

    def plain(records: list[Any]) -> str:  # NaN equals NaN here
        return repr([dataclasses.replace(record, seconds=0) for record in records])

    return {
        "factors": values(trainer),
        "moments": {name: a.tobytes() for name, a in trainer.optimizer.state_dict().items()},
        "records": [plain(records) for records in (history.steps, history.evaluations, history.epochs)],
        "best": (history.ended, history.best_step, history.best_epoch, history.best_loss),
    }


class Scripted:
    """Validation data; all targets are offsets[k] when they are read for the k-th time."""

    def __init__(self, *offsets: float) -> None:
        self.offsets, self.read = offsets, 0

    def __iter__(self) -> Iterator[tuple[Array, Array]]:
        self.read += 1
        offset = self.offsets[self.read - 1]
        yield np.zeros((4, 6), np.float32), np.full((4, 2), offset, np.float32)


class Seen(Callback):
    """The factors at each evaluation."""

    def __init__(self) -> None:
        self.factors: dict[int, dict[str, bytes]] = {}

    def on_evaluation(self, run: Run, record: EvaluationRecord) -> None:
        arrays = fingerprint.factors(run.model)
        self.factors[record.step] = {name: array.tobytes() for name, array in arrays.items()}


class StopAt(Callback):
    """Ctrl-C after a step, or after its evaluation."""

    def __init__(self, step: int, hook: str = "on_step_end") -> None:
        setattr(self, hook, self.stop)
        self.step = step

    def stop(self, run: Run, record: Any) -> None:
        if record.step == self.step:
            raise KeyboardInterrupt


class InterruptedData:
    """The validation data of `fit`; reading them for the n-th time raises KeyboardInterrupt half-way."""

    def __init__(self, n: int) -> None:
        self.left = n

    def __iter__(self) -> Iterator[tuple[Array, Array]]:
        x, y = data()
        self.left -= 1
        yield x[:5], y[:5]
        if not self.left:
            raise KeyboardInterrupt
        yield x[5:10], y[5:10]


def scripted(*offsets: float, **arguments: Any) -> tuple[Trainer, Seen, History]:
    """A run of 12 steps in epochs of 4, whose outputs stay close to 0."""
    seen = Seen()
    layer = nplora.LoRALinear(np.eye(2, 6), rank=1, rng=0)
    trainer = Trainer(layer, "mse", nplora.AdamW(lr=1e-3), progress=False, callbacks=[seen])
    x, _ = data()
    usual = {"epochs": 3, "batch_size": 4, "validation": Scripted(*offsets), "eval_every": 3}
    return trainer, seen, trainer.fit(x[:16], x[:16, :2], **{**usual, **arguments})


class Distance:
    """The mean distance of the outputs from 1. It also measures the largest distance of each batch."""

    def __init__(self) -> None:
        self.largest: list[float] = []

    def count(self, x: Array, y: Array) -> int:
        return len(x)

    def forward_backward(self, model: Any, x: Array, y: Array, factor: float) -> float:
        out, saved = model.forward(x)
        model.backward(np.sign(out - 1) * np.float32(factor), saved)
        self.largest.append(float(abs(out - 1).max()))
        return float(abs(out - 1).sum())

    def evaluate(self, model: Any, x: Array, y: Array) -> float:
        distances = abs(model(x) - 1)
        self.largest.append(float(distances.max()))
        return float(distances.sum()) / len(x)

    def blame(self, model: Any, x: Array) -> str:
        return "not finite"

    def settings(self) -> dict[str, Any]:
        return {}

    def take_metrics(self) -> dict[str, float]:
        taken, self.largest = self.largest, []
        return {"largest": float(np.mean(taken)), "nothing": math.nan} if taken else {}


class Measured(Callback):
    """The largest distance on the validation data at each evaluation, in float64."""

    def __init__(self) -> None:
        self.found: dict[int, float] = {}

    def on_evaluation(self, run: Run, record: EvaluationRecord) -> None:
        layer: Any = run.model
        weights = layer.merged_weight().astype(np.float64)
        self.found[record.step] = float(abs(np.eye(4) @ weights.T - 1).max())


def measured_run(directory: Path, *callbacks: Callback, **arguments: Any) -> History:
    """Eight steps in two epochs, evaluated after steps 3, 4, 6 and 8."""
    layer = nplora.LoRALinear(np.eye(4), rank=1, rng=0)
    trainer = Trainer(layer, Distance(), nplora.AdamW(lr=0.05), progress=False, callbacks=callbacks)
    validation = [(np.eye(4, dtype=np.float32), np.zeros(4))]
    x = np.eye(4, dtype=np.float32)[[0, 1, 2, 3] * 2]
    return trainer.fit(
        x, np.zeros(8), epochs=2, batch_size=2, validation=validation, eval_every=3,
        checkpoint_dir=directory, checkpoint_every=2, **arguments,
    )  # fmt: skip


# ---- what the loss measures besides ----


def largest_of(records: Any) -> list[tuple[int, float]]:
    return [(record.step, record.val_metrics["largest"]) for record in records]


def test_every_evaluation_has_the_metrics_of_the_loss(tmp_path: Path) -> None:
    seen = Measured()
    history = measured_run(tmp_path / "run", seen)
    assert [record.step for record in history.evaluations] == [3, 4, 6, 8]
    for step, largest in largest_of(history.evaluations):
        assert largest == pytest.approx(seen.found[step], rel=1e-5)
    assert largest_of(history.epochs) == largest_of(history.evaluations)[1::2]
    rows = [json.loads(line) for line in (tmp_path / "run/log.jsonl").read_text().splitlines()]
    logged = [(row["step"], row["val_metrics"]["largest"]) for row in rows if row["event"] == "evaluation"]
    assert logged == largest_of(history.evaluations)


@pytest.mark.slow
@pytest.mark.parametrize("log", ["there", "lost", "without evaluations"])
@pytest.mark.parametrize("step", [3, 5, 7])
def test_a_resumed_run_has_the_metrics_of_all_evaluations(step: int, log: str, tmp_path: Path) -> None:
    whole = measured_run(tmp_path / "whole")
    directory = tmp_path / "run"
    measured_run(directory, StopAt(step))
    path = directory / "log.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    if log == "lost":
        path.unlink()
    if log == "without evaluations":
        path.write_bytes(b"".join(line for line in lines if b'"evaluation"' not in line))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*the log is missing, cut or damaged")
        history = measured_run(directory, resume=True)
    assert largest_of(history.evaluations) == largest_of(whole.evaluations)
    assert largest_of(history.epochs) == largest_of(whole.epochs)
    assert all(math.isnan(record.val_metrics["nothing"]) for record in history.evaluations)


def test_the_epochs_of_a_log_without_evaluations_give_theirs_with_the_metrics() -> None:
    row = {"event": "epoch", "epoch": 1, "step": 4, "loss": 2.0, "val_loss": 1.5, "val_accuracy": None}
    history = History()
    history.add_log(json.dumps({**row, "seconds": 1.0, "val_metrics": {"kl": 0.25}}).encode(), 4, 1)
    assert history.evaluations == [EvaluationRecord(4, 1, 1.5, None, 0.0, {"kl": 0.25})]


def test_metrics_of_an_evaluation_that_are_not_numbers_are_refused() -> None:
    history = History()
    row = {"step": 2, "epoch": 1, "val_loss": 1.0, "val_accuracy": None, "seconds": 0.5}
    history.restore(history.step_columns(), [], [row, row | {"val_metrics": {"kl": 0.25}}])
    assert [record.val_metrics for record in history.evaluations] == [{}, {"kl": 0.25}]
    for wrong in ([1], {"kl": "x"}, None):
        with pytest.raises(TypeError, match="the metrics of an evaluation are not a dictionary of numbers"):
            history.restore(history.step_columns(), [], [row | {"val_metrics": wrong}])


@pytest.mark.parametrize("changed", [False, True])
def test_with_other_validation_data_the_best_factors_are_chosen_anew(changed: bool, tmp_path: Path) -> None:
    """The run moves away from the easy data, whose loss stays far below that of the hard data."""
    x, _ = data()
    trainer = Trainer(nplora.LoRALinear(np.eye(3, 6), rank=1, rng=0), "mse", nplora.AdamW(lr=0.1))
    easy, hard = (x[:4], x[:4, :3]), (x[:4], np.full((4, 3), 9.0, np.float32))
    usual: dict[str, Any] = {"batch_size": 4, "eval_every": 1, "checkpoint_dir": tmp_path / "run"}
    trainer.fit(*hard, steps=2, validation=easy, **usual)
    again = Trainer(nplora.LoRALinear(np.eye(3, 6), rank=1, rng=0), "mse", nplora.AdamW(lr=0.1))
    with pytest.warns(UserWarning, match="total_steps was 2, is 6"):
        history = again.fit(*hard, steps=6, validation=hard if changed else easy, resume=True, **usual)
    assert [record.step for record in history.evaluations] == [1, 2, 3, 4, 5, 6]
    best = min(history.evaluations[2 * changed :], key=lambda record: record.val_loss)
    assert (history.best_step, history.best_loss) == (best.step, best.val_loss)
    assert (best.step > 2) == changed
    assert again.evaluate(*(hard if changed else easy))["loss"] == pytest.approx(best.val_loss)


# ---- when the model is evaluated, and which factors it keeps ----


@pytest.mark.parametrize("changed", [True, False])
def test_patience_compares_no_losses_of_other_data_also_if_the_run_had_none_in_between(
    changed: bool, tmp_path: Path
) -> None:
    x, _ = data()
    easy, hard = (x[:4], x[:4, :3]), (x[:4], np.full((4, 3), 9.0, np.float32))

    def run(validation: Any, patience: int | None, *callbacks: Callback) -> History:
        layer = nplora.LoRALinear(np.eye(3, 6), rank=1, rng=0)
        trainer = Trainer(layer, "mse", nplora.AdamW(lr=0.1), callbacks=callbacks)
        return trainer.fit(
            *hard, steps=6, batch_size=4, validation=validation, patience=patience, keep="last",
            eval_every=None if validation is None else 1, checkpoint_dir=tmp_path, resume=True,
        )  # fmt: skip

    run(easy, None, StopAt(2))
    run(None, None, StopAt(4))
    history = run(hard if changed else easy, 1)
    losses = [record.val_loss for record in history.evaluations]
    assert losses[-1] > losses[0], "the test needs a loss that is higher than the first one"
    assert (history.ended, len(history.steps)) == (("complete", 6) if changed else ("patience", 4))


def test_a_run_is_evaluated_at_steps_and_at_the_ends_of_epochs_but_never_twice() -> None:
    _, seen, history = scripted(9, 8, 7, 6, 5, 4)
    assert [record.step for record in history.evaluations] == [3, 4, 6, 8, 9, 12] == list(seen.factors)
    assert [record.epoch for record in history.evaluations] == [1, 1, 2, 2, 3, 3]
    losses = [record.val_loss for record in history.evaluations]
    assert losses == pytest.approx([81, 64, 49, 36, 25, 16], rel=1e-2)
    assert [(e.epoch, e.step, e.val_loss) for e in history.epochs] == [
        (1, 4, losses[1]), (2, 8, losses[3]), (3, 12, losses[5]),
    ]  # fmt: skip
    assert (history.best_step, history.best_epoch, history.best_loss) == (12, 3, losses[5])


@pytest.mark.parametrize("patience", [None, 20])
def test_the_model_keeps_the_factors_of_the_lowest_loss(patience: int | None) -> None:
    trainer, seen, history = scripted(9, math.nan, 2, 6, 5, 4, patience=patience)
    assert (history.ended, history.best_step, history.best_epoch) == ("complete", 6, 2)
    assert values(trainer) == seen.factors[6] != seen.factors[12]
    assert history.best_loss == history.evaluations[2].val_loss


class Copies(Callback):
    """The copies of the best factors at the end."""

    def on_fit_end(self, run: Run) -> None:
        self.found = dict(run._state.early_stopping.copies)


@pytest.mark.parametrize(
    ("arguments", "are_copied"),
    [
        ({"epochs": 1}, False),
        ({"steps": 3}, False),
        ({"steps": 3, "eval_every": 3}, False),
        ({"epochs": 2}, True),
        ({"steps": 3, "eval_every": 2}, True),
        ({"epochs": 2, "keep": "last"}, False),
    ],
)
def test_the_best_factors_are_copied_only_if_steps_follow(
    arguments: dict[str, Any], are_copied: bool, tmp_path: Path
) -> None:
    seen, copies = Seen(), Copies()
    trainer = trainer_of(0, seen, copies)
    history = fit(trainer, **{"steps": None, "eval_every": None, **arguments})
    assert bool(copies.found) == are_copied
    if history.best_step is not None:
        assert values(trainer) == seen.factors[history.best_step]


def test_a_checkpoint_has_the_best_factors_that_were_never_copied(tmp_path: Path) -> None:
    seen = Seen()
    options: dict[str, Any] = {"steps": None, "eval_every": None, "checkpoint_dir": tmp_path}
    fit(trainer_of(0, seen), epochs=1, **options)
    with RunDirectory(tmp_path) as directory:
        assert directory.newest is not None
        kept = directory.newest.best_parameters
        assert {name: array.tobytes() for name, array in kept.items()} == seen.factors[4]
    again = trainer_of(0, seen)
    with pytest.warns(UserWarning, match="total_steps was 4, is 8"):
        history = fit(again, epochs=2, resume=True, **options)
    assert values(again) == seen.factors[history.best_step or 0]


def test_the_last_factors_are_kept_on_request() -> None:
    trainer, seen, history = scripted(9, 8, 2, 6, 5, 4, keep="last", patience=3)
    assert (history.ended, history.best_step, history.best_loss) == ("complete", None, None)
    assert values(trainer) == seen.factors[12]


def test_the_first_of_equal_losses_is_the_best() -> None:
    history = fit(trainer_of(0), eval_every=1, validation=Scripted2())
    assert history.best_step == 1


class Scripted2:
    """Validation data without a label: each loss is 0."""

    def __iter__(self) -> Iterator[tuple[Array, Array]]:
        yield np.zeros((4, 6), np.float32), np.full(4, -100)


def test_patience_counts_evaluations_and_ends_a_run_within_an_epoch() -> None:
    trainer, seen, history = scripted(9, 2, 3, 4, 4, patience=2, eval_every=1)
    assert (history.ended, len(history.steps), history.best_step) == ("patience", 4, 2)
    assert [record.step for record in history.epochs] == [4]
    assert values(trainer) == seen.factors[2]
    data = Scripted(9, 2, math.nan, 5)
    trainer, seen, history = scripted(validation=data, patience=1, eval_every=1)
    assert (history.ended, len(history.steps), data.read) == ("patience", 3, 3)
    assert [(record.epoch, record.step) for record in history.epochs] == [(1, 3)]


@pytest.mark.parametrize("length", [{"epochs": 2}, {"epochs": None, "steps": 7}])
@pytest.mark.parametrize("eval_every", [None, 1])
def test_a_run_that_made_all_its_steps_is_complete_even_if_patience_is_lost_at_the_end(
    length: dict[str, Any], eval_every: int | None
) -> None:
    last = length.get("steps", 8)
    offsets = [1, 2] if eval_every is None else [*range(last, 1, -1), 9]  # only the last loss is higher
    history = scripted(*offsets, patience=1, eval_every=eval_every, **length)[2]
    assert len(history.evaluations) == len(offsets)
    assert (history.ended, len(history.steps), history.epochs[-1].step) == ("complete", last, last)


def test_losses_that_are_never_finite_keep_the_last_factors() -> None:
    trainer, seen, history = scripted(*[math.nan] * 6)
    assert (history.best_step, history.best_loss) == (None, None)
    assert values(trainer) == seen.factors[12]


def test_ctrl_c_keeps_the_last_factors_and_a_resumed_run_knows_the_best(tmp_path: Path) -> None:
    seen, last = Seen(), Seen()
    every_step: dict[str, Any] = {"eval_every": 1, "steps": 60}
    whole = fit(trainer_of(0, seen), **every_step)
    losses = [record.val_loss for record in whole.evaluations]
    # The losses differ by instruction set. At this step and the one before, they are above an earlier loss.
    ends = [n for n in range(3, len(losses) + 1) if min(losses[n - 2 : n]) > min(losses[: n - 2])]
    assert ends, "the test needs two losses in a row above an earlier one"
    end = ends[0]
    best = 1 + int(np.argmin(losses[:end]))
    last.on_step_end = last.on_evaluation  # type: ignore[attr-defined]
    first = trainer_of(0, last, StopAt(end))
    history = fit(first, checkpoint_dir=tmp_path, **every_step)
    assert (history.ended, history.best_step) == ("interrupted", None)
    assert values(first) == last.factors[end] != seen.factors[best]
    second = trainer_of(99)
    history = fit(second, checkpoint_dir=tmp_path, resume=True, patience=1, **every_step)
    assert (history.ended, history.best_step, len(history.steps)) == ("patience", best, end)
    assert values(second) == seen.factors[best]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"eval_every": 0}, "Trainer.fit: eval_every is 0, expected at least 1"),
        ({"validation": None}, "Trainer.fit: eval_every needs validation data"),
        ({"keep": "first"}, "Trainer.fit: keep='first' is not available; possible: 'best', 'last'"),
        ({"epochs": 1, "steps": None, "validation": iter(())}, "can be read only once"),
    ],
)
def test_wrong_arguments_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        fit(trainer_of(0), **arguments)


@pytest.mark.parametrize("name", ["eval_steps", "steps_per_eval", "val_check_interval"])
def test_other_names_of_the_steps_between_evaluations_are_known(name: str) -> None:
    with pytest.raises(TypeError, match=rf"unexpected keyword '{name}'; did you mean eval_every\?"):
        fit(trainer_of(0), **{name: 3})
    with pytest.raises(TypeError, match=r"'load_best_model_at_end'; did you mean keep\?"):
        fit(trainer_of(0), load_best_model_at_end=True)


# ---- stopped and resumed ----


@pytest.fixture(scope="module")
def uninterrupted() -> dict[str, Any]:
    trainer = trainer_of(0)
    return outcome(trainer, fit(trainer))


@pytest.mark.slow
@pytest.mark.parametrize("step", range(1, STEPS + 1))
def test_a_run_stopped_after_any_step_resumes_to_the_same_bits(
    step: int, uninterrupted: dict[str, Any], tmp_path: Path
) -> None:
    """The step is saved before its evaluation, which the resumed run then makes."""
    assert fit(trainer_of(0, StopAt(step)), checkpoint_dir=tmp_path).interrupted
    second = trainer_of(99)
    assert outcome(second, fit(second, checkpoint_dir=tmp_path, resume=True)) == uninterrupted


@pytest.mark.slow
@pytest.mark.parametrize("hook", ["on_evaluation", "on_epoch_end"])
@pytest.mark.parametrize("step", [3, 4, 6, 8, 12, 16, 18])
def test_a_run_stopped_after_an_evaluation_does_not_repeat_it(
    step: int, hook: str, uninterrupted: dict[str, Any], tmp_path: Path
) -> None:
    fit(trainer_of(0, StopAt(step, hook)), checkpoint_dir=tmp_path)
    seen, second = Seen(), trainer_of(99)
    second.callbacks.append(seen)
    assert outcome(second, fit(second, checkpoint_dir=tmp_path, resume=True)) == uninterrupted
    assert step not in seen.factors or step == STEPS
    records = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    logged = [record["step"] for record in records if record["event"] == "evaluation"]
    assert logged == [3, 4, 6, 8, 9, 12, 15, 16, 18]


@pytest.mark.slow
@pytest.mark.parametrize("n", range(1, 10))
def test_a_run_stopped_within_an_evaluation_repeats_it(
    n: int, uninterrupted: dict[str, Any], tmp_path: Path
) -> None:
    whole = trainer_of(0)
    expected = outcome(whole, fit(whole, validation=InterruptedData(0)))  # two batches: other roundings
    history = fit(trainer_of(0), validation=InterruptedData(n), checkpoint_dir=tmp_path)
    assert history.interrupted
    assert len(history.evaluations) == n - 1
    second = trainer_of(99)
    found = fit(second, validation=InterruptedData(0), checkpoint_dir=tmp_path, resume=True)
    assert outcome(second, found) == expected


@pytest.mark.parametrize("step", [5, 9, 10, 11])
def test_early_stopping_by_steps_survives_a_stop(step: int, tmp_path: Path) -> None:
    whole = trainer_of(0)
    expected = outcome(whole, fit(whole, patience=2, steps=60, eval_every=2))
    assert expected["best"][0] == "patience"
    fit(trainer_of(0, StopAt(step)), patience=2, steps=60, eval_every=2, checkpoint_dir=tmp_path)
    for _ in range(2):  # a run that is over is over
        second = trainer_of(99)
        history = fit(second, patience=2, steps=60, eval_every=2, checkpoint_dir=tmp_path, resume=True)
        assert outcome(second, history) == expected


@pytest.mark.parametrize("hook", [None, "on_evaluation", "on_epoch_end"])
def test_a_run_that_is_made_longer_goes_on_from_its_last_factors(hook: str | None, tmp_path: Path) -> None:
    """The end of the shorter run is no end of an epoch: the longer run has no evaluation there."""
    whole = trainer_of(0)
    expected = outcome(whole, fit(whole))
    stops = [StopAt(13, hook)] if hook else []
    history = fit(trainer_of(0, *stops), steps=13, checkpoint_dir=tmp_path)
    assert history.best_step is None if hook else history.best_step in range(1, 13)
    second = trainer_of(99)
    with pytest.warns(UserWarning, match="total_steps was 13, is 18"):
        history = fit(second, checkpoint_dir=tmp_path, resume=True)
    assert outcome(second, history) == expected


def test_a_run_that_did_not_keep_its_best_chooses_among_later_evaluations(tmp_path: Path) -> None:
    fit(trainer_of(0, StopAt(14)), keep="last", checkpoint_dir=tmp_path)
    with RunDirectory(tmp_path) as directory:
        assert directory.newest is not None
        assert not directory.newest.best_parameters
    seen, second = Seen(), trainer_of(99)
    second.callbacks.append(seen)
    history = fit(second, checkpoint_dir=tmp_path, resume=True)
    later = {record.step: record.val_loss for record in history.evaluations if record.step > 14}
    assert history.best_step == min(later, key=later.__getitem__)
    assert values(second) == seen.factors[history.best_step]


def test_checkpoints_of_the_older_schema_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Schema 1 has no evaluations, and no step in the best one, which ended an epoch."""
    whole = trainer_of(0)
    expected = outcome(whole, fit(whole, eval_every=None, patience=9))
    fit(trainer_of(0, StopAt(13)), eval_every=None, patience=9, checkpoint_dir=tmp_path)
    log = tmp_path / "log.jsonl"
    lines = log.read_bytes().splitlines(keepends=True)
    log.write_bytes(b"".join(line for line in lines if b'"event":"evaluation"' not in line))
    with RunDirectory(tmp_path) as directory:
        newest = directory.newest
    assert newest is not None
    assert newest.best is not None
    best = {name: value for name, value in newest.best.items() if name != "step"}
    kinds = {name: kind for name, kind in checkpoint._KINDS.items() if name != "evaluations"}
    with monkeypatch.context() as older:
        older.setattr(checkpoint, "SCHEMA", 1)
        older.setattr(checkpoint, "_KINDS", kinds)
        old = dataclasses.replace(newest, best=best, log_bytes=log.stat().st_size)
        for path in tmp_path.glob("checkpoint-*"):
            files.replace([checkpoint.new_file(path, old)])
    assert "evaluations" not in json.loads(nplora.formats.safetensors.open(path).metadata["state"])
    second = trainer_of(99)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the marks of the run directory
        history = fit(second, eval_every=None, patience=9, checkpoint_dir=tmp_path, resume=True)
    assert outcome(second, history) == expected


# ---- the log and the plot ----


def test_evaluations_are_in_the_log_and_in_the_plot(tmp_path: Path) -> None:
    history = fit(trainer_of(0), checkpoint_dir=tmp_path)
    log = plot.read_log(tmp_path / "log.jsonl")
    assert [record["step"] for record in log.evaluations] == [3, 4, 6, 8, 9, 12, 15, 16, 18]
    curves = {curve.label: curve for curve in plot._loss_curves(log)}
    assert curves["validation"].x == [record.step for record in history.evaluations]
    assert curves["validation"].y == [record.val_loss for record in history.evaluations]
    older = log._replace(evaluations=[])
    curves = {curve.label: curve for curve in plot._loss_curves(older)}
    assert curves["validation"].x == [4, 8, 12, 16, 18]
    end = json.loads((tmp_path / "log.jsonl").read_text().splitlines()[-1])
    assert (end["event"], end["best_step"]) == ("end", history.best_step)


def test_the_history_of_evaluations_is_rebuilt_from_the_log(tmp_path: Path) -> None:
    """A checkpoint holds the last 64 records only."""
    whole = trainer_of(0)
    arguments = {"steps": 90, "eval_every": 1}
    expected = outcome(whole, fit(whole, **arguments))
    fit(trainer_of(0, StopAt(80)), **arguments, checkpoint_dir=tmp_path)
    second = trainer_of(99)
    assert outcome(second, fit(second, **arguments, checkpoint_dir=tmp_path, resume=True)) == expected


@pytest.mark.parametrize("log", ["kept", "lost"])
def test_an_epoch_whose_validation_loss_was_not_finite_stays_different_from_one_without_validation(
    log: str, tmp_path: Path
) -> None:
    x, y = data()
    nothing = np.full_like(x[:10], np.nan), y[:10]
    usual = {"eval_every": None, "steps": 14, "checkpoint_dir": tmp_path}
    fit(trainer_of(0, StopAt(5)), **usual, validation=nothing)  # an epoch has four steps
    with warnings.catch_warnings():
        warnings.simplefilter("ignore" if log == "lost" else "error")  # about the history of the steps
        fit(trainer_of(9, StopAt(9)), **usual, validation=None, resume=True)
        if log == "lost":
            (tmp_path / "log.jsonl").write_bytes(b"")
        history = fit(trainer_of(99), **usual, resume=True)
    first, second, *rest = (record.val_loss for record in history.epochs)
    assert first is not None
    assert math.isnan(first)
    assert second is None
    assert all(loss is not None and math.isfinite(loss) for loss in rest)


def test_a_lost_log_keeps_the_last_evaluations(tmp_path: Path) -> None:
    whole = trainer_of(0)
    expected = outcome(whole, fit(whole))
    fit(trainer_of(0, StopAt(13)), checkpoint_dir=tmp_path)
    lines = (tmp_path / "log.jsonl").read_bytes().splitlines(keepends=True)
    (tmp_path / "log.jsonl").write_bytes(b"".join(itertools.islice(lines, 7)))
    second = trainer_of(99)
    with pytest.warns(UserWarning, match="the log is missing, cut or damaged"):
        history = fit(second, checkpoint_dir=tmp_path, resume=True)
    assert outcome(second, history) == expected
    log = plot.read_log(tmp_path / "log.jsonl")
    assert [record["step"] for record in log.evaluations] == [3, 4, 6, 8, 9, 12, 15, 16, 18]


def test_an_evaluation_after_the_step_of_the_checkpoint_is_dropped() -> None:
    history = History()
    history.evaluations += [EvaluationRecord(step, 1, 0.5, None, 1.0, {}) for step in (0, 2, 3)]
    history.add_log(b"", step=2, epoch=1)
    assert [record.step for record in history.evaluations] == [2]
