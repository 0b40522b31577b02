"""Plans: they predict the memory of runs, they choose settings that fit, and runs follow them."""

import dataclasses
import json
import mmap
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from bench import bench_plan

import nplora
import systems
from nplora import cli
from nplora.finetuning import FinetuneOptions, TokenLoss, execution, finetune, plan
from nplora.finetuning.data import read_dataset
from nplora.finetuning.planning import (
    Adapters,
    Alternative,
    BudgetError,
    ExecutionPlan,
    MicroBatch,
    Work,
    available_memory,
    choice,
    current_memory,
    memory_plan,
    needed,
    parse_bytes,
    peak_memory,
    preferred,
    speed,
)
from nplora.finetuning.planning.memory import Memory, ProductMethod, predicted
from nplora.finetuning.planning.resident import unread
from nplora.formats.errors import DataError
from nplora.formats.gguf import Typed
from nplora.lm import load_model
from nplora.models.decoder import frozen_weights
from nplora.models.footprint import NOT_ADAPTED
from nplora.models.packing import pack
from nplora.platform import memory as system_memory
from nplora.weights import keeping_int8
from nplora.weights.int8_error import sample_nbytes
from small_llama import save_small_llama

pytest.importorskip("tokenizers")

MEGABYTE = 10**6


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_small_llama(tmp_path_factory.mktemp("model") / "model.gguf")


@pytest.fixture
def data(tmp_path: Path) -> Path:
    rows = [{"prompt": f"{n}+{n}=", "completion": str(2 * n) * (1 + n % 3)} for n in range(24)]
    path = tmp_path / "train.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


# ---- predictions and runs ----


@pytest.mark.slow
@pytest.mark.skipif(systems.IS_WINE, reason="Wine counts only a part of a process's memory")
@pytest.mark.usefixtures("smollm2")
@pytest.mark.parametrize("setting", bench_plan.TESTED, ids=str)
def test_the_peak_of_a_run_is_the_predicted_one(setting: bench_plan.Setting) -> None:
    found = setting.measure(2, resumes="memory" in setting.options, steps=2)
    assert found["predicted"] == pytest.approx(found["measured"], rel=0.1)
    if "memory" in setting.options:
        assert found["measured"] < parse_bytes(setting.options["memory"])
    assert 0 < found["predicted_seconds"] < 100


# ---- micro-batches ----


def test_micro_batches_have_the_same_sequences_in_order() -> None:
    rng = np.random.default_rng(0)
    sequences = [(rng.integers(100, size=n), rng.integers(100, size=n)) for n in (5, 9, 1, 30, 4, 4, 2)]
    whole = pack(sequences)
    parts = whole.pieces(12)
    assert [len(part.ids) for part in parts] == [5, 10, 30, 10]
    assert [np.diff(part.starts).tolist() for part in parts] == [[5], [9, 1], [30], [4, 4, 2]]
    assert all(part.starts[0] == 0 for part in parts)
    np.testing.assert_array_equal(np.concatenate([part.ids for part in parts]), whole.ids)
    np.testing.assert_array_equal(np.concatenate([part.targets for part in parts]), whole.targets)
    assert [len(part.ids) for part in whole.pieces(None)] == [len(whole.ids)]


def test_the_gradient_of_micro_batches_is_that_of_the_batch(model: Path) -> None:
    rng = np.random.default_rng(1)
    lm = load_model(model)
    lm.add_lora(rank=2, seed=3)
    for layer in lm.adapter_layers().values():
        layer.A[...] = rng.standard_normal(layer.A.shape)
    sequences = [rng.integers(lm.config.vocab_size, size=n) for n in (7, 3, 12, 5)]
    batch = pack([(ids, ids) for ids in sequences])
    found = []
    for micro_tokens in (None, 10):
        lm.zero_grad()
        loss = TokenLoss(micro_tokens).forward_backward(lm, batch, None, 0.1)
        found.append((loss, [parameter.grad.copy() for parameter in lm.parameters()]))
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-6)
    for whole, cut in zip(found[0][1], found[1][1], strict=True):
        np.testing.assert_allclose(cut, whole, rtol=1e-4, atol=1e-4 * abs(whole).max())


def test_targets_are_those_that_a_packed_batch_counts(model: Path, data: Path) -> None:
    for learn in ("completion", "all"):
        dataset = read_dataset(data, load_model(model).tokenizer, learn=learn)
        counted = [pack([example]).num_targets for example in dataset]
        assert dataset.targets.tolist() == counted


# ---- what is chosen ----


def sized(model: Path, data: Path, megabytes: float, **options: Any) -> nplora.finetuning.planning.MemoryPlan:
    """A plan for this many megabytes more than the peak of the process."""
    return plan(model, data, memory=int(peak_memory() + megabytes * MEGABYTE), **options)


def test_a_large_budget_changes_nothing(model: Path, data: Path) -> None:
    found = sized(model, data, 10_000)
    assert found.chosen == ExecutionPlan("float32", False, None)
    assert found.memory.total <= found.limit


def test_the_time_of_a_run_is_printed_in_a_fitting_unit(model: Path, data: Path) -> None:
    found = plan(model, data)
    for steps, seconds, words in (
        (6, 0.43, "6 steps in 3 s"),
        (1, 0.2, "1 step in 0 s"),
        (100, 0.9, "100 steps in 90 s"),
        (100, 3.0, "100 steps in 5.0 minutes"),
        (10_000, 3.0, "10,000 steps in 8.3 hours"),
    ):
        assert str(dataclasses.replace(found, steps=steps, seconds=seconds)).splitlines()[0].endswith(words)


