"""Computes the last norm, the head and the loss a few rows at a time. Memory never holds all logits."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator
from typing import Any, Protocol, TypeAlias

import numpy as np
import numpy.typing as npt

from nplora import _core
from nplora.models.decoder import Decoder
from nplora.models.packing import IGNORED
from nplora.nn import Linear, LoRALinear, TrainedHead, stack_backward, stack_forward
from nplora.runtime.giving_way import give_way
from nplora.runtime.profile import section

Array = npt.NDArray[Any]
AnyHead = Linear | LoRALinear | TrainedHead
FunctionOfLosses: TypeAlias = Callable[[Array], tuple[float, Array]]


class LogitLoss(Protocol):
    """A loss that is computed for each row of logits, and summed over the rows."""

    def __call__(self, logits: Array, rows: Array, factor: float, gradient: bool) -> Array:
        """The loss of each row, float64 (n,).

        Args:
            logits: float32 (n, vocabulary). If `gradient` is True, the gradient of the logits, multiplied by
                `factor`, overwrites the logits. If `gradient` is False, the logits may be overwritten with
                meaningless values.
            rows: the indices of these n rows in the batch.
        """


SECTION = "head"  # a Profiler's name for the time spent on the head and the loss

# The size of a chunk's logits. A chunk must be small enough to stay in the processor's cache between head,
# loss and gradient. It must have enough rows that reading the head's weight costs little compared with the
# products. If there would be more than _MANY_CHUNKS chunks, each chunk gets 1.5 times as many rows, so that
# the weight is decoded less often. A batch with this many tokens needs far more memory elsewhere anyway.
_CHUNK_BYTES = 32 << 20
_MANY_CHUNKS = 4
_LEAST_ROWS, _MOST_ROWS = 64, 256


def loss_and_gradient(
    model: Decoder, head: AnyHead, x: Array, targets: Array, factor: float
) -> tuple[float, Array]:
    """Return the sum of the losses, and `factor` times the gradient of this sum with respect to x.

    x (n, d) is the residual stream. Rows without a target have gradient 0. If the head has an adapter, the
    adapter's gradients are accumulated too.
    """
    dx, total = np.zeros_like(x), 0.0
    for rows in _chunks_of(targets, head):
        losses, dx[rows] = _chunk_gradient(model, head, x[rows], targets[rows], factor)
        total += float(losses.sum())
    return total, dx


def gradient_of_losses(
    model: Decoder, head: AnyHead, x: Array, targets: Array, function: FunctionOfLosses
) -> tuple[float, Array]:
    """Apply `function` to the tokens' losses. Return the value and its gradient with respect to x (n, d).

    The loss of a token depends only on the token's own row of x. So if the head is frozen, one pass computes
    all losses and their gradients. `function` then returns a derivative for each loss, and each row of the
    gradients is multiplied by the derivative for the row's loss. If the head is trained, a first pass
    computes the losses, and `function` returns the derivatives. A second pass multiplies the gradients of the
    logits by these derivatives, and then computes the gradients of the head.

    Args:
        function: takes the losses of all rows with a target, float64 (m,). Returns a value, and the
            derivative of the value with respect to each loss (m,).
    """
    dx, trained = np.zeros_like(x), np.flatnonzero(targets != IGNORED)
    if head.parameters() or isinstance(head, TrainedHead):  # a tied head trains the rows of the embedding
        streams = head.random_state()
        losses = token_losses(model, head, x, targets)
        head.set_random_state(streams)  # the second pass draws the same dropout masks
        value, weights = function(losses)
        weight = np.zeros(len(x), x.dtype)
        weight[trained] = weights
        for rows in _chunks_of(targets, head):
            _, dx[rows] = _chunk_gradient(model, head, x[rows], targets[rows], 1.0, weight[rows])
        return value, dx
    found = [np.empty(0)]
    for rows in _chunks_of(targets, head):
        chunk_losses, dx[rows] = _chunk_gradient(model, head, x[rows], targets[rows], 1.0)
        found.append(chunk_losses)
    value, weights = function(np.concatenate(found))
    dx[trained] *= np.asarray(weights, x.dtype)[:, None]
    return value, dx


def _chunk_gradient(
    model: Decoder, head: AnyHead, x: Array, targets: Array, factor: float, weights: Array | None = None
) -> tuple[Array, Array]:
    """The losses of a few rows, and the gradients of the losses with respect to x.

    The gradient of row i is multiplied by `factor` and, if `weights` is given, by weights[i]. The logits of
    these rows are freed at the end.
    """
    normed = model.read_out(x)
    logits, saved = logits_forward(head, normed)
    losses, word_filter = np.empty(len(x)), model.word_filter
    if word_filter is not None and word_filter.applies(head):
        give_way()
        dnormed = word_filter.gradient(head, normed, logits, targets, factor, losses, weights)
        return losses, model.read_out_backward(dnormed, x)
    _core.cross_entropy(logits, targets, factor, losses, True)
    if weights is not None:
        logits *= weights[:, None]
    give_way()
    dnormed = logits_backward(head, logits, saved, _dither_key(model, losses))
    return losses, model.read_out_backward(dnormed, x)


def gradient_of_logit_loss(
    model: Decoder, head: AnyHead, x: Array, targets: Array, row_loss: LogitLoss, factor: float
) -> tuple[float, Array]:
    """Like `loss_and_gradient`, but with the loss `row_loss` instead of the cross entropy."""
    dx, total = np.zeros_like(x), 0.0
    for rows in _chunks_of(targets, head):
        losses, dx[rows] = _chunk_of_logit_loss(model, head, x[rows], rows, row_loss, factor)
        total += float(losses.sum())
    return total, dx


def _chunk_of_logit_loss(
    model: Decoder, head: AnyHead, x: Array, rows: Array, row_loss: LogitLoss, factor: float
) -> tuple[Array, Array]:
    """Compute `gradient_of_logit_loss` for a few rows. The logits of these rows are freed at the end."""
    logits, saved = logits_forward(head, model.read_out(x))
    losses = row_loss(logits, rows, factor, True)
    give_way()
    dnormed = logits_backward(head, logits, saved, _dither_key(model, losses))
    return losses, model.read_out_backward(dnormed, x)


def logit_loss(model: Decoder, head: AnyHead, x: Array, targets: Array, row_loss: LogitLoss) -> float:
    """The sum of `row_loss` over the rows that have a target, without gradients."""
    total = 0.0
    for rows in _chunks_of(targets, head):
        total += float(row_loss(logits_of(model, head, x[rows]), rows, 1.0, False).sum())
    return total


def logits_of(model: Decoder, head: AnyHead, x: Array) -> Array:
    """The logits of the rows x (n, d) of the residual stream."""
    return head.forward(model.read_out(x))[0]


def logits_forward(head: AnyHead, x: Array) -> tuple[Array, Any]:
    """Return the logits (n, vocab) for the head's input x (n, d), and the values for `logits_backward`."""
    if isinstance(head, TrainedHead):
        return head.forward(x)
    (logits,), saved = stack_forward((head,), x)
    return logits, saved


