"""finetune(profile=True): the activities of the steps, and nothing else."""

import json
import time
from pathlib import Path
from typing import Any

import pytest

from nplora.finetuning import FinetuneReport, finetune
from nplora.finetuning.step_profile import ProfileRow, StepProfile
from nplora.trainer import Callback, Run
from nplora.trainer.history import StepRecord
from small_llama import BLOCKS, FFN, HIDDEN, save_small_llama

RANK, STEPS = 4, 3


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return save_small_llama(tmp_path / "model.gguf", "q8_0")


@pytest.fixture
def data(tmp_path: Path) -> Path:
    lines = ({"prompt": f"{i} " * 20, "completion": "abc" * (4 + i % 3)} for i in range(12))
    file = tmp_path / "data.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return file


def run(path: Path, data: Path, output: Path, **more: Any) -> FinetuneReport:
    options: dict[str, Any] = {"progress": False, "rank": RANK, "steps": STEPS, "batch_examples": 4}
    return finetune(path, data, output, **(options | more))


def operations(report: FinetuneReport) -> dict[str, dict[str, float]]:
    assert report.profile is not None
    return {row.name: dict(row.operations) for row in report.profile.rows if row.operations}


class Pauses(Callback):
    """Pauses at the beginning of each step, and after each step."""

    seconds = 0.04

    def on_step_begin(self, run: Run) -> None:
        time.sleep(self.seconds)

    def on_step_end(self, run: Run, record: StepRecord) -> None:
        time.sleep(self.seconds)


def test_the_last_row_is_the_time_outside_the_core_within_steps(
    path: Path, data: Path, tmp_path: Path
) -> None:
    start = time.perf_counter()
    report = run(path, data, tmp_path / "out", profile=True, callbacks=[Pauses()])
    elapsed, profile = time.perf_counter() - start, report.profile
    assert profile is not None
    assert profile.steps == STEPS
    assert profile.rows[-1].seconds >= STEPS * Pauses.seconds  # no time of it is in two rows
    assert profile.seconds <= elapsed - STEPS * Pauses.seconds
    assert all(row.seconds > 0 for row in profile.rows)
    text = str(report)
    assert all(row.name in text for row in profile.rows)
    assert "GFLOP/s" in text


def test_the_products_are_those_of_the_layers(path: Path, data: Path, tmp_path: Path) -> None:
    report = run(path, data, tmp_path / "out", profile=True, epochs=1, steps=None)  # each token once
    all_, learned = report.train.tokens, report.train.learned
    layers = BLOCKS * ([(HIDDEN, HIDDEN)] * 4 + [(FFN, HIDDEN)] * 2 + [(HIDDEN, FFN)])  # d_out and d_in
    frozen = sum(2 * all_ * d_out * d_in for d_out, d_in in layers)
    low = sum(2 * all_ * RANK * (d_out + d_in) for d_out, d_in in layers)
    found = operations(report)
    assert found["products, forward"] == {"float32": frozen + low}
    # The lowest layers (q, k and v of the first block) need no gradient of their input, and so no dz B.
    first = 3 * 2 * all_ * (HIDDEN * HIDDEN + RANK * HIDDEN)
    assert found["products, backward"] == {"float32": frozen + 2 * low - first}
    vocab = found["head: products, forward"]["float32"] / (2 * learned * HIDDEN)
    assert vocab == round(vocab) > 200
    assert found["head: products, backward"] == found["head: products, forward"]


@pytest.mark.slow
def test_evaluations_and_comparisons_of_gradients_are_not_recorded(
    path: Path, data: Path, tmp_path: Path
) -> None:
    plain = run(path, data, tmp_path / "plain", profile=True, compute="int8")
    more = run(
        path, data, tmp_path / "more", profile=True, compute="int8", valid=data, eval_every=1, sample=("a",)
    )
    assert operations(plain) == operations(more)
    assert operations(plain)["products, forward"].keys() == {"int8", "bfloat16"}


@pytest.mark.slow
def test_a_profile_changes_no_bit(path: Path, data: Path, tmp_path: Path) -> None:
    assert run(path, data, tmp_path / "off").profile is None
    run(path, data, tmp_path / "on", profile=True, accumulate=2)
    run(path, data, tmp_path / "without", accumulate=2)
    files = [(tmp_path / name / "adapter_model.safetensors").read_bytes() for name in ("on", "without")]
    assert files[0] == files[1]


def test_the_floor_is_the_operations_at_the_peak_rates() -> None:
    rows = (ProfileRow("a", 2.0, {"int8": 8e9, "float32": 1e9}), ProfileRow("b", 1.0, {}))
    profile = StepProfile(2, 3.0, 1, rows, {"float32": 1e9, "int8": 8e9})
    assert profile.floor == 2.0
    lines = str(profile).splitlines()
    assert lines[1].split() == ["a", "1000.0", "66.7%", "4", "100%"]
    assert lines[2].split() == ["b", "500.0", "33.3%"]
    assert lines[4] == "products alone, at the peak rates: 1000.0 ms a step"
    assert lines[5].startswith("peak rates on 1 thread, in GFLOP/s: ")
