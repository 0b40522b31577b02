"""FilterCheck: prints a message if a word filter costs more time than it saves."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import numpy as np

from nplora import _core
from nplora.finetuning.objectives.packed_loss import KEPT
from nplora.models.word_filter import WordFilter
from nplora.nn import Linear, TrainedHead
from nplora.nn.linear import core_weight
from nplora.trainer import Callback, Run
from nplora.trainer.history import StepRecord
from nplora.weights import buffers

STEPS = 5  # the check is after this step of a run, or after the last step of a shorter run
_REPEATS = 5  # how often the gradients without the filter are timed
# The filter is reported if it takes this many times as long. A smaller difference may be chance.
_SLOWER = 1.1


class FilterCheck(Callback):
    """Compares the time of the head's gradients with and without a word filter, once in a run.

    The time without the filter does not depend on the probabilities. So the check measures this time after a
    step, with logits that are all 0. The check changes no gradient.

    Args:
        head: a head to which the filter applies.
        say: prints a line.
    """

    def __init__(
        self, head: Linear | TrainedHead, word_filter: WordFilter, say: Callable[[str], None]
    ) -> None:
        self._head, self._filter, self._say = head, word_filter, say
        self._steps, self._kept = 0, list[float]()

    def on_step_end(self, run: Run, record: StepRecord) -> None:
        self._steps += 1
        if self._steps > STEPS:
            return
        self._kept += [record.metrics[KEPT]] if KEPT in record.metrics else []
        if self._kept and (self._steps == STEPS or run.step == run.total_steps):
            self._compare(run)

    def _compare(self, run: Run) -> None:
        rows, seconds = self._filter.usual_time()
        plain = seconds_without_filter(self._head, rows)
        if seconds > _SLOWER * plain:
            self._say(
                f"step {run.step}: --filter-vocabulary {self._filter.bound:g} makes the steps slower: the "
                f"gradients of the output layer take {1e3 * seconds:.3g} ms for {rows} tokens, and about "
                f"{1e3 * plain:.3g} ms without the filter. The filter keeps "
                f"{statistics.fmean(self._kept):.1%} of the vocabulary. A new run would be faster without "
                "this option, or with a larger probability"
            )


def seconds_without_filter(head: Linear | TrainedHead, rows: int) -> float:
    """The time in which the head's gradients for `rows` rows are computed without a filter."""
    weight = head.rows.value if isinstance(head, TrainedHead) else head.weight
    words, dim = weight.shape
    logits, dx = buffers.empty((rows, words), np.float32), buffers.empty((rows, dim), np.float32)
    products = 2 if isinstance(head, TrainedHead) else 1  # the weight's gradient costs as much as dx
    targets, losses, times = np.zeros(rows, np.int64), np.empty(rows), list[float]()
    for _ in range(_REPEATS):
        logits.fill(0)
        start = time.perf_counter()
        _core.cross_entropy(logits, targets, 1.0, losses, True)
        for _ in range(products):
            _core.matmul_t(core_weight(weight), logits, dx, False)
        times.append(time.perf_counter() - start)
    return statistics.median(times)
