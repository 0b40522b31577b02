"""label_pairs: makes scored pairs of texts from labelled texts."""

from __future__ import annotations

from collections.abc import Hashable, Iterable
from typing import Any

import numpy as np

from nplora import _check
from nplora.formats.errors import counted


def label_pairs(
    texts: Iterable[str], labels: Iterable[Hashable], count: int = 640, seed: int = 0
) -> list[dict[str, Any]]:
    """Make random pairs of labelled texts, for `train` with the loss "cosine" (Tunstall et al. 2022, SetFit).

    The two texts of every other pair have the same label, and the score 1. The texts of the other pairs have
    different labels, and the score 0. Each label is drawn equally often, even if it has few texts.

        >>> import nplora
        >>> texts = ["where is my parcel", "delivery is late", "return an order", "a refund"]
        >>> rows = nplora.embedding.label_pairs(texts, ["late", "late", "return", "return"], count=2)
        >>> [row["score"] for row in rows]
        [1.0, 0.0]

    Args:
        texts, labels: the texts and their labels, in the same order.
        count: the number of pairs.
        seed: the seed of the random choices.
    Returns:
        rows with the fields sentence1, sentence2 and score.
    Raises:
        ValueError: the numbers of texts and labels differ, there are fewer than two different labels, or no
            label has two different texts.
        TypeError: an argument, or an element of `texts`, has a wrong type.
    """
    op = "label_pairs"
    _check.integer(op, "count", count, least=1)
    _check.integer(op, "seed", seed, least=0)
    if isinstance(texts, str):
        raise TypeError(f"{op}: texts is a text, expected a list of texts")
    given, names = list(texts), list(labels)
    for i, text in enumerate(given):
        if not isinstance(text, str):
            raise TypeError(f"{op}: texts[{i}] is {_check.kind(text)}, expected a text")
    if len(given) != len(names):
        raise ValueError(f"{op}: there are {counted(len(given), 'text')}, but {counted(len(names), 'label')}")
    groups = dict[Hashable, dict[str, None]]()  # the different texts of each label, in their order
    for text, name in zip(given, names, strict=True):
        groups.setdefault(name, {})[text] = None
    of_label = [list(group) for group in groups.values()]
    alike = [group for group in of_label if len(group) > 1]
    if len(of_label) < 2:
        raise ValueError(f"{op}: there are fewer than two different labels")
    if not alike:
        raise ValueError(f"{op}: no label has two different texts")
    rng, rows = np.random.default_rng(seed), list[dict[str, Any]]()
    for number in range(count):
        if number % 2 == 0:
            group = alike[rng.integers(len(alike))]
            first, second = (group[i] for i in rng.choice(len(group), 2, replace=False))
        else:
            two = (of_label[i] for i in rng.choice(len(of_label), 2, replace=False))
            first, second = (group[rng.integers(len(group))] for group in two)
        rows.append({"sentence1": first, "sentence2": second, "score": 1.0 - number % 2})
    return rows
