"""Checks the words of sentences that a user gives, and finds the first token of each word."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from typing import TypeGuard

import numpy as np

from nplora import _check
from nplora.formats.errors import brief


def is_word(value: object) -> TypeGuard[str]:
    """Whether a value is a text with at least one character that is not a space."""
    return isinstance(value, str) and bool(value.strip())


def sentences_of(op: str, name: str, given: object) -> list[tuple[str, ...]]:
    """Check sentences of words, and return each sentence as a tuple of words.

    Raises:
        TypeError: a sentence is not a list of texts. ValueError: a word is empty, or has only spaces.
    """
    if not isinstance(given, Iterable) or isinstance(given, str):
        raise TypeError(f"{op}: {name} is {_check.kind(given)}, expected a list of lists of texts")
    made = list[tuple[str, ...]]()
    for i, words in enumerate(given):
        words = words.tolist() if isinstance(words, np.ndarray) else words
        if not isinstance(words, list | tuple):
            raise TypeError(f"{op}: {name}[{i}] is {brief(words)}, expected a list of texts")
        for j, word in enumerate(words):
            if not is_word(word):
                error = ValueError if isinstance(word, str) else TypeError
                raise error(f"{op}: {name}[{i}][{j}] is {brief(word)}, expected a word")
        made.append(tuple(words))
    return made


def first_tokens(offsets: Iterable[tuple[int, int]], words: Sequence[str], with_space: bool) -> list[int]:
    """The position of the first token of each word of a sentence, or -1 for a word without tokens.

    A token that covers several words belongs to the first of these words.

    Args:
        offsets: for each token, the range of characters that the token stands for.
        with_space: whether a token that consists only of the space before a word counts as a token of the
            word.
    """
    ends = list(itertools.accumulate((len(word) + 1 for word in words), initial=-1))[1:]
    begins = [end - len(word) - with_space for end, word in zip(ends, words, strict=True)]
    first, word = [-1] * len(words), 0
    for place, (begin, end) in enumerate(offsets):
        if begin == end:  # a special token
            continue
        while word < len(words) and ends[word] <= begin:
            word += 1
        if word == len(words):
            break
        if end > begins[word] and first[word] < 0:
            first[word] = place
    return first
