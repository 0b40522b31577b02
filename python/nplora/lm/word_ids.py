"""WordIds: for sentences that are given as words, the token ids and the index of each word's first token."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from nplora import _check
from nplora.formats.errors import counted

Array = npt.NDArray[Any]

NO_TAG = -100  # the target of a token without a tag; `CrossEntropy` ignores such tokens


@dataclass(frozen=True)
class WordIds:
    """The token ids of sentences that are given as words.

    A word's tag is the target of the word's first token. A word has no token if the sentence was cut before
    the word, or if the tokenizer drops all characters of the word. The tag of a word without a token is not
    used.

    Attributes:
        ids: the token ids of each sentence, with the special tokens.
        first: for each sentence, int64 (words,): the index of each word's first token in the sentence's
            `ids`, or -1 if the word has no token.
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
        """For each word with a token, the index of its first token in the concatenation of all sentences."""
        starts = np.cumsum([0, *map(len, self.ids)])
        found = [start + own[own >= 0] for start, own in zip(starts, self.first, strict=False)]
        return np.concatenate([np.empty(0, np.int64), *found])

    def windows(self, longest: int, around: Sequence[int]) -> tuple[list[list[int]], Array]:
        """Divide the sentences that have too many tokens into overlapping windows.

        Each window shares at least a quarter of its tokens with the next window. (Special tokens do not
        count. Windows with room for only one token share none.) A word's label comes from the window in which
        the word's first token is furthest from a cut. The beginning and the end of a sentence are not cuts.

            >>> import nplora
            >>> words = nplora.load_encoder("encoder-model").word_ids([["a", "cat", "and", "a", "dog"]])
            >>> words.ids, words.windows(longest=6, around=[2, 3])
            ([[2, 5, 6, 8, 5, 7, 3]], ([[2, 5, 6, 8, 5, 3], [2, 6, 8, 5, 7, 3]], array([ 1,  2,  8,  9, 10])))

        Args:
            longest: the largest number of tokens of a window, including the special tokens.
            around: the ids of the special tokens before and after the tokens of a sentence. Each window also
                gets these special tokens.
        Returns:
            a tuple: a list with the token ids of each window; and, for each word with a token, the index of
            the word's first token in the concatenation of all windows, int64 (words,).
        Raises:
            ValueError: `longest` has no room for a word.
        """
        room = longest - len(around)
        if room < 1:
            raise ValueError(
                f"windows: longest is {longest}, expected more than the {len(around)} special tokens"
            )
        made, places, start = list[list[int]](), list[Array](), 0
        for ids in self.ids:
            same = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(around, ids, strict=False))
            before = len(list(same))
            after, excess = len(ids) - len(around) + before, len(ids) - longest
            begins = [0] if excess <= 0 else [*range(0, excess, max(1, 3 * room // 4)), excess]
            middles = [before + (a + b + room) // 2 for a, b in itertools.pairwise(begins)]
            edges = itertools.pairwise([0, *middles, len(ids)])
            for begin, (first, end) in zip(begins, edges, strict=True):
                body = ids[before + begin : min(before + begin + room, after)]
                made.append([*ids[:before], *body, *ids[after:]])
                places.append(np.arange(first, end) - begin + start)
                start += len(made[-1])
        return made, np.concatenate([np.empty(0, np.int64), *places])[self.rows()]

    def token_targets(self, tags: Iterable[npt.ArrayLike]) -> list[Array]:
        """Convert targets of words to targets of tokens: an int64 array (tokens,) for each sentence.

            >>> import nplora
            >>> words = nplora.load_encoder("encoder-model").word_ids([["a", "cat"], ["sitting"]], 8)
            >>> [targets.tolist() for targets in words.token_targets([[0, 1], [2]])]
            [[-100, 0, 1, -100], [-100, 2, -100]]

        Args:
            tags: for each sentence, an integer array (words,): the targets of the words.
        Returns:
            for each sentence, an array with each word's target at the index of the word's first token. All
            other elements are -100.
        Raises:
            ValueError: the number of sentences or of words is wrong. TypeError: the tags are not integers.
        """
        made = list[Array]()
        for ids, first, own in zip(self.ids, self.first, self._checked("token_targets", tags), strict=True):
            targets = np.full(len(ids), NO_TAG, np.int64)
            targets[first[first >= 0]] = own[first >= 0]
            made.append(targets)
        return made

    def kept(self, tags: Iterable[npt.ArrayLike]) -> list[Array]:
        """Return only the tags of words that have a token. Arguments and errors: see `token_targets`.

        >>> import nplora
        >>> words = nplora.load_encoder("encoder-model").word_ids([["a", "cat", "sat"]], longest=4)
        >>> [tags.tolist() for tags in words.kept([[5, 6, 7]])]
        [[5, 6]]
        """
        checked = self._checked("kept", tags)
        return [own[first >= 0] for first, own in zip(self.first, checked, strict=True)]

    def _checked(self, op: str, tags: Iterable[npt.ArrayLike]) -> list[Array]:
        made = [_check.as_array(op, f"tags[{i}]", own) for i, own in enumerate(tags)]
        if len(made) != len(self.first):
            raise ValueError(
                f"{op}: tags are given for {counted(len(made), 'sentence')}, expected {len(self.first)}"
            )
        for i, (own, first) in enumerate(zip(made, self.first, strict=True)):
            if own.shape != first.shape:
                raise ValueError(
                    f"{op}: tags[{i}] has shape {own.shape}, expected {first.shape}, one for each word"
                )
            if len(own) and not np.issubdtype(own.dtype, np.integer):
                raise TypeError(f"{op}: tags[{i}] has dtype {own.dtype}, expected integers")
        return made

    def per_word(self, values: Sequence[Any]) -> list[list[Any]]:
        """Group values by sentence and word. `values` has one value for each word that has a token.

        A word without a token gets None.
        """
        given = iter(values)
        return [[next(given) if place >= 0 else None for place in own.tolist()] for own in self.first]
