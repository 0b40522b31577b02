"""The lines of a FinetuneReport."""

from pathlib import Path

import pytest

from nplora.finetuning import FinetuneReport
from nplora.finetuning.data import DataReport
from nplora.trainer import History, StepRecord

DATA = DataReport("data", 1, 1, 1, 1, 1, 1, 0, 0, 0, ())


def report(losses: list[float], epoch: int, before: float | None = None, after: float | None = None) -> str:
    """The text of a report. `epoch` is the number of steps in an epoch."""
    steps = [StepRecord(1 + i, 1 + i // epoch, loss, 1, 0.1, 1.0, 1.0) for i, loss in enumerate(losses)]
    return str(FinetuneReport(Path("out"), DATA, None, before, after, (), History(steps=steps), 1, 2))


@pytest.mark.parametrize(
    ("losses", "epoch", "words"),
    [
        ([5.0], 4, "loss 5.0000"),
        ([5.0, 3.0], 4, "loss 5.0000 in the first step, 4.0000 on average in the last 2 steps"),
        ([5.0, 3.0, 2.0, 1.0], 2, "loss 5.0000 in the first step, 1.5000 on average in the last 2 steps"),
        (
            [5.0, 3.0, 2.0, 1.0, 0.0],
            2,
            "loss 5.0000 in the first step, 0.5000 on average in the last 2 steps",
        ),
        ([5.0, 3.0, 2.0], 1, "loss 5.0000 in the first step, 2.0000 in the last"),
        ([5.0] * 9 + [1.0] * 20, 30, "loss 5.0000 in the first step, 1.0000 on average in the last 20 steps"),
    ],
)
def test_the_last_loss_is_the_mean_of_the_last_epoch_or_of_20_steps(
    losses: list[float], epoch: int, words: str
) -> None:
    assert f" MB, {words}\n" in report(losses, epoch)


@pytest.mark.parametrize(
    ("losses", "before", "after", "name"),
    [
        ([5.2, 22.0], None, None, "loss"),
        ([2.0, 1.0, 4.0, 5.0], None, None, "loss"),
        ([2.0, 4.0, 1.0, 5.0], None, None, None),  # single batches differ
        ([2.0, 2.5], None, None, None),
        ([2.0], None, None, None),
        ([], None, None, None),
        ([2.0, 1.0], 2.0, 2.1, "validation loss"),
        ([2.0, 9.0], 2.0, 1.9, None),
        ([2.0, 9.0], 2.0, 2.00001, None),
    ],
)
def test_a_loss_that_has_risen_is_reported(
    losses: list[float], before: float | None, after: float | None, name: str | None
) -> None:
    text = report(losses, 2, before, after)
    if name is None:
        assert "risen" not in text
    else:
        assert f"\nthe {name} has risen: try a lower learning rate, or fewer epochs\n" in text
