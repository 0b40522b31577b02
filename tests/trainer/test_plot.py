"""plot: the log of a run becomes a PNG, or an error says why nothing can be drawn."""

import json
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import nplora
from nplora import cli
from nplora.formats.errors import DataError
from nplora.trainer import plot
from taken import FOREIGN, assert_nothing_is_lost


@pytest.fixture
def run(tmp_path: Path) -> Path:
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(40, 6)), rng.integers(0, 3, 40)
    model = nplora.LoRALinear(rng.normal(size=(3, 6)), rank=2, rng=0)
    trainer = nplora.Trainer(model, schedule="linear", progress=False)
    trainer.fit(x, y, epochs=3, batch_size=8, validation=(x, y), checkpoint_dir=tmp_path / "run")
    return tmp_path / "run"


def pixels(png: Path) -> Any:
    image = pytest.importorskip("matplotlib.image")
    return image.imread(png)


@pytest.mark.slow
def test_a_run_becomes_a_png(run: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    assert plot.plot_run(run) == run / "plot.png"
    image = pixels(run / "plot.png")
    assert image.shape[0] >= 600  # loss, accuracy and learning rate: three panels of 2 inches at 120 dpi
    coloured = np.ptp(image[..., :3], axis=-1) > 0.3
    assert coloured.sum() > 500  # the curves
    assert plot.plot_run(run, tmp_path / "other.png") == tmp_path / "other.png"
    assert (tmp_path / "other.png").read_bytes() == (run / "plot.png").read_bytes()


@pytest.mark.slow
def test_a_picture_is_replaced_only_on_request(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib")
    target = tmp_path / "mine.png"
    assert_nothing_is_lost(target, lambda overwrite: plot.plot_run(run, target, overwrite=overwrite))
    (run / "plot.png").write_bytes(FOREIGN)
    assert cli.main(["plot", str(run)]) == 2
    assert (
        f"{run / 'plot.png'}: the file already exists; name another one, or replace it with --overwrite"
        in capsys.readouterr().err
    )
    assert (run / "plot.png").read_bytes() == FOREIGN
    assert cli.main(["plot", str(run), "--overwrite"]) == 0
    assert pixels(run / "plot.png").size


def test_a_picture_does_not_replace_its_log(run: Path) -> None:
    log = (run / "log.jsonl").read_bytes()
    for make in (os.link, os.symlink):
        make(run / "log.jsonl", run / "log.png")
        with pytest.raises(ValueError, match=r"plot: .*log\.png is the log itself, which is never"):
            plot.plot_run(run, run / "log.png", overwrite=True)
        (run / "log.png").unlink()
    assert (run / "log.jsonl").read_bytes() == log


@pytest.mark.slow
def test_dollar_signs_in_the_name_of_a_directory_are_not_a_formula(run: Path) -> None:
    pytest.importorskip("matplotlib")
    plot.plot_run(run.rename(run.with_name(r"cost$\frac$" if os.sep == "/" else "cost$x$")))


def test_the_log_is_read_back(run: Path) -> None:
    steps, epochs, before, evaluations = plot.read_log(run / "log.jsonl")
    assert before is None
    assert [r["step"] for r in steps] == list(range(1, 16))
    assert [r["step"] for r in epochs] == [r["step"] for r in evaluations] == [5, 10, 15]
    assert all(0 <= r["val_accuracy"] <= 1 for r in epochs)


def test_the_loss_before_training_is_drawn_at_step_0(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with open(run / "log.jsonl", "a", encoding="utf-8") as log:
        log.write('{"event":"before","loss":7.5,"data":null,"answers":{}}\n')
    log = plot.read_log(run / "log.jsonl")
    assert log.loss_before == 7.5
    curves = {curve.label: curve for curve in plot._loss_curves(log)}
    assert curves["validation"].x == [0, 5, 10, 15]
    assert curves["validation"].y == [7.5, *(record["val_loss"] for record in log.epochs)]
    smooth = curves["step, smoothed"]
    assert smooth.x == curves["step"].x == list(range(1, 16))
    few = plot.RunLog(log.steps[:9], [], None)
    assert [curve.label for curve in plot._loss_curves(few) if curve.x] == ["step"]


def test_a_smoothed_curve_is_a_mean_with_falling_weights() -> None:
    values, window = np.random.default_rng(0).normal(3, 1, 50), 6.0
    for end, found in enumerate(plot.smoothed(list(values), window), 1):
        weights = np.exp(-np.arange(end)[::-1] / window)
        assert found == pytest.approx(np.average(values[:end], weights=weights), rel=1e-12)
    assert plot.smoothed([2.0] * 9, 3.0) == pytest.approx([2.0] * 9)


def test_a_line_cut_short_by_a_kill_is_skipped(run: Path) -> None:
    with open(run / "log.jsonl", "a", encoding="utf-8") as log:
        log.write('{"event":"step","st')
    assert len(plot.read_log(run / "log.jsonl")[0]) == 15


def test_missing_losses_are_gaps(run: Path) -> None:
    pytest.importorskip("matplotlib")
    (run / "log.jsonl").write_text(
        '{"event":"step","step":1,"loss":1.5,"lr":0.1}\n{"event":"step","step":2,"loss":null,"lr":0.1}\n'
        '{"event":"epoch","step":2,"loss":1.5,"val_loss":null,"val_accuracy":null}\n'
    )
    assert pixels(plot.plot_run(run)).shape[0] < 700  # two panels


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "the log has no step yet"),
        ('{"event":"start"}\n', "the log has no step yet"),
        ('{"event":"start"}\nnonsense\n', "line 2: not JSON"),
        ("[1]\n", r"line 1 is \[1\], expected a JSON object with an event"),
        ('{"event":"step","step":"1","loss":1,"lr":1}\n', "line 1: step is '1', expected a number"),
        ('{"event":"step","step":1,"loss":true,"lr":1}\n', "line 1: loss is True, expected a number"),
        ('{"event":"step","step":1,"loss":1,"lr":1e999}\n', "line 1: the number 1e999 is beyond the range"),
        ('{"event":"step","step":null,"loss":1,"lr":1}\n', "line 1: step is None, expected a number"),
        ('{"event":"before","loss":"1"}\n', "line 1: loss is '1', expected a number"),
    ],
)
def test_a_log_of_another_program_is_an_error_that_names_the_line(
    text: str, message: str, tmp_path: Path
) -> None:
    (tmp_path / "log.jsonl").write_text(text)
    with pytest.raises(DataError, match=rf"log\.jsonl: {message}"):
        plot.plot_run(tmp_path)


