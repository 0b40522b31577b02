"""The predicted time of a step on several machines."""

import argparse
import json
import subprocess
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from bench import bench_distributed
from bench import nodes as simulation

import nplora
from distributed.threads import ThreadRank, on_threads
from nplora import cli
from nplora.distributed import Network
from nplora.finetuning import FinetuneOptions, TokenLoss, plan
from nplora.finetuning.execution import adapters_of, choose_execution, predicted
from nplora.finetuning.load import read_inputs, training_batches
from nplora.finetuning.planning import BatchTime, ExecutionPlan, NodesPlan
from nplora.lm import load_model
from nplora.models.packing import pack
from small_llama import save_small_llama

pytest.importorskip("tokenizers")

MESSAGE = 20e-6  # seconds for each message that a rank sends and receives
GIGABIT = Network(1e9, 50e-6)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    directory = tmp_path_factory.mktemp("nodes")
    rows = [{"prompt": f"{n}+{n}=", "completion": str(2 * n) * (1 + n % 3)} for n in range(24)]
    (directory / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return save_small_llama(directory / "model.gguf"), directory / "train.jsonl"


# ---- networks ----


@pytest.mark.parametrize(
    ("rate", "latency", "expected", "text"),
    [
        ("1Gb", "50us", (1e9, 50e-6), "1 Gb/s, 50 µs"),
        ("2.5 Gb/s", "0.1 ms", (2.5e9, 1e-4), "2.5 Gb/s, 100 µs"),
        ("100Mbit", "3ms", (1e8, 3e-3), "100 Mb/s, 3 ms"),
        ("125MBps", "0s", (1e9, 0.0), "1 Gb/s, 0 µs"),
        ("1Tb", "1µs", (1e12, 1e-6), "1 Tb/s, 1 µs"),
    ],
)
def test_rates_and_latencies_are_read(
    rate: str, latency: str, expected: tuple[float, float], text: str
) -> None:
    network = Network.parse(rate, latency)
    assert (network.rate, network.latency) == pytest.approx(expected)
    assert str(network) == text


@pytest.mark.parametrize("rate", ["", "1G", "fast", "-1Gb", "0Gb", "1e9b", "nanGb", "1Gb 2Gb"])
def test_other_rates_are_refused(rate: str) -> None:
    with pytest.raises(
        ValueError, match=r"^Network\.parse: network is .*, expected bits per second like 1Gb"
    ):
        Network.parse(rate)


@pytest.mark.parametrize("latency", ["", "50", "-1us", "1 hour"])
def test_other_latencies_are_refused(latency: str) -> None:
    with pytest.raises(ValueError, match=r"^Network\.parse: latency is .*, expected a time like 50us"):
        Network.parse("1Gb", latency)


def test_a_slice_goes_to_every_other_node() -> None:
    """Of 8 MB, each of 4 nodes sends 3 slices of 2 MB: 48 Mbit, of which 1448 of 1538 bytes are payload."""
    expected = 0.048 * 1538 / 1448 + 50e-6 + 3 * MESSAGE
    assert GIGABIT.exchange(8_000_000, 4) == pytest.approx(expected, rel=1e-12)
    assert GIGABIT.exchange(8_000_000, 1) == 0


# ---- steps ----


def test_a_step_of_equal_batches_takes_its_share_and_the_sums() -> None:
    """8 batches of 2 s on 4 nodes are 2 rounds: 4 s. The second round hides the exchange of the first one's
    terms. The other two exchanges (terms and sums) and three small ones take additional time."""
    found = NodesPlan.of([[BatchTime(2.0)] * 8], 8_000_000, 4, GIGABIT)
    large = 0.048 * 1538 / 1448 + 50e-6 + 3 * MESSAGE
    small = 50e-6 + 3 * MESSAGE
    assert found.waiting == pytest.approx(0, abs=1e-12)
    assert found.sums == pytest.approx(2 * large + 3 * small, rel=1e-12)
    assert found.seconds == pytest.approx(4 + 2 * large + 3 * small, rel=1e-12)
    assert found.efficiency == pytest.approx(16 / (4 * found.seconds), rel=1e-12)
    assert "no multiple" not in str(found)


def test_nodes_wait_for_the_longest_batch_and_in_a_round_that_is_not_full() -> None:
    """On 2 nodes, the rounds take 3, 4 and 2 s. The passes take 12 s on one machine, 6 s on each of two."""
    step = [BatchTime(seconds) for seconds in (1.0, 3.0, 4.0, 2.0, 2.0)]
    found = NodesPlan.of([step], 0, 2, Network(1e15, 0.0))
    assert (found.alone, found.waiting) == pytest.approx((12.0, 3.0))
    assert found.efficiency == pytest.approx(12 / 18, rel=1e-3)
    assert str(found).splitlines()[-1] == (
        "2 nodes cannot share the 5 batches of a step equally: --accumulate 6 keeps all nodes busy"
    )


def test_nodes_without_a_batch_because_the_epoch_is_short_are_told() -> None:
    found = NodesPlan.of([[BatchTime(1.0)] * 2], 0, 4, GIGABIT, accumulate=8)
    assert (
        str(found)
        .splitlines()[-1]
        .startswith("a step has 8 batches, but an epoch has only 2, so some nodes have nothing to do: ")
    )


def test_each_micro_batch_of_the_longest_batch_is_a_term_of_the_sum() -> None:
    """Rounds of 1 and 3 terms, then of 2: 5 terms, and the sums. Passes that take no time hide nothing."""
    step = [BatchTime(0.0, 1), BatchTime(0.0, 3), BatchTime(0.0, 2)]
    found = NodesPlan.of([step], 1_000_000, 2, Network(1e9, 0.0))
    large, small = 0.004 * 1538 / 1448 + MESSAGE, MESSAGE
    assert found.sums == pytest.approx(6 * large + 3 * small, rel=1e-12)


def test_the_average_of_several_steps_is_predicted() -> None:
    steps = [[BatchTime(1.0), BatchTime(1.0)], [BatchTime(5.0)]]
    found = NodesPlan.of(steps, 0, 2, Network(1e15, 0.0))
    assert (found.alone, found.alone / 2 + found.waiting) == pytest.approx((3.5, 3.0))


def test_one_node_adds_nothing() -> None:
    found = NodesPlan.of([[BatchTime(1.5)] * 3], 10**9, 1, GIGABIT)
    assert (found.seconds, found.efficiency) == pytest.approx((4.5, 1.0))


# ---- plans ----


def test_a_plan_of_one_machine_predicts_several(files: tuple[Path, Path]) -> None:
    found = plan(*files, rank=2, targets="q_proj", batch_examples=3, accumulate=4)
    lm = load_model(files[0])
    lm.add_lora(rank=2, targets="q_proj")
    nodes = found.on_nodes(2, "1Gb", "1ms")
    assert nodes.size == 4 * lm.num_trainable
    assert found.on_nodes(2, "1Gb", communication_dtype="bfloat16").size == 2 * lm.num_trainable
    assert nodes.alone == pytest.approx(found.seconds)
    assert [len(step) for step in found.times] == [4, 4]
    assert nodes.batches == 4


@pytest.mark.parametrize(
    ("more", "sizes"), [({"epochs": 2}, [8, 1, 8, 1]), ({"steps": 3}, [8, 1, 8]), ({"steps": 1}, [8])]
)
def test_a_plan_knows_that_the_last_step_of_an_epoch_has_fewer_batches(
    files: tuple[Path, Path], tmp_path: Path, more: dict[str, int], sizes: list[int]
) -> None:
    """An epoch of 9 equal batches. 8 nodes compute each step in the time of one batch, if sums take none."""
    data = tmp_path / "train.jsonl"
    data.write_text((json.dumps({"prompt": "1+1=", "completion": "2"}) + "\n") * 9)
    found = plan(files[0], data, batch_examples=1, accumulate=8, **more)
    assert [len(step) for step in found.times] == sizes
    assert found.steps == len(sizes)
    batch = found.times[0][0].seconds
    assert found.seconds * found.steps == pytest.approx(sum(sizes) * batch)
    nodes = found.on_nodes(8, "1000000Gb", "0s")
    assert nodes.alone == pytest.approx(found.seconds)
    assert nodes.alone / 8 + nodes.waiting == pytest.approx(batch)
    assert nodes.alone / (8 * batch) == pytest.approx(sum(sizes) / (8 * len(sizes)))  # 56 % for two epochs


def test_a_plan_counts_the_micro_batches_of_each_batch(files: tuple[Path, Path]) -> None:
    options = FinetuneOptions(batch_examples=12)
    inputs = read_inputs("plan", *files, None, options, check=False)
    execution = ExecutionPlan("float32", False, micro_tokens=24)
    found = predicted("plan", inputs, adapters_of("plan", inputs, options), options, execution)
    lengths = inputs.train.lengths
    times = [time for step in found.times for time in step]
    for batch, time in zip(training_batches(inputs.train, options).members(0), times, strict=True):
        parts, size = 1, 0
        for length in lengths[batch]:
            parts, size = (parts + 1, length) if size and size + length > 24 else (parts, size + length)
        assert time.parts == parts > 1


@pytest.mark.slow
@pytest.mark.parametrize("more", [{}, {"local_steps": 2}])
def test_ranks_find_each_plan_that_fits_with_the_gradients_that_they_keep(
    files: tuple[Path, Path], repeatable_plans: None, more: dict[str, Any]
) -> None:
    given = {"rank": 32, "batch_examples": 12, "accumulate": 2, "compute": "float32", "distributed": "mpi"}
    given |= more

    def used(ranks: ThreadRank, memory: int) -> ExecutionPlan:
        options = FinetuneOptions(memory=memory, **given)
        inputs = read_inputs("plan", *files, None, options, check=False)
        return choose_execution(files[0], inputs, options, None, lambda text: None, ranks)

    found = plan(*files, memory="9G", **given)
    lm = load_model(files[0])
    lm.add_lora(rank=32)
    copies = 2 + 1 + 8 if more else 3 + 1  # no micro-batches
    assert found.memory.gradients == copies * 4 * lm.num_trainable
    assert found.memory.total == sum(vars(found.memory).values())
    for size in sorted({found.memory.total, *(other.size for other in found.others)})[:4]:
        memory = int(1.02 * size) + 100_000
        chosen = plan(*files, memory=memory, **given)
        assert chosen.memory.total <= memory
        assert on_threads(2, partial(used, memory=memory)) == [chosen.chosen] * 2


def test_ranks_exchange_as_often_as_predicted(files: tuple[Path, Path]) -> None:
    """Three steps of five batches on two ranks, minus two such steps. A latency of 1 s counts exchanges."""
    counts = [on_threads(2, partial(exchanges, files, steps=steps))[0] for steps in (2, 3)]
    step = [after - before for before, after in zip(*counts, strict=True)]
    lm, rounds, terms = load_model(files[0]), 3, 3 * 2  # every batch has two micro-batches
    lm.add_lora(rank=2)
    large, small, sent = terms + 1, rounds + 1, 7 * 4 * lm.num_trainable / 2
    assert step == [large, small, sent]
    network = Network(1e15, 1.0)
    size, given = 4 * lm.num_trainable, [(2, 0.0)] * rounds
    assert network.sums(size, 2, given) == pytest.approx(large + small, rel=1e-4)
    seconds = Network(1e6, 0.0).sums(size, 2, given) - (large + small) * MESSAGE
    assert seconds == pytest.approx(8 * sent / 1e6 * 1538 / 1448, rel=1e-9)


def test_gradients_travel_while_the_next_round_computes() -> None:
    """The exchange of the first round takes 20 s, of which the second round hides 5. The exchange of the
    second round takes 10 s, all of which the third round hides."""
    seconds = Network(1e15, latency := 10.0).sums(8, 2, [(2, 50.0), (1, 5.0), (1, 70.0)])
    wanted = (20 - 5) + 0 + 10 + 5 * latency  # the third round, the sums, and four gathers
    assert seconds == pytest.approx(wanted, rel=1e-4)


def test_ranks_with_local_steps_exchange_as_often_as_predicted(files: tuple[Path, Path]) -> None:
    """An outer step in two steps: four steps minus two."""
    counts = [on_threads(2, partial(exchanges, files, steps=steps, local_steps=2))[0] for steps in (2, 4)]
    large, small, sent = (after - before for before, after in zip(*counts, strict=True))
    lm, rounds = load_model(files[0]), 3
    lm.add_lora(rank=2)
    size = 4 * lm.num_trainable
    assert (large, small, sent) == (6, 2 * (rounds + 2) + 1, 6 * size / 2)
    assert 2 * Network(1e15, 1.0).local_sums(size, 2, 2, rounds) == pytest.approx(large + small, rel=1e-4)
    found = plan(*files, rank=2, batch_examples=2, accumulate=5, local_steps=2, distributed="mpi")
    nodes = found.on_nodes(2, "1Gb", local_steps=2)
    wanted = [GIGABIT.local_sums(size, 2, 2, -(-len(step) // 2)) for step in found.times]
    assert nodes.sums == pytest.approx(sum(wanted) / len(wanted))
    assert f"1/2 of an outer step, which adds up three arrays of {size / 1e6:.1f} MB" in str(nodes)


def exchanges(
    files: tuple[Path, Path], ranks: ThreadRank, steps: int, local_steps: int | None = None
) -> list[float]:
    """The communication of this rank in a run: calls of `exchange` and `join`, calls of `gather`, and
    bytes."""
    counted = Counted(ranks)
    lm = load_model(files[0])
    lm.add_lora(rank=2, seed=0)
    ids = np.random.default_rng(0).integers(100, size=12)
    batches = [(pack([(ids, ids), (ids, ids)]), None)] * (15 if local_steps is None else 30)
    trainer = nplora.Trainer(
        lm, TokenLoss(micro_tokens=12), accumulate=5, progress=False, communicator=counted,
        local_steps=local_steps,
    )  # fmt: skip
    trainer.fit(batches, steps=steps)
    return counted.found


class Counted:
    """A communicator that counts what another one does."""

    def __init__(self, ranks: ThreadRank) -> None:
        self._ranks, self.rank, self.size = ranks, ranks.rank, ranks.size
        self.waited = self.exchanged = 0.0
        self.found = [0.0, 0.0, 0.0]

    def __getattr__(self, name: str) -> Any:
        return getattr(self._ranks, name)

    def gather(self, value: Any, place: str = "") -> Any:
        self.found[1] += 1
        return self._ranks.gather(value, place)

    def start_exchange(self, parts: Any, out: Any, senders: Any) -> None:
        self.found[0] += 1
        self.found[2] += parts.nbytes - parts[self.rank].nbytes
        self._ranks.start_exchange(parts, out, senders)

    def join(self, part: Any, out: Any) -> None:
        self.found[0] += 1
        self.found[2] += part.nbytes * (self.size - 1)
        self._ranks.join(part, out)


def test_more_nodes_than_batches_are_refused(files: tuple[Path, Path]) -> None:
    found = plan(*files, accumulate=4)
    with pytest.raises(ValueError, match=r"^plan: nodes is 5, expected at most 4, .* accumulate=5 makes"):
        found.on_nodes(5, "1Gb")


@pytest.mark.parametrize(
    ("model", "trained"),
    list(zip(simulation.MODELS, (2_442_240, 11_272_192 // 2, 41_943_040 // 2), strict=True)),
)
def test_simulated_models_have_the_trained_values_that_peft_prints(
    model: simulation.Llama, trained: int
) -> None:
    """PEFT's figures for rank 16 are 11,272,192 and 41,943,040. Those for rank 8 are one half."""
    assert model.trained == trained


# ---- the command ----


def test_the_command_prints_the_plan_and_the_time_on_nodes(
    files: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    words = [str(files[0]), "--data", str(files[1]), "--accumulate", "8", "--batch-examples", "2"]
    assert cli.main(["plan", *words, "--nodes", "4", "--network", "10Gb", "--latency", "20us"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("float32, activations kept: ")
    assert lines[-4].startswith("4 nodes, 10 Gb/s, 20 µs: ")
    assert lines[-1].endswith("MB of gradients")


@pytest.mark.parametrize("words", [["--distributed", "mpi"], ["--nodes", "2", "--network", "1Gb"]])
def test_the_command_shows_the_gradients_that_a_rank_keeps(
    files: tuple[Path, Path], capsys: pytest.CaptureFixture[str], words: list[str]
) -> None:
    given = ["plan", str(files[0]), "--data", str(files[1]), "--accumulate", "2"]
    line = "gradients, until they are added up over all ranks"
    assert cli.main(given) == 0
    assert line not in capsys.readouterr().out
    assert cli.main([*given, *words]) == 0
    assert line in capsys.readouterr().out
    with pytest.raises(SystemExit):
        cli.main(["plan", "--help"])
    assert "--distributed" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--nodes", "4"], "plan: --nodes needs --network, as in --nodes 8 --network 1Gb"),
        (["--network", "1Gb"], "plan: --network needs --nodes, as in --nodes 8 --network 1Gb"),
        (["--latency", "1ms"], "plan: --latency needs --network, as in --nodes 8 --network 1Gb"),
        (
            ["--nodes", "2", "--network", "fast", "--accumulate", "2"],
            "plan: network is 'fast', expected bits",
        ),
        (
            ["--nodes", "2", "--network", "1Gb", "--latency", "bad", "--accumulate", "2"],
            "plan: latency is 'bad', expected a time",
        ),
        (["--nodes", "0", "--network", "1Gb"], "plan: nodes is 0, expected at least 1"),
        (["--nodes", "2", "--network", "1Gb"], "plan: nodes is 2, expected at most 1, the number of batches"),
    ],
)
def test_the_command_says_what_is_wrong(
    files: tuple[Path, Path], capsys: pytest.CaptureFixture[str], words: list[str], expected: str
) -> None:
    assert cli.main(["plan", str(files[0]), "--data", str(files[1]), *words]) == 2
    assert f"nplora: error: {expected}" in capsys.readouterr().err


def test_the_command_checks_the_network_before_it_reads_the_model(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["plan", "missing.gguf", "--data", "missing.jsonl", "--nodes", "2", "--network", "fast"]
    assert cli.main(words) == 2
    assert "network is 'fast'" in capsys.readouterr().err


# ---- the benchmark ----


def test_the_benchmark_starts_one_process_two_ranks_and_the_same_over_a_link(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started, levels = [], []

    def run(words: list[str], **options: Any) -> subprocess.CompletedProcess[str]:
        given = json.loads(words[-1])
        started.append([word for word in words if word in ("mpiexec", "-n", "1", ":", "first", "second")])
        levels.append(options["env"].get("MPI4PY_RC_THREAD_LEVEL"))
        output = Path(given["options"]["output"])
        output.mkdir(parents=True)
        (output / "adapter_model.safetensors").write_bytes(b"the same")
        Path(given["result"]).write_text("{}", encoding="utf-8")
        return subprocess.CompletedProcess(words, 0, "", "")

    monkeypatch.setattr(bench_distributed.subprocess, "run", run)
    monkeypatch.setattr(bench_distributed, "model_file", lambda: tmp_path / "model.gguf")
    names = ("ALONE", "LOCAL", "LINKED", "WAITING")
    given = argparse.Namespace(length=16, accumulate=4, mpiexec="mpiexec")
    for name in names:
        bench_distributed.run(getattr(bench_distributed, name), tmp_path, [["first"], ["second"]], given, 2)
    linked = ["mpiexec", "-n", "1", "first", ":", "-n", "1", "second"]
    assert started == [[], ["mpiexec", "-n", "1", ":", "-n", "1"], linked, linked]
    assert levels == [None, None, None, "funneled"]
