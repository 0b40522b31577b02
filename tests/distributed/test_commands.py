"""`nplora finetune --distributed mpi`, as a user runs it."""

import dataclasses
import json
import os
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import nplora
from commands import command
from distributed.cases import PAIRS, ROWS
from distributed.launching import needs_mpi, run
from distributed.threads import ThreadRank, on_threads
from nplora import cli
from nplora.distributed import Alone, RankError, mpi, opening
from nplora.finetuning import FinetuneOptions, finetune
from nplora.finetuning.execution import choose_execution, fitting_all
from nplora.finetuning.load import read_inputs
from nplora.finetuning.objectives import TokenLoss
from nplora.finetuning.planning import Alternative, BudgetError, ExecutionPlan, Memory, MemoryPlan, choice
from nplora.lm import load_model
from nplora.models.packing import pack
from small_llama import save_small_llama

pytest.importorskip("tokenizers")


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("inputs")
    save_small_llama(directory / "model.gguf")
    save_small_llama(directory / "other.gguf", storage="bfloat16")
    (directory / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    (directory / "other.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS[1:]))
    return directory


def words(
    inputs: Path, output: Path, *more: Any, data: str = "train.jsonl", model: str = "model.gguf"
) -> list[Any]:
    files = [inputs / model, "--data", inputs / data, "--output", output]
    options = ["--rank", 2, "--batch-examples", 4, "--accumulate", 2, "--distributed", "mpi"]
    return ["-m", "nplora", "finetune", *files, *options, *more]


def errors_of(text: str) -> list[str]:
    return [line for line in text.splitlines() if "error: " in line]


@needs_mpi
@pytest.mark.slow
def test_one_rank_prints_and_writes_and_all_are_reported(inputs: Path, tmp_path: Path) -> None:
    status, out, errors = run((2, words(inputs, tmp_path / "out", "--sample", "1 and")))
    assert status == 0, errors
    assert out.count("holds the adapter") == 1
    assert out.count("  '1 and'") == 1
    assert [f"rank {rank} on " in out for rank in range(3)] == [True, True, False]
    assert errors.count("train.jsonl (completion): 24 examples") == 1
    log = [json.loads(line) for line in (tmp_path / "out" / "log.jsonl").read_text().splitlines()]
    logged = next(row["ranks"] for row in log if row["event"] == "ranks")
    counts = sum(row["count"] for row in log if row["event"] == "step")
    assert sum(row["items"] for row in logged) == counts
    assert all(row["items"] > 0 and row["computed"] > 0 for row in logged)


@needs_mpi
@pytest.mark.slow
@pytest.mark.parametrize(
    ("of_rank_1", "message"),
    [
        ({"data": "other.jsonl"}, "the ranks do not agree: rank 1 differs in data"),
        ({"data": "missing.jsonl"}, "error: rank 1: no such file: "),
        ({"model": "other.gguf"}, "the ranks do not agree: rank 1 differs in base model"),
        ({"model": "missing.gguf"}, "error: rank 1: no such file: "),
        ({"more": ["--lr", 0.5]}, "the ranks do not agree: rank 1 differs in lr: 0.5, but not set on rank 0"),
    ],
)
def test_a_rank_with_other_inputs_is_one_error_that_names_it(
    of_rank_1: dict[str, Any], message: str, inputs: Path, tmp_path: Path
) -> None:
    output, more = tmp_path / "out", of_rank_1.get("more", [])
    files = {name: file for name, file in of_rank_1.items() if name != "more"}
    status, _, errors = run((1, words(inputs, output)), (1, words(inputs, output, *more, **files)))
    assert status != 0
    assert len(errors_of(errors)) == 1, errors
    assert message in errors_of(errors)[0]


@needs_mpi
@pytest.mark.slow
@pytest.mark.parametrize(
    ("of_rank_0", "of_rank_1", "message"),
    [
        (["--valid", "train.jsonl"], ["--valid", "short.jsonl"], "rank 1 differs in validation data"),
        ([], ["--valid", "short.jsonl"], "rank 1 differs in validation data"),
        (["--memory", "2G"], [], "rank 1 differs in use of memory: not limited, but planned on rank 0"),
    ],
)
def test_a_rank_with_another_validation_or_no_limit_of_memory_is_named(
    of_rank_0: list[str], of_rank_1: list[str], message: str, inputs: Path, tmp_path: Path
) -> None:
    (inputs / "short.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS[:3]))
    programs = [
        [str(inputs / word) if word.endswith(".jsonl") else word for word in more]
        for more in (of_rank_0, of_rank_1)
    ]
    output = tmp_path / "out"
    status, _, errors = run(*((1, words(inputs, output, *more)) for more in programs))
    assert status != 0
    assert len(errors_of(errors)) == 1, errors
    assert f"the ranks do not agree: {message}" in errors
    assert not output.exists()


@needs_mpi
@pytest.mark.slow
@pytest.mark.parametrize(
    ("more", "timeout", "message"),
    [
        (["--rank", 0], "60", "rank 1: finetune: rank is 0"),
        (["--unknown", 1], "60", "rank 1: unrecognized arguments: --unknown 1"),
        (["--lr", "fast"], "60", "rank 1: argument --lr: "),
        ([], "soon", "rank 1: MPICommunicator: NPLORA_RANK_TIMEOUT is 'soon'"),
    ],
)
def test_a_rank_that_fails_before_it_meets_the_others_ends_them(
    more: list[Any], timeout: str, message: str, inputs: Path, tmp_path: Path
) -> None:
    first, second = words(inputs, tmp_path / "out"), words(inputs, tmp_path / "out", *more)
    other = (
        f"import os, runpy, sys; os.environ['NPLORA_RANK_TIMEOUT'] = '{timeout}'; sys.argv = sys.argv[2:]; "
    )
    program = ["-c", f"{other}runpy.run_module('nplora', run_name='__main__', alter_sys=True)", *second]
    status, _, errors = run((1, first), (1, program))
    assert status != 0
    assert message in errors
    assert not (tmp_path / "out").exists()


@needs_mpi
@pytest.mark.slow
def test_only_rank_0_needs_an_output_directory(inputs: Path, tmp_path: Path) -> None:
    steps = "--steps", 2
    missing = words(inputs, Path("/proc/no/such/directory"), *steps)  # nobody can make one there
    status, _, errors = run((1, words(inputs, tmp_path / "out", *steps)), (1, missing))
    assert status == 0, errors
    assert (tmp_path / "out" / "adapter_model.safetensors").exists()
    status, _, errors = run((1, missing), (1, words(inputs, tmp_path / "other", *steps)))
    assert status != 0
    assert len(errors_of(errors)) == 1, errors
    assert "/proc/no" in errors
    assert "; the error occurred on rank 0" in errors


@needs_mpi
@pytest.mark.slow
def test_different_errors_of_two_ranks_are_both_printed(inputs: Path, tmp_path: Path) -> None:
    first = words(inputs, tmp_path / "out", "--valid", inputs / "no-valid.jsonl")
    status, _, errors = run((1, first), (1, words(inputs, tmp_path / "out", data="no-train.jsonl")))
    assert status != 0
    assert sorted(name in errors for name in ("no-train.jsonl", "no-valid.jsonl")) == [True, True]
    assert errors.count("error: ") == 2, errors  # the launcher may print both in one line


@needs_mpi
@pytest.mark.slow
def test_more_ranks_than_batches_in_a_step_are_refused_once(inputs: Path, tmp_path: Path) -> None:
    status, _, errors = run((3, words(inputs, tmp_path / "out")))
    assert status != 0
    assert len(errors_of(errors)) == 1
    assert (
        "3 ranks need at least 3 batches in a step, but there are 2: use fewer ranks, or --accumulate 3"
        in errors_of(errors)[0]
    )
    assert not (tmp_path / "out").exists()


@needs_mpi
@pytest.mark.slow
def test_ranks_without_the_option_are_refused_even_if_another_rank_has_it(
    inputs: Path, tmp_path: Path
) -> None:
    without = words(inputs, tmp_path / "out")
    without = without[: without.index("--distributed")]
    found = "--distributed mpi makes them train together; --distributed off makes separate runs"
    for programs in ([(2, without)], [(1, words(inputs, tmp_path / "out")), (1, without)]):
        status, _, errors = run(*programs)
        assert status != 0
        found_once = f"mpirun started 2 ranks, and each of them would train alone: {found}"
        assert errors.count(found_once) == 1, errors


@needs_mpi
@pytest.mark.slow
def test_ranks_make_local_steps(inputs: Path, tmp_path: Path) -> None:
    text = "--epochs 2 --local-steps 2 --outer-lr 0.5 --outer-momentum 0.5 --memory 2G"
    options = text.split()
    status, out, errors = run((2, words(inputs, tmp_path / "out", *options)))
    assert status == 0, errors
    assert out.count("holds the adapter") == 1
    log = [json.loads(line) for line in (tmp_path / "out" / "log.jsonl").read_text().splitlines()]
    assert [row["step"] for row in log if row["event"] == "step"] == [1, 2, 3, 4, 5, 6]
    settings = next(row["settings"] for row in log if row["event"] == "start")
    assert settings["fixed"]["local_steps"] == 2
    assert (settings["free"]["outer_lr"], settings["free"]["ranks"]) == (0.5, 2)


@needs_mpi
@pytest.mark.slow
def test_ranks_agree_on_one_plan(inputs: Path, tmp_path: Path) -> None:
    status, _, errors = run(
        (1, words(inputs, tmp_path / "out", "--memory", "2G")),
        (1, words(inputs, tmp_path / "out", "--memory", "3G")),
    )
    assert status == 0, errors
    assert errors.count("this process, with model") == 1  # a line of every plan's report
    assert "float32, activations kept" in errors


# ---- without ranks ----


def test_the_failure_of_another_rank_is_not_a_wrong_argument(
    monkeypatch: pytest.MonkeyPatch, inputs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*arguments: Any, **options: Any) -> None:
        raise RankError(1, "out of memory")

    monkeypatch.setattr("nplora.finetuning.finetune", fail)
    files = [inputs / "model.gguf", "--data", inputs / "train.jsonl", "--output", tmp_path / "out"]
    assert cli.main(["finetune", *map(str, files)]) == 1
    assert capsys.readouterr().err == "nplora: error: rank 1: out of memory\n"


def test_a_process_that_no_launcher_started_says_that_it_is_alone(
    monkeypatch: pytest.MonkeyPatch, inputs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(opening, "MPICommunicator", Alone)  # MPI without a launcher has one rank too
    assert cli.main([*map(str, words(inputs, tmp_path / "out", "--steps", 1)[2:])]) == 0
    out, errors = capsys.readouterr()
    notice = "--distributed mpi: this process trains alone; start it with `mpiexec -n N` to use N processes\n"
    assert errors.count(notice) == 1
    assert "rank 0 on " not in out


def test_a_run_that_cannot_be_resumed_is_said_once(
    inputs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    finetune(inputs / "model.gguf", ROWS, tmp_path / "out", steps=1, rank=2, resume=True, progress=True)
    assert capsys.readouterr().err.count("there is no run to resume") == 1


def test_dropout_on_the_head_is_refused_on_several_ranks(inputs: Path) -> None:
    def work(ranks: ThreadRank) -> None:
        options = FinetuneOptions(rank=2, targets="lm_head", dropout=0.1, accumulate=2, distributed="mpi")
        given = read_inputs("finetune", inputs / "model.gguf", ROWS, None, options)
        choose_execution(inputs / "model.gguf", given, options, None, lambda text: None, ranks)

    on_threads(1, work)
    with pytest.raises(ValueError, match="several ranks cannot train an adapter on lm_head with dropout"):
        on_threads(2, work)


def test_ranks_with_other_limits_use_the_plan_of_the_smallest_memory(
    inputs: Path, repeatable_plans: None
) -> None:
    def used(ranks: ThreadRank | Alone, *memory: int) -> ExecutionPlan:
        options = FinetuneOptions(rank=2, batch_examples=24, accumulate=2, memory=memory[ranks.rank])
        given = read_inputs("finetune", inputs / "model.gguf", ROWS, None, options)
        return choose_execution(inputs / "model.gguf", given, options, None, lambda text: None, ranks)

    plan = nplora.plan(inputs / "model.gguf", ROWS, rank=2, batch_examples=24, accumulate=2, memory="2G")
    sizes = sorted(other.size for other in plan.others if other.size < plan.memory.total)
    small = int(1.02 * sizes[0]) + 100_000
    alone = [used(Alone(), memory) for memory in (2 * 10**9, small)]
    assert alone[0] != alone[1]
    assert on_threads(2, lambda ranks: used(ranks, 2 * 10**9, small)) == [alone[1]] * 2


def test_a_rank_with_more_threads_gets_no_plan_that_is_too_large_for_it(
    inputs: Path, repeatable_plans: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    threads = threading.local()
    monkeypatch.setattr(choice, "get_num_threads", lambda: threads.count)

    def planned(count: int, memory: int, ranks: ThreadRank | Alone) -> ExecutionPlan:
        threads.count = count
        options = FinetuneOptions(rank=2, batch_examples=24, accumulate=2, memory=memory)
        given = read_inputs("finetune", inputs / "model.gguf", ROWS, None, options)
        return choose_execution(inputs / "model.gguf", given, options, None, lambda text: None, ranks)

    threads.count = 64
    plan = nplora.plan(inputs / "model.gguf", ROWS, rank=2, batch_examples=24, accumulate=2, memory="9G")
    limit = int(1.02 * min(other.size for other in plan.others)) + 100_000  # for 64 threads
    alone = [planned(count, limit, Alone()) for count in (1, 64)]
    assert alone[0] != alone[1]
    for counts in ((1, 64), (64, 1)):
        found = on_threads(2, lambda ranks, counts=counts: planned(counts[ranks.rank], limit, ranks))
        assert found == [alone[1]] * 2


KEPT, RECOMPUTED, CUT = (ExecutionPlan("float32", *rest) for rest in ((False,), (True,), (False, 64)))
BFLOAT16 = ExecutionPlan("bfloat16", False)


def compared(*found: tuple[ExecutionPlan, int, float], limit: float = 150e6) -> MemoryPlan:
    """What a rank found for each plan: the bytes and the seconds. The first plan is its own choice."""
    (chosen, size, seconds), *others = found
    memory = Memory(size, *[0] * (len(dataclasses.fields(Memory)) - 1))
    return MemoryPlan(chosen, memory, seconds, 1, tuple(Alternative(*one) for one in others), limit)


def test_ranks_use_a_plan_that_fits_on_all_even_if_it_is_the_choice_of_none() -> None:
    first = compared((KEPT, 100_000_000, 1.0), (RECOMPUTED, 200_000_000, 2.0), (CUT, 120_000_000, 3.0))
    second = compared((RECOMPUTED, 100_000_000, 1.0), (CUT, 120_000_000, 3.0), (KEPT, 200_000_000, 2.0))
    for plans in ([first, second], [second, first]):
        assert fitting_all(plans) == CUT


def test_of_the_plans_that_fit_on_all_ranks_the_ranks_prefer_float32_and_then_the_fastest() -> None:
    sizes = {KEPT: 200_000_000, BFLOAT16: 1_000_000, CUT: 2_000_000, RECOMPUTED: 3_000_000}
    seconds = (
        {KEPT: 1.0, BFLOAT16: 0.5, CUT: 2.0, RECOMPUTED: 3.0},
        {KEPT: 1.0, BFLOAT16: 0.5, CUT: 4.0, RECOMPUTED: 3.0},  # a step takes as long as on this rank
    )
    plans = [
        compared(*((plan, sizes[plan], one[plan]) for plan in one), limit=limit)
        for one, limit in zip(seconds, (250e6, 150e6), strict=True)
    ]
    assert fitting_all(plans) == fitting_all(plans[::-1]) == RECOMPUTED
    assert fitting_all(plans[:1]) == KEPT


def test_plans_of_which_none_fits_on_every_rank_are_refused() -> None:
    first = compared((KEPT, 100_000_000, 1.0), (RECOMPUTED, 170_000_000, 2.0))
    second = compared((RECOMPUTED, 100_000_000, 1.0), (KEPT, 190_000_000, 2.0))
    message = (
        r"no plan fits on every rank: the plan that comes closest \(float32, activations recomputed\) needs "
        "170 MB on rank 0, whose limit is 150 MB: give rank 0 a larger --memory"
    )
    with pytest.raises(BudgetError, match=message):
        fitting_all([first, second])


def test_ranks_that_compared_different_plans_are_called_different() -> None:
    first, second = compared((KEPT, 1_000_000, 1.0)), compared((CUT, 1_000_000, 1.0))
    with pytest.raises(ValueError, match="the ranks differ: rank 1 and rank 0 have compared different"):
        fitting_all([first, second])


def test_the_progress_counts_the_tokens_of_all_ranks(inputs: Path) -> None:
    def work(ranks: ThreadRank | Alone) -> int:
        lm = load_model(inputs / "model.gguf")
        lm.add_lora(rank=2, seed=0)
        loss = TokenLoss()
        batches = [(pack([(np.arange(n), np.arange(n))]), None) for n in (5, 6, 7, 8, 9)]
        trainer = nplora.Trainer(lm, loss, accumulate=2, progress=False, communicator=ranks)
        trainer.fit(batches)
        return loss.tokens

    assert on_threads(2, work) == [work(Alone())] * 2 == [35, 35]


def test_the_variables_of_a_launcher_without_the_option_are_refused(
    monkeypatch: pytest.MonkeyPatch, inputs: Path, tmp_path: Path
) -> None:
    monkeypatch.setenv("OMPI_COMM_WORLD_SIZE", "4")
    with pytest.raises(ValueError, match="finetune: mpirun started 4 ranks"):
        finetune(inputs / "model.gguf", ROWS, tmp_path / "out")
    finetune(inputs / "model.gguf", ROWS, tmp_path / "out", steps=1, rank=2, distributed="off")


@pytest.mark.parametrize(
    "arguments",
    [
        ["tune", "m", "--data", "d", "--output", "o"],
        ["classify", "predict", "m", "--data", "d", "--output", "o.csv"],
        ["classify", "predict", "m", "--data", "d"],
        ["embed", "m", "texts.txt", "--output", "o.npy"],
        ["teach", "m", "--data", "d", "--output", "o"],
        ["merge", "m", "a", "--output", "o"],
        ["convert", "m", "o"],
        ["plot", "run"],
        ["export", "m", "--ollama", "d"],
        ["classify", "eval", "m", "--data", "d", "--plot", "p.png"],
        ["eval", "m", "--data", "d", "--answers", "a.jsonl"],
    ],
)
def test_commands_that_cannot_be_divided_are_refused_under_a_launcher(
    arguments: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PMI_SIZE", "4")
    assert cli.main(arguments) == 2
    assert capsys.readouterr().err == (
        f"nplora: error: {arguments[0]}: mpirun started 4 ranks, and each of them would do the same work and "
        "write the same output: start it without mpirun; for separate runs, let mpirun start "
        f"`env -u PMI_SIZE nplora {arguments[0]}`, each rank with its own output\n"
    )


def test_commands_that_write_nothing_are_not_refused_under_a_launcher(
    inputs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PMI_SIZE", "4")
    assert cli.main(["info", str(inputs / "model.gguf")]) == 0


def test_mpi_without_mpi4py_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, inputs: Path, tmp_path: Path
) -> None:
    monkeypatch.setitem(sys.modules, "mpi4py", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'nplora\[mpi\]'"):
        finetune(inputs / "model.gguf", ROWS, tmp_path / "out", distributed="mpi")


@needs_mpi
@pytest.mark.slow
def test_mpi_without_a_library_says_what_to_install(inputs: Path, tmp_path: Path) -> None:
    missing = {**os.environ, "MPI4PY_LIBMPI": "/no/such/libmpi.so"}  # mpi4py loads this library
    done = command(*words(inputs, tmp_path / "out")[2:], env=missing)
    assert done.returncode != 0
    found = "cannot load an MPI library: pip install mpich, or install the system's MPICH or Open MPI ("
    assert len(errors_of(done.stderr)) == 1, done.stderr
    assert found in done.stderr
    assert not (tmp_path / "out").exists()


def test_a_cache_of_the_prefix_is_refused_with_the_reason() -> None:
    with pytest.raises(ValueError, match="an example may be on another rank in the next epoch"):
        FinetuneOptions(distributed="mpi", keep_prefix="memory", layers="last:1")


@pytest.mark.parametrize("value", ["soon", "0", "-1", "nan"])
def test_a_timeout_must_be_a_number_above_zero(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NPLORA_RANK_TIMEOUT", value)
    with pytest.raises(ValueError, match=f"NPLORA_RANK_TIMEOUT is '{value}', expected a number of seconds"):
        mpi._checked_timeout(None)


def test_plan_accepts_the_option(inputs: Path) -> None:
    assert nplora.plan(inputs / "model.gguf", PAIRS, objective="dpo", distributed="mpi").steps
