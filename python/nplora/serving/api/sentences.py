"""Sentences: the texts whose words a classifier labels, and the labels and entities for the answer."""

from __future__ import annotations

import dataclasses
import itertools
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from nplora.finetuning.classification.entities import entities, kinds_of
from nplora.lm import TextClassifier
from nplora.lm.classifier import probabilities
from nplora.lm.word_ids import WordIds
from nplora.serving.fields import wrong
from nplora.serving.jobs.shapes import Shape
from nplora.serving.request_error import RequestError
from nplora.tokenizer.words import is_word, word_spans

Array = npt.NDArray[Any]

_MOST = 1 << 16  # the most words of a request, and the most tokens
_MOST_CHARACTERS = 16 * _MOST  # of all words; the tokenizer may need seconds for more
_MOST_LOGITS = 1 << 24  # 64 MiB
_ARRAY = 128  # the bytes of a small array in addition to its values, rounded up


@dataclasses.dataclass(frozen=True)
class Sentences:
    """The sentences of a request to a classifier of words.

    Attributes:
        texts: the text of each sentence. If a client sent words, they are joined by spaces.
        spans: for each sentence, where each word begins and ends in the sentence's text, int64 (words, 2).
        first: for each sentence, an array with the index of each word's first token, as in `WordIds`.
        rows: for each word that has a token, the index of its row of logits.
    """

    texts: list[str]
    spans: list[Array]
    first: list[Array] = dataclasses.field(default_factory=list)
    rows: Array = dataclasses.field(default_factory=lambda: np.empty(0, np.int64))

    @classmethod
    def read(cls, inputs: Sequence[object]) -> Sentences:
        """Read the items of the field `input`, which are texts or lists of words.

        Raises:
            RequestError: an item is neither a text nor a list of words, an item has no word, or there are too
                many words or characters.
        """
        texts, spans, room, characters = list[str](), list[Array](), _MOST, _MOST_CHARACTERS
        for i, given in enumerate(inputs):
            words = None if isinstance(given, str) else _checked_words(f"input[{i}]", given)
            text = given if isinstance(given, str) else " ".join(words or ())
            characters -= len(text)
            if characters < 0:
                raise _too_long("characters", _MOST_CHARACTERS)
            found = word_spans(text) if words is None else _joined_spans(words)
            own = list(itertools.islice(found, room + 1))
            if not own:
                raise wrong(f"input[{i}]", given, "a text or a list of words, with at least one word")
            room -= len(own)
            if room < 0:
                raise _too_long("words", _MOST)
            texts.append(text)
            spans.append(np.array(own, np.int64))
        return cls(texts, spans)

    def words(self) -> list[list[str]]:
        """The words of each sentence."""
        return [
            [text[begin:end] for begin, end in own.tolist()]
            for text, own in zip(self.texts, self.spans, strict=True)
        ]

    def encoded(
        self, classifier: TextClassifier, longest: int, cut: int | None
    ) -> tuple[Sentences, list[list[int]]]:
        """Return a copy whose `first` and `rows` are set, and a list of the token ids of each window.

        A sentence that is too long for the classifier is divided into several windows, as in `predict_words`.

        Args:
            longest: the largest number of tokens of a window.
            cut: the number of tokens after which sentences are cut; None: they are not cut.
        Raises:
            RequestError: there are too many tokens. Other errors: those of `Encoder.word_ids`.
        """
        most = min(_MOST, _MOST_LOGITS // len(classifier.labels))
        words = classifier.encoder.word_ids(self.words(), most if cut is None else min(cut, most))
        ids, rows = classifier.windows(words, longest)
        if (words.cut and cut is None) or sum(map(len, ids)) > most:
            raise _too_long("tokens (a token counts once for each window that contains it)", most)
        return dataclasses.replace(self, first=words.first, rows=rows), ids

    @property
    def nbytes(self) -> int:
        """The number of bytes of memory that this object takes."""
        arrays = [*self.spans, *self.first, self.rows]
        return sum(map(sys.getsizeof, self.texts)) + sum(array.nbytes + _ARRAY for array in arrays)

    def tagged(self, classifier: TextClassifier, logits: Array) -> list[Shape]:
        """Return an object for each sentence in the answer: its words with their labels, and its entities.

        The fields of words and entities have the names that transformers gives them.

        Args:
            logits: array (tokens, outputs) for the tokens of all windows.
        """
        names, values = _rated(classifier, logits[self.rows])
        has_entities = classifier.task == "single" and kinds_of(classifier.labels)
        made, nothing = list[Shape](), (None,) * len(names)
        for i, rated in enumerate(WordIds([], self.first).per_word(values)):
            text, own = self.texts[i], self.spans[i].tolist()
            words = [
                {**dict(zip(names, one or nothing, strict=True)), **_place(text, begin, end)}
                for (begin, end), one in zip(own, rated, strict=True)
            ]
            sentence = {"index": i, "words": words}
            if has_entities:
                sentence["entities"] = list(_entities(text, words))
            made.append(sentence)
        return made


def _checked_words(name: str, given: object) -> list[str]:
    if not isinstance(given, list):
        raise wrong(name, given, "a text or a list of words")
    for j, word in enumerate(given):
        if not is_word(word):
            raise wrong(f"{name}[{j}]", word, "a word")
    return given


def _joined_spans(words: Sequence[str]) -> Iterator[tuple[int, int]]:
    """The start and the end of each word in the text " ".join(words)."""
    begin = 0
    for word in words:
        yield begin, begin + len(word)
        begin += len(word) + 1


def _too_long(unit: str, most: int) -> RequestError:
    return RequestError(
        f"input has more than {most:,} {unit}; this is the limit for a request that labels words",
        param="input",
        code="context_length_exceeded",
    )


def _rated(classifier: TextClassifier, logits: Array) -> tuple[tuple[str, ...], list[tuple[Any, ...]]]:
    """Return the names of the fields that describe a label, and a tuple of their values for each row."""
    if classifier.task == "regression":
        return ("values",), [(row,) for row in logits.tolist()]
    chances, labels = probabilities(classifier.task, logits), classifier.labels
    best = [labels[k] for k in chances.argmax(axis=1).tolist()]
    return ("entity", "score"), list(zip(best, chances.max(axis=1).tolist(), strict=True))


def _place(text: str, begin: int, end: int) -> Shape:
    return {"word": text[begin:end], "start": begin, "end": end}


def _entities(text: str, words: Sequence[Shape]) -> Iterator[Shape]:
    """The entities of a sentence. Words without a label are skipped, as in `evaluate_classifier`."""
    tagged = [word for word in words if word["entity"] is not None]
    for kind, begin, end in entities([word["entity"] for word in tagged]):
        own = tagged[begin:end]
        score = sum(word["score"] for word in own) / len(own)
        yield {"entity_group": kind, "score": score, **_place(text, own[0]["start"], own[-1]["end"])}
