"""Metrics of a generated answer: exact match, F1, and functions that the user provides."""

from __future__ import annotations

import collections
import contextlib
import importlib
import itertools
import math
import os
import re
import string
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np

from nplora import _check
from nplora.formats.errors import brief
from nplora.runtime.stderr import stderr

# Takes the answer, the reference and the row of the data; returns a number, higher for better answers.
MetricFunction: TypeAlias = Callable[[str, str, dict[str, Any]], float]

_MESSAGE = 200  # characters of an error's message that a result holds
_SHOWN = 3  # tracebacks that are printed for a metric, one for each kind of error
# Names of entries that the results and records of an evaluation already have.
_RESERVED = {
    "loss", "perplexity", "token_accuracy", "acc", "acc_norm", "acc_token", "reward_acc", "reward_margin",
    "row", "answer", "reference", "system",
}  # fmt: skip
_ARTICLES = re.compile(r"\b(a|an|the)\b")
# A number with its sign and with the marks inside it, as in -5, 1.5, 3:1, 1/2 and 2024-05-01; or punctuation.
_NUMBER_OR_MARK = re.compile(rf"((?<!\w)-?\d+(?:[.,:/-]\d+)*)|[{re.escape(string.punctuation)}]")
_THOUSANDS = re.compile(r"(?<=\d),(?=\d{3}\b)")


def _plain(text: str) -> str:
    return text.lower().replace("\N{MINUS SIGN}", "-")


def _unmarked(text: str) -> str:
    """The text in lower case, without punctuation. Numbers keep their punctuation, as in -1.5 or 3:2."""
    return _NUMBER_OR_MARK.sub(lambda found: found[1] or "", _THOUSANDS.sub("", _plain(text)))


def _without_articles(text: str) -> str:
    return _ARTICLES.sub(" ", _unmarked(text))


def words_of(answer: str, reference: str) -> tuple[list[str], list[str]]:
    """The words of both texts, in lower case. Punctuation and English articles are removed.

    The steps and their order are those of SQuAD's script evaluate-v1.1.py (Rajpurkar et al. 2016), with two
    differences. First, numbers keep their signs and the marks inside them, as in -1.5. Second, articles are
    removed only if each text has words besides articles, and punctuation is removed only if each text has
    words besides punctuation. So answers such as "A" and "+" can be compared too.

    >>> words_of("The answer: -1.5", "1.5")
    (['answer', '-1.5'], ['1.5'])
    >>> words_of("A", "the")
    (['a'], ['the'])
    """
    for normalise in (_without_articles, _unmarked, _plain):
        found, wanted = normalise(answer).split(), normalise(reference).split()
        if found and wanted:
            break
    return found, wanted


def exact_match(answer: str, reference: str, row: Mapping[str, Any] | None = None) -> bool:
    """Whether both texts have the same words in the same order; see `words_of`."""
    found, wanted = words_of(answer, reference)
    return found == wanted


def f1(answer: str, reference: str, row: Mapping[str, Any] | None = None) -> float:
    """The harmonic mean of precision and recall over the words of both texts; see `words_of`.

    As in SQuAD 2.0, the result is 1 if neither text has words, and 0 if only one of them has words.
    """
    found, wanted = words_of(answer, reference)
    if not found or not wanted:
        return float(found == wanted)
    shared = sum((collections.Counter(found) & collections.Counter(wanted)).values())
    return 2 * shared / (len(found) + len(wanted))


BY_NAME: dict[str, MetricFunction] = {"exact_match": exact_match, "f1": f1}


