"""The trainer and its sums on several ranks that are threads of this process. test_same_bits.py has MPI."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import nplora
from distributed import cases
from distributed.threads import ThreadRank, on_threads
from nplora.distributed import Alone, OrderedSum
from nplora.distributed.cores import Cores, crowded_machines, fair_threads, is_bound
from nplora.finetuning import FinetuneOptions, agreement
from nplora.finetuning.agreement import require_same_options
from nplora.trainer import Callback, Run, StepRecord
from nplora.trainer.handshake import differences


@pytest.mark.parametrize("size", [2, 3, 4])
def test_a_sum_has_the_bits_of_adding_the_terms_in_order(size: int, rng: np.random.Generator) -> None:
    """The terms have very different sizes, so that every other order gives other bits."""
    terms = [
        [
            (rng.normal(size=n) * 10.0 ** rng.uniform(-6, 6, n)).astype(kind)
            for n, kind in ((7, "f4"), (5, "f8"))
        ]
        for _ in range(7)
    ]
    wanted = [np.zeros(7, np.float32), np.zeros(5)]
    for term in terms:
        for total, values in zip(wanted, term, strict=True):
            total += values
    backwards = [sum(term[which] for term in reversed(terms)) for which in (0, 1)]
    assert all((other != one).any() for other, one in zip(backwards, wanted, strict=True))

    def work(ranks: ThreadRank) -> list[Any]:
        arrays = [np.zeros(7, np.float32), np.zeros(5)]
        total, rest = OrderedSum(ranks, arrays), list(terms)
        while rest:  # each rank takes one or two terms
            counts = [min(len(rest), 1 + rank % 2) if rest else 0 for rank in range(ranks.size)]
            counts = [max(0, min(count, len(rest) - sum(counts[:rank]))) for rank, count in enumerate(counts)]
            begin = sum(counts[: ranks.rank])
            for term in rest[begin : begin + counts[ranks.rank]]:
                for array, values in zip(arrays, term, strict=True):
                    array += values
                total.keep()
                assert not any(array.any() for array in arrays)
            total.add(counts)
            rest = rest[sum(counts) :]
        total.finish()
        return arrays

    for arrays in on_threads(size, work):
        for found, expected in zip(arrays, wanted, strict=True):
            np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("size", [1, 2, 3])
def test_bfloat16_rounds_each_term_and_the_sum_and_sends_half_of_the_bytes(
    size: int, rng: np.random.Generator
) -> None:
    bfloat16 = pytest.importorskip("ml_dtypes").bfloat16
    terms = [(rng.normal(size=9) * 10.0 ** rng.uniform(-6, 6, 9)).astype(np.float32) for _ in range(5)]
    total = np.zeros(9, np.float32)
    for term in terms:
        total += term.astype(bfloat16).astype(np.float32)
    wanted = total.astype(bfloat16)
    sent = set()

    class Watched(ThreadRank):
        def start_exchange(self, parts: Any, out: Any, senders: Any) -> None:
            sent.add(("exchange", parts.itemsize))
            super().start_exchange(parts, out, senders)

        def join(self, part: Any, out: Any) -> None:
            sent.add(("join", part.itemsize))
            super().join(part, out)

    def work(rank: ThreadRank) -> Any:
        arrays = [np.zeros(9, np.float32), np.zeros(9)]  # float64 arrays hold the same values
        sums = OrderedSum(Watched(rank.table, rank.rank), arrays, "bfloat16")
        for begin in range(0, len(terms), size):
            now = terms[begin : begin + size]
            if rank.rank < len(now):
                for array in arrays:
                    array += now[rank.rank]
                sums.keep()
            sums.add([int(number < len(now)) for number in range(size)])
        sums.finish()
        return arrays

    for arrays in on_threads(size, work):
        for found in arrays:
            np.testing.assert_array_equal(found, wanted.astype(found.dtype))
    assert sent == {("exchange", 2), ("join", 2)}


def test_a_run_that_sent_in_bfloat16_is_not_resumed_in_float32(tmp_path: Path) -> None:
    def fit(**more: Any) -> str:
        return cases.fitted(None, cases.classifier(), checkpoint_dir=tmp_path, epochs=2, **more)

    fit(communication_dtype="bfloat16")
    with pytest.raises(ValueError, match="communication_dtype was bfloat16, is float32"):
        fit(resume=True)
    fit(communication_dtype="bfloat16", resume=True)
    fit(overwrite=True)
    with pytest.raises(ValueError, match="communication_dtype was float32, is bfloat16"):
        fit(communication_dtype="bfloat16", resume=True)


def test_another_communication_dtype_is_refused() -> None:
    with pytest.raises(
        ValueError, match="communication_dtype='float16' is not available; possible: 'float32', 'bfloat16'"
    ):
        nplora.Trainer(nplora.LoRALinear(np.eye(4), rank=1), communication_dtype="float16")


@pytest.mark.slow
@pytest.mark.parametrize("size", [2, 5])
@pytest.mark.parametrize(
    "name", ["numpy_model", "numpy_batch_without_labels", "numpy_layer_used_twice", "numpy_sent_in_bfloat16"]
)
def test_threads_train_the_values_of_one_process(name: str, size: int, tmp_path: Path) -> None:
    alone = cases.NUMPY[name](Alone() if name == cases.ADDS_TWICE else None, tmp_path)
    assert on_threads(size, lambda ranks: cases.NUMPY[name](ranks, tmp_path)) == [alone] * size


def test_dropout_masks_whose_number_changes_are_refused() -> None:
    class Sometimes(cases.Twice):
        def forward(self, x: Any) -> Any:
            if x[0, 0] > 0:
                return super().forward(x)
            y, saved = self.layer.forward(x)
            return y, (saved,)

        def backward(self, dy: Any, saved: Any) -> Any:
            return sum(self.layer.backward(dy, one) for one in saved)

    with pytest.raises(RuntimeError, match="more dropout masks in one batch than in another"):
        on_threads(2, lambda ranks: cases.fitted(ranks, Sometimes(), "mse"))


def test_an_error_in_a_batch_of_one_rank_names_the_batch() -> None:
    def work(ranks: ThreadRank) -> None:
        x, y = cases.arrays(False)
        x[14] = np.nan  # batch 3, which is the first of the second round
        layer = nplora.LoRALinear(np.eye(16), rank=2, rng=0)
        trainer = nplora.Trainer(layer, "mse", accumulate=4, communicator=ranks, progress=False)
        trainer.fit(x, y, batch_size=7, shuffle=False)

    with pytest.raises(nplora.NonFiniteLossError, match="the loss of batch 3 is nan"):
        on_threads(2, work)


def test_the_callbacks_of_every_rank_see_the_same_gradients() -> None:
    seen: dict[int, list[Any]] = {0: [], 1: [], 2: []}

    class Watch(Callback):
        def __init__(self, rank: int) -> None:
            self.rank = rank

        def on_before_optimizer_step(self, run: Run, gradients: Any) -> None:
            seen[self.rank].append({name: value.copy() for name, value in gradients.items()})

    def work(ranks: ThreadRank) -> None:
        cases.fitted(ranks, cases.classifier(), callbacks=[Watch(ranks.rank)], epochs=1)

    on_threads(3, work)
    assert len(seen[0]) == 3
    for here, there in ((seen[0], seen[1]), (seen[0], seen[2])):
        for one, other in zip(here, there, strict=True):
            for name, value in one.items():
                np.testing.assert_array_equal(value, other[name])


def test_each_rank_is_recorded_and_every_batch_is_computed_once() -> None:
    def work(ranks: ThreadRank) -> Any:
        layer = nplora.LoRALinear(np.eye(16), rank=2, rng=0)
        trainer = nplora.Trainer(layer, "mse", accumulate=3, communicator=ranks, progress=False)
        history = trainer.fit(*cases.arrays(False), batch_size=7)
        return trainer.ranks, sum(step.count for step in history.steps)

    (records, count), *others = on_threads(2, work)
    assert [record.rank for record in records] == [0, 1]
    assert sum(record.items for record in records) == count == 81 * 16
    assert others[0][0] == records
    assert all(record.computed > 0 for record in records)


def test_a_callback_of_any_rank_ends_the_run_of_all() -> None:
    class Stop(Callback):
        def on_step_end(self, run: Run, record: StepRecord) -> None:
            if run.step == 2:
                run.stop()

    def work(ranks: ThreadRank) -> tuple[int, str | None]:
        layer = nplora.LoRALinear(np.eye(16), rank=2, rng=0)
        callbacks = [Stop()] if ranks.rank == 1 else []
        trainer = nplora.Trainer(
            layer, "mse", accumulate=2, communicator=ranks, callbacks=callbacks, progress=False
        )
        history = trainer.fit(*cases.arrays(False), batch_size=7)
        return len(history.steps), history.ended

    assert on_threads(2, work) == [(2, "callback")] * 2


# ---- the handshake and the cores ----


def test_the_handshake_names_rank_and_value_but_no_digest() -> None:
    ranks = [{"lr": 0.1, "data": "a" * 64}, {"lr": 0.1, "data": "a" * 64}, {"lr": 0.2, "data": "b" * 64}]
    assert differences(ranks) == ["rank 2 differs in lr: 0.2, but 0.1 on rank 0", "rank 2 differs in data"]
    assert differences(ranks[:2]) == []


def test_ranks_with_other_dropout_streams_are_refused() -> None:
    """The factors agree, but each rank has drawn another seed for its masks."""

    def work(rank: ThreadRank) -> None:
        layer = nplora.LoRALinear(np.eye(4), rank=2, dropout=0.5, rng=rank.rank)
        layer.A[...] = layer.B[...] = 0.25
        trainer = nplora.Trainer(layer, "mse", accumulate=2, progress=False, communicator=rank)
        trainer.fit(np.eye(4), np.eye(4), batch_size=2)

    with pytest.raises(ValueError, match="the ranks do not agree: rank 1 differs in initial dropout streams"):
        on_threads(2, work)


def test_ranks_with_another_state_of_the_optimiser_are_refused() -> None:
    def work(rank: ThreadRank) -> None:
        layer, optimizer = nplora.LoRALinear(np.eye(4), rank=2, rng=0), nplora.AdamW()
        if rank.rank:
            optimizer.step(nplora.LoRALinear(np.eye(4), rank=2, rng=0).parameters())
        trainer = nplora.Trainer(layer, "mse", optimizer, accumulate=2, progress=False, communicator=rank)
        trainer.fit(np.eye(4), np.eye(4), batch_size=2)

    with pytest.raises(ValueError, match="the ranks do not agree: rank 1 differs in state of the optimiser"):
        on_threads(2, work)


@pytest.mark.parametrize("what", ["version of nplora", "instruction set", "version of NumPy"])
def test_ranks_with_another_program_are_named_before_a_model_is_read(what: str) -> None:
    usual = agreement.program()

    def work(rank: ThreadRank) -> None:
        class Other(ThreadRank):
            def gather(self, value: Any, place: str = "") -> Any:
                return super().gather({**value, what: "another"} if self.rank == 1 else value, place)

        require_same_options(Other(rank.table, rank.rank), FinetuneOptions(accumulate=2))

    with pytest.raises(ValueError, match=f"rank 1 differs in {what}: another, but {usual[what]} on rank 0"):
        on_threads(2, work)


@pytest.mark.parametrize(
    ("option", "value"),
    [("lr", 0.5), ("communication_dtype", "bfloat16"), ("local_steps", 3), ("outer_lr", 0.5)],
)
def test_ranks_with_another_option_are_named(option: str, value: Any) -> None:
    def work(rank: ThreadRank) -> None:
        options: dict[str, Any] = {"local_steps": 2, **({option: value} if rank.rank else {})}
        require_same_options(rank, FinetuneOptions(accumulate=2, **options))

    with pytest.raises(ValueError, match=f"the ranks do not agree: rank 1 differs in {option}: "):
        on_threads(2, work)


SECOND = {"node-b": (2, 1)}  # only the second machine has too few cores


@pytest.mark.parametrize(
    ("ranks", "wanted", "crowded"),
    [
        ([Cores("a", frozenset(range(8)), 8)] * 2, [4, 4], {}),
        ([Cores("a", frozenset(range(8)), 8), Cores("b", frozenset(range(4)), 4)], [8, 4], {}),
        ([Cores("a", frozenset(range(2)), 2)] * 3, [1, 1, 1], {"node-a": (3, 2)}),
        ([Cores("a", frozenset({0}), 1), Cores("a", frozenset({1}), 1)], [1, 1], {}),
        ([Cores("a", frozenset(range(8)), 3)] * 2, [3, 3], {}),
        ([Cores("a", frozenset(range(7)), 7)] * 2, [3, 3], {}),
        ([Cores("a", frozenset(range(4)), 4), *[Cores("b", frozenset({0}), 1)] * 2], [4, 1, 1], SECOND),
    ],
)
def test_ranks_share_the_cores_of_their_machine(
    ranks: list[Cores], wanted: list[int], crowded: dict[str, tuple[int, int]]
) -> None:
    assert [fair_threads(ranks, rank) for rank in range(len(ranks))] == wanted
    used = [(f"node-{rank.machine}", threads) for rank, threads in zip(ranks, wanted, strict=True)]
    assert crowded_machines(ranks, used) == crowded


def test_ranks_with_a_fixed_number_of_threads_may_be_too_many() -> None:
    ranks = [Cores("a", frozenset(range(4)), 4)] * 2
    assert crowded_machines(ranks, [("node1", 2)] * 2) == {}
    assert crowded_machines(ranks, [("node1", 2), ("node1", 3)]) == {"node1": (5, 4)}


@pytest.mark.parametrize(
    ("cores", "environment", "all_cores", "wanted"),
    [
        ({3}, {"OMPI_COMM_WORLD_SIZE": "2"}, 8, True),
        ({3}, {"PMI_SIZE": "2"}, 8, False),
        ({3, 4}, {"OMPI_COMM_WORLD_SIZE": "2"}, 8, False),
        ({0}, {"OMPI_COMM_WORLD_SIZE": "2"}, 2, False),
    ],
)
def test_a_rank_that_open_mpi_has_bound_to_one_core_is_noticed(
    cores: set[int], environment: dict[str, str], all_cores: int, wanted: bool
) -> None:
    assert is_bound(Cores("a", frozenset(cores), 1), environment, all_cores) == wanted
