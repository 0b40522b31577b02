"""Searches for the options of a run: trials within a budget, which finetune repeats to the bit."""

import dataclasses
import errno
import inspect
import json
import math
import os
import re
import sys
from pathlib import Path
from typing import Any

import pytest

import nplora
import systems
from nplora import cli
from nplora.cli.parser import weighted_path
from nplora.finetuning import FinetuneOptions, TuneOptions, evaluate, finetune, teach, tune
from nplora.finetuning.data.sources import sources_of
from nplora.finetuning.load import evaluation_batches
from nplora.finetuning.objectives import objective_of
from nplora.finetuning.tuning import tune as tune_module
from nplora.finetuning.tuning.log import NAME, TuneLog
from nplora.finetuning.tuning.report import command_of
from nplora.finetuning.tuning.schedule import Pace, first_rung, last_rung, parse_budget, second_rung
from nplora.finetuning.tuning.search import Search, winner_of
from nplora.finetuning.tuning.space import Settings, Space, space_of
from nplora.finetuning.tuning.trial import Trial, key_of
from nplora.formats import files
from nplora.formats.errors import CorruptError, DataError, UnsafeError
from nplora.trainer.evaluation import evaluate as evaluate_loss
from small_llama import save_small_llama

pytest.importorskip("tokenizers")

tuning = sys.modules["nplora.finetuning.tuning.tune"]
assert tune_module is tune  # the package's name is the function's


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_small_llama(tmp_path_factory.mktemp("model") / "model.gguf")


@pytest.fixture
def data(tmp_path: Path) -> Path:
    rows = [{"prompt": f"{n}+{n}=", "completion": str(2 * n)} for n in range(40)]
    path = tmp_path / "train.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


# ---- the decisions of a search, on losses that a formula gives ----

SPACE = Space((1e-4, 1e-3, 1e-2), {"rank": (8, 4, 32), "targets": (("all",), ("q",))}, (1, 2, 4), 2.0)


def loss_of(settings: Settings, steps: int, best: float = 2.5e-3) -> float:
    """The best: the learning rate `best`, rank 32, all targets, and 200 steps, which are two epochs."""
    rate = math.log10(settings["lr"] / best) ** 2
    rank = {4: 0.1, 8: 0.05, 32: 0.0}[settings["rank"]]
    targets = 0.2 * (settings["targets"] != ("all",))
    return 1 + rate + rank + targets + 0.1 * math.log2(steps / 200) ** 2


class Made:
    """Makes the trials of a search by the formula, and counts them."""

    def __init__(self, diverge: float = math.inf, best: float = 2.5e-3) -> None:
        self.keys = list[tuple[Any, ...]]()
        self.diverge, self.best = diverge, best

    def __call__(self, settings: Settings, steps: int) -> tuple[float, float, float]:
        self.keys.append(key_of(settings, steps))
        loss = math.inf if settings["lr"] > self.diverge else loss_of(settings, steps, self.best)
        return loss, 1.0 * steps, 2.0


def search_in(directory: Path, budget: float, made: Made, space: Space = SPACE, **more: Any) -> Search:
    log = TuneLog(directory)
    log.begin({"search": space.described()}, resume=more.pop("resume", False), overwrite=False)
    if log.baseline is None:
        log.add_baseline(5.0, 2.0)
    search = Search(space, 100, 100, budget, 1.0, log, made, more.pop("sampler", None), lambda text: None)
    search.run()
    return search


def test_a_search_finds_the_best_of_every_option(tmp_path: Path) -> None:
    made = Made()
    search = search_in(tmp_path, 10_000, made)
    winner = winner_of(search.log.trials, search.full)
    assert winner is not None
    assert abs(math.log10(winner.settings["lr"] / 2.5e-3)) < 0.13
    assert (winner.settings["rank"], winner.settings["alpha"]) == (32, 64.0)
    assert winner.settings["targets"] == ("all",)
    assert (winner.epochs, winner.steps) == (2, 200)
    assert search.ended == "complete"
    assert len(made.keys) == len(set(made.keys))
    steps = {trial.rung: trial.steps for trial in search.log.trials}
    assert list(steps) == sorted(steps)


@pytest.mark.parametrize("budget", [40, 60, 100, 200, 400, 1000, 3000])
def test_a_search_stays_within_its_budget_and_uses_it(budget: float, tmp_path: Path) -> None:
    search = search_in(tmp_path, budget, Made())
    trials = search.log.trials
    assert len(trials) >= 2
    assert search.log.seconds <= 1.1 * budget
    if budget >= 200:
        assert search.log.seconds >= 0.5 * budget or search.ended == "complete"
    assert min(trial.steps for trial in trials) >= 10
    if budget >= 1000:
        winner = winner_of(trials, search.full)
        assert winner is not None
        assert winner.steps >= search.full


def test_a_machine_that_becomes_slower_ends_a_search_in_time(tmp_path: Path) -> None:
    class Slower(Made):
        def __call__(self, settings: Settings, steps: int) -> tuple[float, float, float]:
            loss, seconds, evaluation = super().__call__(settings, steps)
            return loss, seconds * (1 if len(self.keys) < 5 else 6), evaluation

    search = search_in(tmp_path, 1000, Slower())
    assert search.ended == "budget"
    last = search.log.trials[-1]
    assert search.log.seconds - last.seconds - last.evaluation <= 1000
    assert winner_of(search.log.trials, search.full) is not None


