"""Computes losses a few tokens at a time.

With compute="int8", matrix products for a few tokens are rounded differently from products for many tokens.
Decoding computes a few tokens at a time. This module does the same, so its losses have the same rounding
errors as decoding.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

from nplora import _core
from nplora.models import head
from nplora.models.cache import KVCache
from nplora.models.config import ModelConfig
from nplora.models.decoder import Decoder
from nplora.models.head import AnyHead
from nplora.models.packing import PackedBatch

Array = npt.NDArray[Any]

FEW = _core.constants.small_batch  # the maximum number of tokens in each step


def loss(config: ModelConfig, model: Decoder, lm_head: AnyHead, batch: PackedBatch) -> float:
    """The sum of the losses of packed sequences. Call this function in `with inference()`."""
    losses = (head.token_losses(model, lm_head, x, targets) for x, targets in _steps(config, model, batch))
    return float(np.concatenate([np.empty(0), *losses]).sum())


def token_scores(
    config: ModelConfig, model: Decoder, lm_head: AnyHead, batch: PackedBatch
) -> tuple[Array, Array]:
    """The loss of each target, and whether the target is the most likely token, as in `head.token_scores`.

    Call this function in `with inference()`.
    """
    pieces = (head.token_scores(model, lm_head, x, targets) for x, targets in _steps(config, model, batch))
    losses, tops = zip((np.empty(0), np.empty(0, np.bool_)), *pieces, strict=True)
    return np.concatenate(losses), np.concatenate(tops)


def _steps(config: ModelConfig, model: Decoder, batch: PackedBatch) -> Iterator[tuple[Array, Array]]:
    """For a few tokens at a time, yield the residual stream after the last block, and the targets."""
    for first, end in zip(batch.starts[:-1], batch.starts[1:], strict=True):
        cache, slot = KVCache(config, 1, max(1, int(end - first)), model), np.zeros(1, np.int64)
        cache.activate(0, batch.ids[first:end])
        for start in range(int(first), int(end), FEW):
            rows = slice(start, min(start + FEW, int(end)))
            count = rows.stop - rows.start
            positions = cache.next_positions(slot, count)
            x = model.run_cached(batch.ids[rows], positions, cache)
            cache.lengths[:] += count
            yield x, batch.targets[rows]
