"""Sequences of tokens one behind the other, without padding: what a language model reads."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterable
from typing import Any

import numpy as np
import numpy.typing as npt

from nplora import _check

Array = npt.NDArray[Any]

IGNORED = -100  # the label of a token that is not trained on, as in torch and transformers


@dataclasses.dataclass(frozen=True, slots=True)
class PackedBatch:
    """Several sequences in one run of tokens.

    Attributes:
        ids: int64 (n,), the tokens of all sequences.
        starts: int64 (sequences + 1,), where each sequence begins; the last entry is n.
        targets: int64 (n,), the token that follows each one, IGNORED where nothing is trained.
    Raises:
        TypeError: an array does not hold integers.
        ValueError: an array has not one axis, targets are not as many as ids, or starts do not ascend from 0
            to n.
    """

    ids: Array
    starts: Array
    targets: Array

    def __post_init__(self) -> None:
        op = "PackedBatch"
        for name in ("ids", "starts", "targets"):
            array = _check.integers(op, name, getattr(self, name))
            if array.ndim != 1:
                raise ValueError(f"{op}: {name} has shape {array.shape}, expected one axis")
            object.__setattr__(self, name, array)
        n, starts = len(self.ids), self.starts
        if len(self.targets) != n:
            raise ValueError(f"{op}: {len(self.targets)} targets for {n} ids")
        if not len(starts) or starts[0] != 0 or starts[-1] != n or (starts[1:] < starts[:-1]).any():
            shown = np.array2string(starts, threshold=8, edgeitems=3)
            raise ValueError(f"{op}: starts is {shown}, expected to ascend from 0 to {n}, the number of ids")

    @property
    def positions(self) -> Array:
        """int64 (n,): the place of each token in its own sequence."""
        return np.asarray(np.arange(len(self.ids)) - np.repeat(self.starts[:-1], np.diff(self.starts)))

    @property
    def num_targets(self) -> int:
        """The trained tokens: the number that a mean loss divides by."""
        return int(np.count_nonzero(self.targets != IGNORED))

    def pieces(self, most_tokens: int | None) -> list[PackedBatch]:
        """The same sequences in batches of at most so many tokens, in order; None: in one.

        A sequence that is longer is a batch by itself.
        """
        cuts = cut(np.diff(self.starts), most_tokens)
        return [self._piece(first, last) for first, last in itertools.pairwise(cuts)]

    def _piece(self, first: int, last: int) -> PackedBatch:
        starts = self.starts[first : last + 1]
        rows = slice(int(starts[0]), int(starts[-1]))
        return PackedBatch(self.ids[rows], starts - starts[0], self.targets[rows])


def cut(lengths: Array, most_tokens: int | None) -> list[int]:
    """Where sequences are cut into batches of at most so many tokens: the first of each, and the end."""
    cuts, size = [0], 0
    for index, length in enumerate(lengths.tolist()):
        if most_tokens is not None and size and size + length > most_tokens:
            cuts.append(index)
            size = 0
        size += length
    return [*cuts, len(lengths)] if len(lengths) else cuts


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