def test_the_next_faster_and_the_next_smaller_plan_are_printed_and_all_in_a_table(
    model: Path, data: Path
) -> None:
    """Plans of 10, 20, ... MB; the smaller a plan is, the longer it takes."""
    sizes = (50, 40, 30, 20, 10)
    plans = {mb: ExecutionPlan("float32", mb < 40, mb) for mb in sizes}
    found = dataclasses.replace(
        plan(model, data),
        chosen=plans[30],
        seconds=70,
        memory=Memory(30 * MEGABYTE, 0, 0, 0, 0, 0, 0),
        others=tuple(Alternative(plans[mb], mb * MEGABYTE, 100 - mb) for mb in sizes if mb != 30),
        limit=32 * MEGABYTE,
    )
    assert str(found).splitlines()[-3:] == [
        f"too large: {found.others[1]}",
        f"or: {found.others[2]}",
        "and 2 other plans: nplora plan --verbose lists all",
    ]
    assert found.table().splitlines()[-4:] == [
        f"{word}: {other}"
        for word, other in zip(("too large", "too large", "or", "or"), found.others, strict=True)
    ]


def test_what_is_fixed_stays(model: Path, data: Path) -> None:
    found = sized(model, data, 10_000, compute="bfloat16", recompute=True)
    assert found.chosen == ExecutionPlan("bfloat16", True, None)
    assert {(other.plan.compute, other.plan.recompute) for other in found.others} == {("bfloat16", True)}


def test_the_arithmetic_of_a_loaded_model_stays(model: Path, data: Path) -> None:
    for compute in ("float32", "bfloat16"):
        lm = load_model(model, compute)
        found = sized(lm, data, 10_000)
        assert {planned.compute for planned in (found.chosen, *(other.plan for other in found.others))} == {
            compute
        }


def test_an_example_that_is_longer_than_a_batch_of_an_evaluation_counts_whole(
    tmp_path: Path, data: Path
) -> None:
    model = save_small_llama(tmp_path / "long.gguf", changes={"llama.context_length": Typed(4096, "UINT32")})
    works = {}
    for length in (1000, 3000):
        valid = tmp_path / f"{length}.jsonl"
        valid.write_text(json.dumps({"text": "x" * length}) + "\n")
        works[length] = plan(model, data, valid=valid, max_length=4096).memory.work
    assert works[3000] > 2.5 * works[1000]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"keep_prefix": "memory"}, "there is no frozen block below the adapters"),
        (
            {"init": "pissa"},
            "^(plan|finetune): init='pissa' needs unquantised weights, but model.layers.0.* stored in q8_0",
        ),
        (
            {"targets": ("q_prj",)},
            "^(plan|finetune): the model has no layer 'q_prj'; the nearest",
        ),
        ({"layers": "last:99"}, r"^(plan|finetune): layers='last:99', but the model has \d blocks"),
    ],
)
def test_what_finetune_refuses_is_not_planned(
    tmp_path: Path, data: Path, options: dict[str, Any], message: str
) -> None:
    low = save_small_llama(tmp_path / "low.gguf", "q8_0")
    for call in (lambda: plan(low, data, **options), lambda: finetune(low, data, tmp_path / "o", **options)):
        with pytest.raises(ValueError, match=message):
            call()
    assert not (tmp_path / "o").exists()


def test_int8_takes_more_than_bfloat16_for_scales_and_comparisons(model: Path, data: Path) -> None:
    plans = {compute: plan(model, data, compute=compute) for compute in ("int8", "bfloat16")}
    int8, bfloat16 = (plans[compute].memory for compute in ("int8", "bfloat16"))
    assert (int8.kept, int8.work) == (bfloat16.kept, bfloat16.work)
    lm = nplora.load_model(model)
    shapes = [module.weight.shape for _, module in lm.named_modules() if isinstance(module, nplora.Linear)]
    lm.add_lora(rank=8)
    numbers = sum(parameter.value.size for parameter in lm.parameters())
    measured = max(sample_nbytes(*shape) for shape in shapes)  # of one layer at a time
    assert int8.scratch - bfloat16.scratch == 4 * (sum(d_out for d_out, _ in shapes) + numbers) + measured


def test_weights_kept_in_int8_have_a_line_in_the_plan(model: Path, data: Path) -> None:
    """A byte for each weight of the first adapted block and of the later blocks, if no size needs padding."""
    words, blocks = "MB  weights kept as 8-bit integers", load_model(model).model.layers
    for layers, first in (("first:1", 0), ("last:1", 1)):
        kept, converted = (
            plan(model, data, compute="int8", layers=layers, keep_int8=keeps) for keeps in (True, False)
        )
        assert kept.memory.codes == sum(weight.size for weight in frozen_weights(blocks[first:])) > 0
        assert converted.memory.codes == 0
        assert words in str(kept)
        assert words not in str(converted)


def test_weights_that_are_kept_already_are_not_counted_again(model: Path, data: Path) -> None:
    lm = load_model(model, compute="int8")
    with keeping_int8(frozen_weights(lm.model.layers[1:])):
        rest = plan(lm, data, keep_int8=True).memory.codes
    assert rest == sum(weight.int8_nbytes for weight in frozen_weights(lm.model.layers[:1]))


@pytest.mark.usefixtures("repeatable_plans")
def test_a_limit_that_fits_without_kept_weights_says_so(model: Path, data: Path) -> None:
    options: dict[str, Any] = {"compute": "int8", "recompute": True, "batch_examples": 1}
    least = plan(model, data, **options).memory.total
    with pytest.raises(BudgetError, match=r"; without --keep-int8 it needs .* MB; --memory .*M is enough"):
        plan(model, data, memory=int(1.02 * least) + 1000, keep_int8=True, **options)


