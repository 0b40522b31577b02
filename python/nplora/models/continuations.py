"""Scores several continuations of a prompt. The prompt is processed once, and its keys and values are shared.

The tokens of several prompts are processed together, without padding.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from nplora.models import head
from nplora.models.cache import KVCache
from nplora.models.config import ModelConfig
from nplora.models.decoder import Decoder

Array = npt.NDArray[Any]
Scores = tuple[Array, Array]  # the loss of each token, and whether the token is the most likely one

MOST_ROWS = 512  # the maximum number of tokens that are computed at a time, to limit the memory
_MOST_CELLS = 2048  # the maximum size of a cache, in tokens; the cache of a single prompt may be larger


class Question(NamedTuple):
    """The tokens of a prompt and of each of its continuations. The prompt and each continuation have at least
    one token."""

    prompt: Array
    continuations: list[Array]

    @property
    def long(self) -> list[Array]:
        """The continuations with more than one token, each of which needs a slot in the cache."""
        return [tokens for tokens in self.continuations if len(tokens) > 1]

    @property
    def slots(self) -> int:
        return max(1, len(self.long))

    @property
    def length(self) -> int:
        """The number of tokens in the longest sequence: the prompt and its longest continuation."""
        return len(self.prompt) + max(map(len, self.continuations))

    @property
    def computed(self) -> int:
        """The number of tokens to compute in the longest sequence: all except its last token."""
        return self.length - 1


class _Part(NamedTuple):
    """A question with only those continuations that need the same factors of LongRoPE, short or long."""

    number: int  # the index of the question
    places: list[int]  # the indices of the continuations in the question
    question: Question


class _Rows(NamedTuple):
    """For each token: its id, its slot, its position in the sequence, and the maximum length of the
    sequence."""

    ids: Array
    slots: Array
    in_sequence: Array
    limits: Array


def token_scores(
    config: ModelConfig,
    model: Decoder,
    lm_head: head.AnyHead,
    questions: Sequence[Question],
    most_rows: int = MOST_ROWS,
) -> list[list[Scores]]:
    """The scores of each continuation of each question. Call this function in `with inference()`.

    Args:
        most_rows: the maximum number of tokens that are computed at a time.
    """
    found = [dict[int, Scores]() for _ in questions]
    for group in _groups(_parts(questions, config.rope.longest_short)):
        scores = _group_scores(config, model, lm_head, [part.question for part in group], most_rows)
        for part, each in zip(group, scores, strict=True):
            found[part.number].update(zip(part.places, each, strict=True))
    return [[scores[place] for place in range(len(scores))] for scores in found]


def _parts(questions: Sequence[Question], longest_short: float) -> list[_Part]:
    """Divide each question into at most two parts. The continuations of one part need the short factors of
    LongRoPE, and the continuations of the other part need the long factors.
    """
    parts = list[_Part]()
    for number, (prompt, continuations) in enumerate(questions):
        is_long = [len(prompt) + len(tokens) > longest_short for tokens in continuations]
        for side in (False, True):
            if places := [place for place, long in enumerate(is_long) if long == side]:
                parts.append(_Part(number, places, Question(prompt, [continuations[i] for i in places])))
    return parts


def _groups(parts: Sequence[_Part]) -> list[list[_Part]]:
    """Divide the parts into groups of consecutive parts. The parts of a group are computed together."""
    found, slots, length = list[list[_Part]](), 0, 0
    for part in parts:
        slots, length = slots + part.question.slots, max(length, part.question.computed)
        if not found or slots * length > _MOST_CELLS:
            found.append([])
            slots, length = part.question.slots, part.question.computed
        found[-1].append(part)
    return found


def _group_scores(
    config: ModelConfig, model: Decoder, lm_head: head.AnyHead, questions: Sequence[Question], most_rows: int
) -> list[list[Scores]]:
    """The scores of questions that are computed together."""
    starts = np.cumsum([0, *(question.slots for question in questions)], dtype=np.int64)
    cache = KVCache(config, int(starts[-1]), max(question.computed for question in questions), model)
    for question, first in zip(questions, starts[:-1], strict=True):
        for slot in range(first, first + question.slots):
            cache.activate(slot, question.prompt)
    lasts = _run_prompts(model, questions, starts, cache, most_rows)
    more = _run_continuations(model, questions, starts, cache, most_rows)
    scores = list[list[Scores]]()
    for question, last in zip(questions, lasts, strict=True):
        scores.append([])
        for tokens in question.continuations:
            x, more = np.concatenate([last[None], more[: len(tokens) - 1]]), more[len(tokens) - 1 :]
            pieces = range(0, len(x), most_rows)
            found = [
                head.token_scores(model, lm_head, x[i : i + most_rows], tokens[i : i + most_rows])
                for i in pieces
            ]
            losses, tops = zip(*found, strict=True)
            scores[-1].append((np.concatenate(losses), np.concatenate(tops)))
    return scores


def _run_prompts(
    model: Decoder, questions: Sequence[Question], starts: Array, cache: KVCache, most_rows: int
) -> Array:
    """Compute each prompt's keys and values in the first slot of its question, and copy them to all other
    slots of the question.

    Returns the residual stream (questions, d) of the last token of each prompt.
    """
    rows = [
        _rows(question.prompt, int(slot), 0, question.length)
        for question, slot in zip(questions, starts[:-1], strict=True)
    ]
    ends = np.cumsum([len(question.prompt) for question in questions]) - 1
    lasts = _run(model, rows, cache, most_rows, ends)
    for question, slot in zip(questions, starts[:-1], strict=True):
        others, length = slice(slot + 1, slot + question.slots), len(question.prompt)
        for held in (*cache.keys, *cache.values):
            held[others, :length] = held[slot, :length]
    return lasts


def _run_continuations(
    model: Decoder, questions: Sequence[Question], starts: Array, cache: KVCache, most_rows: int
) -> Array:
    """The residual stream (n, d) of all tokens of the continuations, except the last token of each one."""
    rows = [
        _rows(tokens[:-1], int(slot), len(question.prompt), question.length)
        for question, first in zip(questions, starts[:-1], strict=True)
        for slot, tokens in enumerate(question.long, first)
    ]
    return _run(model, rows, cache, most_rows, np.arange(sum(len(part.ids) for part in rows)))


def _rows(ids: Array, slot: int, begin: int, limit: int) -> _Rows:
    count = len(ids)
    positions = np.arange(begin, begin + count, dtype=np.int64)
    return _Rows(ids, np.full(count, slot, np.int64), positions, np.full(count, limit, np.int64))


def _run(model: Decoder, parts: list[_Rows], cache: KVCache, most_rows: int, kept: Array) -> Array:
    """Compute the tokens in order, at most `most_rows` at a time. Return the residual stream of the chosen
    tokens.

    Args:
        kept: the indices of the chosen tokens, ascending.
    """
    if not parts:
        return np.empty((0, model.norm.weight.shape[0]), np.float32)
    rows, found = _Rows(*map(np.concatenate, zip(*parts, strict=True))), list[Array]()
    for begin in range(0, len(rows.ids), most_rows):
        ids, slots, places, limits = (column[begin : begin + most_rows] for column in rows)
        x = model.run_cached(ids, cache.positions(slots, places, limits), cache)
        inside = kept[(kept >= begin) & (kept < begin + len(ids))] - begin
        found.append(x[inside])
    return np.concatenate(found)
