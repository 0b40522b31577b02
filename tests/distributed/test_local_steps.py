"""Ranks that make steps on their own, and are combined by outer steps."""

import json
import shutil
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

import nplora
from distributed import cases
from distributed.cases import StopAt
from distributed.threads import ThreadRank, on_threads
from nplora.distributed import Alone, Communicator, RankError
from nplora.finetuning import FinetuneOptions, TokenLoss, int8_check
from nplora.models.packing import pack
from nplora.nn.losses import NonFiniteLossError
from nplora.nn.product_errors import ProductErrors
from nplora.trainer import Callback, History, Run, StepRecord, resuming
from small_llama import save_small_llama

BATCH, LR, OUTER_LR, OUTER_MOMENTUM = 4, 0.05, 0.7, 0.9
Array = np.ndarray[Any, Any]


def problem(batches: int) -> tuple[Array, Array, Array]:
    """Rows, targets and a frozen weight."""
    rng = np.random.default_rng(0)
    return (
        rng.normal(size=(BATCH * batches, 6)),
        rng.normal(size=(BATCH * batches, 5)),
        rng.normal(size=(5, 6)),
    )


def new_layer(batches: int) -> nplora.LoRALinear:
    return nplora.LoRALinear(problem(batches)[2], rank=2, rng=0, dtype="float64")


def trained(ranks: Communicator | None, batches: int = 6, **more: Any) -> tuple[list[Array], History]:
    """Train a float64 layer; return its factors A and B, and the history."""
    x, y, _ = problem(batches)
    layer = new_layer(batches)
    fit = {"epochs": 2, "batch_size": BATCH, "shuffle": False}
    fit |= {name: more.pop(name) for name in list(more) if name in FIT}
    options = {
        "accumulate": 2,
        "outer_lr": OUTER_LR,
        "outer_momentum": OUTER_MOMENTUM,
        "progress": False,
    } | more
    trainer = nplora.Trainer(layer, "mse", nplora.AdamW(LR), communicator=ranks, **options)
    history = trainer.fit(x, y, **fit)
    return [layer.A.copy(), layer.B.copy()], history


FIT = ("epochs", "steps", "checkpoint_dir", "checkpoint_every", "resume", "validation", "eval_every")