@dataclass
class Metric:
    """A metric: its name, and the function that scores an answer.

    Attributes:
        is_rate: whether all results so far are True or False, so that the metric is the share of right
            answers.
        failed: the number of examples in which the function failed.
        error: the first error.
    """

    name: str
    function: MetricFunction

    def __post_init__(self) -> None:
        self.failed, self.error, self.is_rate = 0, "", True
        self._seen = set[tuple[Any, ...]]()

    def score(self, answer: str, reference: str, row: dict[str, Any], where: str) -> float:
        """The score of an answer. If the function fails, its traceback is printed, and the score is 0."""
        try:
            found: Any = self.function(answer, reference, dict(row))
            self.is_rate = self.is_rate and isinstance(found, bool | np.bool_)
            score = float(found) if hasattr(found, "__float__") else math.nan
            if not math.isfinite(score):
                raise ValueError(f"the metric returned {brief(found)}, expected a finite number")
        except (Exception, SystemExit) as error:
            self.failed += 1
            self.error = self.error or brief_error(error)
            self._show(error, where)
            return 0.0
        return score

    def _show(self, error: BaseException, where: str) -> None:
        """Print the traceback of an error.

        Print nothing if an error of the same class from the same line of code was printed before, or if
        `_SHOWN` errors were printed already.
        """
        frames = traceback.extract_tb(error.__traceback__)
        kind = (type(error), frames[-1].filename, frames[-1].lineno)
        if kind in self._seen or len(self._seen) == _SHOWN:
            return
        self._seen.add(kind)
        error.__traceback__ = error.__traceback__ and error.__traceback__.tb_next  # without our own frame
        text = "".join(traceback.format_exception(error))
        print(f"metric {self.name} failed in {where}:\n{text}", file=stderr, end="", flush=True)


def brief_error(error: BaseException) -> str:
    """The class of an error, and the first line of its message."""
    *_, last = traceback.format_exception_only(error)  # works even if the error's own __str__ fails
    return last.strip().partition("\n")[0][:_MESSAGE]


def metrics_of(op: str, given: object) -> list[Metric]:
    """Make the metrics that `given` names. `given` is a text such as "exact_match,f1" or "module:function",
    a function, or a list of texts and functions.

    Raises:
        ValueError: there is no such metric, module or function; or a metric is given twice.
        TypeError: a metric is neither a text nor a function.
    """
    several = list(given) if isinstance(given, Sequence) and not isinstance(given, str) else [given]
    found = list[Metric]()
    for item in several:
        if callable(item):
            name = getattr(item, "__name__", type(item).__name__)
            found.append(Metric(_numbered(name, [metric.name for metric in found]), item))
        elif isinstance(item, str):
            found += [_named(op, name.strip()) for name in item.split(",")]
        else:
            raise TypeError(f"{op}: metric is {brief(item)}, expected a name or a function")
    names = [metric.name for metric in found]
    if twice := [name for name in names if names.count(name) > 1]:
        raise ValueError(f"{op}: metric {twice[0]} is given twice")
    if taken := [name for name in names if name in _RESERVED]:
        raise ValueError(f"{op}: the results already have an entry {taken[0]}; give the metric another name")
    return found


def _numbered(name: str, known: Sequence[str]) -> str:
    """Return `name`, with a number appended if `known` already has this name."""
    count = itertools.count(2)
    found = name
    while found in known:
        found = f"{name}_{next(count)}"
    return found


def _named(op: str, name: str) -> Metric:
    module, colon, attribute = name.partition(":")
    if colon:
        return Metric(name, _imported(op, name, module, attribute))
    if name not in BY_NAME:
        known = ", ".join(BY_NAME)
        near = _check.suggestion(name, BY_NAME) or f", expected {known} or module:function"
        raise ValueError(f"{op}: no metric {name!r}{near}")
    return Metric(name, BY_NAME[name])


def _imported(op: str, name: str, module: str, attribute: str) -> MetricFunction:
    """Import a function from a module. The module may be a file in the working directory."""
    with _working_directory():
        try:
            value: Any = importlib.import_module(module) if module else None
        except ModuleNotFoundError as error:
            if error.name != module.partition(".")[0] and error.name != module:
                raise
            raise ValueError(
                f"{op}: metric {name!r}: the module {module!r} is neither in {os.getcwd()} nor installed"
            ) from None
    for part in attribute.split("."):
        if value is None or not part or not hasattr(value, part):
            near = _check.suggestion(part, [known for known in dir(value) if known[0] != "_"])
            raise ValueError(f"{op}: metric {name!r}: {module} has no {part!r}{near}")
        value = getattr(value, part)
    if not callable(value):
        raise ValueError(f"{op}: metric {name!r} is {brief(value)}, expected a function")
    return value  # type: ignore[no-any-return]


@contextlib.contextmanager
def _working_directory() -> Iterator[None]:
    """A context in which modules are imported from the working directory first."""
    place = os.getcwd()
    sys.path.insert(0, place)
    try:
        yield
    finally:
        sys.path.remove(place)
