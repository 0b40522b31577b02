"""The requests of an EncoderEngine, and the parts into which a long request is divided."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence
from concurrent.futures import Future
from typing import Any

import numpy as np
import numpy.typing as npt

from nplora import _check
from nplora.lm import TextClassifier
from nplora.models.packing import cut
from nplora.serving.served_encoder import Model, encoder_of

Array = npt.NDArray[Any]
Ids = Sequence[npt.ArrayLike]  # the token ids of each text

_ARRAY = 128  # the bytes of a small array in addition to its values, rounded up
_FLOAT = 4


@dataclasses.dataclass(frozen=True)
class Work:
    """A model and the kind of result to compute. Only texts with equal `Work` can be computed together."""

    model: Model
    classes: bool
    normalize: bool | None

    def starts(self, ids: Sequence[Array]) -> Array:
        """Array (texts + 1,), int64: text i has the rows starts[i] to starts[i + 1] - 1 of the result.

        A text has one row, or one row for each token if a classifier labels the tokens.
        """
        is_by_token = self.classes and isinstance(self.model, TextClassifier) and self.model.classifies_tokens
        return np.cumsum([0, *(len(text) if is_by_token else 1 for text in ids)])

    def width(self) -> int:
        """The number of values of a row."""
        if not isinstance(self.model, TextClassifier):
            return self.model.dim
        return len(self.model.labels) if self.classes else self.model.encoder.dim

    def compute(self, ids: Sequence[Array]) -> Array:
        """Compute the rows of all texts."""
        if not isinstance(self.model, TextClassifier):
            return self.model.embed_ids(ids, normalize=self.normalize)
        if self.classes:
            return self.model.logits_of_ids(ids)
        return self.model.encoder.embed_ids(ids, normalize=self.normalize)

    def checked(self, op: str, ids: Ids, longest: int) -> list[Array]:
        """The token ids of each text, int64.

        Raises:
            TypeError: ids are not integers.
            ValueError: a text has no tokens or more than `longest`, or a token is not in the vocabulary.
        """
        texts = [_check.integers(op, f"ids[{i}]", text) for i, text in enumerate(ids)]
        for i, text in enumerate(texts):
            if text.ndim != 1:
                raise ValueError(f"{op}: ids[{i}] has shape {text.shape}, expected a list of token ids")
            if not len(text):
                raise ValueError(f"{op}: ids[{i}] is empty, expected at least one token")
            if len(text) > longest:
                raise ValueError(f"{op}: ids[{i}] has {len(text):,} tokens, expected at most {longest:,}")
        if texts:
            _check.in_range(op, "ids", np.concatenate(texts), encoder_of(self.model).config.vocab_size)
        return texts


class Request:
    """Texts that one client sent together. A long request is computed in parts.

    Args:
        part: the largest number of tokens in a part. A text with more tokens is a part by itself.
        held: the bytes that the caller keeps until the result is available.
    Attributes:
        tokens: the number of tokens.
        bytes: the number of bytes of the ids and of the result, plus `held`.
        begun: whether `take_part` was called.
        priority, started: attributes that only the queue needs.
    """

    priority = 0
    started: int | None = None

    def __init__(self, work: Work, ids: list[Array], client: str, part: int, held: int = 0) -> None:
        self.work, self.client = work, client
        self.future: Future[Array] = Future()
        self.arrived = time.monotonic()
        self.tokens = sum(map(len, ids))
        self._ids, self._starts = ids, work.starts(ids)
        result = int(self._starts[-1]) * work.width() * _FLOAT
        self.bytes = sum(text.nbytes + _ARRAY for text in ids) + self._starts.nbytes + result + held
        self._cuts = cut(np.array(list(map(len, ids)), np.int64), part)
        self._taken = self._stored = 0
        self._rows: Array | None = None  # allocated with the first rows; a waiting request needs no rows

    @property
    def begun(self) -> bool:
        return self._taken > 0

    def next_part(self) -> Part:
        """The part that is computed next."""
        first, end = self._cuts[self._taken : self._taken + 2]
        return Part(self, int(self._starts[first]), int(self._starts[end]), self._ids[first:end])

    def take_part(self) -> bool:
        """Record that the next part is computed now. Return whether it is the last part of the request."""
        self._taken += 1
        return self._taken == len(self._cuts) - 1

    def store(self, first: int, rows: Array) -> Array | None:
        """Store the rows of a part. If this completes the request, return all rows; otherwise return None."""
        if self._rows is None:
            self._rows = np.empty((self._starts[-1], self.work.width()), np.float32)
        self._rows[first : first + len(rows)] = rows
        self._stored += 1
        return self._rows if self._stored == len(self._cuts) - 1 else None


@dataclasses.dataclass(frozen=True, eq=False)
class Part:
    """Consecutive texts of a request. In the result, these texts have the rows `first` to `end` - 1."""

    request: Request
    first: int
    end: int
    ids: list[Array]

    @property
    def tokens(self) -> int:
        return sum(map(len, self.ids))