def test_a_budget_for_less_than_two_trials_says_how_much_is_needed(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"^tune: the budget is 20s, but two trials of 10 steps need about"
    ) as e:
        search_in(tmp_path / "a", 20, Made())
    needed = re.search(r"need about (\d+)s; (\S+) is enough", str(e.value))
    assert needed is not None
    assert len(search_in(tmp_path / "b", float(needed[1]), Made()).log.trials) >= 2
    enough = search_in(tmp_path / "a", parse_budget(needed[2]), Made())
    winner = winner_of(enough.log.trials, enough.full)
    assert winner is not None
    assert winner.steps >= enough.full


def test_trials_that_diverge_are_left_behind(tmp_path: Path) -> None:
    search = search_in(tmp_path / "some", 5000, Made(diverge=2e-3))
    winner = winner_of(search.log.trials, search.full)
    assert winner is not None
    assert winner.settings["lr"] <= 2e-3
    assert any(math.isinf(trial.loss) for trial in search.log.trials)
    search = search_in(tmp_path / "all", 5000, Made(diverge=0))
    assert winner_of(search.log.trials, search.full) is None
    assert len(search.log.trials) == 3


def test_a_fixed_learning_rate_and_fixed_epochs_are_not_searched(tmp_path: Path) -> None:
    space = Space((1e-3,), {"rank": (8, 32)}, (), None)
    made = Made()

    def train(settings: Settings, steps: int) -> tuple[float, float, float]:
        return made({**settings, "targets": ("all",)}, steps)

    search = search_in(tmp_path, 5000, train, space)  # type: ignore[arg-type]
    assert {trial.settings["lr"] for trial in search.log.trials} == {1e-3}
    assert {trial.steps for trial in search.log.trials if trial.rung > 2} <= {100}
    winner = winner_of(search.log.trials, search.full)
    assert winner is not None
    assert winner.settings == {"lr": 1e-3, "rank": 32}


@pytest.mark.slow
@pytest.mark.parametrize("best", [2.5e-3, 1.5e-3, 6e-4, 5e-3, 3e-5])
def test_a_search_resumes_after_any_event_with_the_same_trials(best: float, tmp_path: Path) -> None:
    whole = Made(best=best)
    search = search_in(tmp_path / "whole", 2500, whole)
    lines = (tmp_path / "whole" / NAME).read_text().splitlines(keepends=True)
    assert len(lines) > 15
    for count in range(1, len(lines) + 1):
        directory = tmp_path / str(count)
        directory.mkdir()
        (directory / NAME).write_text("".join(lines[:count]))
        rest = Made(best=best)
        resumed = search_in(directory, 2500, rest, resume=True)
        assert resumed.log.trials == search.log.trials, count
        assert (directory / NAME).read_text() == "".join(lines), count
        done = sum('"trial"' in line.partition(",")[0] for line in lines[:count])
        assert rest.keys == whole.keys[done:]


def test_a_combination_that_is_worse_does_not_displace_a_better_trial(tmp_path: Path) -> None:
    """Rank 32 helps alone and q helps alone, but both together do not. There is time for one full run."""

    def train(settings: Settings, steps: int) -> tuple[float, float, float]:
        both = {
            (8, "all"): 1.0,
            (32, "all"): 0.9,
            (8, "q"): 0.8,
            (32, "q"): 3.0,
            (4, "all"): 2.0,
            (4, "q"): 2.0,
        }
        rate = math.log10(settings["lr"] / 1e-3) ** 2
        return rate + both[settings["rank"], settings["targets"][0]], 1.0 * steps, 2.0

    search = search_in(tmp_path, 390, train)  # type: ignore[arg-type]
    full = [trial for trial in search.log.trials if trial.steps == search.full]
    assert [(trial.settings["rank"], trial.settings["targets"]) for trial in full] == [(8, ("q",))]


def test_trials_that_diverge_at_once_do_not_make_the_others_seem_fast(tmp_path: Path) -> None:
    made = Made()

    def train(settings: Settings, steps: int) -> tuple[float, float, float]:
        diverges = settings["lr"] > 3e-5
        return (math.inf, 0.05, 2.0) if diverges else made({**settings, "targets": ("all",)}, steps)

    rates = (2e-5, 6.3e-5, 2e-4, 6.3e-4, 2e-3, 6.3e-3)
    space = Space(rates, {"rank": (8,)}, (), 2.0)
    search = search_in(tmp_path, 90, train, space)  # type: ignore[arg-type]
    assert made.keys
    assert search.log.seconds <= 1.1 * 90


def test_a_log_holds_any_character_of_a_name(tmp_path: Path) -> None:
    start = {"options": {"columns": {"prompt": "a\u2028b\x85c"}}}
    TuneLog(tmp_path).begin(start, resume=False, overwrite=False)
    log = TuneLog(tmp_path)
    log.begin(start, resume=True, overwrite=False)
    assert log.start["options"] == start["options"]