def test_all_ranks_return_the_same_blocks_to_bfloat16(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between outer steps, the gradients and products of the ranks differ, and so may their errors."""
    path = save_small_llama(tmp_path / "model.gguf", "q8_0")

    def parts(ranks: ThreadRank) -> list[str]:
        lm = nplora.load_model(path, compute="int8")
        lm.add_lora(rank=2)
        said = list[str]()
        own.lm, own.names = lm, ["model.layers.0", "model.layers.1"]
        own.worse = own.names[ranks.rank]
        ids = np.arange(1, 9)
        sample = pack([(np.arange(1, 30), np.arange(1, 30))])
        check = int8_check.Int8Check(lm, lambda: lm.forward_backward(sample, 1.0), said.append)
        trainer = nplora.Trainer(
            lm,
            TokenLoss(),
            accumulate=2,
            callbacks=[check],
            progress=False,
            communicator=ranks,
            local_steps=2,
        )
        trainer.fit([(pack([(ids, ids)]), None)] * 2, epochs=1)
        assert sorted(said[0].partition("bfloat16: ")[2].partition(". ")[0].split(", ")) == own.names
        return said

    def measured(comparison: Any) -> int8_check.Errors:
        """On each rank, another part is inexact, as long as it computes in int8."""
        comparison._add_gradient()  # the check sees the products
        is_worse = any(layer.int8 for layer in int8_check.layers_of(own.lm, [own.worse]))
        cosines = {name: 0.5 if is_worse and name == own.worse else 0.99 for name in own.names}
        return int8_check.Errors(0.99, cosines, 0.0, 1.0)

    def sampled(products: ProductErrors, name: str, *_: Any) -> None:
        error: Any = SimpleNamespace(measured=float(int8_check.part_of(name) == own.worse), bound=1.0)
        products.seen.append(name)
        products.found[name] = error

    own = threading.local()
    monkeypatch.setattr(int8_check.Comparison, "measure", measured)
    monkeypatch.setattr(ProductErrors, "_sample", sampled)
    first, second = on_threads(2, parts)
    assert first == second


def test_nothing_is_compared_if_the_loss_of_one_rank_is_not_finite(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = save_small_llama(tmp_path / "model.gguf", "q8_0")

    def said(ranks: ThreadRank) -> list[str]:
        lm, lines = nplora.load_model(path, compute="int8"), list[str]()
        lm.add_lora(rank=2)
        own.rank = ranks.rank
        check = int8_check.Int8Check(lm, lambda: 0.0, lines.append)
        ids = np.arange(1, 9)
        trainer = nplora.Trainer(
            lm, TokenLoss(), accumulate=2, callbacks=[check], progress=False, communicator=ranks
        )
        trainer.fit([(pack([(ids, ids)]), None)] * 2, epochs=1)
        return lines

    def found(*_: Any) -> Any:
        if own.rank == 1:
            raise NonFiniteLossError("the loss is nan")
        return int8_check.Errors(0.5, {"model.layers.0": 0.5}, 0.0, 1.0)

    own = threading.local()
    monkeypatch.setattr(int8_check.Comparison, "measure", found)
    line = "step 1: the sample's gradients in int8 and bfloat16 are not compared: rank 1: the loss is nan"
    assert on_threads(2, said) == [[line]] * 2


# ---- an oracle in plain NumPy ----


def gradients(values: list[Array], x: Array, y: Array, weight: Array) -> list[Array]:
    """The gradients of the mean squared error of y = x Wᵀ + scale (x Bᵀ) Aᵀ."""
    a, b = values
    scale = 16 / 2  # alpha / rank
    z = x @ b.T
    dy = 2 * (x @ weight.T + scale * z @ a.T - y) / y.size
    return [scale * dy.T @ z, scale * (dy @ a).T @ x]


class Worker:
    """A rank that makes steps of AdamW on its own."""

    def __init__(self, values: list[Array]) -> None:
        self.values = [value.copy() for value in values]
        self.m, self.v = ([np.zeros_like(value) for value in values] for _ in range(2))

    def step(self, gradient: list[Array], number: int) -> None:
        for i, g in enumerate(gradient):
            self.m[i] = 0.9 * self.m[i] + 0.1 * g
            self.v[i] = 0.999 * self.v[i] + 0.001 * g * g
            m, v = self.m[i] / (1 - 0.9**number), self.v[i] / (1 - 0.999**number)
            self.values[i] = self.values[i] * (1 - LR * 0.01) - LR * m / (np.sqrt(v) + 1e-8)


def diloco(ranks: int, every: int, batches: int, epochs: int, accumulate: int) -> list[Array]:
    """Douillard et al. 2023, algorithm 1, with averaged moments. `accumulate` is a multiple of `ranks`."""
    x, y, weight = problem(batches)
    start = new_layer(batches)
    theta = [start.A.copy(), start.B.copy()]
    workers = [Worker(theta) for _ in range(ranks)]
    velocity = [np.zeros_like(value) for value in theta]
    step = 0
    for _ in range(epochs):
        for begin in range(0, batches, accumulate):
            step += 1
            for k, worker in enumerate(workers):
                mine = range(begin + k, min(begin + accumulate, batches), ranks)
                parts = [slice(i * BATCH, (i + 1) * BATCH) for i in mine]
                found = [gradients(worker.values, x[part], y[part], weight) for part in parts]
                worker.step([np.mean(each, axis=0) for each in zip(*found, strict=True)], step)
            if step % every and begin + accumulate < batches:
                continue
            for i, value in enumerate(theta):
                delta = value - np.mean([worker.values[i] for worker in workers], axis=0)
                velocity[i] = OUTER_MOMENTUM * velocity[i] + delta
                theta[i] = value - OUTER_LR * (delta + OUTER_MOMENTUM * velocity[i])
                for moments in ([w.m for w in workers], [w.v for w in workers]):
                    mean = np.mean([each[i] for each in moments], axis=0)
                    for each in moments:
                        each[i] = mean
            for worker in workers:
                worker.values = [value.copy() for value in theta]
    return theta


@pytest.mark.parametrize(("ranks", "every", "accumulate"), [(1, 2, 2), (2, 2, 2), (2, 3, 4), (3, 1, 3)])
def test_local_steps_train_the_values_of_the_published_algorithm(
    ranks: int, every: int, accumulate: int
) -> None:
    wanted = diloco(ranks, every, batches=12, epochs=2, accumulate=accumulate)
    found = on_threads(
        ranks, lambda rank: trained(rank, 12, local_steps=every, accumulate=accumulate, epochs=2)[0]
    )
    for values in found:
        for value, expected in zip(values, wanted, strict=True):
            np.testing.assert_allclose(value, expected, rtol=1e-9, atol=1e-12)


def test_one_rank_without_outer_momentum_trains_as_usual() -> None:
    usual, _ = trained(None)
    local, _ = trained(None, local_steps=2, outer_lr=1.0, outer_momentum=0.0)
    for value, expected in zip(local, usual, strict=True):
        np.testing.assert_allclose(value, expected, rtol=1e-12)


# ---- what is exchanged and recorded ----


def test_values_and_moments_are_exchanged_only_in_outer_steps() -> None:
    calls = []

    class Counted(ThreadRank):
        def join(self, part: Any, out: Any) -> None:
            calls.append(self.rank)
            super().join(part, out)

    on_threads(2, lambda rank: trained(Counted(rank.table, rank.rank), local_steps=2))
    # Of 6 steps, 2 and 4 are followed by an outer step, and 3 and 6 are the last ones of an epoch.
    assert calls.count(0) == calls.count(1) == 4 * 3  # the values and two moments


def test_the_records_count_the_batches_of_all_ranks() -> None:
    def work(rank: ThreadRank) -> Any:
        return trained(rank, 5, local_steps=2)[1].steps

    first, second = on_threads(2, work)
    assert [record.count for record in first] == [2 * BATCH * 5, 2 * BATCH * 5, BATCH * 5] * 2
    assert [(r.loss, r.count) for r in first] == [(r.loss, r.count) for r in second]


def test_a_rank_without_a_batch_in_a_step_gets_the_values_of_all() -> None:
    first, second = on_threads(2, lambda rank: trained(rank, 5, local_steps=2)[0])
    for here, there in zip(first, second, strict=True):
        np.testing.assert_array_equal(here, there)


def test_rounding_to_bfloat16_changes_the_outer_steps_only_a_little() -> None:
    exact, rounded = (
        on_threads(2, lambda rank: trained(rank, local_steps=2, communication_dtype=dtype)[0])  # noqa: B023
        for dtype in ("float32", "bfloat16")
    )
    for value, expected in zip(rounded[0], exact[0], strict=True):
        assert not np.array_equal(value, expected)
        np.testing.assert_allclose(value, expected, atol=0.02 * np.abs(expected).max())


# ---- stopping and resuming ----


class RaiseAt(Callback):
    def __init__(self, step: int, error: BaseException) -> None:
        self.step, self.error = step, error

    def on_step_end(self, run: Run, record: StepRecord) -> None:
        if run.step == self.step:
            raise self.error


def resumed(
    size: int, directory: Path, callback: Callback | None, rank_of_callback: int = 0, **more: Any
) -> list[list[Array]]:
    """Run or resume on several ranks, until a callback ends the run of one of them."""

    def work(rank: ThreadRank) -> list[Array]:
        callbacks = [callback] if callback is not None and rank.rank == rank_of_callback else []
        place = {} if rank.rank else {"checkpoint_dir": directory}
        return trained(rank, local_steps=4, epochs=4, resume=True, callbacks=callbacks, **place, **more)[0]

    return on_threads(size, work)


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_an_error_between_outer_steps_loses_only_the_steps_since_the_last_one(
    rank: int, tmp_path: Path
) -> None:
    (whole, _) = on_threads(2, lambda rank: trained(rank, local_steps=4, epochs=4)[0])
    for step, saved in ((2, 0), (5, 4), (11, 9)):  # an epoch has 3 steps
        with pytest.raises(MemoryError):
            resumed(2, tmp_path / "run", RaiseAt(step, MemoryError()), rank)
        rows = map(json.loads, (tmp_path / "run" / "log.jsonl").read_text().splitlines())
        assert max((row["step"] for row in rows if row["event"] == "step"), default=0) == saved
    for value, expected in zip(resumed(2, tmp_path / "run", None)[0], whole, strict=True):
        np.testing.assert_array_equal(value, expected)


@pytest.mark.parametrize("failing", [4, 5, 6, 7, 8, 9])
def test_a_failed_exchange_of_an_outer_step_changes_nothing(failing: int, tmp_path: Path) -> None:
    """An outer step exchanges the values (joins 4 and 7) and then two moments."""

    class Failing(Alone):
        joins = 0

        def join(self, part: Any, out: Any) -> None:
            self.joins += 1
            if self.joins == failing:
                raise RankError(0, "no answer")
            super().join(part, out)

    def fit(ranks: Communicator, **more: Any) -> list[Array]:
        return trained(ranks, local_steps=2, steps=6, epochs=None, **more)[0]

    with pytest.raises(RankError, match="no answer"):
        fit(Failing(), checkpoint_dir=tmp_path, checkpoint_every=100)
    found = fit(Alone(), checkpoint_dir=tmp_path, resume=True)
    for value, expected in zip(found, fit(Alone()), strict=True):
        np.testing.assert_array_equal(value, expected)


def test_ctrl_c_between_outer_steps_leaves_the_values_of_the_last_one(tmp_path: Path) -> None:
    def fit(**more: Any) -> tuple[list[Array], History]:
        return trained(None, local_steps=2, steps=6, epochs=None, **more)

    until_4, _ = trained(None, local_steps=2, steps=4, epochs=None)
    whole, _ = fit()
    stopped, history = fit(checkpoint_dir=tmp_path, callbacks=[RaiseAt(5, KeyboardInterrupt())])
    assert history.interrupted
    assert [record.step for record in history.steps] == [1, 2, 3, 4]
    for value, expected in zip(stopped, until_4, strict=True):
        np.testing.assert_array_equal(value, expected)
    found, history = fit(checkpoint_dir=tmp_path, resume=True)
    assert [record.step for record in history.steps] == [1, 2, 3, 4, 5, 6]
    for value, expected in zip(found, whole, strict=True):
        np.testing.assert_array_equal(value, expected)


@pytest.mark.parametrize("outer", [{}, {"outer_lr": 1.0, "outer_momentum": 0.0}])
def test_a_callback_stops_the_run_after_the_next_outer_step(outer: dict[str, float], tmp_path: Path) -> None:
    def fit(**more: Any) -> tuple[list[Array], History]:
        return trained(None, local_steps=2, epochs=2, **outer, **more)

    whole, _ = fit()
    _, history = fit(callbacks=[StopAt(1)], checkpoint_dir=tmp_path)
    assert len(history.steps) == 2
    assert history.ended == "callback"
    found, _ = fit(checkpoint_dir=tmp_path, resume=True)
    for value, expected in zip(found, whole, strict=True):
        np.testing.assert_array_equal(value, expected)


def test_a_checkpoint_that_is_due_waits_for_the_next_outer_step(tmp_path: Path) -> None:
    steps = []

    class Watch(Callback):
        def on_checkpoint(self, run: Run) -> None:
            steps.append(run.step)

    trained(
        None, 40, local_steps=2, epochs=1, checkpoint_dir=tmp_path, checkpoint_every=5, callbacks=[Watch()]
    )
    assert steps == [0, 6, 10, 16, 20, 20]  # the last one after the end of the epoch is recorded


def test_other_numbers_of_ranks_and_local_steps(tmp_path: Path) -> None:
    def fit(**more: Any) -> None:
        trained(None, checkpoint_dir=tmp_path, **more)

    fit(local_steps=2)
    with pytest.raises(ValueError, match="local_steps was 2, is 3"):
        fit(local_steps=3, resume=True)
    with pytest.raises(ValueError, match="local_steps was 2, is not set"):
        fit(resume=True)
    with pytest.warns(UserWarning, match=r"differ from the checkpoint's: outer_lr was 0\.7, is 0\.5"):
        fit(local_steps=2, outer_lr=0.5, resume=True)


@pytest.mark.parametrize(("then", "now"), [(0.0, 0.9), (0.9, 0.0)])
def test_outer_momentum_begins_at_zero_if_the_run_had_none(then: float, now: float, tmp_path: Path) -> None:
    """One outer step with momentum µ that begins at zero is one of 1 + µ times the average change."""

    def fit(steps: int, momentum: float, lr: float = 0.5, place: Path = tmp_path, **more: Any) -> list[Array]:
        return trained(
            None, outer_momentum=momentum, outer_lr=lr, local_steps=2, steps=steps, epochs=None,
            checkpoint_dir=place, resume=True, **more,
        )[0]  # fmt: skip

    fit(2, then)
    shutil.copytree(tmp_path, tmp_path / "copy")
    with pytest.warns(UserWarning, match=f"outer_momentum was {then}, is {now}"):
        found = fit(3, now)
    with pytest.warns(UserWarning, match="settings of the resumed run"):
        wanted = fit(3, 0.0, 0.5 * (1 + now), tmp_path / "copy")
    for value, expected in zip(found, wanted, strict=True):
        np.testing.assert_allclose(value, expected, rtol=1e-12)


def test_a_run_that_continues_on_another_number_of_ranks_says_so(tmp_path: Path) -> None:
    trained(None, local_steps=2, checkpoint_dir=tmp_path, steps=2, epochs=None)
    told = []

    def work(rank: ThreadRank) -> None:
        place = {} if rank.rank else {"checkpoint_dir": tmp_path}
        trained(rank, local_steps=2, resume=True, steps=4, epochs=None, **place)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(resuming, "warn_user", told.append)
        on_threads(2, work)
    assert any("ranks was 1, is 2" in text for text in told)


def test_evaluations_between_outer_steps_are_refused() -> None:
    x, y, _ = problem(6)
    with pytest.raises(ValueError, match="eval_every is 3, expected a multiple of local_steps=2"):
        trained(None, local_steps=2, validation=(x, y), eval_every=3)
    with pytest.raises(ValueError, match="finetune: eval_every is 3, expected a multiple of local_steps=2"):
        FinetuneOptions(local_steps=2, eval_every=3)
    _, history = trained(None, local_steps=2, validation=(x, y), eval_every=2)
    assert [record.step for record in history.evaluations] == [2, 3, 4, 6]


@pytest.mark.parametrize(
    "options", [{"local_steps": 0}, {"outer_lr": -1.0}, {"outer_momentum": 1.0}, {"local_steps": 1.5}]
)
def test_options_out_of_range_are_refused(options: dict[str, Any]) -> None:
    for make in (FinetuneOptions, lambda **more: nplora.Trainer(new_layer(1), "mse", **more)):
        with pytest.raises((ValueError, TypeError), match=next(iter(options))):
            make(**options)


def test_every_kind_of_model_and_loss_makes_local_steps() -> None:
    """With dropout, DoRA, ignored labels and a trained head."""
    first, second = on_threads(
        2, lambda rank: cases.fitted(rank, cases.classifier(), local_steps=2, eval_every=4)
    )
    assert (
        first.split()[0] == second.split()[0]
    )  # the values; each rank records its own norm of the gradients
