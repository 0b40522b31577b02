"""Entities: spans of words with tags such as B-PER and I-PER (IOB2), and how well they are predicted."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

OUTSIDE = "O"


class Entity(NamedTuple):
    """An entity: its kind, and the indices of its words, from `begin` to `end` - 1."""

    kind: str
    begin: int
    end: int


class EntityCounts(NamedTuple):
    """For each kind, the number of correctly predicted entities, of predicted entities, and of true ones."""

    hits: Counter[str]
    predicted: Counter[str]
    true: Counter[str]


def kinds_of(tags: Iterable[str]) -> tuple[str, ...]:
    """The sorted kinds of entities that these tags name. The result is empty if a tag is not an IOB2 tag.

    >>> from nplora.finetuning.classification.entities import kinds_of
    >>> kinds_of(["O", "B-PER", "I-PER", "B-LOC"]), kinds_of(["NOUN", "VERB"])
    (('LOC', 'PER'), ())
    """
    inside = [tag for tag in tags if tag != OUTSIDE]
    if any(tag[:2] not in ("B-", "I-") or not tag[2:] for tag in inside):
        return ()
    return tuple(sorted({tag[2:] for tag in inside}))


def entities(tags: Sequence[str]) -> Iterator[Entity]:
    """The entities of a sentence, as CoNLL's evaluation script counts them.

    An I- tag also begins an entity if the word before it is in no entity, or in an entity of another kind.

    >>> from nplora.finetuning.classification.entities import entities
    >>> [tuple(entity) for entity in entities(["B-PER", "I-PER", "O", "I-LOC", "B-LOC"])]
    [('PER', 0, 2), ('LOC', 3, 4), ('LOC', 4, 5)]
    """
    begin, kind = 0, ""
    for place, tag in enumerate([*tags, OUTSIDE]):
        own = "" if tag == OUTSIDE else tag[2:]
        if kind and (own != kind or tag.startswith("B-")):
            yield Entity(kind, begin, place)
            kind = ""
        if own and not kind:
            begin, kind = place, own


def count_entities(predicted: Iterable[Sequence[str]], true: Iterable[Sequence[str]]) -> EntityCounts:
    """Count the entities of sentences. A hit is a predicted entity whose kind and words are both true."""
    counts = EntityCounts(Counter(), Counter(), Counter())
    for ours, theirs in zip(predicted, true, strict=True):
        found, wanted = set(entities(ours)), set(entities(theirs))
        for counter, chosen in zip(counts, (found & wanted, found, wanted), strict=True):
            counter.update(entity.kind for entity in chosen)
    return counts