def test_a_command_has_every_digit_of_a_number() -> None:
    command = command_of("m.gguf", [("d.jsonl", 1.0)], None, Path("out"), {"lr": 0.0123456789, "alpha": 16.0})
    assert command == ("nplora finetune m.gguf --data d.jsonl --output out --alpha 16 --lr 0.0123456789")
    files = [("a.jsonl", 0.123456789), ("b.jsonl", 3.0), ("c.jsonl", 1e-7)]
    words = systems.words_of(command_of("m.gguf", files, None, Path("out"), {}))
    assert [weighted_path(word) for word in words if ".jsonl" in word] == files


@pytest.mark.parametrize("budget", [60, 150, 300])
def test_a_larger_budget_continues_a_search(budget: float, tmp_path: Path) -> None:
    small = search_in(tmp_path, budget, Made())
    before = list(small.log.trials)
    large = search_in(tmp_path, 3000, Made(), resume=True)
    assert large.log.trials[: len(before)] == before
    assert len(large.log.trials) > len(before)
    winner = winner_of(large.log.trials, large.full)
    assert winner is not None
    assert winner.steps >= large.full
    again = search_in(tmp_path, 3000, rest := Made(), resume=True)
    assert (again.log.trials, rest.keys) == (large.log.trials, [])


def test_rungs_divide_a_budget() -> None:
    pace = Pace(step=1.0, evaluation=2.0)
    assert first_rung(1000, pace, rates=6, full=100).steps == 1000 * 0.15 / 6 - 2
    assert first_rung(1e6, pace, rates=6, full=100).steps == 100
    assert first_rung(40, pace, rates=6, full=100).count == 3
    rung = second_rung(1000, 850, pace, candidates=9, least=23, full=100)
    assert (rung.count, rung.steps) == (6, 56)
    assert last_rung(500, pace, survivors=2, least=56, full=100) == last_rung(204, pace, 2, 56, 100)
    assert last_rung(200, pace, survivors=2, least=56, full=100).count == 1
    assert last_rung(90, pace, survivors=2, least=20, full=100).steps == 43
    assert last_rung(90, pace, survivors=2, least=40, full=100).count == 0


@pytest.mark.parametrize(
    ("text", "seconds"), [("90s", 90), ("30m", 1800), ("1.5h", 5400), ("2", 120), (0.5, 30), (" 1M ", 60)]
)
def test_a_budget_is_a_time(text: str | float, seconds: float) -> None:
    assert parse_budget(text) == seconds


@pytest.mark.parametrize("text", ["", "m", "0", "-3m", "nan", "inf", "1d", "1:30", True])
def test_what_is_no_time_is_refused(text: Any) -> None:
    with pytest.raises(ValueError, match=r"^tune: budget is .*, expected a time such as 30m, 90s or 1\.5h"):
        parse_budget(text)


# ---- the log ----


def test_a_damaged_log_is_refused(tmp_path: Path) -> None:
    search_in(tmp_path / "good", 300, Made())
    lines = (tmp_path / "good" / NAME).read_text().splitlines()
    trial = json.loads(next(line for line in lines if '"trial"' in line))
    for changed in (
        lines[3][:20], "[]", "{}", '{"event": "dance"}', json.dumps(trial | {"loss": "low"}),
        json.dumps(trial | {"steps": -1}), json.dumps(trial | {"settings": []}), "\x00",
    ):  # fmt: skip
        directory = tmp_path / "bad"
        directory.mkdir(exist_ok=True)
        (directory / NAME).write_text("\n".join([*lines[:3], changed, *lines[4:]]) + "\n")
        with pytest.raises(ValueError, match=r"tune\.jsonl, line 4") as caught:
            search_in(directory, 300, Made(), resume=True)
        assert type(caught.value).__name__ in ("CorruptError", "FormatError"), changed
    (tmp_path / "bad" / NAME).write_text("\n".join(lines[1:]))
    with pytest.raises(CorruptError, match="the log has no event 'start'"):
        search_in(tmp_path / "bad", 300, Made(), resume=True)


def test_a_log_of_another_search_or_behind_a_link_is_refused(tmp_path: Path) -> None:
    search_in(tmp_path / "one", 300, Made())
    other = dataclasses.replace(SPACE, epochs=(1,))
    with pytest.raises(ValueError, match=r"belongs to a search with different values of search"):
        search_in(tmp_path / "one", 300, Made(), other, resume=True)
    with pytest.raises(FileExistsError, match="the directory holds a search: --resume"):
        search_in(tmp_path / "one", 300, Made())
    (tmp_path / "note").mkdir()
    (tmp_path / "note" / NAME).write_text("mine")
    with pytest.raises(FileExistsError, match="the directory holds a search: --resume"):
        search_in(tmp_path / "note", 300, Made())
    (tmp_path / "two").mkdir()
    (tmp_path / "two" / NAME).symlink_to(tmp_path / "one" / NAME)
    with pytest.raises(UnsafeError, match="a symbolic link"):
        search_in(tmp_path / "two", 300, Made(), resume=True)


# ---- searches on a model ----

QUICK: dict[str, Any] = {"batch_examples": 12, "rank": 2, "targets": "q_proj", "seed": 3}


