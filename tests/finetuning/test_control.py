"""Control of a fine-tuning run: evaluations at steps, early stopping and the adapter that is kept."""

import csv
import json
from pathlib import Path
from typing import Any

import pytest

import nplora
from nplora import cli
from nplora.finetuning import FinetuneReport, evaluate, finetune, load_with_adapter, plan
from nplora.finetuning.options import DEFAULT_EXAMPLES, FinetuneOptions, default_lr
from nplora.formats.errors import UnsafeError
from nplora.trainer import Callback, Run, StepRecord
from small_llama import save_small_llama

pytest.importorskip("tokenizers")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_small_llama(tmp_path_factory.mktemp("model") / "model.gguf")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with train.jsonl and valid.jsonl."""
    rows = [{"prompt": f"{n}+{n}=", "completion": str(2 * n)} for n in range(24)]
    directory = tmp_path_factory.mktemp("data")
    for name, part in (("train", rows[4:]), ("valid", rows[:4])):
        (directory / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
    return directory


# A learning rate at which the validation loss falls and rises. An epoch has 5 steps.
WILD: dict[str, Any] = {
    "rank": 2,
    "lr": 0.1,
    "batch_examples": 4,
    "steps": 18,
    "eval_every": 2,
    "schedule": "constant",
}


def factors_of(directory: Path) -> bytes:
    return (directory / "adapter_model.safetensors").read_bytes()


class StopAfter(Callback):
    """Ctrl-C after a step."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, run: Run, record: StepRecord) -> None:
        if record.step == self.step:
            raise KeyboardInterrupt


def after_a_rise(losses: list[float], begin: int) -> int:
    """The first step for which itself and the step before have a higher loss than a step from `begin` on.

    Step 1 has `losses[0]`.
    """
    steps = range(begin + 2, len(losses) + 1)
    return next(n for n in steps if min(losses[n - 2 : n]) > min(losses[begin - 1 : n - 2]))


# ---- the adapter that is kept ----


@pytest.mark.slow
def test_the_adapter_of_the_lowest_validation_loss_is_saved(model: Path, data: Path, tmp_path: Path) -> None:
    every_step = WILD | {"eval_every": 1, "steps": 60}
    whole = finetune(model, data, tmp_path / "whole", **every_step)
    end = after_a_rise([record.val_loss for record in whole.history.evaluations], 2)
    options = every_step | {"steps": end}
    best = finetune(model, data, tmp_path / "best", **options)
    history = best.history
    losses = {record.step: record.val_loss for record in history.evaluations}
    assert list(losses) == list(range(1, end + 1))
    step = min(losses, key=losses.__getitem__)
    assert (history.best_step, best.loss_after, history.best_loss) == (step, losses[step], losses[step])
    measured = evaluate(model, data, adapter=tmp_path / "best")["loss"]
    assert measured == pytest.approx(losses[step], rel=1e-6)
    assert f"-> {losses[step]:.4f} (step {step}, the lowest of {end} evaluations)" in str(best)

    last = finetune(model, data, tmp_path / "last", **options, keep="last")
    assert (last.history.best_step, last.loss_after) == (None, losses[end])
    assert evaluate(model, data, adapter=tmp_path / "last")["loss"] == pytest.approx(losses[end], rel=1e-6)
    assert f"-> {losses[end]:.4f}\n" in str(last)
    alone = finetune(model, data / "train.jsonl", tmp_path / "alone", **options | {"eval_every": None})
    assert alone.history.best_step is None
    assert factors_of(tmp_path / "alone") == factors_of(tmp_path / "last") != factors_of(tmp_path / "best")


