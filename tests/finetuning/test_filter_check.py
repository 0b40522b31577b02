"""A run with filter_vocabulary: when it is refused, and when it costs more than it saves."""

import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import nplora
import small_models
from nplora import _core
from nplora.finetuning import FinetuneOptions, finetune, plan
from nplora.finetuning.filter_check import FilterCheck, seconds_without_filter
from nplora.models import WordFilter
from nplora.trainer.history import StepRecord
from small_llama import save_small_llama

ROWS = [{"prompt": f"{n}+{n}=", "completion": str(2 * n)} for n in range(8)]
QUICK: dict[str, Any] = {"rank": 2, "batch_examples": 4, "steps": 2}


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return save_small_llama(tmp_path / "model.gguf")


# ---- heads that the filter cannot compute ----

REFUSED: dict[str, dict[str, Any]] = {
    "lm_head has a low-rank adapter": {"targets": "lm_head"},
    "only some of its rows are trained": {"trainable_tokens": "5,6"},
    "only some of its rows are trained: by trainable_tokens, by add_tokens": {"add_tokens": ["3+"]},
}


@pytest.mark.parametrize("problem", REFUSED)
def test_a_filter_that_cannot_work_is_refused(model: Path, tmp_path: Path, problem: str) -> None:
    options = QUICK | REFUSED[problem]
    for run in (lambda **o: finetune(model, ROWS, tmp_path / "run", **o), lambda **o: plan(model, ROWS, **o)):
        with pytest.raises(ValueError, match=f"filter_vocabulary needs an output layer .*{problem}"):
            run(filter_vocabulary=1e-3, **options)
    assert not (tmp_path / "run").exists()


def test_a_filter_of_a_distillation_is_refused() -> None:
    with pytest.raises(ValueError, match=r"filter_vocabulary=0\.001 and objective 'distill' exclude"):
        FinetuneOptions(objective="distill", teacher="other.gguf", filter_vocabulary=1e-3)


@pytest.mark.parametrize("saved", ["lm_head", "embed_tokens"])
def test_a_run_that_trains_the_whole_head_is_filtered(tmp_path: Path, saved: str) -> None:
    tied = {"without": "output.weight"} if saved == "embed_tokens" else {}
    model = save_small_llama(tmp_path / "model.gguf", **tied)
    options = QUICK | {"modules_to_save": saved, "progress": False}
    plain = finetune(model, ROWS, tmp_path / "plain", **options)
    report = finetune(model, ROWS, tmp_path / "run", filter_vocabulary=0.01, **options)
    assert report.history.loss[0] == plain.history.loss[0]
    assert report.history.loss[1] == pytest.approx(plain.history.loss[1], rel=0.02)
    assert report.history.loss[1] != plain.history.loss[1]
    for record in report.history.steps:
        assert 0 < record.metrics["skipped_probability"] < 1
        assert 0 < record.metrics["kept_vocabulary"] < 1


# ---- the time ----


class StoppedFilter(WordFilter):
    def __init__(self, seconds: float) -> None:
        super().__init__(1e-3)
        self._seconds = seconds

    def usual_time(self) -> tuple[int, float]:
        return 16, self._seconds


def said_by(seconds: float, steps: int, total: int) -> list[str]:
    """What a check says in a run in which a gradient with the filter takes this time."""
    said = list[str]()
    head = nplora.Linear(np.ones((64, 32)))
    check = FilterCheck(head, StoppedFilter(seconds), said.append)
    for step in range(1, steps + 1):
        run: Any = types.SimpleNamespace(step=step, total_steps=total)
        check.on_step_end(run, StepRecord(step, 1, 1.0, 1, 1e-3, 1.0, 1.0, {"kept_vocabulary": 0.1 * step}))
    return said


def test_a_filter_that_costs_more_than_it_saves_is_reported_once() -> None:
    [line] = said_by(10.0, steps=20, total=20)
    assert line.startswith("step 5: --filter-vocabulary 0.001 makes the steps slower")
    assert "take 1e+04 ms for 16 tokens" in line
    assert "keeps 30.0% of the vocabulary" in line
    assert said_by(10.0, steps=2, total=2)[0].startswith("step 2: ")
    assert said_by(10.0, steps=2, total=20) == []


def test_a_filter_that_saves_time_is_not_reported() -> None:
    assert said_by(1e-9, steps=20, total=20) == []


def test_the_time_without_a_filter_counts_both_gradients_of_a_trained_head(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lm, calls, usual = small_models.load(tmp_path), list[int](), _core.matmul_t

    def counted(*arguments: Any) -> None:
        calls[-1] += 1
        usual(*arguments)

    def begin(*arguments: Any) -> None:  # each repetition begins with the loss
        calls.append(0)

    monkeypatch.setattr(_core, "matmul_t", counted)
    monkeypatch.setattr(_core, "cross_entropy", begin)
    assert isinstance(lm.lm_head, nplora.Linear)
    assert seconds_without_filter(lm.lm_head, 8) > 0
    assert set(calls) == {1}
    calls.clear()
    lm.add_lora(rank=2, modules_to_save="lm_head")
    assert isinstance(lm.lm_head, nplora.nn.TrainedHead)
    assert seconds_without_filter(lm.lm_head, 8) > 0
    assert set(calls) == {2}
    assert not lm.lm_head.rows.grad.any()