def test_blocks_that_are_not_trained_take_the_time_of_inference(model: Path, data: Path) -> None:
    lm, int8, bfloat16 = load_model(model), ProductMethod("int8", True), ProductMethod("bfloat16")
    assert int8.of_inference == bfloat16 == bfloat16.of_inference
    speeds = speed.measured(lm, (int8,))
    assert speeds.keys() == {int8, bfloat16, ProductMethod("float32")}
    slow = dataclasses.replace(speeds[bfloat16], forward=speed.Cost(7.0, 0.0))
    adapters = [Adapters.of(lm, 2, "all-linear", layers) for layers in ("last:1", None)]
    for recompute in (False, True):
        sizes = [speeds[int8].step(lm, each, MicroBatch(20, 20, 20), recompute, slow) for each in adapters]
        assert 8 > sizes[0] > 7 > sizes[1]
    slow = dataclasses.replace(slow, head_forward=speed.Cost(100.0, 0.0), head_backward=speed.Cost(1e6, 0.0))
    assert slow.forward_pass(lm, 20, 20) == 7 * len(lm.model.layers) + 100


def test_weights_are_kept_in_int8_only_for_a_gain_that_is_more_than_noise() -> None:
    plans = [ExecutionPlan("int8", False, None, keeps) for keeps in (False, True)]
    for gain, chosen in ((0.99, False), (0.97, True)):
        assert preferred(plans, {plans[0]: 1.0, plans[1]: gain}.__getitem__).keep_int8 == chosen


