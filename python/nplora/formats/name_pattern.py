"""The patterns of PEFT's `rank_pattern` and `alpha_pattern`: a small, safe subset of regular expressions.

PEFT passes a file's patterns to a backtracking engine, where `(a+)+$` can run for ever. This module accepts
only the syntax below. The matcher follows all alternatives of a pattern at once, so its time grows only with
the product of the pattern's length and the name's length.

- ASCII letters and digits, the space, the characters _ - / : and all non-ASCII characters match themselves.
  Other ASCII punctuation matches itself after a backslash.
- One character is matched by `.`, `\\d`, `\\w`, or a set such as `[a-z0-9_]` or `[^.]`.
- One character can be repeated with `*`, `+`, `?` or their lazy forms `*?`, `+?`, `??`. A group cannot be
  repeated.
- Alternatives are written `(a|b)` or `(?:a|b)`, nested at most 8 deep.
- `^` is the start and `$` is the end of the name.
"""

import functools
import re
import string
from collections.abc import Iterable
from dataclasses import dataclass
from typing import NoReturn

from nplora.formats.errors import LimitError, UnsafeError, brief

MAX_LENGTH = 512
_MAX_DEPTH = 8
_PLAIN = frozenset(string.ascii_letters + string.digits + "_-/: ")
_ESCAPED = {"d": string.digits, "w": string.ascii_letters + string.digits + "_"}
_RANGE = re.compile(r"([A-Za-z0-9])-([A-Za-z0-9])")


class Name:
    """A module's name. Bit i of the integer `places[c]` is set if character i of the name is `c`."""

    def __init__(self, text: str) -> None:
        self.everywhere = (1 << len(text)) - 1
        self.end = 1 << len(text)
        self.places: dict[str, int] = {}
        for position, character in enumerate(text):
            self.places[character] = self.places.get(character, 0) | 1 << position

    def where(self, characters: Iterable[str]) -> int:
        return sum({self.places[character] for character in characters if character in self.places})


# A set of positions is an integer with one bit for each position, as in `Name`. The method `follow` returns
# the positions at which one part of a pattern can end if the part begins at one of the positions in `starts`.


@dataclass(frozen=True)
class _Character:
    characters: frozenset[str]
    negated: bool
    repeat: str = ""

    @property
    def only_letter(self) -> str:
        """The only text that this part of a pattern matches, if that is a single character; else ""."""
        plain = len(self.characters) == 1 and not self.negated and not self.repeat
        return "".join(self.characters) if plain else ""

    def follow(self, name: Name, starts: int) -> int:
        allowed = name.where(self.characters)
        if self.negated:
            allowed = name.everywhere & ~allowed
        reached = starts & allowed
        if self.repeat in ("*", "+"):
            # The addition's carry runs from each start to the end of the allowed characters that follow it.
            reached = ((allowed + reached ^ allowed) | reached) & allowed
        reached <<= 1
        return reached | starts if self.repeat in ("*", "?") else reached


@dataclass(frozen=True)
class _End:
    at_start: bool

    def follow(self, name: Name, starts: int) -> int:
        return starts & (1 if self.at_start else name.end)


@dataclass(frozen=True)
class _Choice:
    branches: tuple[tuple["_Piece", ...], ...]

    def follow(self, name: Name, starts: int) -> int:
        reached = 0
        for branch in self.branches:
            ends = starts
            for piece in branch:
                ends = piece.follow(name, ends)
                if not ends:
                    break
            reached |= ends
        return reached


_Piece = _Character | _End | _Choice


@functools.lru_cache(256)
def _letter(character: str) -> _Character:
    """Return a `_Character` that matches one given character once. All patterns share these objects."""
    return _Character(frozenset(character), False)


