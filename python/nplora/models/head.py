"""Computes the last norm, the head and the loss for a few rows at a time, to keep few logits in memory."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt

from nplora import _core
from nplora.models.decoder import Decoder
from nplora.models.packing import IGNORED
from nplora.nn import Linear, LoRALinear, TrainedHead, stack_backward, stack_forward

Array = npt.NDArray[Any]
AnyHead = Linear | LoRALinear | TrainedHead

# Logits of a chunk. A chunk must be small enough to stay in the cache between head, loss and gradient, and
# have enough rows that reading the head's weight costs little compared with the products. If more than
# _MANY_CHUNKS are needed, each is half as large again, so that the weight is decoded less often. Training so
# many tokens takes far more memory elsewhere anyway.
_CHUNK_BYTES = 32 << 20
_MANY_CHUNKS = 4
_LEAST_ROWS, _MOST_ROWS = 64, 256


def loss_and_gradient(
    model: Decoder, head: AnyHead, x: Array, targets: Array, factor: float
) -> tuple[float, Array]:
    """The sum of the losses, and `factor` times its gradient with respect to the residual stream x (n, d).

    If the head has an adapter, the adapter's gradients are accumulated too. Rows without a target have
    gradient 0.
    """
    trained = np.flatnonzero(targets != IGNORED)
    dx, total = np.zeros_like(x), 0.0
    for rows in chunks(trained, head.weight.shape[0]):
        chunk_loss, dx[rows] = _chunk_gradient(model, head, x[rows], targets[rows], factor)
        total += chunk_loss
    return total, dx


def _chunk_gradient(
    model: Decoder, head: AnyHead, x: Array, targets: Array, factor: float
) -> tuple[float, Array]:
    """Compute `loss_and_gradient` for a few rows. The logits of these rows are freed at the end."""
    logits, saved = logits_forward(head, model.read_out(x))
    losses = np.empty(len(x))
    _core.cross_entropy(logits, targets, factor, losses, True)
    dnormed = logits_backward(head, logits, saved)
    return float(losses.sum()), model.read_out_backward(dnormed, x)


def logits_forward(head: AnyHead, x: Array) -> tuple[Array, Any]:
    """The logits (n, vocab) of the head's input x (n, d), and the values for `logits_backward`."""
    if isinstance(head, TrainedHead):
        return head.forward(x)
    (logits,), saved = stack_forward((head,), x)
    return logits, saved


def logits_backward(head: AnyHead, dlogits: Array, saved: Any) -> Array:
    """The gradient of the head's input. The gradients of a trained head are accumulated too.

    `dlogits` may be overwritten.
    """
    if isinstance(head, TrainedHead):
        dx: Array = head.backward(dlogits, saved, overwrite_dy=True)
        return dx
    return stack_backward((head,), [dlogits], saved)


def loss(model: Decoder, head: AnyHead, x: Array, targets: Array) -> float:
    """The sum of the losses, without gradients."""
    pieces = chunks(np.flatnonzero(targets != IGNORED), head.weight.shape[0])
    return sum((_chunk_loss(model, head, x[rows], targets[rows]) for rows in pieces), 0.0)


def _chunk_loss(model: Decoder, head: AnyHead, x: Array, targets: Array) -> float:
    """Compute `loss` for a few rows. The logits of these rows are freed at the end."""
    logits = head.forward(model.read_out(x))[0]
    losses = np.empty(len(x))
    _core.cross_entropy(logits, targets, 1.0, losses, False)
    return float(losses.sum())


def most_rows(rows: int, vocab: int) -> int:
    """The largest number of rows whose logits are in memory at once."""
    most = min(max(_CHUNK_BYTES // (4 * vocab), _LEAST_ROWS), _MOST_ROWS)
    return most if rows <= _MANY_CHUNKS * most else min(most + most // 2, _MOST_ROWS)


def chunks(rows: Array, vocab: int) -> list[Array]:
    """Split the rows into even chunks. A short chunk would read the whole head for only a few rows."""
    return np.array_split(rows, math.ceil(len(rows) / most_rows(len(rows), vocab))) if len(rows) else []
