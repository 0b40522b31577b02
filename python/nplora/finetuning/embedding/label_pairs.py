"""label_pairs: makes scored pairs of texts from labelled texts."""

from __future__ import annotations

from collections.abc import Hashable, Iterable
from typing import Any

import numpy as np

from nplora import _check
from nplora.formats.errors import counted
from nplora.lm.encoder import texts_of


@_check.keywords
def label_pairs(
    texts: Iterable[str], labels: Iterable[Hashable], count: int = 640, seed: int = 0
) -> list[dict[str, Any]]:
    """Make random pairs of labelled texts, for `train` with the loss "cosine" (SetFit, Tunstall et al. 2022).

    The pairs alternate. In the first, third, fifth pair and so on, both texts have the same label, and the
    score is 1. In the other pairs, the labels differ, and the score is 0. All labels are equally likely, even
    if they have few texts; but a label with a single text occurs only in pairs with different labels. A pair
    may occur more than once, but never consists of two equal texts.

        >>> import nplora
        >>> texts = ["where is my parcel", "delivery is late", "return an order", "a refund"]
        >>> rows = nplora.embedding.label_pairs(texts, ["late", "late", "return", "return"], count=2)
        >>> [row["score"] for row in rows]
        [1.0, 0.0]

    Args:
        texts, labels: the texts and their labels, in the same order. For each label, copies of a text count
            once.
        count: the number of pairs.
        seed: the seed of the random choices.
    Returns:
        rows with the fields sentence1, sentence2 and score.
    Raises:
        ValueError: the numbers of texts and labels differ, a text is empty, a label is missing (None, NaN or
            pandas.NA), there are fewer than two different labels, or no label has two different texts.
        TypeError: an argument, or an element of `texts` or `labels`, has a wrong type.
    """
    op = "label_pairs"
    _check.integer(op, "count", count, least=1)
    _check.integer(op, "seed", seed, least=0)
    groups = _groups(op, texts_of(op, texts), labels)
    large = [group for group in groups if len(group) > 1]
    if len(groups) < 2:
        raise ValueError(f"{op}: there are fewer than two different labels")
    if not large:
        raise ValueError(f"{op}: no label has two different texts")
    rng, rows = np.random.default_rng(seed), list[dict[str, Any]]()
    for number in range(count):
        if number % 2 == 0:
            group = large[rng.integers(len(large))]
            first, second = (group[i] for i in rng.choice(len(group), 2, replace=False))
        else:
            first = second = ""
            while first == second:  # a text may have several labels
                two = (groups[i] for i in rng.choice(len(groups), 2, replace=False))
                first, second = (group[rng.integers(len(group))] for group in two)
        rows.append({"sentence1": first, "sentence2": second, "score": 1.0 - number % 2})
    return rows


def _groups(op: str, texts: list[str], labels: Iterable[Hashable]) -> list[list[str]]:
    """The different texts of each label."""
    if isinstance(labels, str) or not np.iterable(labels):
        raise TypeError(f"{op}: labels is {_check.kind(labels)}, expected a list of labels")
    given = list(labels)
    if len(texts) != len(given):
        raise ValueError(f"{op}: there are {counted(len(texts), 'text')}, but {counted(len(given), 'label')}")
    groups = dict[Hashable, dict[str, None]]()
    for i, (text, label) in enumerate(zip(texts, given, strict=True)):
        if not isinstance(label, Hashable):
            raise TypeError(f"{op}: labels[{i}] is {_check.kind(label)}, expected a text or a number")
        equal: Any = label == label  # false for NaN; for the NA of pandas, not a boolean
        if label is None or not isinstance(equal, bool | np.bool_) or not equal:
            raise ValueError(f"{op}: labels[{i}] is missing: it is {label}")
        if not text.strip():
            raise ValueError(f"{op}: texts[{i}] is empty")
        groups.setdefault(label, {})[text] = None
    return [list(group) for group in groups.values()]
