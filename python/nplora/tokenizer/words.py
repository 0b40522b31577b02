"""Checks sentences that are lists of words. Finds the words of a text, and the first token of each word."""

from __future__ import annotations

import itertools
import re
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from typing import TypeGuard

import numpy as np

from nplora import _check
from nplora.formats.errors import brief


def is_word(value: object) -> TypeGuard[str]:
    """Whether a value is a text with at least one character that is not a space."""
    return isinstance(value, str) and bool(value.strip())


def word_spans(text: str) -> Iterator[tuple[int, int]]:
    """Yield the start and the end of each word of a text, as indices of characters.

    The text is split at spaces. Each punctuation mark or sign (such as $ or +) at the start or end of a word
    then becomes a separate word.

        >>> from nplora.tokenizer.words import word_spans
        >>> text = "(Where's my order?)"
        >>> [text[begin:end] for begin, end in word_spans(text)]
        ['(', "Where's", 'my', 'order', '?', ')']
    """
    for piece in re.finditer(r"\S+", text):
        begin, end = piece.span()
        while begin < end and _is_mark(text[begin]):
            yield begin, begin + 1
            begin += 1
        last = end
        while last > begin and _is_mark(text[last - 1]):
            last -= 1
        if begin < last:
            yield begin, last
        yield from ((place, place + 1) for place in range(last, end))


def _is_mark(character: str) -> bool:
    category = unicodedata.category(character)  # P: punctuation, Sc: currency, Sm: mathematics
    return category[0] == "P" or category in ("Sc", "Sm")


def sentences_of(op: str, name: str, given: object) -> list[tuple[str, ...]]:
    """Check sentences that are lists of words, and return each sentence as a tuple of words.

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
            word. If False, this token belongs to no word.
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