def _dither_key(model: Decoder, losses: Array) -> int | None:
    """Return the key from which `logits_backward` draws random numbers; None if `int8_head` is False.

    The key is a hash of the losses. So different training steps draw different numbers, but a step that is
    repeated draws the same numbers again. Checkpoints need not hold the state of a random generator.
    """
    if not model.int8_head:
        return None
    return int.from_bytes(hashlib.blake2b(losses.tobytes(), digest_size=8).digest(), "little")


def logits_backward(head: AnyHead, dlogits: Array, saved: Any, dither_key: int | None = None) -> Array:
    """The gradient of the head's input. The gradients of a trained head are accumulated too.

    `dlogits` may be overwritten.

    Args:
        dither_key: only for a head with compute="int8": the key from which random numbers are drawn, or None.
            With a key, `dlogits` is rounded to int8 stochastically (see `stack_backward`), and the product is
            computed in int8. With None, the product is computed in bfloat16. A head with trained rows ignores
            the key.
    """
    if isinstance(head, TrainedHead):
        dx: Array = head.backward(dlogits, saved, overwrite_dy=True)
        return dx
    in_int8 = dither_key is not None
    return stack_backward((head,), [dlogits], saved, int8=in_int8, dither_key=dither_key)


def loss(model: Decoder, head: AnyHead, x: Array, targets: Array) -> float:
    """The sum of the losses, without gradients."""
    return float(token_losses(model, head, x, targets).sum())


def token_losses(model: Decoder, head: AnyHead, x: Array, targets: Array) -> Array:
    """The loss -log p of each row that has a target, float64."""
    pieces = _chunks_of(targets, head)
    return np.concatenate(
        [np.empty(0), *(_chunk_losses(model, head, x[rows], targets[rows]) for rows in pieces)]
    )


def token_scores(model: Decoder, head: AnyHead, x: Array, targets: Array) -> tuple[Array, Array]:
    """For each row with a target, the loss (float64), and whether the target is the most likely token."""
    pieces = [_chunk_scores(model, head, x[rows], targets[rows]) for rows in _chunks_of(targets, head)]
    losses, tops = zip((np.empty(0), np.empty(0, np.bool_)), *pieces, strict=True)
    return np.concatenate(losses), np.concatenate(tops)


def _chunk_scores(model: Decoder, head: AnyHead, x: Array, targets: Array) -> tuple[Array, Array]:
    """Compute `token_scores` for a few rows. The logits of these rows are freed at the end."""
    logits = logits_of(model, head, x)
    is_top = logits.argmax(axis=1) == targets
    losses = np.empty(len(x))
    _core.cross_entropy(logits, targets, 1.0, losses, False)
    return losses, is_top


def _chunk_losses(model: Decoder, head: AnyHead, x: Array, targets: Array) -> Array:
    """The losses of a few rows. The logits of these rows are freed at the end."""
    logits = logits_of(model, head, x)
    losses = np.empty(len(x))
    _core.cross_entropy(logits, targets, 1.0, losses, False)
    return losses


def _chunks_of(targets: Array, head: AnyHead) -> Iterator[Array]:
    """Yield the indices of rows that have a target, in chunks. `give_way` lets more urgent work run before
    each chunk.

    Computing a chunk may take several times as long as computing a block of the decoder. So callers also call
    `give_way` within a chunk.
    """
    for rows in chunks(np.flatnonzero(targets != IGNORED), head.weight.shape[0]):
        give_way()
        with section(SECTION):
            yield rows


def most_rows(rows: int, vocab: int) -> int:
    """The largest number of rows whose logits are in memory at once."""
    most = min(max(_CHUNK_BYTES // (4 * vocab), _LEAST_ROWS), _MOST_ROWS)
    return most if rows <= _MANY_CHUNKS * most else min(most + most // 2, _MOST_ROWS)


def largest_chunk(rows: int, vocab: int) -> int:
    """The number of rows in the largest chunk, if `chunks` splits `rows` rows."""
    return math.ceil(rows / math.ceil(rows / most_rows(rows, vocab))) if rows else 0


def chunks(rows: Array, vocab: int) -> list[Array]:
    """Split the rows into chunks of almost equal size.

    A chunk with only a few rows would be wasteful, because each chunk reads the whole weight of the head.
    """
    return np.array_split(rows, math.ceil(len(rows) / most_rows(len(rows), vocab))) if len(rows) else []
