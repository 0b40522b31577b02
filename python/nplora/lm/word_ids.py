"""WordIds: the token ids of sentences, and the token of each word that carries its tag."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from nplora import _check

Array = npt.NDArray[Any]

NO_TAG = -100  # the target of a token without a tag, which `CrossEntropy` leaves out


@dataclass(frozen=True)
class WordIds:
    """The token ids of sentences that are given as words.

    Only the first token of a word carries its tag. A word without a token has no tag: the sentence was cut
    before it, or the tokenizer drops its characters.

    Attributes:
        ids: the token ids of each sentence, with the special tokens.
        first: for each sentence, int64 (words,): the place of the first token of each word, or -1.
        cut: the number of sentences that were too long, and were cut.
    """

    ids: list[list[int]]
    first: list[Array]
    cut: int = 0

    @property
    def lost(self) -> int:
        """The number of words without a token."""
        return sum(int((own < 0).sum()) for own in self.first)

    def rows(self) -> Array:
        """The place of the first token of each word among the tokens of all sentences."""
        starts = np.cumsum([0, *map(len, self.ids)])
        found = [start + own[own >= 0] for start, own in zip(starts, self.first, strict=False)]
        return np.concatenate([np.empty(0, np.int64), *found])

    def token_targets(self, tags: Iterable[Array]) -> list[Array]:
        """The targets of the tokens of each sentence, int64 (tokens,), given those of its words."""
        made = [np.full(len(ids), NO_TAG, np.int64) for ids in self.ids]
        for targets, first, own in zip(made, self.first, tags, strict=True):
            targets[first[first >= 0]] = own[first >= 0]
        return made

    def kept(self, values: Iterable[Array]) -> list[Array]:
        """The values of the words that have a token, for each sentence, given a value for each word."""
        return [own[first >= 0] for first, own in zip(self.first, values, strict=True)]

    def per_word(self, values: Sequence[Any]) -> list[list[Any]]:
        """Divide the values of `rows` among the sentences. A word without a token gets None."""
        given = iter(values)
        return [[next(given) if place >= 0 else None for place in own.tolist()] for own in self.first]


def sentences_of(op: str, name: str, given: Iterable[Any]) -> list[tuple[str, ...]]:
    """The sentences as tuples of words. Raises TypeError if one of them is not a list of texts."""
    if not isinstance(given, Iterable) or isinstance(given, str):
        raise TypeError(f"{op}: {name} is {_check.kind(given)}, expected a list of lists of texts")
    lists = (words.tolist() if isinstance(words, np.ndarray) else words for words in given)
    return [_check.texts(op, f"{name}[{i}]", words) for i, words in enumerate(lists)]
