"""The division of time between decoding and training."""

import itertools
import threading
import time
from typing import Any

import numpy as np
import pytest

from nplora.runtime.giving_way import give_way, giving_way
from nplora.runtime.time_share import TimeBudget, TimeShare


def trained_until(slices: list[tuple[float, float]], times: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """The seconds of training before each of these times."""
    edges, lengths = np.ravel(slices), np.diff(slices).ravel()
    before = np.concatenate([[0], np.cumsum(lengths)])
    return np.interp(times, edges, np.ravel(np.stack([before[:-1], before[1:]], axis=1)))


def most_in_any_second(slices: list[tuple[float, float]]) -> float:
    """The sum is largest in a second that begins or ends at an edge of a slice."""
    edges = np.ravel(slices)
    starts = np.concatenate([edges, edges - 1])
    return float((trained_until(slices, starts + 1) - trained_until(slices, starts)).max())


def slices_of(budget: TimeBudget, lengths: list[float]) -> list[tuple[float, float]]:
    """Run slices of these lengths by a fake clock, each as soon as the budget allows it."""
    now, slices = 100.0, list[tuple[float, float]]()
    for length in lengths:
        for _ in range(20):  # `delay` must not leave a rest for ever
            if (delay := budget.delay(now)) <= 0:
                break
            now += delay
        assert budget.delay(now) <= 1e-9
        slices.append((now, now + length))
        now += length
        budget.add(*slices[-1])
    return slices


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("longest", [0.005, 0.03, 0.09])
def test_training_takes_at_most_its_share_of_any_second(
    rng: np.random.Generator, share: float, longest: float
) -> None:
    lengths = [longest, *rng.uniform(longest / 10, longest, int(6 * share / longest)).tolist()]
    # Among the recent slices there is always one of the greatest length, as with the blocks of one model.
    lengths = [longest if index % 30 == 0 else length for index, length in enumerate(lengths)]
    slices = slices_of(TimeBudget(share), lengths)
    assert most_in_any_second(slices) <= share + 1e-9
    whole = np.diff(slices).sum() / (slices[-1][1] - slices[0][0])
    assert whole > share - longest * 1.01, "training gets less than its share"


def test_slices_are_spread_over_the_second() -> None:
    slices = slices_of(TimeBudget(0.5), [0.03] * 60)
    pauses = [after[0] - before[1] for before, after in itertools.pairwise(slices)]
    assert min(pauses) == pytest.approx(0.03)
    assert max(pauses) < 0.1


def test_a_slice_that_is_longer_than_its_share_is_followed_by_a_pause_in_proportion() -> None:
    slices = slices_of(TimeBudget(0.25), [2.0] * 4)
    pauses = [after[0] - before[1] for before, after in itertools.pairwise(slices)]
    assert pauses == pytest.approx([6.0] * 3)


def test_training_keeps_its_share_after_a_slice_that_was_an_exception() -> None:
    slices = slices_of(TimeBudget(0.25), [0.03] * 40 + [0.3] + [0.03] * 100)
    after = slices[42:]
    assert most_in_any_second(after) <= 0.25 + 1e-9
    assert np.diff(after).sum() / (after[-1][1] - after[0][0]) > 0.2


def test_only_the_part_of_a_slice_counts_in_which_urgent_work_waited() -> None:
    budget = TimeBudget(0.5)
    budget.add(0.0, 0.9, counted_from=0.8)
    assert budget.delay(0.9) == pytest.approx(0.9)  # it expects another slice of 0.9 s
    budget.add(1.8, 2.0, counted_from=2.0)
    assert budget.delay(5.0) == 0


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_training_takes_all_if_nothing_else_waits() -> None:
    clock = Clock()
    turns = TimeShare(0.01, clock)
    for _ in range(100):
        turns.pause()
        clock.now += 1


def test_urgent_work_waits_for_the_end_of_a_slice_and_training_for_the_end_of_urgent_work() -> None:
    turns, order = TimeShare(0.5), list[str]()
    inside, ended = threading.Event(), threading.Event()

    def decode() -> None:
        with turns:
            order.append("decode")
            inside.set()
            ended.wait(10)
            order.append("decoded")

    turns.pause()
    thread = threading.Thread(target=decode)
    thread.start()
    assert not inside.wait(0.05), "urgent work ran within a slice"
    order.append("trained")
    pausing = threading.Thread(target=lambda: (turns.pause(), order.append("train")))
    pausing.start()
    assert inside.wait(10)
    ended.set()
    thread.join()
    pausing.join()
    assert order == ["trained", "decode", "decoded", "train"]


def test_training_that_is_due_goes_before_urgent_work_that_comes_later() -> None:
    turns, order, waits = TimeShare(0.5), list[str](), threading.Event()

    def train() -> None:
        waits.set()
        turns.pause()
        order.append("train")
        turns.end()

    thread = threading.Thread(target=train)
    with turns:
        thread.start()
        waits.wait(10)
        time.sleep(0.05)  # now it waits in `pause`
    with turns:
        order.append("decode")
    thread.join()
    assert order == ["train", "decode"]


def test_urgent_work_waits_for_a_long_slice_only_once(monkeypatch: pytest.MonkeyPatch) -> None:
    waited, clock = list[float](), Clock()
    turns = TimeShare(0.5, clock)

    def wait(condition: threading.Condition, seconds: float) -> None:
        waited.append(seconds)
        clock.now += seconds

    monkeypatch.setattr(threading.Condition, "wait", wait)
    turns.pause()
    for _ in range(3):  # in the same thread: the slice does not end meanwhile
        with turns:
            pass
    assert waited == [0.25]


def test_urgent_work_that_is_interrupted_while_it_waits_does_not_hold_up_training(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    clock = Clock()
    turns = TimeShare(0.5, clock)

    def interrupted(condition: threading.Condition, seconds: float) -> None:
        raise InterruptedError

    turns.pause()
    monkeypatch.setattr(threading.Condition, "wait", interrupted)
    with pytest.raises(InterruptedError):
        turns.__enter__()
    for _ in range(3):  # with urgent work, training would wait after each slice
        clock.now += 1.0
        turns.pause()


def test_training_that_is_interrupted_while_it_waits_does_not_hold_up_urgent_work(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    clock = Clock()
    turns = TimeShare(0.5, clock)

    def interrupted(condition: threading.Condition, seconds: float | None = None) -> None:
        raise InterruptedError

    monkeypatch.setattr(threading.Condition, "wait", interrupted)
    with turns, pytest.raises(InterruptedError):
        turns.pause()
    clock.now += 1.0
    with turns:  # with training that waits, this would wait
        pass


@pytest.mark.parametrize("share", [0, -1, 1.01, float("nan")])
def test_a_share_is_above_0_and_at_most_1(share: float) -> None:
    with pytest.raises(ValueError, match="share is"):
        TimeShare(share)


def test_giving_way_is_for_one_thread_only() -> None:
    called = list[str]()
    with giving_way(lambda: called.append("outer")):
        with giving_way(lambda: called.append("inner")):
            give_way()
        thread = threading.Thread(target=give_way)
        thread.start()
        thread.join()
        give_way()
    give_way()
    assert called == ["inner", "outer"]
