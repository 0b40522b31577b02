"""Ranks that would silently train different values are refused, and each refusal names the rank."""

import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest

import nplora
from distributed.threads import ThreadRank, on_threads
from nplora.distributed.farewell import Farewell
from nplora.nn.losses import NonFiniteLossError
from nplora.trainer import Callback, Run, StepRecord

X, Y = np.random.default_rng(0).normal(size=(2, 40, 4)).astype(np.float32)


class Distance:
    """The squared distance as a fused loss."""

    def count(self, x: Any, y: Any) -> int:
        return len(x)

    def forward_backward(self, model: Any, x: Any, y: Any, factor: float) -> float:
        out, saved = model.forward(x)
        model.backward(2 * (out - y) * np.float32(factor), saved)
        return float(((out - y) ** 2).sum())

    def evaluate(self, model: Any, x: Any, y: Any) -> float:
        return float(((model(x) - y) ** 2).sum()) / len(x)

    def blame(self, model: Any, x: Any) -> str:
        return "not finite"

    def settings(self) -> dict[str, Any]:
        return {}


class Parted(Distance):
    """Says that it has parts, but does not call `after_part`."""

    def after_part(self) -> None:
        pass

    def parts(self, x: Any, y: Any) -> int:
        return 1

    def computed_elsewhere(self, x: Any, y: Any) -> None:
        pass


class Measured(Distance):
    def take_metrics(self) -> dict[str, float]:
        return {"sum": 1.0}


def fit(
    ranks: Any,
    loss: Any = "mse",
    callbacks: Any = (),
    data: Any = (X, Y),
    directory: Path | None = None,
    local_steps: int | None = None,
    **more: Any,
) -> nplora.Module:
    model = nplora.LoRALinear(np.eye(4), rank=2, rng=0)
    trainer = nplora.Trainer(
        model, loss, nplora.AdamW(lr=0.05), accumulate=2, progress=False, communicator=ranks,
        callbacks=callbacks, local_steps=local_steps,
    )  # fmt: skip
    place = None if getattr(ranks, "rank", 0) else directory
    options = {"epochs": 2} | ({"resume": True} if directory else {}) | more
    if isinstance(data, tuple):
        options |= {"batch_size": 4}
    trainer.fit(*(data if isinstance(data, tuple) else [data]), checkpoint_dir=place, **options)
    return model


def test_a_loss_that_does_not_call_after_part_is_refused() -> None:
    with pytest.raises(RuntimeError, match=r"^Parted.forward_backward has called after_part 0 times, exp"):
        on_threads(2, lambda ranks: fit(ranks, Parted()))


def test_metrics_that_cannot_be_merged_are_refused() -> None:
    fit(nplora.distributed.Alone(), Measured())
    with pytest.raises(ValueError, match=r"^Trainer: the metrics of Measured cannot be merged across ranks"):
        on_threads(2, lambda ranks: fit(ranks, Measured()))


@pytest.mark.parametrize("given", ["mpi", object()])
def test_a_communicator_must_have_the_methods(given: Any) -> None:
    with pytest.raises(TypeError, match=r"^Trainer: communicator is .*, expected a Communicator"):
        fit(given)


class HalfOnRank0(Callback):
    """Changes gradients or values, but on rank 0 only."""

    def __init__(self, ranks: ThreadRank, what: str) -> None:
        self.ranks, self.what = ranks, what

    def on_before_optimizer_step(self, run: Run, gradients: Mapping[str, Any]) -> None:
        if self.what == "gradients" and not self.ranks.rank and run.step == 2:
            gradients["B"][...] = 0

    def on_step_end(self, run: Run, record: StepRecord) -> None:
        if self.what == "values" and not self.ranks.rank and run.step == 3:
            run.model.parameters()[0].value[0, 0] += 1


@pytest.mark.parametrize("what", ["gradients", "values"])
def test_a_callback_that_changes_one_rank_ends_the_run_and_is_not_saved(what: str, tmp_path: Path) -> None:
    def work(ranks: ThreadRank) -> None:
        fit(ranks, callbacks=[HalfOnRank0(ranks, what)], directory=tmp_path / "run", checkpoint_every=1)

    with pytest.raises(ValueError, match="after step 3, the trained values of rank 1 differ from those"):
        on_threads(2, work)
    resumed, whole = fit(None, directory=tmp_path / "run"), fit(None)
    for found, wanted in zip(resumed.parameters(), whole.parameters(), strict=True):
        np.testing.assert_array_equal(found.value, wanted.value)


