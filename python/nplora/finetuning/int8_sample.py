"""The sample of training data whose gradients `Int8Check` compares."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable
from typing import Any

from nplora import _core
from nplora.finetuning.data import TokenBatches
from nplora.finetuning.int8_check import AddGradient
from nplora.finetuning.objectives.packed_loss import PackedLoss
from nplora.lm import LanguageModel
from nplora.models.packing import PackedBatch
from nplora.nn.losses import NonFiniteLossError

SAMPLE_TOKENS = 512  # the most tokens of the sample, if they have enough targets
# The least rows of a product that is compared. A product of fewer rows with low-bit weights is computed in
# int8 even within `without_int8`.
LEAST_ROWS = _core.constants.small_batch + 1
_BATCHES = 4  # the sample is a part of one of the run's first batches


def of_tokens(
    lm: LanguageModel,
    loss: PackedLoss,
    batches: TokenBatches,
    micro_tokens: int | None = None,
) -> AddGradient:
    """Return the argument `add_gradient` of an `Int8Check`.

    The gradient is that of the run's loss. The sample is a part of one of the run's first batches, with about
    SAMPLE_TOKENS tokens. It has at least LEAST_ROWS targets, so that the products of the head are compared
    too. If SAMPLE_TOKENS tokens have fewer targets, the sample is larger, up to a micro-batch of the run. If
    no micro-batch has enough targets, the one with the most targets is the sample.

    Args:
        loss: a loss like that of the run, but without micro-batches. Nothing else may use this object.
        micro_tokens: maximum number of tokens in a micro-batch of the run, as in `PackedLoss`.
    """
    found: list[tuple[PackedBatch, Any]] = []

    def add_gradient() -> float:
        if not found:
            found.append(_sample(loss, batches, micro_tokens))
        x, y = found[0]
        loss.word_filter = lm.model.word_filter
        count = max(1, loss.count(x, y))
        try:
            total = loss.forward_backward(lm, x, y, 1 / count)
        finally:
            loss.take_measured()  # nobody reads these metrics
            if lm.model.word_filter is not None:
                lm.model.word_filter.take_skipped()  # the run must not count the sample's words
        if not math.isfinite(total):
            raise NonFiniteLossError(f"the loss is {total}")
        return total / count

    return add_gradient


def _sample(loss: PackedLoss, batches: TokenBatches, micro_tokens: int | None) -> tuple[PackedBatch, Any]:
    first = list(itertools.islice(batches.epoch(0), _BATCHES))
    longest = max(len(x.ids) for x, _ in first)
    most = longest if micro_tokens is None else min(micro_tokens, longest)
    tokens = min(SAMPLE_TOKENS, most)
    while True:
        parts = [part for x, y in first for part in loss.parts_of(x, y, tokens)]
        enough = (part for part in parts if part[0].num_targets >= LEAST_ROWS)
        if found := next(enough, None):
            return found
        if tokens == most:
            return max(parts, key=lambda part: part[0].num_targets)
        tokens = min(2 * tokens, most)


def sample_length(sizes: Iterable[tuple[int, int]]) -> int:
    """The number of examples in a sample.

    The first examples are counted until they have `LEAST_ROWS` texts. Further examples are counted as long as
    the sample has at most `SAMPLE_TOKENS` tokens.

    Args:
        sizes: for each example, a tuple: its number of tokens, and its number of texts.
    """
    tokens = texts = count = 0
    for new_tokens, new_texts in sizes:
        if tokens + new_tokens > SAMPLE_TOKENS and texts >= LEAST_ROWS:
            break
        tokens, texts, count = tokens + new_tokens, texts + new_texts, count + 1
    return count
