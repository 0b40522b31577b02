"""Reporters: their content, that a resumed run appends, and that a failing report never ends a run."""

import csv
import json
import math
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import nplora
from nplora.trainer import Callback, History, Run, StepRecord, Trainer
from nplora.trainer.reporters import (
    REPORTERS,
    CsvReporter,
    MlflowReporter,
    Reporter,
    TensorBoardReporter,
    WandbReporter,
    reporting,
    require_reporters,
)

SETTINGS = {
    "rank": 2,
    "lr": 0.05,
    "targets": ("q_proj", "v_proj"),
    "chat": False,
    "layers": None,
    "x": "y" * 900,
}
SHOWN = {"rank": 2, "lr": 0.05, "targets": "q_proj,v_proj", "chat": False, "x": "y" * 500}

Rows = list[dict[str, str]]


class StopAfter(Callback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, run: Run, record: StepRecord) -> None:
        if record.step == self.step:
            raise KeyboardInterrupt


def run(directory: Path | None, *callbacks: Callback, **arguments: Any) -> History:
    """Ten steps in two epochs, evaluated after steps 3, 5, 6, 9 and 10."""
    rng = np.random.default_rng(1)
    layer = nplora.LoRALinear(rng.normal(size=(3, 6)), rank=2, rng=0)
    trainer = Trainer(layer, optimizer=nplora.AdamW(lr=0.05), schedule="linear", callbacks=callbacks)
    x, y = rng.normal(size=(20, 6)), rng.integers(0, 3, 20)
    usual = {
        "epochs": 2,
        "batch_size": 4,
        "validation": (x[:6], y[:6]),
        "eval_every": 3,
        "checkpoint_every": 2,
    }
    if directory is None:
        usual.pop("checkpoint_every")
    return trainer.fit(x, y, **{**usual, **arguments, "checkpoint_dir": directory})