class Smaller(Callback):
    """Makes every gradient smaller than the one before: a state that it keeps in the log."""

    def __init__(self, stop: int | None) -> None:
        self.stop, self.factor = stop, 1.0

    def on_fit_start(self, run: Run) -> None:
        self.factor = run.logged("factor").get("factor", 1.0)

    def on_before_optimizer_step(self, run: Run, gradients: Mapping[str, Any]) -> None:
        self.factor *= 0.5
        for gradient in gradients.values():
            gradient *= np.float32(self.factor)

    def on_step_end(self, run: Run, record: StepRecord) -> None:
        run.log("factor", {"factor": self.factor})
        assert run.logged("factor")["factor"] == self.factor
        if run.step == self.stop:
            run.stop()


def test_callbacks_of_all_ranks_know_the_log_of_a_resumed_run(tmp_path: Path) -> None:
    directory = tmp_path / "run"
    on_threads(2, lambda ranks: fit(ranks, callbacks=[Smaller(3)], directory=directory))
    resumed = on_threads(2, lambda ranks: fit(ranks, callbacks=[Smaller(None)], directory=directory))
    whole = fit(None, callbacks=[Smaller(None)], directory=tmp_path / "whole")
    for model in resumed:
        for found, wanted in zip(model.parameters(), whole.parameters(), strict=True):
            np.testing.assert_array_equal(found.value, wanted.value)


@pytest.mark.parametrize("change", ["order", "values", "length"])
def test_batches_that_differ_between_ranks_are_refused(change: str) -> None:
    def work(ranks: ThreadRank) -> None:
        batches = [(X[first : first + 4], Y[first : first + 4]) for first in range(0, 40, 4)]
        if ranks.rank:
            x, y = batches[3]
            batches[3] = (x + (change == "values"), y)
            batches = batches[::-1] if change == "order" else batches
            batches = batches[:5] if change == "length" else batches

        class Endless:
            """Without a length, which the ranks would compare."""

            def __iter__(self) -> Iterator[Any]:
                return iter(batches)

        fit(ranks, data=Endless(), epochs=1)

    with pytest.raises(ValueError, match="the batches of rank 1 differ from those of rank 0: all ranks"):
        on_threads(2, work)


class Overflow(Callback):
    """Makes the gradient of the next step infinite on one rank: a huge row of x meets a finite loss."""

    def __init__(self, ranks: ThreadRank, step: int) -> None:
        self.ranks, self.step = ranks, step

    def on_before_optimizer_step(self, run: Run, gradients: Mapping[str, Any]) -> None:
        if self.ranks.rank and run.step + 1 == self.step:
            gradients["A"][0, 0] = math.inf


def test_a_gradient_that_is_not_finite_on_one_rank_is_the_error_of_all(tmp_path: Path) -> None:
    """With local steps, only that rank notices it. The log has the step at which a resumed run would fail."""
    directory, errors = tmp_path / "run", []

    def work(ranks: ThreadRank) -> None:
        try:
            fit(ranks, callbacks=[Overflow(ranks, 4)], directory=directory, local_steps=2)
        except NonFiniteLossError as error:
            errors.append(str(error))
            raise

    with pytest.raises(NonFiniteLossError, match=r"^step 4 \(epoch 1\): the loss is finite, but the grad"):
        on_threads(2, work)
    assert len(errors) == 2
    log = [json.loads(line) for line in (directory / "log.jsonl").read_text().splitlines()]
    assert [row["after"] for row in log if row["event"] == "nonfinite"] == [3]
    with pytest.raises(ValueError, match=r"With a lower --lr \(the optimizer's lr\), .* from step 2"):
        on_threads(2, lambda ranks: fit(ranks, directory=directory, local_steps=2))


def test_the_error_names_all_ranks_that_do_not_answer() -> None:
    farewell = Farewell(mock.MagicMock(), mock.MagicMock(rank=0, size=4), 2.0)
    words = "no answer for 2 s from the ranks 1, 3: these ranks hang, are stopped, or need more time"
    assert str(farewell.no_answer([3, 1])).endswith(words)
