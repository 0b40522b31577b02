"""Decides whether a regular expression from a file is safe to run.

A regular expression is safe if a search in a text of n characters takes at most about n² steps. When a later
part of the expression fails to match, a search tries all other ways to match the earlier parts. So this
module counts the ways to match each part. Each alternative may contain at most one part that matches texts of
any length in several ways, such as `\\s*` in `\\s*[\\r\\n]+`. An alternative may also contain a few parts
that match texts of limited length in several ways. A group that repeats must match in only one way.
Backreferences and other syntax that no tokenizer needs are refused.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import NoReturn

MAX_PATTERN = 1000  # characters
_MAX_DEPTH = 8
_MAX_CHOICES = 256
_LONG = 16  # this many repetitions count as unlimited
_QUANTIFIER = re.compile(r"(?:[*+?]|\{(\d{0,9})(,?)(\d{0,9})\})")
_ESCAPE = re.compile(
    r"\\(?:[pP]\{\^?\w+\}|u[0-9A-Fa-f]{4}|x[0-9A-Fa-f]{2}|[^a-zA-Z0-9]|[dDsSwWrntfvbBAzZhH])"
)
_GROUP = re.compile(r"\((?:\?(?:i?:|=|!|<=|<!))?(?!\?)")
_LOOKAROUND = re.compile(r"\(\?(?:=|!|<)")


def is_safe(pattern: str) -> bool:
    """Whether searching a text of n characters takes at most about n² steps."""
    if len(pattern) > MAX_PATTERN:
        return False
    try:
        reader = _Reader(pattern)
        cost = _cost(reader.alternatives(0), False)
        return reader.place == len(pattern) and cost.degree <= 1 and cost.choices <= _MAX_CHOICES
    except _UnknownError:
        return False


class _UnknownError(Exception):
    """Raised if a pattern contains syntax that is not known to be harmless."""


@dataclass(frozen=True)
class _Part:
    """One character, anchor or group of a pattern, repeated `least` to `most` times."""

    least: int = 1
    most: float = 1
    group: list[list[_Part]] | None = None
    looks: bool = False  # a lookaround, which can fail however often it repeats


@dataclass(frozen=True)
class _Cost:
    """The number of ways to match a text of n characters: `choices` · n ** `degree`."""

    degree: int
    choices: int


def _cost(alternatives: list[list[_Part]], can_fail: bool) -> _Cost:
    """Return the number of ways to match a group. `can_fail`: whether a part after the group can fail."""
    costs = [_cost_of_sequence(parts, can_fail) for parts in alternatives]
    return _Cost(max(cost.degree for cost in costs), sum(cost.choices for cost in costs))


def _cost_of_sequence(parts: list[_Part], can_fail: bool) -> _Cost:
    degree, choices = 0, 1
    for part in reversed(parts):
        inner = _cost(part.group or [[]], can_fail or part.looks or part.most > 1)
        if part.most > 1 and inner != _Cost(0, 1):
            raise _UnknownError
        degree, choices = degree + inner.degree, choices * inner.choices
        if can_fail and part.most >= _LONG:
            degree += 1
        elif can_fail:
            choices *= 1 + int(part.most) - part.least
        can_fail = can_fail or part.least > 0
    return _Cost(degree, choices)


class _Reader:
    """Parses a pattern."""

    def __init__(self, pattern: str) -> None:
        self.pattern, self.place = pattern, 0

    def alternatives(self, depth: int) -> list[list[_Part]]:
        """Parse a group up to its closing parenthesis or the end of the pattern; return its alternatives."""
        if depth > _MAX_DEPTH:
            self._refuse()
        found: list[list[_Part]] = [[]]
        while self.place < len(self.pattern) and self.pattern[self.place] != ")":
            if self.pattern[self.place] == "|":
                self.place += 1
                found.append([])
            else:
                found[-1].append(self._part(depth))
        return found

    def _part(self, depth: int) -> _Part:
        start = self.pattern[self.place]
        if start == "(":
            looks = bool(_LOOKAROUND.match(self.pattern, self.place))
            self._skip(_GROUP)
            group = self.alternatives(depth + 1)
            self._skip(re.compile(r"\)"))
            least, most = self._times()
            return _Part(least, most, group, looks)
        if start == "[":
            self._class()
        elif start == "\\":
            self._skip(_ESCAPE)
        elif start in "*+?{":
            self._refuse()
        else:
            self.place += 1
        return _Part(*self._times())

    def _class(self) -> None:
        """Skip a character class, which may contain other classes."""
        depth = 0
        while True:
            start = self.pattern[self.place : self.place + 1]
            if start == "\\":
                self._skip(_ESCAPE)
                continue
            depth += {"[": 1, "]": -1}.get(start, 0)
            self.place += 1
            if not depth:
                return
            if not start:
                self._refuse()

    def _times(self) -> tuple[int, float]:
        found = _QUANTIFIER.match(self.pattern, self.place)
        if found is None:
            return 1, 1
        self.place = found.end()
        if self.pattern[self.place : self.place + 1] in ("+", "?"):  # possessive or lazy
            self.place += 1
            if found[0][0] == "{":  # Oniguruma reads this as a repetition of a repetition
                self._refuse()
        if _QUANTIFIER.match(self.pattern, self.place):
            self._refuse()
        if found[0][0] != "{":
            return {"*": (0, _LONG), "+": (1, _LONG), "?": (0, 1)}[found[0]]
        least = int(found[1] or 0)
        return least, float(found[3] or (_LONG if found[2] else least))

    def _skip(self, wanted: re.Pattern[str]) -> None:
        found = wanted.match(self.pattern, self.place)
        if found is None:
            self._refuse()
        self.place = found.end()

    def _refuse(self) -> NoReturn:
        raise _UnknownError