@pytest.mark.usefixtures("repeatable_plans")
def test_a_budget_decides_whether_weights_are_kept_in_int8(
    model: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Weights are kept if they fit and a step is then faster. Here, it is always faster."""
    usual = choice.measured

    def measured(*arguments: Any) -> Any:
        found = usual(*arguments)
        slow = next(iter(found.values()))
        cost = dataclasses.replace(slow.forward, token=10 * slow.forward.token)
        return {
            method: slow if method.keep_int8 else dataclasses.replace(slow, forward=cost) for method in found
        }

    monkeypatch.setattr(choice, "measured", measured)
    options: dict[str, Any] = {"compute": "int8", "recompute": True, "batch_examples": 1}
    needed = {keeps: plan(model, data, keep_int8=keeps, **options).memory.total for keeps in (False, True)}
    assert needed[False] < needed[True]
    large = plan(model, data, memory=int(1.03 * needed[True]), **options)
    assert str(large).startswith("int8, weights kept as 8-bit integers, activations recomputed: ")
    for limit in (1.02 * needed[True] - 1000, 1.02 * needed[False] + 1000):
        assert not plan(model, data, memory=int(limit), **options).chosen.keep_int8
    fixed = plan(model, data, memory="1G", keep_int8=True, **options)
    assert {one.keep_int8 for one in fixed.compared()} == {True}


def test_without_a_budget_the_options_are_only_predicted(model: Path, data: Path) -> None:
    found = plan(model, data, recompute=True, steps=5, accumulate=2)
    assert (found.chosen, found.others, found.steps) == (ExecutionPlan("float32", True, None), (), 5)
    assert found.memory.total == sum(vars(found.memory).values())
    assert "at most" in str(found)


def test_the_list_of_a_runs_batches_is_not_counted_as_memory_of_the_run(
    model: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    work_of, listed = execution._work_of, []

    def long(*arguments: Any) -> Any:
        listed.append(np.ones(50 * MEGABYTE, np.uint8))
        return work_of(*arguments)

    before = plan(model, data).memory.process
    monkeypatch.setattr(execution, "_work_of", long)
    assert plan(model, data).memory.process - before < 25 * MEGABYTE


@pytest.mark.slow
def test_nothing_that_fits_is_refused_with_what_would(
    model: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(
        BudgetError,
        match=r"^plan: no plan fits into 1 MB: the smallest \(.*\) needs \d+ MB plus 2% in reserve; "
        r"a smaller --max-length does not help; --memory \d+M is enough$",
    ):
        plan(model, data, memory="1M")
    fresh = [sys.executable, "-m", "nplora", "plan", str(model), "--data", str(data), "--memory"]
    refused = subprocess.run([*fresh, "1M"], capture_output=True, text=True)
    enough = re.search(r"; --memory (\d+M) is enough$", refused.stderr, re.MULTILINE)
    assert enough, refused.stderr
    assert subprocess.run([*fresh, enough[1]], capture_output=True).returncode == 0
    with pytest.raises(BudgetError, match=r"^finetune: no plan fits into 1 MB: "):
        finetune(model, data, tmp_path / "out", memory="1M")
    assert not (tmp_path / "out").exists()
    arguments = [str(model), "--data", str(data), "--memory", "1M"]
    assert cli.main(["plan", *arguments]) == 2
    assert cli.main(["finetune", *arguments, "--output", str(tmp_path / "out")]) == 2
    assert capsys.readouterr().err.count(": no plan fits into 1 MB: ") == 2


def test_a_need_and_the_room_for_it_never_read_the_same(
    model: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    need = Memory(226_400_000, 0, 0, 0, 0, 0, 0)
    assert memory_plan.shortage(need, 226_399_999).startswith(
        "the run needs 227 MB of memory, and 226 MB are available: "
    )
    assert "226 MB at most" in str(
        dataclasses.replace(plan(model, data), memory=Memory(226_000_000, *[0] * 6))
    )
    monkeypatch.setattr(choice, "needed", lambda *arguments: need)
    monkeypatch.setattr(choice, "_MARGIN", 1.0)
    with pytest.raises(BudgetError, match=r"no plan fits into 226 MB: .* needs 227 MB plus 0% in reserve; "):
        plan(model, data, memory=226_399_999)


@pytest.mark.slow
def test_a_resumed_run_may_use_the_margin_of_its_plan(
    model: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(choice, "peak_memory", lambda: 0)
    size = 100 * MEGABYTE
    monkeypatch.setattr(choice, "needed", lambda *arguments: Memory(size, 0, 0, 0, 0, 0, 0))
    given = {"data": data, "output": tmp_path / "out", "memory": f"{103 * MEGABYTE}B", "schedule": "constant"}
    finetune(model, **given, steps=1)
    size = 102 * MEGABYTE  # as in another process
    with pytest.warns(UserWarning, match="total_steps was 1, is 2"):
        assert len(finetune(model, **given, steps=2, resume=True).history.steps) == 2
    with pytest.raises(
        BudgetError,
        match=r"fits into 103 MB: .* needs 102 MB plus 2% in reserve; .*; --memory 107M is enough",
    ):
        plan(model, data, memory=given["memory"])
    assert plan(model, data, memory="1G").limit == pytest.approx(1e9 / 1.02)
    size = 104 * MEGABYTE
    with pytest.raises(BudgetError, match=r"fits into 103 MB: .* needs 104 MB; .*; --memory 107M is enough"):
        finetune(model, **given, steps=2, resume=True)


def test_a_budget_below_an_earlier_peak_has_an_error_of_its_own(
    model: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("nplora.finetuning.planning.choice.peak_memory", lambda: 9 * 10**9)
    with pytest.raises(
        BudgetError, match="the peak memory of this process is 9000 MB already, and the limit is 8000 MB: "
    ):
        plan(model, data, memory="8G")


def test_a_budget_too_small_for_any_process_is_not_blamed_on_an_earlier_peak(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The budget is above the present memory, below the need, and the need is below an earlier peak."""
    choice = "nplora.finetuning.planning.choice"
    monkeypatch.setattr(f"{choice}._MARGIN", 1.0)
    monkeypatch.setattr(f"{choice}.current_memory", lambda: 10 * MEGABYTE)
    monkeypatch.setattr(f"{choice}.unread", lambda source: 0)
    data = tmp_path / "long.jsonl"
    data.write_text(json.dumps({"text": "x" * 100}) + "\n")
    least = {}
    for length in (32, 1024):
        found = plan(model, data, max_length=length, memory="9G")
        least[length] = min(found.memory.total, *(other.size for other in found.others))
    monkeypatch.setattr(f"{choice}.peak_memory", lambda: 9000 * MEGABYTE)
    words = r"needs \d+ MB plus 0% in reserve; with --max-length 32 it needs \d+ MB"
    with pytest.raises(BudgetError, match=words) as caught:
        plan(model, data, memory=sum(least.values()) // 2)
    assert "peak" not in str(caught.value)
    with pytest.raises(BudgetError, match="the peak memory of this process is 9000 MB already"):
        plan(model, data, memory=least[1024])


def test_the_error_names_no_length_that_cuts_off_the_answers(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = tmp_path / "chats.jsonl"

    def refused(prompt: int) -> str:
        data.write_text(json.dumps({"prompt": "x" * prompt, "completion": "y" * 20}) + "\n")
        with pytest.raises(BudgetError) as caught:
            plan(model, data, memory="150M")
        return str(caught.value)

    def size(lm: Any, adapters: Any, work: Work, *rest: Any) -> Memory:
        return Memory(MEGABYTE * (140 if work.longest <= 32 else 160), 0, 0, 0, 0, 0, 0)

    monkeypatch.setattr(choice, "needed", size)
    assert "; with --max-length 32 it needs 140 MB; " in refused(25)
    assert "; a --max-length that fits would leave out examples, " in refused(35)
    with pytest.raises(DataError, match="no examples"):
        plan(model, data, max_length=32)


def test_the_error_names_a_length_that_is_no_power_of_two_if_only_such_a_length_keeps_all_examples(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At 10 MB a token, compare the message with the lengths that fit and keep all examples."""
    data = tmp_path / "chats.jsonl"
    monkeypatch.setattr(
        choice, "needed", lambda lm, a, work, *r: Memory(10 * MEGABYTE * work.longest, 0, 0, 0, 0, 0, 0)
    )
    for prompt in (1, 20, 35, 50):
        data.write_text(json.dumps({"prompt": "x" * prompt, "completion": "y" * (60 - prompt)}) + "\n")
        dataset = read_dataset(data, load_model(model))
        least, longest = dataset.least_length, int(dataset.lengths.max())
        for most in (least - 1, least, least + 1, longest - 2, 1, 0):
            with pytest.raises(BudgetError) as caught:
                plan(model, data, memory=int(10 * MEGABYTE * (most + 0.5) * 1.02))
            named = re.search(r"; with --max-length (\d+) it needs", str(caught.value))
            if named:
                assert least <= int(named[1]) <= most
            elif most:
                assert most < least
                assert "; a --max-length that fits would leave out examples, " in str(caught.value)
            else:
                assert "; a smaller --max-length does not help" in str(caught.value)


@pytest.mark.slow
def test_the_error_names_a_shorter_length_that_fits(smollm2: Path, tmp_path: Path) -> None:
    rows = bench_plan.Setting(1, 2048).write(tmp_path)

    def planned(max_length: int) -> subprocess.CompletedProcess[str]:
        arguments = [
            "plan",
            smollm2,
            "--data",
            rows,
            "--batch-examples",
            1,
            "--memory",
            "370M",
        ]
        command = [sys.executable, "-m", "nplora", *map(str, [*arguments, "--max-length", max_length])]
        return subprocess.run(command, capture_output=True, text=True, check=False)

    refused = planned(2048)
    assert refused.returncode == 2
    found = re.search(
        r"fits into 370 MB: .* needs \d+ MB plus 2% in reserve; with --max-length (\d+) it needs \d+ MB",
        refused.stderr,
    )
    assert found, refused.stderr
    assert planned(int(found[1])).returncode == 0


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("600M", 600e6),
        ("600 MB", 600e6),
        ("3T", 3e12),
        ("1TiB", 2**40),
        ("1.5G", 1.5e9),
        ("512MiB", 2**29),
        ("7k", 7e3),
        ("7KiB", 7168),
        ("600000000", 6e8),
        ("600000000B", 6e8),
        (2**20, 2**20),
    ],
)
def test_sizes_are_read(text: str | int, size: float) -> None:
    assert parse_bytes(text) == size


@pytest.mark.parametrize("text", ["", "M", "-3M", "0", "3P", "1e9", "12 apples"])
def test_other_sizes_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match="expected a size like 600M"):
        FinetuneOptions(memory=text)


@pytest.mark.parametrize("text", ["600", 600, "600B", "1.5", 2**20 - 1])
def test_few_bytes_are_taken_for_a_forgotten_unit(text: str | int) -> None:
    with pytest.raises(ValueError, match=r"memory is .*bytes: give a unit, as in 600M, 1\.5G or 512MiB"):
        FinetuneOptions(memory=text)


# ---- the model of memory ----


def memory_of(lm: Any, one: MicroBatch, planned: ExecutionPlan, **adapters: Any) -> Any:
    given = {"rank": 8, "targets": "all-linear", "layers": None, "use_dora": False, **adapters}
    return predicted(lm, Adapters.of(lm, **given), one, 0, planned, 1, (0, 0))


@pytest.mark.parametrize("compute", ["float32", "bfloat16"])
@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize(
    "adapters",
    [
        {},
        {"layers": "last:1"},
        {"targets": ["q_proj", "down_proj"]},
        {"use_dora": True},
        {"layers": "first:1", "use_dora": True},
        {"rank_pattern": {"q_proj": 32, "layers.0.mlp": 24}},
        {"freeze_B": True},
    ],
    ids=["all", "last", "some", "dora", "first", "ranks", "frozen B"],
)
def test_kept_activations_are_those_of_a_pass(
    model: Path, compute: str, recompute: bool, adapters: dict[str, Any]
) -> None:
    """Compared with the arrays that a forward pass keeps for the backward pass."""
    lm = load_model(model, compute)
    one = MicroBatch(256, 256, 128)
    wanted = memory_of(lm, one, ExecutionPlan(compute, recompute), **adapters).kept
    lm.add_lora(**{"rank": 8, **adapters})
    lm.model.recompute = recompute
    batch = pack([(np.arange(128), np.arange(128))] * 2)
    from nplora.models.positions import packed_positions

    _, saved = lm.model.run(batch.ids, packed_positions(batch.starts))
    gains = 2 * 4 * sum(len(layer.m) for layer in lm.adapter_layers().values() if layer.m is not None)
    assert nplora.saved_nbytes(saved.blocks) == pytest.approx(wanted + (0 if recompute else gains), rel=0.01)


def test_the_working_memory_is_that_of_the_largest_block_wherever_it_is(model: Path) -> None:
    lm, one = load_model(model), MicroBatch(256, 256, 128)
    for planned in (ExecutionPlan("float32", False), ExecutionPlan("float32", True)):
        first, last, every = (
            memory_of(lm, one, planned, layers=layers).work for layers in ("first:1", "last:1", None)
        )
        assert first == last == every


SHAPES = [
    (64, 1024, 3, 1024, 1024),
    (1024, 1024, 3, 1024, 1024),
    (2048, 512, 3, 1024, 1024),
    (64, 512, 1, 512, 16384),
]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("compute", "n", "rank", "layers", "d_out", "d_in"),
    [
        *(("float32", *shape) for shape in SHAPES),
        # The two share a prediction, so each measures a part of the shapes.
        *(("bfloat16", *shape) for shape in SHAPES[::2]),
        *(("int8", *shape) for shape in SHAPES[1:]),
    ],
)
@systems.needs_procfs("status")
def test_scratch_is_what_a_call_takes(
    compute: str, n: int, rank: int, layers: int, d_out: int, d_in: int
) -> None:
    """Compared with how much a new process grows in a forward and a backward pass, less their results."""
    code = (
        "import numpy as np, nplora\n"
        f"n, r, d_out, d_in, compute = {n}, {rank}, {d_out}, {d_in}, {compute!r}\n"
        "def memory(what):\n"
        "    status = open('/proc/self/status').read().split()\n"
        "    return 1024 * int(status[status.index(what) + 1])\n"
        "nplora.set_num_threads(1)\n"
        "rng = np.random.default_rng(0)\n"
        "W = rng.standard_normal((d_out, d_in), np.float32)\n"
        "weight = nplora.FrozenWeight(W, 'bfloat16' if compute == 'int8' else compute, compute=compute)\n"
        f"layers = [nplora.LoRALinear(weight, r, rng=0) for _ in range({layers})]\n"
        "for layer in layers: layer.A[...] = layer.B[...] = layer.dA[...] = layer.dB[...] = 0.01\n"
        "x, dy = (rng.standard_normal((n, d), np.float32) for d in (d_in, d_out))\n"
        "before = memory('VmRSS:')\n"
        "ys, saved = nplora.stack_forward(layers, x)\n"
        "nplora.stack_backward(layers, [dy] * len(layers), saved)\n"
        "print(memory('VmHWM:') - before - 4 * n * (len(layers) * (d_out + r) + d_in))\n"
    )
    taken = int(
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    )
    names = ("q_proj", "k_proj", "v_proj")[:layers]
    layers = [f"model.layers.0.self_attn.{name}" for name in names]
    adapters = Adapters(dict.fromkeys(layers, (d_out, d_in)), rank, calls=dict.fromkeys(layers, "the call"))
    scratch = adapters.scratch(compute != "float32", n, 1)
    assert taken - (4 << 20) < scratch < 2.5 * taken  # the rest of a thread's scratch is a few MB


def test_scratch_of_a_wide_layer_holds_z_of_more_tokens_with_more_threads() -> None:
    wide = Adapters({"model.layers.0.self_attn.q_proj": (16384, 16384)}, 8)
    sizes = [wide.scratch(False, 4096, threads) for threads in (1, 2, 8)]
    assert sizes[1] == sizes[0]
    assert sizes[2] - sizes[0] == 4 * 8 * (4 * 512 - 512)


def test_scratch_is_that_of_the_largest_call() -> None:
    q, k, out = ((f"model.layers.0.self_attn.{name}_proj", (64, 64)) for name in "qko")
    calls = dict.fromkeys((q[0], k[0]), "the call")
    cases = ([q], [q, k], [q, k, out], [out])
    sizes = [Adapters(dict(shapes), 8, calls=calls).scratch(False, 1, 1) for shapes in cases]
    assert sizes[0] < sizes[1] == sizes[2] > sizes[3]
    assert Adapters({"model.embed_tokens": (1000, 64)}, 8).scratch(False, 1, 1) == 0


def test_scratch_counts_each_layer_with_its_own_rank() -> None:
    q, k = (f"model.layers.0.self_attn.{name}_proj" for name in "qk")
    shapes, calls = dict.fromkeys((q, k), (64, 64)), dict.fromkeys((q, k), "the call")
    equal = [Adapters(shapes, rank, calls=calls).scratch(False, 9, 1) for rank in (8, 6)]
    mixed = Adapters(shapes, 8, calls=calls, ranks={k: 4}).scratch(False, 9, 1)
    assert equal[0] > mixed == equal[1]
    alone = Adapters({q: (64, 64)}, 8, ranks={q: 4}).scratch(False, 9, 1)
    assert alone == Adapters({q: (64, 64)}, 4).scratch(False, 9, 1)


def test_numbers_of_adapters_are_those_that_are_trained(model: Path) -> None:
    for options in (
        {},
        {"targets": ["lm_head", "embed_tokens", "q_proj"]},
        {"use_dora": True},
        {"rank_pattern": {"layers.1.mlp": 7, "k_proj": 1}},
        {"freeze_B": True, "use_dora": True, "targets": ["embed_tokens", "q_proj"]},
    ):
        lm = load_model(model)
        given = {"rank": 3, "targets": "all-linear", "layers": "last:1", "use_dora": False, **options}
        counted = Adapters.of(lm, **given).numbers
        lm.add_lora(**given)
        assert counted == lm.num_trainable


@pytest.mark.parametrize("freeze_B", [False, True])
def test_memory_of_the_factors_is_that_of_their_arrays(model: Path, freeze_B: bool) -> None:
    """Factors, gradients and moments; a frozen B has neither a gradient nor moments."""
    lm, step = load_model(model), MicroBatch(256, 256, 128)
    planned = memory_of(lm, step, ExecutionPlan("float32", False), freeze_B=freeze_B).factors
    lm.add_lora(freeze_B=freeze_B)
    optimizer = nplora.AdamW()
    lm.train_step(np.zeros((1, 4), int), np.zeros((1, 4), int), optimizer)
    arrays = [array for layer in lm.adapter_layers().values() for array in (layer.A, layer.B, layer.dA)]
    arrays += [layer.dB for layer in lm.adapter_layers().values() if layer.dB is not None]
    arrays += [array for array in optimizer.state_dict().values() if array.ndim == 2]
    assert sum(array.nbytes for array in arrays) == planned


def test_a_frozen_b_needs_less_memory(model: Path) -> None:
    lm, step = load_model(model), MicroBatch(256, 1, 128)
    plain, frozen = (
        memory_of(lm, step, ExecutionPlan("float32", False), freeze_B=freeze_B) for freeze_B in (False, True)
    )
    assert frozen.factors < 0.7 * plain.factors
    assert frozen.work < plain.work  # the inputs of the layers are not computed again
    assert frozen.scratch < plain.scratch


# ---- the process's memory ----


def test_memory_of_a_process_grows_by_what_it_fills() -> None:
    size = 50 * MEGABYTE
    before = current_memory()
    fresh = np.frombuffer(mmap.mmap(-1, size), np.uint8)  # np.ones might reuse memory
    fresh[...] = 1
    assert current_memory() - before == pytest.approx(size, rel=0.1)
    assert peak_memory() >= current_memory() - MEGABYTE


@systems.needs_procfs("smaps")
def test_what_is_mapped_and_not_read_is_counted(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(bytes(8 << 20))
    mapped = np.memmap(path, np.uint8, "r")
    assert unread(str(path)) == 8 << 20
    assert mapped.sum() == 0
    assert unread(str(path)) == 0


@pytest.mark.parametrize("name", ["model.gguf", "model-00001-of-00002.safetensors"])
def test_links_of_hugging_faces_cache_are_followed_to_what_is_mapped(tmp_path: Path, name: str) -> None:
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "0123"
    blobs.mkdir()
    snapshot.mkdir(parents=True)
    files = {name: "89ab", "config.json": "cdef"} if name.endswith(".safetensors") else {name: "89ab"}
    for file, digest in files.items():
        (blobs / digest).write_bytes(bytes(8 << 20))
        (snapshot / file).symlink_to(f"../../blobs/{digest}")
    mapped = np.memmap(snapshot / name, np.uint8, "r")
    assert unread(str(snapshot / list(files)[-1])) == 8 << 20
    assert mapped.sum() == 0
    assert unread(str(snapshot / list(files)[-1])) == 0


@systems.needs_procfs("smaps")
def test_mappings_of_files_with_odd_names_are_skipped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only \\n ends a line. Names may contain any bytes, also those at which `str.splitlines` cuts."""
    monkeypatch.setattr(system_memory, "_ROOT", tmp_path)
    sizes = b"Size: 8 kB\nRss: 3 kB\n"
    (tmp_path / "proc/self").mkdir(parents=True)
    for name in (b"other\x1cSize: many", b"other\xe2\x80\xa8Size: many", b"other\xff"):
        lines = [
            b"00-ff r--p 0 08:01 7 " + os.fsencode(path) + b"\n" + sizes for path in (tmp_path / "w", name)
        ]
        (tmp_path / "proc/self/smaps").write_bytes(b"".join(lines))
        assert unread(str(tmp_path / "w")) == 5 * 1024


GROUPS = {  # files below the root; the process has 300 kB of its own, the machine has 40,000 kB left
    "version 2": {
        "proc/self/cgroup": "0::/user/job\n",
        "sys/fs/cgroup/user/job/memory.max": "{limit}\n",
        "sys/fs/cgroup/user/job/memory.current": "5000000\n",
        "sys/fs/cgroup/user/job/memory.stat": "anon 2\nactive_file 1000000\ninactive_file 400000\n"
        "slab_reclaimable 100000\n",
    },
    "version 2, where reclaim begins below the limit": {
        "proc/self/cgroup": "0::/job\n",
        "sys/fs/cgroup/job/memory.max": "95000000\n",
        "sys/fs/cgroup/job/memory.high": "{limit}\n",
        "sys/fs/cgroup/job/memory.current": "3500000\n",
    },
    "version 2, of any name": {
        "proc/self/cgroup": "0::/a\x1cb:\u2028\r\udcff\n",
        "sys/fs/cgroup/a\x1cb:\u2028\r\udcff/memory.max": "{limit}\n",
        "sys/fs/cgroup/a\x1cb:\u2028\r\udcff/memory.current": "3500000\n",
    },
    "version 2, and files above where the groups are": {
        "proc/self/cgroup": "0::/job\n",
        "sys/fs/cgroup/memory.max": "{limit}\n",
        "sys/fs/cgroup/memory.current": "3500000\n",
        "sys/fs/memory.max": "1\n",
        "sys/fs/memory.current": "1\n",
    },
    "version 2, and lines that mean nothing": {
        "proc/self/cgroup": "\nno colons\n0:\n0::\n0::job\n0::/\0\n0::/job\n",
        "sys/fs/cgroup/memory.max": "1" * 5000 + "\n",
        "sys/fs/cgroup/memory.current": "\n",
        "sys/fs/cgroup/job/memory.max": "{limit}\n",
        "sys/fs/cgroup/job/memory.current": "3500000\n",
        "sys/fs/cgroup/job/memory.stat": "\nactive_file\ninactive_file many\nslab_reclaimable 1 2\n",
    },
    "version 2, a group above": {
        "proc/self/cgroup": "0::/user/job\n",
        "sys/fs/cgroup/user/job/memory.max": "max\n",
        "sys/fs/cgroup/user/job/memory.current": "1000000\n",
        "sys/fs/cgroup/user/memory.max": "{limit}\n",
        "sys/fs/cgroup/user/memory.current": "3500000\n",
    },
    "version 1": {
        "proc/self/cgroup": "7:cpu:/else\n4:memory:/job\n0::/\n",
        "sys/fs/cgroup/memory/job/memory.limit_in_bytes": "{limit}\n",
        "sys/fs/cgroup/memory/job/memory.usage_in_bytes": "5000000\n",
        "sys/fs/cgroup/memory/job/memory.stat": "active_file 7\ntotal_active_file 1000000\n"
        "total_inactive_file 500000\n",
        "sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712\n",
        "sys/fs/cgroup/memory/memory.usage_in_bytes": "6000000\n",
    },
    "version 1, mounted with another controller": {
        "proc/self/cgroup": "4:hugetlb,memory:/job\n",
        "sys/fs/cgroup/hugetlb,memory/job/memory.limit_in_bytes": "{limit}\n",
        "sys/fs/cgroup/hugetlb,memory/job/memory.usage_in_bytes": "3500000\n",
    },
    "version 1, a container whose group is hidden from inside": {
        "proc/self/cgroup": "4:memory:/docker/0123\n",
        "sys/fs/cgroup/memory/memory.limit_in_bytes": "{limit}\n",
        "sys/fs/cgroup/memory/memory.usage_in_bytes": "3500000\n",
    },
}


@systems.needs_procfs("cgroup")
@pytest.mark.parametrize("name", GROUPS)
def test_what_is_available_is_what_the_machine_and_every_group_leave(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(system_memory, "_ROOT", tmp_path)
    assert available_memory() is None
    machine = {
        "proc/meminfo": "MemTotal: 90000 kB\nMemAvailable: 40000 kB\n",
        "proc/self/status": "VmRSS:\t900 kB\nRssAnon:\t200 kB\nRssFile:\t600 kB\nRssShmem:\t100 kB\n",
    }
    for limit, left in ((10_000_000, 6_500_000), (90_000_000, 40_000 * 1024)):
        for file, text in (machine | GROUPS[name]).items():
            path = tmp_path / file
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(os.fsencode(text.replace("{limit}", str(limit))))
        assert available_memory() == left + 300 * 1024


# ---- runs follow their plan, and resume to the bit ----


@pytest.mark.slow
@pytest.mark.parametrize("compute", [None, "bfloat16"])
def test_a_run_with_a_plan_resumes_to_the_bit(
    model: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, compute: str | None
) -> None:
    """The micro-batches and the arithmetic of the first plan stay, even if another plan would fit later."""
    options = {"rank": 2, "lr": 1e-2, "batch_examples": 8, "save_every": 2, "memory": "100G"}
    plans = [ExecutionPlan(compute or "float32", True, 24), ExecutionPlan("bfloat16", False, None)]

    def scripted(planned: ExecutionPlan) -> None:
        real = execution.choose

        def choose(lm: Any, adapters: Any, work: Any, constraints: Any, *rest: Any) -> Any:
            found = real(lm, adapters, work, constraints, *rest)
            if constraints.resuming:
                return found
            return type(found)(planned, found.memory, found.seconds, found.steps)

        monkeypatch.setattr(execution, "choose", choose)

    scripted(plans[0])
    finetune(model, data, tmp_path / "whole", steps=6, schedule="constant", **options)
    finetune(model, data, tmp_path / "parts", steps=3, schedule="constant", **options)
    log = [json.loads(line) for line in (tmp_path / "parts" / "log.jsonl").read_text().splitlines()]
    assert log[1]["settings"]["fixed"]["micro_tokens"] == 24
    with pytest.warns(UserWarning, match="total_steps"):
        finetune(model, data, tmp_path / "parts", steps=6, schedule="constant", resume=True, **options)
    whole, parts = (
        (tmp_path / name / "adapter_model.safetensors").read_bytes() for name in ("whole", "parts")
    )
    assert whole == parts
    without = {name: value for name, value in options.items() if name != "memory"}
    finetune(model, data, tmp_path / "other", steps=3, schedule="constant", **options)
    with pytest.warns(UserWarning, match="total_steps"):
        finetune(model, data, tmp_path / "other", steps=6, schedule="constant", resume=True, **without)
    assert (tmp_path / "other" / "adapter_model.safetensors").read_bytes() == whole


@pytest.mark.slow
@systems.needs_procfs("statm")
def test_the_pairs_of_attention_are_what_a_pass_keeps(model: Path) -> None:
    """Compared with how much a new process grows in a forward and a backward pass in bfloat16."""
    n, width, heads = 8192, 512, 8
    code = (
        "import numpy as np\n"
        "from nplora import _core\n"
        f"n, width, heads = {n}, {width}, {heads}\n"
        "def memory():\n"
        "    return 4096 * int(open('/proc/self/statm').read().split()[1])\n"
        "_core.set_num_threads(1)\n"
        "starts = np.arange(0, n + 1, 16)\n"
        "q, k, v, dout, out, dq, dk, dv = (np.ones((n, width), np.float32) for _ in range(8))\n"
        "lse = np.ones((n, heads), np.float32)\n"
        "before = memory()\n"
        "shape = heads, heads, 0.1, 0\n"
        "_core.attention(q, k, v, starts, *shape, out, lse, True, False, None)\n"
        "_core.attention_backward(\n"
        "    dout, q, k, v, out, lse, starts, *shape, dq, dk, dv, True, False, None)\n"
        "print(memory() - before)\n"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    lm = load_model(model)
    own = lm.model.layers[0].footprint(NOT_ADAPTED, narrow=True).scratch
    planned = n * own * width // lm.config.key_value_width
    sizes = [
        memory_of(lm, MicroBatch(tokens, 1, 16), ExecutionPlan("bfloat16", True)).scratch
        for tokens in (4096, 8192)
    ]
    assert sizes[1] - sizes[0] >= 4096 * own
    assert planned <= int(run.stdout) < planned + (4 << 20)  # the rest of a thread's scratch is a few MB


def test_a_filter_of_the_vocabulary_is_planned(model: Path) -> None:
    lm = load_model(model)
    adapters = Adapters.of(lm, rank=2, targets="all-linear", layers=None)
    work = Work([(np.array([64]), np.array([64]))], steps=10)
    kept = ExecutionPlan("float32", recompute=False)
    plain, filtered = (
        needed(lm, adapters, dataclasses.replace(work, filters=filters), kept, (0, 0)).total
        for filters in (False, True)
    )
    vocab, width = lm.config.vocab_size, lm.config.hidden_size
    lists, copied = 4 * 64 * vocab * 11 // 32, 4 * 32 * (vocab + width)
    assert lists <= filtered - plain <= lists + copied