@pytest.mark.slow
def test_finetune_repeats_the_winner_to_the_bit(
    model: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The line that the command prints is run, and the loss of its adapter is that of the trial."""
    words = ["--batch-examples", "12", "--rank", "2", "--targets", "q_proj,v_proj", "--layers", "last:1"]
    words += ["--compute", "int8", "--keep-int8"]
    output = tmp_path / "a search"
    line = ["tune", str(model), "--data", str(data), "--output", str(output), "--budget", "10m", *words]
    assert cli.main([*line, "--search", "lr=1e-3,1e-2", "--search", "epochs=1,2"]) == 0
    out = capsys.readouterr().out.splitlines()
    starred = next(row.split() for row in out if row.endswith("*"))
    command = systems.words_of(out[-1])
    assert command[:3] == ["nplora", "finetune", str(model)]
    assert "--keep-int8" in command
    assert command[command.index("--output") + 1] == str(output / "best")
    assert cli.main(command[1:]) == 0
    said = re.search(r"validation loss [\d.]+ -> ([\d.]+)", capsys.readouterr().out)
    assert said is not None
    assert said[1] == starred[-3]
    assert [path.name for path in output.iterdir() if path.name != "best"] == [NAME]
    assert cli.main([*line, "--search", "lr=1e-3,1e-2", "--search", "epochs=1,2", "--resume"]) == 0
    assert capsys.readouterr().out.splitlines() == out


def test_trials_keep_weights_in_int8_while_they_train(
    model: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept, usual = list[tuple[bool, ...]](), tuning.new_trainer

    def new_trainer(lm: nplora.LanguageModel, *arguments: Any) -> Any:
        trainer, fit = usual(lm, *arguments), nplora.Trainer.fit
        assert not any(weight.keeps_int8 for weight in lm.model.int8_weights())  # those of an earlier trial

        def watched(*given: Any, **more: Any) -> Any:
            history = fit(trainer, *given, **more)
            kept.append(tuple(weight.keeps_int8 for weight in lm.model.int8_weights()))
            return history

        monkeypatch.setattr(trainer, "fit", watched)
        return trainer

    monkeypatch.setattr(tuning, "new_trainer", new_trainer)
    losses = []
    for keeps in (False, True):
        options = QUICK | {"epochs": 1, "compute": "int8", "keep_int8": keeps}
        report = tune(model, data, tmp_path / str(keeps), budget="5m", search={"lr": [1e-3, 2e-3]}, **options)
        losses.append([trial.loss for trial in report.trials])
        assert {all(each) for each in kept} == {keeps}
        kept.clear()
    assert losses[0] == losses[1]


@pytest.mark.parametrize(
    "options",
    [{"int8_head": "off"}, {"int8_head": "on"}, {"int8_head": "forward", "filter_vocabulary": 0.2}],
)
def test_trials_compute_the_head_as_a_run_does(
    model: Path, data: Path, tmp_path: Path, options: dict[str, Any]
) -> None:
    options = QUICK | {"epochs": 1, "compute": "int8", "rank": 4, "targets": "all-linear"} | options
    report = tune(model, data, tmp_path / "out", budget="5m", search={"lr": [1e-2]}, **options)
    assert report.winner is not None
    done = finetune(model, data, tmp_path / "best", progress=False, **report.options)
    assert done.loss_after == report.winner.loss


@pytest.mark.slow
def test_trials_share_the_outputs_of_the_frozen_blocks(
    model: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    caches, found = list[Any](), list[bool]()

    class Counting(nplora.models.PrefixCache):
        def __init__(self, *arguments: Any) -> None:
            super().__init__(*arguments)
            caches.append(self)

        def find(self, *arguments: Any) -> Any:
            rows = super().find(*arguments)
            found.append(rows is not None)
            return rows

    monkeypatch.setattr(tuning, "PrefixCache", Counting)
    options = QUICK | {"layers": "last:1", "epochs": 1, "batch_examples": 36}
    report = tune(model, data, tmp_path / "out", budget="5m", search={"lr": [1e-3, 1e-2]}, **options)
    assert len(caches) == 1
    assert caches[0].nbytes == 0  # it was closed
    assert found[0] is False
    assert sum(found) > len(report.trials)
    assert report.winner is not None
    done = finetune(model, data, tmp_path / "best", progress=False, **report.options)
    assert done.loss_after == report.winner.loss


@pytest.mark.slow
def test_a_tenth_is_held_out_unless_there_are_validation_data(
    model: Path, data: Path, tmp_path: Path
) -> None:
    few: dict[str, Any] = QUICK | {"epochs": 1, "lr": 1e-2, "progress": False, "budget": 1}
    report = tune(model, data, tmp_path / "a", **few, dropout=0.1)
    assert report.options["valid_split"] == 0.1
    assert "--valid-split 0.1" in report.command
    directory = tmp_path / "both"
    directory.mkdir()
    for name in ("train", "valid"):
        (directory / f"{name}.jsonl").write_text(data.read_text(encoding="utf-8"))
    for given in (
        tune(model, directory, tmp_path / "b", **few),
        tune(model, data, tmp_path / "c", valid=data, **few),
    ):
        assert "valid_split" not in given.options
        assert given.winner is not None
        assert given.loss_before == evaluate(model, data)["loss"]
    several = tune(model, [(directory, 2), data], tmp_path / "e", **few)
    words = systems.words_of(several.command)
    assert words[3:8] == ["--data", f"{directory}:2", "--data", str(data), "--output"]
    rows = iter([json.loads(line) for line in data.read_text(encoding="utf-8").splitlines()])
    lm = nplora.load_model(model)
    report = tune(lm, rows, tmp_path / "d", valid=[{"prompt": "1+1=", "completion": "2"}], **few)
    words = systems.words_of(report.command)
    assert words[1:7] == ["finetune", str(model), "--data", "DATA", "--valid", "VALID"]
    assert not lm.adapter_layers()


@pytest.mark.slow
def test_ctrl_c_and_a_full_disk_end_a_search_that_resumes(
    model: Path,
    data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    trials, write = tuning._Trials, files.write
    line = ["tune", str(model), "--data", str(data), "--output", str(tmp_path / "out"), "--budget", "5m"]
    line += ["--rank", "2", "--targets", "q_proj", "--epochs", "1", "--search", "lr=1e-3,1e-2"]
    make, count = trials.make, 0

    def interrupted(self: Any, settings: Settings, steps: int) -> Any:
        nonlocal count
        count += 1
        if count == 2:
            raise KeyboardInterrupt
        return make(self, settings, steps)

    def full(fd: int, chunk: files.Chunk, progress: files.Progress) -> None:
        if bytes(chunk).count(b"\n") > 5:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write(fd, chunk, progress)

    with monkeypatch.context() as patched:
        patched.setattr(trials, "make", interrupted)
        assert cli.main(line) == 130
    assert "1 trial in " in (out := capsys.readouterr().out)
    assert "interrupted: --resume continues" in out
    with monkeypatch.context() as patched:
        patched.setattr(files, "write", full)
        assert cli.main([*line, "--resume"]) == 2
    assert "No space left on device" in capsys.readouterr().err
    assert (tmp_path / "out" / NAME).read_text().count("\n") == 5
    assert os.listdir(tmp_path / "out") == [NAME]
    assert cli.main(line) == 2
    assert "the directory holds a search: --resume" in capsys.readouterr().err
    assert cli.main([*line, "--resume"]) == 0
    resumed = capsys.readouterr().out
    assert cli.main([*line, "--overwrite"]) == 0
    again = capsys.readouterr().out
    without_times = [re.sub(r"in \S+ of|\b\d+\.\d\b *", "", text) for text in (resumed, again)]
    assert without_times[0] == without_times[1]


@pytest.mark.slow
def test_a_search_of_epochs_and_warm_up_ends_with_a_command_of_tried_values(
    model: Path, data: Path, tmp_path: Path
) -> None:
    few: dict[str, Any] = QUICK | {"progress": False, "lr": 1e-2, "budget": "10m"}
    report = tune(model, data, tmp_path / "out", search={"epochs": [2, 4], "warmup": [0, 3]}, **few)
    assert report.options["epochs"] in (2, 4)
    done = finetune(model, data, tmp_path / "best", progress=False, keep="last", **report.options)
    assert report.winner is not None
    assert done.loss_after == report.winner.loss


def test_a_model_with_numbers_that_are_not_finite_after_a_trial_has_diverged(
    model: Path, data: Path, tmp_path: Path
) -> None:
    few: dict[str, Any] = QUICK | {"progress": False, "budget": 1}
    report = tune(model, data, tmp_path / "out", steps=1, search={"lr": [3e38, 1e-3]}, **few)
    assert sorted(trial.loss for trial in report.trials if trial.settings["lr"] > 1) == [math.inf]


def test_a_search_of_a_model_whose_loss_is_not_finite_says_so(
    model: Path, data: Path, tmp_path: Path
) -> None:
    lm = nplora.load_model(model)
    lm.model.norm.weight[0] = math.inf  # type: ignore[index]
    message = "tune: the validation loss before training is nan, expected a finite number"
    with pytest.raises(nplora.NonFiniteLossError, match=f"^{message}$"):
        tune(lm, data, tmp_path / "out", budget=1, **QUICK)
    assert not (tmp_path / "out" / NAME).exists() or "baseline" not in (tmp_path / "out" / NAME).read_text()


@pytest.mark.slow
@pytest.mark.parametrize("more", [{}, {"resume": True}, {"overwrite": True}])
def test_a_second_search_in_the_same_directory_is_refused(
    model: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, more: dict[str, Any]
) -> None:
    out, errors, before = tmp_path / "out", list[str](), tuning._Trials.make
    given: dict[str, Any] = {"search": {"lr": [1e-3, 1e-2]}, "rank": 2, "epochs": 1, "budget": "1s"}

    def during(trials: Any, *rest: Any) -> Any:
        if not errors:
            log = (out / NAME).read_bytes()
            for start in (
                lambda: tune(model, data, out, **given, **more),
                lambda: finetune(model, data, out, steps=1),
            ):
                with pytest.raises(BlockingIOError) as refused:
                    start()
                errors.append(str(refused.value))
            assert (out / NAME).read_bytes() == log
        return before(trials, *rest)

    monkeypatch.setattr(tuning._Trials, "make", during)
    report = tune(model, data, out, **given)
    pid = os.getpid()
    assert re.search(rf"another search or run \(process {pid}\) is writing to this directory.*out", errors[0])
    assert re.search(rf"another run \(process {pid}\) is writing to this directory", errors[1])
    assert report.winner is not None
    assert not (out / "lock").exists()
    monkeypatch.undo()
    (out / "lock").write_text("123456\n")  # as a killed search leaves it
    assert tune(model, data, out, **given, resume=True).winner is not None


@pytest.mark.slow
def test_a_trial_that_diverges_is_reported(model: Path, data: Path, tmp_path: Path) -> None:
    few: dict[str, Any] = QUICK | {"epochs": 1, "progress": False, "budget": 1}
    report = tune(model, data, tmp_path / "out", search={"lr": [1e20, 1e-2]}, **few)
    assert report.winner is not None
    assert report.winner.settings["lr"] < 1
    assert "diverged" in report.table()
    report = tune(model, data, tmp_path / "none", lr=1e20, **few)
    assert (report.winner, report.command) == (None, "")
    assert "no trial has a finite loss: search smaller learning rates" in str(report)


# ---- arguments ----


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"budget": "soon"}, ValueError, "budget is 'soon', expected a time"),
        ({"sampler": "grid"}, ValueError, "sampler='grid' is not available; possible: 'halving', 'optuna'"),
        ({"search": {"lr": []}}, ValueError, "search has no values for lr"),
        ({"search": {"lr": [0]}}, ValueError, "lr is 0, expected above 0"),
        ({"search": {"lr": 1e-3}}, TypeError, "search has lr: a float, expected a list of values"),
        ({"search": {"rate": [1]}}, ValueError, "rate cannot be searched"),
        ({"search": {"seed": [1, 2]}}, ValueError, "seed cannot be searched"),
        ({"search": {"batch_examples": [1, 2]}}, ValueError, "batch_examples cannot be searched"),
        ({"search": {"lr": [1e-3]}, "lr": 1e-3}, ValueError, "lr is set to one value and also searched"),
        ({"search": {"epochs": [1]}, "steps": 5}, ValueError, "epochs are searched, and steps is given"),
        ({"learning_rate": 1}, TypeError, "unexpected keyword 'learning_rate'; did you mean lr?"),
        ({"sample": "Hi"}, TypeError, "unexpected keyword 'sample': a search cannot use this option"),
        ({"patience": 2}, TypeError, "unexpected keyword 'patience': a search cannot use this option"),
        ({"search": {"keep": ["last"]}}, ValueError, "keep cannot be searched"),
        (
            {"rank_pattern": {"up_proj": 2}, "search": {"targets": ["all-linear", "q_proj"]}},
            ValueError,
            "tune: rank_pattern has 'up_proj', which matches no adapted layer",
        ),
        ({"search": {"objective": ["sft", "dpo"]}}, ValueError, "objective cannot be searched"),
        ({"search": {"teacher": ["t"]}}, ValueError, "teacher cannot be searched"),
        ({"search": {"beta": [0.2]}}, ValueError, "beta is for objective 'dpo' or 'orpo' or 'kto', but the"),
        ({"search": {"beta": [0]}, "objective": "dpo"}, ValueError, "beta is 0, expected above 0"),
        (
            {"search": {"loss_type": ["sigmoid", "ipo"], "label_smoothing": [0.0, 0.1]}, "objective": "dpo"},
            ValueError,
            "label_smoothing is for loss_type 'sigmoid', 'sigmoid_norm', 'robust', but the loss_ty",
        ),
        ({"resume": True, "overwrite": True}, ValueError, "resume and overwrite are both given"),
        ({"rank": 0}, ValueError, "rank is 0"),
        ({"layers": "last:9"}, ValueError, "the model has 2 blocks"),
    ],
)
def test_wrong_arguments_are_refused(
    options: dict[str, Any], error: type[Exception], words: str, model: Path, data: Path, tmp_path: Path
) -> None:
    with pytest.raises(error, match=re.escape(words)):
        tune(model, data, tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_the_command_line_reads_values_to_try(
    model: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = ["tune", str(model), "--data", str(data), "--output", str(tmp_path / "out")]
    for text, words in (
        ("lr", "expected NAME=VALUE,VALUE"), ("lr=", "expected NAME=VALUE,VALUE"),
        ("lr=fast", "expected values of the type float for lr"),
        ("rank=8.5", "expected values of the type int for rank"),
        ("use-dora=yes", "expected values of the type bool for use_dora"),
        ("rank-pattern=a", "rank_pattern cannot be searched"), ("rates=1", "rates cannot be searched"),
    ):  # fmt: skip
        with pytest.raises(SystemExit) as ended:
            cli.main([*line, "--search", text])
        assert ended.value.code == 2
        assert words in capsys.readouterr().err
    assert cli.main([*line, "--search", "lr=1e-3", "--search", "lr=1e-2"]) == 2
    assert "--search lr is given twice" in capsys.readouterr().err
    from nplora.cli.tune import searched

    assert searched("targets=all-linear,q_proj+v_proj") == (
        "targets",
        [("all-linear",), ("q_proj", "v_proj")],
    )
    assert searched("use-dora=false,true") == ("use_dora", [False, True])
    assert searched("lr=1e-3") == ("lr", [1e-3])


@pytest.mark.slow
def test_few_held_out_examples_are_said_to_be_noise(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    row = {"prompt": "1+1=", "completion": "2"}
    options: dict[str, Any] = {"budget": "4s", "lr": 1e-3, "rank": 2, "targets": "q_proj", "steps": 1}
    for count, notes in (
        (3, ("with 3 held-out examples, the differences between the losses are mostly noise; use at least 30 "
             "examples, better 100 or more",)),
        (30, ()),
    ):  # fmt: skip
        valid = [row | {"prompt": f"{n}="} for n in range(count)]
        report = tune(model, [row] * 4, tmp_path / str(count), valid=valid, progress=True, **options)
        assert report.notes == notes
        assert str(report).count("mostly noise") == len(notes)
        assert capsys.readouterr().err.count("mostly noise") == len(notes)  # before the trials


@pytest.mark.slow
def test_a_search_that_continues_an_adapter_leaves_its_ranks(model: Path, data: Path, tmp_path: Path) -> None:
    finetune(model, data, tmp_path / "first", progress=False, **QUICK, steps=2)
    lm = nplora.load_model(model)
    space = space_of(lm, {"adapter": tmp_path / "first"}, {}, 1e-3)
    assert space.names == ["lr"]
    with pytest.raises(ValueError, match="rank is decided by the adapter to continue from"):
        space_of(lm, {"adapter": tmp_path / "first"}, {"rank": [4]}, 1e-3)
    report = tune(
        model, data, tmp_path / "out", budget=1, progress=False, adapter=tmp_path / "first",
        search={"lr": [1e-2, 1e-3]}, epochs=1,
    )  # fmt: skip
    words = systems.words_of(report.command)
    assert words[words.index("--adapter") + 1] == str(tmp_path / "first")
    assert "--rank" not in report.command
    done = finetune(model, data, tmp_path / "best", progress=False, **report.options)
    assert report.winner is not None
    assert done.loss_after == report.winner.loss


PAIRS = [{"prompt": f"{n}+{n}=", "chosen": str(2 * n), "rejected": f"no{n}"} for n in range(12)]
FEW: dict[str, Any] = {"progress": False, "valid": PAIRS[:4], "rank": 2, "targets": ("q_proj",), "epochs": 1}


@pytest.mark.slow
def test_the_trials_of_kto_are_runs_with_their_batches(model: Path, tmp_path: Path) -> None:
    """Each batch of KTO has its own sequences in the estimate of the KL divergence."""
    kto: dict[str, Any] = {**FEW, "objective": "kto", "batch_examples": 3}
    report = tune(model, PAIRS, tmp_path / "out", budget=9, search={"lr": [1e-2, 1e-3]}, **kto)
    assert {trial.settings["lr"] for trial in report.trials} >= {1e-2, 1e-3}
    for trial in report.trials:
        options = {**kto, **trial.settings, "epochs": None, "steps": trial.steps, "keep": "last"}
        done = finetune(model, PAIRS, tmp_path / "alone", **options, overwrite=True)
        assert done.loss_after == trial.loss


def test_a_search_of_the_losses_of_kto_trains_with_each(model: Path, tmp_path: Path) -> None:
    """Only the second loss needs the reference's log-probabilities of mismatched pairs."""
    types = ["apo_zero_unpaired", "kto"]
    kto: dict[str, Any] = {**FEW, "lr": 1e-2, "objective": "kto", "batch_examples": 3}
    report = tune(model, PAIRS, tmp_path / "out", budget=9, search={"loss_type": types}, **kto)
    assert {trial.settings["loss_type"] for trial in report.trials} == {*types}


def test_judged_answers_to_one_prompt_are_searched_without_the_loss_that_needs_two(
    model: Path, tmp_path: Path
) -> None:
    rows = [{"prompt": "1+1=", "completion": str(n), "label": n == 2} for n in range(8)]
    kto: dict[str, Any] = {**FEW, "valid": rows, "objective": "kto", "batch_examples": 4, "budget": 9}
    kto["search"] = {"lr": [1e-2, 1e-3], "loss_type": ["apo_zero_unpaired"]}
    assert len(tune(model, rows, tmp_path / "out", **kto).trials) >= 2
    kto["search"] = {"lr": [1e-2], "loss_type": ["apo_zero_unpaired", "kto"]}
    with pytest.raises(DataError, match="8 answers to one prompt, expected at least two different prompts"):
        tune(model, rows, tmp_path / "both", **kto)


@pytest.mark.slow
def test_trials_train_with_their_own_loss_and_are_compared_by_the_first(model: Path, tmp_path: Path) -> None:
    dpo: dict[str, Any] = {**FEW, "lr": 1e-2, "objective": "dpo"}
    report = tune(model, PAIRS, tmp_path / "out", budget=9, search={"beta": [0.1, 2.0]}, **dpo)
    assert {trial.settings["beta"] for trial in report.trials} == {0.1, 2.0}
    for trial in report.trials:
        options = {**dpo, **trial.settings, "epochs": None, "steps": trial.steps, "keep": "last"}
        finetune(model, PAIRS, tmp_path / "alone", **options, overwrite=True)
        first = objective_of(FinetuneOptions(objective="dpo", beta=0.1))
        lm = nplora.load_model(model)
        reading = first.options.reading(64)
        held_out = first.read("t", sources_of("t", PAIRS[:4]), lm.tokenizer, reading)
        batches = evaluation_batches(held_out)
        with files.Directory(tmp_path / "alone") as directory:
            first.prepare(lm, [batches], directory, print)
        trained = nplora.finetuning.load_with_adapter(model, tmp_path / "alone")
        assert evaluate_loss(trained, first.loss(None), batches)["loss"] == trial.loss


def test_a_searched_temperature_must_be_that_of_the_stored_teacher(
    model: Path, data: Path, tmp_path: Path
) -> None:
    teach(model, data, tmp_path / "taught", top_k=4)
    options: dict[str, Any] = {"objective": "distill", "teacher": tmp_path / "taught", "progress": False}
    with pytest.raises(ValueError, match=r"tune: temperature is 2, but the log-probabilities in .* at temp"):
        tune(model, data, tmp_path / "out", search={"temperature": [1.0, 2.0]}, **options)


def test_options_of_ranks_belong_to_one_run(model: Path, data: Path, tmp_path: Path) -> None:
    with pytest.raises(
        TypeError, match=r"^tune: unexpected keyword 'distributed': a search cannot use this option"
    ):
        tune(model, data, tmp_path / "out", distributed="off")
    with pytest.raises(ValueError, match=r"^tune: outer_lr cannot be searched"):
        tune(model, data, tmp_path / "out", search={"outer_lr": [0.5, 0.9]})


def test_a_learning_rate_of_none_is_searched(model: Path) -> None:
    assert (
        space_of(nplora.load_model(model), {"lr": None}, {}, 1e-3).rates
        == space_of(nplora.load_model(model), {}, {}, 1e-3).rates
    )


def test_the_usual_space_is_made_for_the_model(model: Path) -> None:
    space = space_of(nplora.load_model(model), {}, {}, 2e-4)
    assert space.rates == (2e-5, 6.3e-5, 2e-4, 6.3e-4, 2e-3)
    assert space.others["targets"] == (
        ("all-linear",), ("q_proj", "k_proj", "v_proj", "o_proj"), ("gate_proj", "up_proj", "down_proj"),
    )  # fmt: skip
    assert space.settings(1e-3, rank=4) == {"lr": 1e-3, "rank": 4, "targets": ("all-linear",), "alpha": 8.0}


def test_the_signature_has_every_option_of_a_search() -> None:
    parameters = inspect.signature(tune).parameters
    for field in dataclasses.fields(TuneOptions):
        default = None if field.name == "search" else field.default
        assert parameters[field.name].default == default, field.name


# ---- Optuna ----


@pytest.mark.slow
def test_optuna_proposes_the_same_trials_after_a_resume(tmp_path: Path) -> None:
    pytest.importorskip("optuna")
    from nplora.finetuning.tuning.bayes import OptunaSampler

    def run(directory: Path, made: Made, **more: Any) -> list[Trial]:
        return search_in(directory, 1500, made, sampler=OptunaSampler(SPACE, seed=1), **more).log.trials

    whole = run(tmp_path / "whole", Made())
    assert len({trial.settings["lr"] for trial in whole if trial.rung == 1}) > 5
    assert run(tmp_path / "again", Made()) == whole
    lines = (tmp_path / "whole" / NAME).read_text().splitlines(keepends=True)
    (tmp_path / "part").mkdir()
    (tmp_path / "part" / NAME).write_text("".join(lines[:9]))
    rest = Made()
    assert run(tmp_path / "part", rest, resume=True) == whole
    assert len(rest.keys) == len(whole) - 6
    diverging = run(tmp_path / "diverging", Made(diverge=1e-3))
    assert any(math.isinf(trial.loss) for trial in diverging)


def test_a_proposal_that_is_repeated_takes_the_place_of_one_survivor(tmp_path: Path) -> None:
    """The best proposal of ten comes three times. A third of eight trials, three, reach the second rung."""

    class Repeating:
        def __init__(self) -> None:
            rates = (2e-3, 2e-3, 2e-3, 1e-3, 5e-4, 2e-4, 1e-4, 5e-5, 2e-5, 1e-5)
            self.proposals = [SPACE.settings(lr) for lr in rates]

        def propose(self) -> Settings:
            return self.proposals.pop(0)

        def tell(self, loss: float) -> None: ...

    search = search_in(tmp_path, 5000, Made(), sampler=Repeating())
    first, second = ([t for t in search.log.trials if t.rung == rung] for rung in (1, 2))
    assert len(first) == 8
    assert sorted(trial.settings["lr"] for trial in second) == [5e-4, 1e-3, 2e-3]


def test_a_search_without_optuna_names_the_extra(
    model: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(ModuleNotFoundError, match=r"needs the package optuna: pip install 'nplora\[tune\]'"):
        tune(model, data, tmp_path / "out", sampler="optuna", progress=False)
