"""Packs sequences of tokens one after another, without padding, for language models."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterable
from typing import Any

import numpy as np
import numpy.typing as npt

from nplora import _check
from nplora.models.positions import packed_positions

Array = npt.NDArray[Any]

IGNORED = -100  # the label of a token that is not trained on, as in torch and transformers


@dataclasses.dataclass(frozen=True, slots=True)
class PackedBatch:
    """Several sequences of tokens, one after another in one array.

    Attributes:
        ids: int64 (n,), the tokens of all sequences.
        starts: int64 (sequences + 1,), the start of each sequence; the last entry is n.
        targets: int64 (n,), for each position the next token, or IGNORED if the position does not count in
            the loss.
    Raises:
        TypeError: an array does not hold integers.
        ValueError: an array does not have one axis, `targets` and `ids` differ in length, or `starts` do not
            ascend from 0 to n.

    >>> import nplora
    >>> batch = pack([([5, 6, 7], [5, 6, 7]), ([8, 9], [-100, 9])])
    >>> batch.ids, batch.starts, batch.targets
    (array([5, 6, 7, 8, 9]), array([0, 3, 5]), array([   6,    7, -100,    9, -100]))
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
        """int64 (n,): the position of each token in its own sequence."""
        return packed_positions(self.starts).in_sequence

    @property
    def num_targets(self) -> int:
        """The number of targets other than IGNORED. The mean loss is the sum of the losses divided by this
        number."""
        return int(np.count_nonzero(self.targets != IGNORED))

    def pieces(self, most_tokens: int | None, together: int = 1) -> list[PackedBatch]:
        """Split into batches of at most `most_tokens` tokens, in order.

        A group of sequences that has more than `most_tokens` tokens gets a batch of its own.

        Args:
            most_tokens: the maximum number of tokens in a batch; None: no limit, so there is one batch.
            together: how many neighbouring sequences form a group. The sequences of a group stay in one
                batch.
        """
        lengths = np.diff(self.starts).reshape(-1, together).sum(axis=1)
        cuts = [together * index for index in cut(lengths, most_tokens)]
        return [self._piece(first, last) for first, last in itertools.pairwise(cuts)]

    def _piece(self, first: int, last: int) -> PackedBatch:
        starts = self.starts[first : last + 1]
        rows = slice(int(starts[0]), int(starts[-1]))
        return PackedBatch(self.ids[rows], starts - starts[0], self.targets[rows])


def cut(lengths: Array, most_tokens: int | None) -> list[int]:
    """Divide sequences into batches of at most `most_tokens` tokens.

    Returns a list: the index of the first sequence of each batch, followed by the total number of sequences.
    """
    cuts, size = [0], 0
    for index, length in enumerate(lengths.tolist()):
        if most_tokens is not None and size and size + length > most_tokens:
            cuts.append(index)
            size = 0
        size += length
    return [*cuts, len(lengths)] if len(lengths) else cuts


def pack(sequences: Iterable[tuple[npt.ArrayLike, npt.ArrayLike]]) -> PackedBatch:
    """Pack pairs (ids, labels) of integer sequences. labels[i] belongs to ids[i], as in transformers.

    Raises:
        ValueError: the ids and labels of a sequence differ in length, or have more than one axis.
    """
    ids, targets, starts = [np.empty(0, np.int64)], [np.empty(0, np.int64)], [0]
    for index, (tokens, labels) in enumerate(sequences):
        tokens, labels = np.asarray(tokens, np.int64), np.asarray(labels, np.int64)
        if tokens.ndim != 1 or tokens.shape != labels.shape:
            raise ValueError(
                f"pack: sequence {index} has ids of shape {tokens.shape} and labels of shape {labels.shape}, "
                "expected the same length"
            )
        ids.append(tokens)
        targets += [labels[1:], np.full(min(1, len(tokens)), IGNORED, np.int64)]
        starts.append(starts[-1] + len(tokens))
    return PackedBatch(np.concatenate(ids), np.asarray(starts, np.int64), np.concatenate(targets))