class NamePattern:
    """A compiled pattern.

    Raises:
        UnsafeError: the pattern uses syntax that is not listed at the top of this module.
        LimitError: the pattern is longer than 512 characters.
    """

    def __init__(self, text: str, source: str) -> None:
        if len(text) > MAX_LENGTH:
            raise LimitError(
                f"{source}: a pattern has {len(text):,} characters, expected at most {MAX_LENGTH}"
            )
        self.text = text
        self._source = source
        self._position = 0
        self._root = self._choice(0)
        if self._position < len(text):
            self._refuse()
        self.only_name = self._as_name()

    def _as_name(self) -> str | None:
        """Return `name` if the pattern is `^name` without special characters, else None."""
        pieces = self._root.branches[0]
        if len(self._root.branches) > 1 or pieces[:1] != (_End(at_start=True),):
            return None
        letters = [piece.only_letter for piece in pieces[1:] if isinstance(piece, _Character)]
        return "".join(letters) if len(letters) == len(pieces) - 1 and all(letters) else None

    def matches(self, name: Name) -> bool:
        """Whether PEFT's regular expression `(.*\\.)?(pattern)$` matches a name from its start."""
        starts = 1 | name.where(".") << 1
        return bool(self._root.follow(name, starts) & name.end)

    def _refuse(self) -> NoReturn:
        where = f"character {self._position + 1} of the pattern {brief(self.text)}"
        raise UnsafeError(
            f"{self._source}: {where} is outside the supported syntax (no repeated groups, no flags)"
        )

    def _next(self, expected: str = "") -> str:
        """Consume and return the next character.

        If `expected` is given and does not contain the next character, consume nothing and return "".
        """
        character = self.text[self._position : self._position + 1]
        if expected and (not character or character not in expected):
            return ""
        self._position += 1
        return character

    def _choice(self, depth: int) -> _Choice:
        branches: list[tuple[_Piece, ...]] = []
        while True:
            branches.append(self._branch(depth))
            if not self._next("|"):
                return _Choice(tuple(branches))

    def _branch(self, depth: int) -> tuple[_Piece, ...]:
        pieces: list[_Piece] = []
        while self._position < len(self.text) and self.text[self._position] not in "|)":
            if self._next("("):
                pieces.append(self._group(depth + 1))
            elif end := self._next("^$"):
                pieces.append(_End(at_start=end == "^"))
            else:
                pieces.append(self._character())
        return tuple(pieces)

    def _group(self, depth: int) -> _Choice:
        if depth > _MAX_DEPTH or (self._next("?") and not self._next(":")):
            self._refuse()
        group = self._choice(depth)
        if not self._next(")") or self.text[self._position : self._position + 1] in ("*", "+", "?", "{"):
            self._refuse()
        return group

    def _character(self) -> _Character:
        if self._next("."):
            characters, negated = "", True
        elif self._next("["):
            characters, negated = self._set()
        elif self._next("\\"):
            characters, negated = self._escaped(), False
        else:
            if self.text[self._position] not in _PLAIN and self.text[self._position].isascii():
                self._refuse()
            characters, negated = self._next(), False
        repeat = self._next("*+?")
        if repeat:
            self._next("?")  # lazy and greedy repeats match the same names
        elif len(characters) == 1 and not negated:
            return _letter(characters)
        return _Character(frozenset(characters), negated, repeat)

    def _escaped(self) -> str:
        if self._position == len(self.text):
            self._refuse()
        character = self._next()
        if character in _ESCAPED:
            return _ESCAPED[character]
        if character.isalnum() or not character.isascii():
            self._position -= 1
            self._refuse()
        return character

    def _set(self) -> tuple[str, bool]:
        negated = bool(self._next("^"))
        characters = ""
        while not self._next("]"):
            if self._position == len(self.text) or self.text[self._position] == "[":
                self._refuse()
            if self._next("\\"):
                characters += self._escaped()
            elif span := _RANGE.match(self.text, self._position):
                self._position = span.end()
                characters += "".join(map(chr, range(ord(span[1]), ord(span[2]) + 1)))
            else:
                characters += self._next()
        return characters, negated