@pytest.mark.parametrize("name", ["plot.pdf", "plot", "plot.png.txt"])
def test_an_output_that_is_not_a_png_is_refused(name: str, run: Path) -> None:
    with pytest.raises(
        ValueError, match=rf"plot: the output is .*{name}, expected a name that ends in \.png$"
    ):
        plot.plot_run(run, run / name)
    assert not (run / name).exists()


def test_a_path_that_is_not_a_run_directory_is_an_error(run: Path) -> None:
    for place in (run / "nosuch", run / "log.jsonl"):
        with pytest.raises(OSError, match=rf"not a run directory: it has no log\.jsonl: '.*{place.name}'"):
            plot.plot_run(place)


def test_a_directory_without_a_log_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"log\.jsonl"):
        plot.plot_run(tmp_path)


def test_without_matplotlib_the_extra_is_named(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.startswith("matplotlib")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ModuleNotFoundError, match=r'pip install "nplora\[plot\]"'):
        plot.plot_run(run)
    assert not (run / "plot.png").exists()


@pytest.mark.slow
def test_rewards_are_drawn_below_the_loss(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib")
    step = {"event": "step", "loss": 0.6, "lr": 0.1}
    metrics = {"rewards/chosen": 0.5, "rewards/rejected": -0.25, "rewards/accuracies": 0.75}
    rows = [{**step, "step": n, "metrics": metrics} for n in (1, 2)]
    epoch = {"event": "epoch", "epoch": 1, "step": 2, "loss": 0.6, "val_loss": 0.5, "val_accuracy": None}
    rows.append({**epoch, "val_metrics": metrics})
    (tmp_path / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    drawn: dict[str, list[float]] = {}
    from matplotlib.axes import Axes

    draw = Axes.plot

    def watched(self: Axes, x: Any, y: Any, **style: Any) -> Any:
        drawn[style["label"]] = list(y)
        return draw(self, x, y, **style)

    monkeypatch.setattr(Axes, "plot", watched)
    plot.plot_run(tmp_path)
    assert drawn["chosen"] == [0.5, 0.5]
    assert drawn["rejected, validation"] == [-0.25]
    evaluation = {"event": "evaluation", "epoch": 1, "val_loss": 0.7, "val_accuracy": None}
    rows.append({**evaluation, "step": 1, "val_metrics": {"rewards/rejected": -0.125}})
    (tmp_path / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    plot.plot_run(tmp_path, overwrite=True)
    assert drawn["rejected, validation"] == [-0.125, -0.25]
    for bad in ({"metrics": [1]}, {"metrics": {"kl": "x"}}):
        (tmp_path / "log.jsonl").write_text(json.dumps({**step, "step": 1, **bad}) + "\n")
        with pytest.raises(DataError, match=r"line 1: (metrics|kl) is "):
            plot.plot_run(tmp_path, overwrite=True)