def test_patience_ends_a_run_and_keeps_its_best_adapter(
    model: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = WILD | {"steps": 60, "patience": 3}
    report = finetune(model, data, tmp_path / "out", **options, progress=True)
    history = report.history
    end = len(history.steps)
    expected = [step for step in range(1, end + 1) if step % 2 == 0 or step % 5 == 0]
    assert history.ended == "patience"
    assert [record.step for record in history.evaluations] == expected
    after = [record.step for record in history.evaluations if record.step > (history.best_step or 60)]
    assert len(after) == 3
    assert "ended early (patience)" in str(report)
    assert "step 2: validation loss" in capsys.readouterr().err
    again = finetune(model, data, tmp_path / "out", **options, resume=True, progress=True)
    assert [one.was_finished for one in (report, again)] == [False, True]
    assert "the run continues" not in capsys.readouterr().err
    assert again.history.evaluations == history.evaluations
    assert again.loss_after == report.loss_after


@pytest.mark.slow
@pytest.mark.parametrize("step", [3, 4, 5, 9, 12, 17])
def test_a_stopped_run_saves_its_last_adapter_and_resumes_to_the_best(
    step: int, model: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = finetune(model, data, tmp_path / "whole", **WILD)
    stopped = finetune(model, data, tmp_path / "out", **WILD, callbacks=[StopAfter(step)])
    assert (stopped.history.ended, stopped.loss_after, stopped.history.best_step) == (
        "interrupted",
        None,
        None,
    )
    finetune(model, data / "train.jsonl", tmp_path / "short", **WILD | {"eval_every": None, "steps": step})
    assert factors_of(tmp_path / "out") == factors_of(tmp_path / "short")
    losses = {record.step: record.val_loss for record in stopped.history.evaluations}
    best = min(losses, key=losses.__getitem__, default=0)
    line = f"lowest validation loss was {losses.get(best, 0):.4f}, at step {best}: --resume --patience 1"
    assert (line in str(stopped)) == (best < max(losses, default=0))
    resumed = finetune(model, data, tmp_path / "out", **WILD, resume=True, progress=True)
    assert f"the run continues after step {step} of {WILD['steps']}\n" in capsys.readouterr().err
    assert factors_of(tmp_path / "out") == factors_of(tmp_path / "whole")
    assert (resumed.loss_after, resumed.history.loss) == (whole.loss_after, whole.history.loss)


def hint_of(report: FinetuneReport) -> str:
    return "".join(line for line in str(report).splitlines() if "--patience 1" in line)


@pytest.mark.slow
@pytest.mark.parametrize("keep", ["best", "last"])
def test_after_ctrl_c_only_an_adapter_that_is_kept_is_offered(
    keep: str, model: Path, data: Path, tmp_path: Path
) -> None:
    options = WILD | {"keep": keep, "steps": 60, "eval_every": 1}
    whole = finetune(model, data, tmp_path / "whole", **options)
    losses = [record.val_loss for record in whole.history.evaluations]
    first = after_a_rise(losses, 1)
    stopped = finetune(model, data, tmp_path / "out", **options, callbacks=[StopAfter(first)])
    best = 1 + losses.index(min(losses[:first]))
    assert (f"at step {best}:" in hint_of(stopped)) == (keep == "best")
    if keep == "best":
        taken = finetune(model, data, tmp_path / "out", **options, resume=True, patience=1)
        assert (taken.history.ended, taken.history.best_step) == ("patience", best)
        assert taken.was_finished
        assert "peak memory" not in str(taken)
        assert len(taken.history.steps) == first
        return
    # The run now keeps its best, but those of its first part are gone: the hint names a later one or none.
    options["keep"], second = "best", after_a_rise(losses, first + 1)
    again = finetune(model, data, tmp_path / "out", **options, resume=True, callbacks=[StopAfter(second)])
    best = 1 + losses.index(min(losses[first:second]))
    assert f"at step {best}:" in hint_of(again)


@pytest.mark.parametrize("option", ["eval_every", "patience"])
def test_options_about_evaluations_need_validation_data(
    option: str, model: Path, data: Path, tmp_path: Path
) -> None:
    advice = r"give --valid \(valid=...\) or --valid-split \(valid_split=...\)"
    with pytest.raises(ValueError, match=f"^finetune: {option}=2 needs validation data: {advice}$"):
        finetune(model, data / "train.jsonl", tmp_path / "out", **{option: 2})
    with pytest.raises(ValueError, match=f"^finetune: {option} is 0, expected at least 1"):
        finetune(model, data, tmp_path / "out", **{option: 0})
    assert not (tmp_path / "out").exists()
    finetune(model, data / "train.jsonl", tmp_path / "out", **{option: 2}, valid_split=0.3, steps=1)


def test_callbacks_run_in_a_fine_tuning_run(model: Path, data: Path, tmp_path: Path) -> None:
    calls: list[str] = []

    class Noted(Callback):
        def __getattribute__(self, name: str) -> Any:
            if name.startswith("on_"):
                calls.append(name)
            return super().__getattribute__(name)

        def on_before_optimizer_step(self, run: Run, gradients: Any) -> None:
            assert isinstance(run.model, nplora.LanguageModel)
            names = {p.name for p in run.model.parameters()}
            assert gradients.keys() == names
            for gradient in gradients.values():
                gradient[...] = 0

    options = WILD | {"steps": 2}
    finetune(model, data, tmp_path / "out", **options, callbacks=[Noted()])
    assert calls[1:] == [
        "on_fit_start",
        "on_checkpoint",
        "on_step_begin",
        "on_before_optimizer_step",
        "on_step_end",
        "on_checkpoint",
        "on_step_begin",
        "on_before_optimizer_step",
        "on_step_end",
        "on_evaluation",
        "on_checkpoint",
        "on_epoch_end",
        "on_fit_end",
    ]
    adapter = nplora.read_adapter(tmp_path / "out")
    assert all(not delta.A.any() for delta in adapter.values()), "without gradients A stays zero"
    with pytest.raises(TypeError, match=r"^finetune: callbacks\[0\] is a builtin_f.*expected a Callback"):
        finetune(model, data, tmp_path / "other", callbacks=[print])  # type: ignore[list-item]


@pytest.mark.slow
def test_a_plan_counts_the_copy_of_the_best_factors(model: Path, data: Path) -> None:
    def planned(where: Path = data, **options: Any) -> int:
        return plan(model, where, **options).memory.factors

    last = planned(epochs=2, keep="last")
    assert planned(epochs=2) - last == last // 4 > 0
    assert planned(steps=3, eval_every=2) == planned(epochs=2)
    # The factors of the only evaluation, at the end of the run, need no copy.
    assert planned() == planned(steps=3, eval_every=3) == planned(steps=2) == last
    assert planned(data / "train.jsonl", epochs=2) == last


def test_the_command_line_has_the_options(model: Path, data: Path, tmp_path: Path) -> None:
    words = ["finetune", str(model), "--data", str(data), "--output", str(tmp_path / "out"), "--lr", "0.1"]
    assert cli.main([*words, "--steps", "30", "--eval-every", "1", "--patience", "1", "--keep", "last"]) == 0
    lines = [json.loads(line) for line in (tmp_path / "out/log.jsonl").read_text().splitlines()]
    assert lines[-1]["ended"] == "patience"
    assert lines[-1]["best_step"] is None


# ---- reports ----


def test_reports_lie_in_the_output_directory_and_have_the_settings(
    model: Path, data: Path, tmp_path: Path
) -> None:
    options = WILD | {"report_to": "csv", "steps": 8, "batch_examples": None}
    out = tmp_path / "out"
    finetune(model, data, out, **options, callbacks=[StopAfter(5)])
    report = finetune(model, data, out, **options, resume=True)
    with open(out / "reports/metrics.csv", encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [float(row["loss"]) for row in rows if row["loss"]] == report.history.loss
    losses = [record.val_loss for record in report.history.evaluations]
    assert [float(row["eval_loss"]) for row in rows if row["eval_loss"]] == losses
    rates = [float(row["tokens_per_second"] or 0) for row in rows if row["loss"]]
    assert [rate > 0 for rate in rates] == [True] * 4 + [False] + [True] * 3, "Ctrl-C came before step 5's"
    settings = json.loads((out / "reports/settings.json").read_text())
    assert settings["model"] == str(model)
    assert (settings["rank"], settings["targets"], settings["compute"]) == (2, "all-linear", "float32")
    assert (settings["data"], settings["valid"]) == (
        str(data / "train.jsonl"),
        str(data / "valid.jsonl"),
    )
    assert settings["batch_examples"] == DEFAULT_EXAMPLES


def test_reports_follow_no_link(model: Path, data: Path, tmp_path: Path) -> None:
    out, other = tmp_path / "out", tmp_path / "other"
    out.mkdir()
    other.mkdir()
    (out / "reports").symlink_to(other)
    with pytest.raises(UnsafeError, match="reports: a symbolic link, expected a directory for reports"):
        finetune(model, data, out, steps=1, report_to="csv")
    assert not list(other.iterdir())


def test_the_command_line_reports_to_tensorboard(model: Path, data: Path, tmp_path: Path) -> None:
    pytest.importorskip("tensorboardX")
    out = tmp_path / "out"
    words = ["finetune", str(model), "--data", str(data), "--output", str(out), "--steps", "3"]
    assert cli.main([*words, "--report-to", "csv,tensorboard"]) == 0
    assert (out / "reports/metrics.csv").exists()
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    events = accumulator.EventAccumulator(str(out / "reports/tensorboard"))
    events.Reload()
    assert [event.step for event in events.Scalars("train/tokens_per_second")] == [1, 2, 3]


@pytest.mark.parametrize(("value", "error", "message"), [
    ("csv,comet", ValueError, "report_to='comet' is not available; possible: 'tensorboard'"),
    (3, TypeError, "report_to is 3, expected a list of texts"),
    ([3], TypeError, r"report_to is \[3\], expected a list of texts"),
])  # fmt: skip
def test_wrong_reporters_are_refused(value: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"^finetune: {message}"):
        finetune("m", "d", "o", report_to=value)


def test_a_missing_library_stops_the_run_before_anything_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda package: None)
    with pytest.raises(ModuleNotFoundError, match=r"^finetune: wandb needs wandb, .*pip install wandb$"):
        finetune("no-model", "no-data", tmp_path / "out", report_to="wandb")
    assert not (tmp_path / "out").exists()
    words = ["finetune", "no-model", "--data", "no-data", "--output", str(tmp_path / "out")]
    assert cli.main([*words, "--report-to", "mlflow"]) == 2
    message = "nplora: error: finetune: mlflow needs mlflow, which is not installed: pip install mlflow\n"
    assert capsys.readouterr().err == message


# ---- ranks of their own, and LoRA+ ----


def test_a_run_trains_and_saves_layers_of_their_own_ranks(model: Path, data: Path, tmp_path: Path) -> None:
    words = ["finetune", str(model), "--data", str(data), "--output", str(tmp_path / "out"), "--rank", "2"]
    patterns = ["--rank-pattern", "q_proj=5,layers.1.mlp=3", "--alpha-pattern", "q_proj=10"]
    assert cli.main([*words, "--steps", "2", *patterns]) == 0
    adapter = nplora.read_adapter(tmp_path / "out")
    ranks = {name.removeprefix("model.layers."): delta.rank for name, delta in adapter.items()}
    assert {rank for name, rank in ranks.items() if name.endswith("q_proj")} == {5}
    assert {rank for name, rank in ranks.items() if name.startswith("1.mlp")} == {3}
    assert {rank for name, rank in ranks.items() if not name.endswith("q_proj") and "1.mlp" not in name} == {
        2
    }
    scales = {delta.scale for name, delta in adapter.items() if name.endswith("q_proj")}
    assert scales == {2.0}
    assert any(delta.A.any() for name, delta in adapter.items() if name.endswith("q_proj"))
    planned = plan(model, data, rank=2, rank_pattern="q_proj=5,layers.1.mlp=3")
    lm = load_with_adapter(model, tmp_path / "out")
    assert planned.memory.factors == 4 * 4 * lm.num_trainable
    with pytest.raises(
        ValueError, match=r"the run cannot continue with other data or settings: .*rank was 5"
    ):
        finetune(model, data, tmp_path / "out", rank=2, steps=2, resume=True)


@pytest.mark.parametrize("function", [finetune, plan])
def test_a_pattern_that_matches_no_layer_is_refused(
    function: Any, model: Path, data: Path, tmp_path: Path
) -> None:
    output = [tmp_path / "out"] if function is finetune else []
    with pytest.raises(
        ValueError, match=f"^{function.__name__}: rank_pattern has 'q', which matches no adapted"
    ):
        function(model, data, *output, rank_pattern={"q": 3})
    assert not (tmp_path / "out").exists()
    with pytest.raises(ValueError, match="rank_pattern is decided by the adapter to continue from"):
        function(model, data, *output, rank_pattern={"q_proj": 3}, adapter="adapter")


def test_an_adapter_to_continue_from_is_planned_with_its_own_ranks(
    model: Path, data: Path, tmp_path: Path
) -> None:
    lm = nplora.load_model(model)
    lm.add_lora(rank=2, targets="q_proj,up_proj", rank_pattern={"q_proj": 5})
    nplora.save_adapter(lm, tmp_path / "adapter")
    planned = plan(model, data, adapter=tmp_path / "adapter")
    assert planned.memory.factors == 4 * 4 * lm.num_trainable


@pytest.mark.parametrize(
    ("hidden", "lr"), [(4096, 2e-4), (8192, 9.8e-5), (640, 1.3e-3), (576, 1.4e-3), (64, 2e-3)]
)
def test_the_default_learning_rate_depends_on_the_width_of_the_model(hidden: int, lr: float) -> None:
    assert default_lr(hidden) == default_lr(hidden, "orpo") == pytest.approx(lr, rel=1e-9)
    for objective in ("dpo", "kto"):
        assert default_lr(hidden, objective) == pytest.approx(0.3 * lr, rel=0.05)


@pytest.mark.parametrize(("options", "message"), [
    ({"freeze_B": True, "lora_plus_ratio": 16}, "lora_plus_ratio=16 and freeze_B exclude each other"),
    ({"outer_momentum": 0.9}, "outer_momentum needs local_steps, which is not set"),
    ({"local_steps": 2, "outer_lr": 0}, "outer_lr is 0, expected above 0"),
])  # fmt: skip
def test_learning_rates_without_effect_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^finetune: {message}"):
        FinetuneOptions(op="finetune", **options)


@pytest.mark.parametrize(("lr", "used"), [(None, 2e-3), (3e-4, 3e-4)])
def test_a_run_without_a_learning_rate_takes_the_default(
    lr: float | None, used: float, model: Path, data: Path, tmp_path: Path
) -> None:
    """The model is so narrow that the default is the largest one."""
    report = finetune(model, data, tmp_path / "out", lr=lr, steps=1)
    assert report.history.steps[0].lr == used


def test_lora_plus_gives_a_its_own_learning_rate(model: Path, data: Path, tmp_path: Path) -> None:
    """Adam's first step changes every number with a gradient by the learning rate."""
    sizes = {}
    for ratio in (1, 16):
        options = {
            "lora_plus_ratio": ratio,
            "lr": 1e-3,
            "steps": 1,
            "weight_decay": 0,
            "schedule": "constant",
        }
        finetune(model, data, tmp_path / str(ratio), **options)  # type: ignore[arg-type]
        adapter = nplora.read_adapter(tmp_path / str(ratio))
        sizes[ratio] = max(float(abs(delta.A).max()) for delta in adapter.values())  # A starts at zero
    assert sizes == pytest.approx({1: 1e-3, 16: 16e-3}, rel=1e-3)
    with pytest.raises(ValueError, match=r"^finetune: lora_plus_ratio is 0, expected above 0"):
        finetune(model, data, tmp_path / "out", lora_plus_ratio=0)
    with pytest.raises(TypeError, match=r"'loraplus_lr_ratio'; did you mean lora_plus_ratio\?"):
        finetune(model, data, tmp_path / "out", loraplus_lr_ratio=16)  # type: ignore[call-arg]
