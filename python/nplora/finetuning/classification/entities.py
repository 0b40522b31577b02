"""Entities: spans of words with tags such as B-PER and I-PER, and how well they are predicted.

The tags follow one of these schemes:

- IOB2: B- begins an entity, and I- continues it.
- IOB1: I- begins and continues an entity. But if the word before an entity is the last word of another entity
  of the same kind, the entity begins with B-.
- IOE: I- begins and continues an entity. E- marks the last word of an entity. In some data, E- marks the last
  word of every entity. In other data, E- is used only if another entity of the same kind follows directly.
- IOBES: as IOB2, but E- marks the last word of an entity, and S- marks an entity of a single word.
- BILOU: as IOBES, with L- instead of E-, and U- instead of S-.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

OUTSIDE = "O"
_SCHEMES = (frozenset("BIES"), frozenset("BILU"))  # the letters that may occur together
_BEGIN, _END = frozenset("BSU"), frozenset("ESLU")  # letters of the first and of the last word of an entity
_TAG = re.compile(r"[BIESLU]-.+", re.DOTALL)
_NEARLY = re.compile(r"[BbIi][\W_].*", re.DOTALL)


class Entity(NamedTuple):
    """An entity: its kind, and the indices of its words, from `begin` to `end` - 1."""

    kind: str
    begin: int
    end: int


class EntityCounts(NamedTuple):
    """Numbers of entities. Each attribute maps each kind of entity to a number.

    Attributes:
        hits: the number of predicted entities that equal a true entity.
        predicted: the number of predicted entities.
        true: the number of true entities.
    """

    hits: Counter[str]
    predicted: Counter[str]
    true: Counter[str]


def first_misfit(tags: Iterable[str]) -> str | None:
    """Return the first tag that fits no scheme together with the tags before it, or None if all tags fit.

    A tag fits if it has the form of an entity tag, and one scheme has the first letter of this tag and the
    first letters of all earlier tags.

    >>> from nplora.finetuning.classification.entities import first_misfit
    >>> first_misfit(["O", "B-PER", "b-LOC"]), first_misfit(["U-PER", "S-PER"]), first_misfit(["O", "S-PER"])
    ('b-LOC', 'S-PER', None)
    """
    letters = set[str]()
    for tag in tags:
        if tag == OUTSIDE:
            continue
        letters.add(tag[:1])
        if not _TAG.fullmatch(tag) or not any(letters <= scheme for scheme in _SCHEMES):
            return tag
    return None


def look_like_entities(tags: Iterable[str]) -> bool:
    """Whether the tags look like tags of entities, even if they have mistakes and fit no scheme.

    Tags look like tags of entities in two cases: a tag begins with B, I, b or i and a separator; or every tag
    is a single letter of a scheme, and B and I occur.

    >>> from nplora.finetuning.classification.entities import look_like_entities
    >>> look_like_entities(["O", "b-LOC"]), look_like_entities(["B", "I", "O"]), look_like_entities(["NOUN"])
    (True, True, False)
    """
    every = set(tags)
    return any(map(_NEARLY.fullmatch, every)) or {"B", "I"} <= every <= {OUTSIDE, *"BIESLU"}


def kinds_of(tags: Sequence[str]) -> tuple[str, ...]:
    """The sorted kinds of entities that these tags name. The result is empty if the tags fit no scheme.

    >>> from nplora.finetuning.classification.entities import kinds_of
    >>> kinds_of(["O", "B-PER", "I-PER", "B-LOC"]), kinds_of(["NOUN", "VERB"])
    (('LOC', 'PER'), ())
    """
    if first_misfit(tags) is not None:
        return ()
    return tuple(sorted({tag[2:] for tag in tags if tag != OUTSIDE}))


def scheme_of(tags: Iterable[str], sentences: Iterable[Sequence[str]]) -> str:
    """The name of the scheme that the tags follow.

    IOB1 and IOB2 use the same tags. The scheme is IOB1 if at least one entity begins with I-, and B- begins
    only entities that directly follow another entity of the same kind.

    >>> from nplora.finetuning.classification.entities import scheme_of
    >>> scheme_of(["B-PER", "I-PER", "O"], [["I-PER", "O"]]), scheme_of(["O", "S-PER"], [])
    ('IOB1', 'IOBES')

    Args:
        tags: all tags; they fit a scheme.
        sentences: the true tags of the words of each sentence.
    """
    letters = {tag[:1] for tag in tags}
    if not letters.isdisjoint("LU"):
        return "BILOU"
    if not letters.isdisjoint("ES"):
        return "IOE" if letters.isdisjoint("BS") else "IOBES"
    name = "IOB2"
    for own in sentences:
        before = Entity("", 0, 0)
        for entity in entities(own):
            if own[entity.begin].startswith("I"):
                name = "IOB1"
            elif (before.kind, before.end) != (entity.kind, entity.begin):
                return "IOB2"
            before = entity
    return name


def entities(tags: Sequence[str]) -> Iterator[Entity]:
    """The entities of a sentence, as in seqeval's default mode. L- means E-, and U- means S-.

    A tag with B-, S- or U- always begins an entity. Every other tag except O begins an entity if the word
    before it is in no entity, is in an entity of another kind, or has a tag with E-, S-, L- or U-.

    >>> from nplora.finetuning.classification.entities import entities
    >>> [tuple(entity) for entity in entities(["B-PER", "I-PER", "O", "I-LOC", "B-LOC"])]
    [('PER', 0, 2), ('LOC', 3, 4), ('LOC', 4, 5)]
    """
    begin, kind, ended = 0, "", False
    for place, tag in enumerate([*tags, OUTSIDE]):
        letter, own = tag[:1], tag[2:]
        if kind and (own != kind or letter in _BEGIN or ended):
            yield Entity(kind, begin, place)
            kind = ""
        if own and not kind:
            begin, kind = place, own
        ended = letter in _END


def count_entities(predicted: Iterable[Sequence[str]], true: Iterable[Sequence[str]]) -> EntityCounts:
    """Count the predicted entities of sentences, the true entities, and the predicted entities that are
    true."""
    counts = EntityCounts(Counter(), Counter(), Counter())
    for ours, theirs in zip(predicted, true, strict=True):
        found, wanted = set(entities(ours)), set(entities(theirs))
        for counter, chosen in zip(counts, (found & wanted, found, wanted), strict=True):
            counter.update(entity.kind for entity in chosen)
    return counts