def rows_of(directory: Path) -> Rows:
    with open(directory / "metrics.csv", encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def expected_rows(history: History) -> list[tuple[int, float | None, float | None]]:
    """Step, loss and validation loss of the rows that a run has."""
    rows = [(record.step, record.loss, None) for record in history.steps]
    evaluated = [(record.step, None, record.val_loss) for record in history.evaluations]
    return sorted([*rows, *evaluated], key=lambda row: (row[0], row[1] is None))


def found_rows(rows: Rows) -> list[tuple[int, float | None, float | None]]:
    return [
        (int(row["step"]), *(float(row[n]) if row[n] else None for n in ("loss", "eval_loss")))
        for row in rows
    ]


# ---- CSV ----


def test_a_csv_report_has_a_row_for_each_step_and_each_evaluation(tmp_path: Path) -> None:
    history = run(None, CsvReporter(tmp_path / "reports", SETTINGS))
    rows = rows_of(tmp_path / "reports")
    assert found_rows(rows) == expected_rows(history)
    assert len(rows) == 15
    steps = [row for row in rows if row["loss"]]
    assert [float(row["learning_rate"]) for row in steps] == [record.lr for record in history.steps]
    assert [float(row["grad_norm"]) for row in steps] == [record.grad_norm for record in history.steps]
    assert [int(row["epoch"]) for row in steps] == [1] * 5 + [2] * 5
    assert all(float(row["items_per_second"]) > 0 for row in steps)
    accuracies = [float(row["eval_accuracy"]) for row in rows if row["eval_loss"]]
    assert accuracies == [record.val_accuracy for record in history.evaluations]
    assert json.loads((tmp_path / "reports/settings.json").read_text()) == SHOWN


@pytest.mark.slow
@pytest.mark.parametrize("step", range(1, 11))
def test_the_csv_report_of_a_resumed_run_has_every_row_once(step: int, tmp_path: Path) -> None:
    """Ctrl-C comes before the step is reported. Rows after the last checkpoint are written again."""
    reports = tmp_path / "reports"
    run(tmp_path / "run", StopAfter(step), CsvReporter(reports))
    with open(reports / "metrics.csv", "a", encoding="utf-8") as file:
        file.write("11,1,0.5,0.1,0.1,,1,,\n12,,,,,,,0.5,\n13,1,0")
    history = run(tmp_path / "run", CsvReporter(reports), resume=True)
    assert found_rows(rows_of(reports)) == expected_rows(history)
    again = run(tmp_path / "run", CsvReporter(reports), overwrite=True)
    assert found_rows(rows_of(reports)) == expected_rows(again)


class Halves:
    """The mean squared error, which also measures itself: its half, and its third in evaluations only."""

    def __init__(self) -> None:
        self.taken: dict[str, float] = {}

    def count(self, x: Any, y: Any) -> int:
        return len(x)

    def forward_backward(self, model: Any, x: Any, y: Any, factor: float) -> float:
        out, saved = model.forward(x)
        model.backward((2 * out * factor).astype(np.float32), saved)
        loss = float((out * out).sum())
        self.taken = {"rewards/half": loss / len(x) / 2, "loss": -1.0}
        return loss

    def evaluate(self, model: Any, x: Any, y: Any) -> float:
        loss = float((model(x) ** 2).sum()) / len(x)
        self.taken = {"rewards/half": loss / 2, "third": loss / 3}
        return loss

    def blame(self, model: Any, x: Any) -> str:
        return "not finite"

    def settings(self) -> dict[str, Any]:
        return {}

    def take_metrics(self) -> dict[str, float]:
        taken, self.taken = self.taken, {}
        return taken


def run_halves(directory: Path, *callbacks: Callback, **arguments: Any) -> History:
    """Four steps, evaluated after steps 3 and 4."""
    trainer = Trainer(nplora.LoRALinear(np.eye(4), rank=1, rng=0), Halves(), callbacks=callbacks)
    x = np.eye(4, dtype=np.float32)
    return trainer.fit(
        x, np.zeros(4), epochs=1, batch_size=1, validation=[(x, np.zeros(4))], eval_every=3,
        checkpoint_dir=directory, checkpoint_every=1, **arguments,
    )  # fmt: skip


@pytest.mark.parametrize("step", [None, 1, 3])
def test_metrics_of_the_loss_get_columns_of_their_own(step: int | None, tmp_path: Path) -> None:
    reports = tmp_path / "reports"
    if step is not None:
        run_halves(tmp_path / "run", StopAfter(step), CsvReporter(reports))
    history = run_halves(tmp_path / "run", CsvReporter(reports), resume=True)
    rows = rows_of(reports)
    assert found_rows(rows) == expected_rows(history)
    assert [row["step"] for row in rows] == ["1", "2", "3", "3", "4", "4"]
    for row in rows:
        loss = float(row["loss"] or row["eval_loss"])
        steps, evaluations = ("rewards/half", "loss"), ("eval_rewards/half", "eval_third")
        assert all(bool(row[name]) == bool(row["loss"]) for name in steps)
        assert all(bool(row[name]) == bool(row["eval_loss"]) for name in evaluations)
        half = row["rewards/half"] or row["eval_rewards/half"]
        assert float(half) == pytest.approx(loss / 2)
        assert float(row["eval_third"] or loss / 3) == pytest.approx(loss / 3)


def test_a_file_that_no_run_wrote_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "metrics.csv").write_text("my,own\n1,2\n")
    with pytest.raises(FileExistsError, match=r"was not written by a run: .*metrics\.csv"):
        run(None, CsvReporter(tmp_path))
    assert (tmp_path / "metrics.csv").read_text() == "my,own\n1,2\n"
    assert not (tmp_path / "settings.json").exists()


