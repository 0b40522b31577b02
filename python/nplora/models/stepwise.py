"""Computes the loss a few tokens at a time, as decoding does with compute="int8"."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from nplora import _core
from nplora.models.cache import KVCache
from nplora.models.config import ModelConfig
from nplora.models.decoder import Decoder
from nplora.models.head import AnyHead
from nplora.models.packing import IGNORED, PackedBatch
from nplora.models.positions import cache_positions

Array = npt.NDArray[Any]

_FEW = _core.constants.least_small_batch  # tokens at a time


def loss(config: ModelConfig, model: Decoder, lm_head: AnyHead, batch: PackedBatch) -> float:
    """The sum of the losses of packed sequences. Call this function in `with inference()`."""
    total = 0.0
    for first, end in zip(batch.starts[:-1], batch.starts[1:], strict=True):
        cache, slot = KVCache(config, 1, max(1, int(end - first)), model), np.zeros(1, np.int64)
        cache.activate(0, batch.ids[first:end])
        for start in range(int(first), int(end), _FEW):
            rows = slice(start, min(start + _FEW, int(end)))
            count = rows.stop - rows.start
            positions = cache_positions(slot, cache.lengths, cache.limits, count)
            x = model.run_cached(batch.ids[rows], positions, cache)
            cache.lengths[:] += count
            total += _head_loss(model, lm_head, x, batch.targets[rows])
    return total


def _head_loss(model: Decoder, lm_head: AnyHead, x: Array, targets: Array) -> float:
    trained = targets != IGNORED
    if not trained.any():
        return 0.0
    logits = lm_head.forward(model.read_out(x[trained]))[0]
    losses = np.empty(len(logits))
    _core.cross_entropy(logits, targets[trained], 1.0, losses, False)
    return float(losses.sum())
