"""Sequences of tokens one behind the other, without padding: what a language model reads."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]

IGNORED = -100  # the label of a token that is not to be learned, as in torch and transformers


@dataclasses.dataclass(frozen=True, slots=True)
class PackedBatch:
    """Several sequences in one run of tokens.

    Attributes:
        ids: int64 (n,), the tokens of all sequences.
        starts: int64 (sequences + 1,), where each sequence begins; the last entry is n.
        targets: int64 (n,), the token that follows each one, IGNORED where nothing is to be learned.
    """

    ids: Array
    starts: Array
    targets: Array

    @property
    def positions(self) -> Array:
        """int64 (n,): the place of each token in its own sequence."""
        return np.asarray(np.arange(len(self.ids)) - np.repeat(self.starts[:-1], np.diff(self.starts)))

    @property
    def num_targets(self) -> int:
        """The tokens to be learned: what a mean loss divides by."""
        return int(np.count_nonzero(self.targets != IGNORED))


def pack(sequences: Iterable[tuple[npt.ArrayLike, npt.ArrayLike]]) -> PackedBatch:
    """Pack pairs (ids, labels) of integer sequences of one length; labels as in transformers, unshifted.

    Raises:
        ValueError: the labels of a sequence are not as many as its tokens.
    """
    ids, targets, starts = [np.empty(0, np.int64)], [np.empty(0, np.int64)], [0]
    for index, (tokens, labels) in enumerate(sequences):
        tokens, labels = np.asarray(tokens, np.int64), np.asarray(labels, np.int64)
        if tokens.ndim != 1 or tokens.shape != labels.shape:
            raise ValueError(
                f"pack: sequence {index} has ids of shape {tokens.shape} and labels of shape {labels.shape}, "
                "expected two of one length"
            )
        ids.append(tokens)
        targets += [labels[1:], np.full(min(1, len(tokens)), IGNORED)]
        starts.append(starts[-1] + len(tokens))
    return PackedBatch(np.concatenate(ids), np.asarray(starts), np.concatenate(targets))