def test_a_link_is_replaced_and_not_followed(tmp_path: Path) -> None:
    other = tmp_path / "other.csv"
    header = ",".join(CsvReporter._usual) + "\n"
    other.write_text(header)
    (tmp_path / "metrics.csv").symlink_to(other)
    run(None, CsvReporter(tmp_path))
    assert other.read_text() == header
    assert len(rows_of(tmp_path)) == 15


def test_a_loss_that_is_not_a_number_is_reported(tmp_path: Path) -> None:
    nothing = np.full((2, 6), np.nan), np.array([0, 1])
    run(None, CsvReporter(tmp_path), validation=nothing)
    assert all(math.isnan(float(row["eval_loss"])) for row in rows_of(tmp_path) if not row["loss"])


def test_tokens_per_second_are_those_of_the_function_that_counts_them(tmp_path: Path) -> None:
    total = iter(range(0, 10**6, 1000))
    history = run(None, CsvReporter(tmp_path, tokens=lambda: next(total)))
    rates = [float(row["tokens_per_second"]) for row in rows_of(tmp_path) if row["loss"]]
    assert rates == pytest.approx([1000 / record.seconds for record in history.steps])


# ---- any report ----


class Failing(Reporter):
    name = "failing"

    def _open(self, run: Run) -> None:
        self.calls: list[str] = []

    def _write(self, step: int, metrics: dict[str, float]) -> None:
        self.calls.append(f"write {step}")
        if step == 3:
            raise OSError("the network is gone")

    def _close(self, ended: str | None) -> None:
        self.calls.append(f"close {ended}")


def test_a_report_that_fails_ends_but_the_run_continues(tmp_path: Path) -> None:
    report = Failing(tmp_path)
    with pytest.warns(
        UserWarning, match="the failing report ends here, but the run continues: the network is gone"
    ):
        history = run(None, report)
    assert len(history.steps) == 10
    assert report.calls == ["write 1", "write 2", "write 3", "close None"]


def test_the_file_of_a_report_that_fails_is_closed(tmp_path: Path) -> None:
    class Full(CsvReporter):
        def _write(self, step: int, metrics: dict[str, float]) -> None:
            raise OSError("the disk is full")

    report = Full(tmp_path)
    with pytest.warns(UserWarning, match="the csv report ends here, but the run continues: the disk is full"):
        run(None, report)
    assert report._file.closed


def test_a_report_that_cannot_begin_ends_the_run_before_its_first_step(tmp_path: Path) -> None:
    (tmp_path / "reports").write_text("")
    with pytest.raises(FileExistsError) as raised:
        run(tmp_path / "run", CsvReporter(tmp_path / "reports"))
    assert not hasattr(raised.value, "__notes__"), "there is no run to resume"
    log = (tmp_path / "run/log.jsonl").read_text()
    assert '"event":"step"' not in log
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["log.jsonl"]
    (tmp_path / "reports").unlink()
    history = run(tmp_path / "run", CsvReporter(tmp_path / "reports"))
    assert found_rows(rows_of(tmp_path / "reports")) == expected_rows(history)


def test_a_report_that_cannot_begin_leaves_the_run_that_was_to_be_overwritten(tmp_path: Path) -> None:
    run(tmp_path / "run")
    before = {path.name: path.read_bytes() for path in (tmp_path / "run").iterdir()}
    (tmp_path / "reports").write_text("")
    with pytest.raises(FileExistsError):
        run(tmp_path / "run", CsvReporter(tmp_path / "reports"), overwrite=True)
    assert {path.name: path.read_bytes() for path in (tmp_path / "run").iterdir()} == before


def test_a_callback_reads_the_log_of_the_new_run_while_it_begins(tmp_path: Path) -> None:
    class Noted(Callback):
        def on_fit_start(self, run: Run) -> None:
            self.before = run.logged("note")
            run.log("note", {"number": 2})
            self.after = run.logged("note")

        def on_fit_end(self, run: Run) -> None:
            run.log("note", {"number": 1})

    for overwrite in (False, True):
        noted = Noted()
        run(tmp_path, noted, overwrite=overwrite)
        assert (noted.before, noted.after.get("number")) == ({}, 2)


