"""Encoded: the token ids of texts, or of sentences whose words are labelled."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from nplora.finetuning.classification.labelled import Labelled, Tagged, Targets
from nplora.finetuning.classification.text_batches import TextBatches, TokenBatches
from nplora.formats.errors import DataError, counted
from nplora.lm import TextClassifier
from nplora.lm.word_ids import WordIds

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class Encoded:
    """The token ids of texts for a classifier. Either each text has a label, or each word of a text has one.

    Attributes:
        ids: the token ids of each text.
        cut: the number of texts that were too long, and were cut.
        words: the index of the first token of each word; None if whole texts are labelled.
    """

    ids: list[list[int]]
    cut: int
    words: WordIds | None = None

    @staticmethod
    def of(classifier: TextClassifier, rows: Sequence[Labelled], whole: bool = False) -> Encoded:
        """Encode texts or, for a classifier of tokens, sentences. If `whole` is True, no sentence is cut."""
        if classifier.classifies_tokens:
            sentences = [row.words if isinstance(row, Tagged) else () for row in rows]
            words = classifier.encoder.word_ids(sentences, None if whole else classifier.max_length)
            return Encoded(words.ids, words.cut, words)
        ids, cut = classifier.encoder.token_ids([row.text for row in rows], classifier.max_length)
        return Encoded(ids, cut)

    def part(self, numbers: Iterable[int]) -> Encoded:
        """Return an `Encoded` that has only the texts with the indices `numbers`."""
        chosen = list(numbers)
        ids, words = [self.ids[i] for i in chosen], self.words
        if words is not None:
            words = WordIds(ids, [words.first[i] for i in chosen])
        return Encoded(ids, 0, words)

    @property
    def lost(self) -> int:
        """The number of words that have no token and therefore no label."""
        return 0 if self.words is None else self.words.lost

    def inputs(self, classifier: TextClassifier) -> tuple[list[list[int]], Array | slice]:
        """Return the token ids that the classifier reads, and the indices of the rows of the logits to use.

        For labelled texts, all rows are used: one for each text. For labelled words, only the row of each
        word's first token is used, and sentences that are too long are divided into windows.
        """
        return (self.ids, slice(None)) if self.words is None else classifier.windows(self.words)

    def places(self, places: Sequence[str]) -> list[str]:
        """Return the place (file and line) of each text.

        If words are labelled, the result has one item for each word with a token: the place of its sentence.

        Args:
            places: the place of each text.
        """
        if self.words is None:
            return list(places)
        counts = map(len, self.words.kept(self.words.first))
        return [place for place, count in zip(places, counts, strict=True) for _ in range(count)]

    def truth(self, targets: Targets) -> Targets:
        """Return the targets for `ClassificationReport.of`: of the texts, or of the words with a token."""
        if self.words is None:
            return targets
        return self.words.kept(targets)

    def batches(self, targets: Targets, size: int, shuffle: bool = False, seed: int = 0) -> TextBatches:
        """The texts and their targets in batches, for `Trainer.fit`.

        Args:
            targets: the target of each text; or for each sentence, an array with the target of each word.
            size: the number of texts in a batch.
            shuffle, seed: as in `TextBatches`.
        Raises:
            ValueError: the numbers of texts and targets, or of words and targets, differ.
        """
        if self.words is None:
            return TextBatches(self.ids, np.asarray(targets), size, shuffle, seed)
        return TokenBatches(self.ids, self.words.token_targets(targets), size, shuffle, seed)


def unit_of(classifier: TextClassifier) -> str:
    """What a row of the classifier's data holds: "text" or "sentence"."""
    return "sentence" if classifier.classifies_tokens else "text"


def require_words(names: str, count: int) -> None:
    """Raise DataError if no word has a token, because then nothing can be trained or compared."""
    if not count:
        raise DataError(f"{names}: no word has a token, expected words that the tokenizer knows")


def cut_in_words(cut: int, lost: int, longest: int, unit: str) -> str:
    """Return a message that says how many texts or sentences were cut, and how many words have no label."""
    found = [f"cut to {longest} tokens: {counted(cut, unit)}"] if cut else []
    if lost:
        have, are = ("has", "is") if lost == 1 else ("have", "are")
        found.append(f"{counted(lost, 'word')} {have} no token and {are} ignored")
    return "; ".join(found)
