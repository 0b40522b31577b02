"""The results of an evaluation: scores with confidence intervals, and comparisons of two systems.

A system is the model, alone or with an adapter.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TypedDict

import numpy as np

from nplora.finetuning.data import DataReport
from nplora.finetuning.judging.statistics import (
    LEVEL,
    Measured,
    difference_interval,
    interval,
)

SIGNIFICANT = 0.05
NO_VALUE = "n/a"  # the value of a metric that failed in all examples
_RATES = 3  # decimals of a metric between 0 and 1
_LOSS = "loss"


class Score(TypedDict):
    """A metric with its 95 % confidence interval.

    Keys:
        value: the metric; NaN, which is null in JSON, if the metric failed in all examples.
        low, high: the interval; None for fewer than two examples. If the metric is True or False in each
            example, the interval is from Wilson's formula, otherwise from a bootstrap over the examples.
        examples: the number of examples.
        failed: the number of examples in which the metric failed. These examples count as 0, unless the
            metric failed in all examples.
        error: the first error of the metric; empty if it never failed.

    >>> nplora.evaluate("model.gguf", "valid.jsonl")["metrics"]["token_accuracy"]["examples"]
    4
    """

    value: float
    low: float | None
    high: float | None
    examples: int
    failed: int
    error: str


class MeanLoss(TypedDict):
    """A mean loss, and the number of tokens in the mean.

    >>> nplora.finetuning.MeanLoss(loss=2.5, tokens=100)
    {'loss': 2.5, 'tokens': 100}
    """

    loss: float
    tokens: int


class Evaluation(MeanLoss):
    """The dict that `evaluate` returns.

    Keys:
        loss, tokens: the mean loss, and the number of tokens in the mean.
        source: the name of the file.
        examples, truncated, emptied, skipped: counts of examples and rows, see `DataReport`.
        perplexity: e to the power of the loss.
        token_accuracy: the share of the tokens in the loss that are the model's most likely tokens.
        metrics: a dict from the name of each metric, including "loss" and "token_accuracy", to its `Score`.
            For multiple-choice rows: "acc", "acc_norm" and "acc_token". For preference pairs: "acc",
            "acc_token" and, with an adapter, "reward_acc" and "reward_margin".

    >>> result: nplora.finetuning.Evaluation = nplora.evaluate("model.gguf", "valid.jsonl")
    >>> result["tokens"], result["examples"]
    (12, 4)
    """

    source: str
    examples: int
    truncated: int
    emptied: int
    skipped: int
    perplexity: float
    token_accuracy: float
    metrics: dict[str, Score]


def evaluation_of(report: DataReport, measured: list[Measured]) -> Evaluation:
    """The results of one system."""
    scores = {one.name: _score(one) for one in measured}
    loss = scores[_LOSS]["value"]
    return Evaluation(
        loss=loss,
        tokens=int(measured[0].weights.sum()),
        source=report.source,
        examples=report.examples,
        truncated=report.truncated,
        emptied=report.emptied,
        skipped=report.skipped,
        perplexity=perplexity(loss),
        token_accuracy=scores["token_accuracy"]["value"],
        metrics=scores,
    )


def _score(measured: Measured) -> Score:
    found = interval(measured)
    low, high = (None, None) if found is None else found
    return Score(
        value=measured.value,
        low=low,
        high=high,
        examples=len(measured.values),
        failed=measured.failed,
        error=measured.error,
    )


def perplexity(loss: float) -> float:
    """e to the power of the loss; infinite if it is too large for a float."""
    with np.errstate(over="ignore"):
        return float(np.exp(np.float64(loss)))


@dataclass(frozen=True)
class Difference:
    """The difference between two systems, measured by one metric on the same examples; `print` shows it.

    Attributes:
        one, other: the names of the systems.
        metric: the name of the metric.
        values: the values of the metric for `one` and for `other`.
        difference: the value for `one` minus the value for `other`.
        low, high: the 95 % confidence interval of the difference; None for fewer than two examples. If the
            metric counts each example as right or wrong for both systems, the interval is from Newcombe's
            formula. If the metric is right or wrong for one system only, and constant for the other, the
            interval is from Wilson's formula. Otherwise, the interval is from a bootstrap that draws the
            same examples for both systems. The interval is not adjusted for `comparisons`.
        p: the p-value of a paired permutation test, adjusted for the number of comparisons by Holm's method.
            If all systems are equally good, the probability that at least one p of a metric is below 0.05
            is at most 5 %. None for fewer than two examples.
        is_better: whether `one` is better than `other`; None if p is not below 0.05, or if a larger value of
            the metric is neither better nor worse (reward_margin).
        examples: the number of examples.
        comparisons: the number of pairs of systems. If all permutations of n examples are tried, p is at
            least min(1, comparisons * 2 / 2**n).

    >>> comparison = nplora.finetuning.compare("model.gguf", "valid.jsonl", ["adapter"])
    >>> comparison.differences[0].one, comparison.differences[0].other
    ('adapter', 'base')
    """

    one: str
    other: str
    metric: str
    values: tuple[float, float]
    difference: float
    low: float | None
    high: float | None
    p: float | None
    is_better: bool | None
    examples: int
    comparisons: int

    def __str__(self) -> str:
        one, other = f"{self.one!r}", "the base" if self.other == BASE else f"{self.other!r}"
        if math.isnan(self.difference) and self.metric != _LOSS:
            values = " and ".join(shown(self.metric, value) for value in self.values)
            return f"{one} and {other} cannot be compared by {self.metric}: {values}"
        judgement = {
            True: f"{one} is better than {other}",
            False: f"{one} is worse than {other}",
            None: f"no clear difference between {one} and {other}",
        }[self.is_better]
        if self.is_better is None and self.p is not None and self.p < SIGNIFICANT:
            judgement = f"{one} differs from {other}"
        least = self.comparisons * 2.0 ** (1 - self.examples)  # of p, if all permutations are tried
        if self.is_better is None and self.examples > 1 and least >= SIGNIFICANT:
            judgement = f"{self.examples} examples are too few to tell {one} from {other}"
        value, other_value, difference = (
            shown(self.metric, number) for number in (*self.values, self.difference)
        )
        if self.difference == 0:
            return f"{one} and {other} have the same {self.metric}: {value}"
        text = f"{judgement}: {self.metric} {value} against {other_value}, difference {difference}"
        if self.low is None or self.high is None or self.p is None:
            return f"{text} (no interval: fewer than two examples, or values that are not finite)"
        low, high = (shown(self.metric, number) for number in (self.low, self.high))
        return f"{text} ({LEVEL:.0%} interval {low} to {high}, {_shown_p(self.p)})".replace("%", " %")


BASE = "base"  # the name of the model without an adapter


def difference_of(
    name: str, one: Measured, other_name: str, other: Measured, p: float | None, comparisons: int
) -> Difference:
    """Compare two systems by one metric. `p` and `comparisons` are those of `Difference`."""
    found, difference = difference_interval(one, other), one.value - other.value
    is_better = None
    if p is not None and p < SIGNIFICANT and one.lower_is_better is not None:
        is_better = (difference < 0) == one.lower_is_better
    low, high = (None, None) if found is None else found
    values, examples = (one.value, other.value), len(one.values)
    return Difference(
        name, other_name, one.name, values, difference, low, high, p, is_better, examples, comparisons
    )


def shown(metric: str, value: float) -> str:
    """A value of a metric as text."""
    if math.isnan(value) and metric not in (_LOSS, "perplexity"):
        return NO_VALUE
    if not math.isfinite(value):
        return str(value)
    if metric == "perplexity":
        return f"{value:.4g}" if value < 1e4 else f"{value:.3e}"
    return f"{value:.4f}" if metric == _LOSS else f"{value:.{_RATES}f}"


def _shown_p(p: float) -> str:
    return "p < 0.001" if p < 0.001 else f"p = {p:.3f}"