def test_reports_are_closed_after_an_error(tmp_path: Path) -> None:
    class Broken(Callback):
        def on_step_end(self, run: Run, record: StepRecord) -> None:
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError), reporting(["csv"], tmp_path, SETTINGS, None) as made:
        run(None, *made, Broken())
    assert isinstance(made[0], CsvReporter)
    assert made[0]._file.closed
    assert len(rows_of(tmp_path)) == 1


@pytest.mark.parametrize(("name", "command"), [
    ("tensorboard", r'tensorboardX, which is not installed: pip install "nplora\[report\]"'),
    ("wandb", "wandb, which is not installed: pip install wandb"),
    ("mlflow", "mlflow, which is not installed: pip install mlflow"),
])  # fmt: skip
def test_a_missing_library_is_named_with_the_command_that_installs_it(
    name: str, command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kind = REPORTERS[name]
    monkeypatch.setattr("importlib.util.find_spec", lambda package: None)
    with pytest.raises(ModuleNotFoundError, match=f"^finetune: {name} needs {command}$"):
        require_reporters("finetune", ["csv", name])
    with pytest.raises(ModuleNotFoundError, match=f"^{kind.__name__}: {name} needs {command}$"):
        kind(tmp_path)
    with pytest.raises(ValueError, match=r"^finetune: report_to='comet' is not available; possible: 'tensor"):
        require_reporters("finetune", ["comet"])


# ---- TensorBoard ----


def scalars(directory: Path, tag: str) -> list[tuple[int, float]]:
    """The points of a curve, as TensorBoard reads them."""
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    events = accumulator.EventAccumulator(str(directory))
    events.Reload()
    return [(event.step, event.value) for event in events.Scalars(tag)]


def test_tensorboard_reads_what_was_reported(tmp_path: Path) -> None:
    pytest.importorskip("tensorboardX")
    history = run(None, TensorBoardReporter(tmp_path, SETTINGS))
    for tag, name in (
        ("loss", "loss"),
        ("learning_rate", "lr"),
        ("grad_norm", "grad_norm"),
        ("epoch", "epoch"),
    ):
        expected = [(record.step, float(np.float32(getattr(record, name)))) for record in history.steps]
        assert scalars(tmp_path, f"train/{tag}") == expected
    expected = [(record.step, float(np.float32(record.val_loss))) for record in history.evaluations]
    assert scalars(tmp_path, "eval/loss") == expected
    assert [step for step, _ in scalars(tmp_path, "eval/accuracy")] == [3, 5, 6, 9, 10]
    assert len(scalars(tmp_path, "train/items_per_second")) == 10
    assert hyper_parameters(tmp_path) == SHOWN


def hyper_parameters(directory: Path) -> dict[str, Any]:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

    events = accumulator.EventAccumulator(str(directory))
    events.Reload()
    content = events.PluginTagToContent("hparams")["_hparams_/session_start_info"]
    found = HParamsPluginData.FromString(content).session_start_info.hparams
    return {name: getattr(value, value.WhichOneof("kind")) for name, value in found.items()}


def test_tensorboard_sees_a_resumed_run_as_one(tmp_path: Path) -> None:
    pytest.importorskip("tensorboardX")
    reports = tmp_path / "reports"
    run(tmp_path / "run", TensorBoardReporter(reports, SETTINGS), StopAfter(7))
    later = TensorBoardReporter(reports)  # events after the last checkpoint, as after a kill
    later._open(types.SimpleNamespace(step=7))  # type: ignore[arg-type]
    later._is_open = True
    for step in (8, 9):
        later._write(step, {"train/loss": 99.0})
    later.close()
    for file in reports.iterdir():  # the files are read in the order of their names, which begin with a time
        seconds = file.name.split(".")[3]
        file.rename(file.with_name(file.name.replace(seconds, str(int(seconds) - 100))))
    history = run(tmp_path / "run", TensorBoardReporter(reports, SETTINGS), resume=True)
    expected = [(record.step, float(np.float32(record.loss))) for record in history.steps]
    assert scalars(reports, "train/loss") == expected
    assert hyper_parameters(reports) == SHOWN


# ---- Weights & Biases, and MLflow ----


class FakeWandb(types.ModuleType):
    """The calls of wandb that the reporter makes."""

    def __init__(self) -> None:
        super().__init__("wandb")
        self.calls: list[tuple[str, Any]] = []
        self.id = "made-id"

    def init(self, **named: Any) -> "FakeWandb":
        self.calls.append(("init", named))
        return self

    def define_metric(self, name: str, **named: Any) -> None:
        self.calls.append(("define_metric", name))

    def log(self, metrics: dict[str, float]) -> None:
        self.calls.append(("log", metrics))

    def finish(self, exit_code: int) -> None:
        self.calls.append(("finish", exit_code))


@pytest.fixture
def fake_wandb(monkeypatch: pytest.MonkeyPatch) -> FakeWandb:
    """wandb's own names and calls are held against the library itself in the test below."""
    fake = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    monkeypatch.setattr(WandbReporter, "package", None)
    return fake


def test_wandb_gets_settings_and_metrics_and_a_resumed_run_has_the_same_id(
    tmp_path: Path, fake_wandb: FakeWandb
) -> None:
    reports = tmp_path / "out/reports"
    run(tmp_path / "run", WandbReporter(reports, SETTINGS), StopAfter(4))
    calls = fake_wandb.calls
    assert calls[0] == ("init", {
        "project": "nplora", "name": "out", "dir": str(reports), "config": SHOWN, "id": None, "resume": None,
    })  # fmt: skip
    logged = [metrics["train/global_step"] for name, metrics in calls if name == "log"]
    assert logged == [1, 2, 3, 3, 4]
    assert calls[-1] == ("finish", 0)
    calls.clear()
    run(tmp_path / "run", WandbReporter(reports, SETTINGS), resume=True)
    assert (calls[0][1]["id"], calls[0][1]["resume"]) == ("made-id", "allow")
    assert [metrics["train/global_step"] for name, metrics in calls if name == "log"][:3] == [5, 5, 6]


def test_wandb_itself_takes_the_calls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    reports = tmp_path / "out/reports"
    run(tmp_path / "run", WandbReporter(reports, SETTINGS), StopAfter(4))
    run(tmp_path / "run", WandbReporter(reports, SETTINGS), resume=True)
    kept = sorted((reports / "wandb").glob("offline-run-*/run-*.wandb"))
    assert len(kept) == 2
    assert len({path.name for path in kept}) == 1, "both parts have the same id"


def test_mlflow_itself_gets_one_run_of_both_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", (tmp_path / "mlruns").as_uri())
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "tests")
    reports = tmp_path / "out/reports"
    run(tmp_path / "run", MlflowReporter(reports, SETTINGS), StopAfter(4))
    client = mlflow.MlflowClient()
    experiment = client.get_experiment_by_name("tests")
    (first,) = client.search_runs([experiment.experiment_id])
    assert (first.info.status, first.info.run_name) == ("KILLED", "out")
    history = run(tmp_path / "run", MlflowReporter(reports, SETTINGS), resume=True)
    (found,) = client.search_runs([experiment.experiment_id])
    assert found.info.status == "FINISHED"
    assert found.data.params == {name: str(value) for name, value in SHOWN.items()}
    losses = {
        metric.step: metric.value for metric in client.get_metric_history(found.info.run_id, "train/loss")
    }
    assert losses == {record.step: record.loss for record in history.steps}
    evaluated = client.get_metric_history(found.info.run_id, "eval/loss")
    assert [metric.step for metric in evaluated] == [3, 5, 6, 9, 10]
