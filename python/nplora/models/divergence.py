"""The Kullback-Leibler divergence between a teacher's and a student's next-token distributions.

p is the teacher's distribution, and q is the student's. Both are softmax(logits / T) at temperature T. Let z
be the student's logits divided by T. The divergences and their derivatives are

    forward  KL(p || q) = Σ p log(p / q)     dKL/dz_j = q_j - p_j
    reverse  KL(q || p) = Σ q log(q / p)     dKL/dz_j = q_j (log(q_j / p_j) - KL)

A loss multiplies the divergence by T², so that the gradients have the same size at any temperature (Hinton et
al. 2015, arXiv:1503.02531, section 2).

A teacher's distribution is given by all logits, or by the k most likely tokens. With k tokens, all other
tokens form one class, "the rest". The rest has the probability p_r = 1 - Σ p_i for the teacher and
q_r = 1 - Σ q_i for the student. The divergence of these k + 1 classes is a lower bound of the full
divergence, and equals it if k is the size of the vocabulary. If token j belongs to the rest, dKL/dz_j is
q_j (1 - p_r / q_r) for the forward divergence, and q_j (log(q_r / p_r) - KL) for the reverse divergence.
Without the class "the rest", the student would learn a distribution over the teacher's k tokens alone, which
is too sharp (Anshumann et al. 2025, arXiv:2503.16870). TRL's distillation from a server computes the same
divergence if its option `loss_add_tail` is set.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from nplora import _core

Array = npt.NDArray[Any]

DIVERGENCES = ("forward", "reverse")
_TINY = 1e-30  # the least probability of the rest, which float32 may round to 0
_NEVER = np.float32(-1e30)  # the logit of a token that is left out; the kernels need a finite number
_GROUP = 32  # the number of logits in each group of `_largest`
BLOCK_BYTES = 1 << 21  # the logits that NumPy works on at once; they fit into the processor's cache


@dataclass(frozen=True)
class TopK:
    """A teacher's most likely tokens.

    Attributes:
        ids: integers (n, k), the tokens. No token occurs twice in the same row of the array. The id -1 stands
            for a token that is not in the student's vocabulary.
        log_probs: float64 (n, k + 1). The first k columns hold the log-probabilities of the tokens, or -inf
            for an id -1. The last column holds the log-probability of all other tokens together, or -inf if
            there are no other tokens. The probabilities of a row sum to 1.
    """

    ids: Array
    log_probs: Array

    def __getitem__(self, rows: Any) -> TopK:
        return TopK(self.ids[rows], self.log_probs[rows])


def most_likely(logits: Array, k: int, temperature: float = 1.0) -> TopK:
    """The k most likely tokens of each row of logits, the most likely first. Equally likely tokens are sorted
    by id.

    Args:
        logits: float32 (n, vocabulary), finite; overwritten.
        k: at most the size of the vocabulary.
    """
    n, vocab = logits.shape
    if temperature != 1:
        logits *= np.float32(1 / temperature)
    rows, ids = np.arange(n)[:, None], _largest(logits, k)
    top = logits[rows, ids].astype(np.float64)
    total = top[:, 0] + _losses(logits, ids[:, 0])
    rest = np.full(n, -np.inf)
    if k < vocab:
        logits[rows, ids] = _NEVER
        others = np.ones((n, k + 1), bool)
        chosen = ids <= k
        others[np.nonzero(chosen)[0], ids[chosen]] = False
        first = others.argmax(axis=1)  # a token of the rest, found among the first k + 1 tokens
        rest = logits[np.arange(n), first] + _losses(logits, first)
    return TopK(ids, np.column_stack([top, rest]) - total[:, None])


def _losses(logits: Array, targets: Array) -> Array:
    """log Σ exp(logits) - logits[target], float64 (n,)."""
    losses = np.empty(len(logits))
    _core.cross_entropy(logits, targets.astype(np.int64), 1.0, losses, False)
    return losses


def _largest(values: Array, k: int) -> Array:
    """The positions (n, k) of the k largest values of each row, the largest first.

    Divide each row into groups, and find the maximum of each group. Let b be the k-th largest of these
    maxima. At least k values of the row are >= b, so the k largest values of the row are >= b. Sort only the
    values that are >= b. This method is several times faster than partitioning the whole row.
    """
    n, size = values.shape
    groups = size // _GROUP
    if groups < 2 * k:
        return np.argsort(-values, axis=1, kind="stable")[:, :k]
    maxima = values[:, : groups * _GROUP].reshape(n, _GROUP, groups).max(axis=1)
    bounds = np.partition(maxima, groups - k, axis=1)[:, groups - k]
    rows, columns = np.nonzero(values >= bounds[:, None])
    order = np.lexsort((columns, -values[rows, columns], rows))
    begins = np.searchsorted(rows, np.arange(n))
    return np.asarray(columns[order[begins[:, None] + np.arange(k)]])


Teacher: TypeAlias = TopK | Array  # an array holds logits (n, vocabulary), which are overwritten


@dataclass(frozen=True)
class Distillation:
    """A loss: ratio · T² · KL + (1 - ratio) · cross-entropy.

    Attributes:
        kl: "forward" or "reverse".
        temperature: T.
        ratio: the weight of the divergence in the loss, from 0 to 1.
    """

    kl: str = "forward"
    temperature: float = 1.0
    ratio: float = 1.0

    def __call__(
        self, logits: Array, targets: Array, teacher: Teacher, factor: float, gradient: bool
    ) -> tuple[Array, Array, Array | None]:
        """Return the losses of n rows, the divergences (without the factor T²), and the cross-entropies.

        Args:
            logits: float32 (n, vocabulary), the student's logits. If `gradient` is True, the gradient of the
                losses, multiplied by `factor`, overwrites the array. If not, the array holds meaningless
                values afterwards.
            targets: integers (n,), the labels.
            teacher: the teacher's logits or most likely tokens, for the same rows.
        Returns:
            three float64 arrays (n,). If `gradient` is True and the ratio is 1, the third array is None.
        """
        n, vocab = logits.shape
        kls, hard = np.empty(n), None if gradient and self.ratio == 1 else np.empty(n)
        rows = max(1, BLOCK_BYTES // (4 * vocab))
        for begin in range(0, n, rows):
            block = slice(begin, begin + rows)
            label_losses = None if hard is None else hard[block]
            kls[block] = self._block(
                logits[block], targets[block], teacher[block], factor, gradient, label_losses
            )
        losses = self.ratio * self.temperature**2 * kls
        if hard is not None and self.ratio < 1:
            losses += (1 - self.ratio) * hard
        return losses, kls, hard

    def _block(
        self, z: Array, targets: Array, teacher: Teacher, factor: float, gradient: bool, hard: Array | None
    ) -> Array:
        """Return the divergences of a few rows. Write the cross-entropies to the array `hard`, if given."""
        of_labels = None
        if hard is not None:
            of_labels = z.copy() if gradient else z
            _core.cross_entropy(of_labels, targets, factor * (1 - self.ratio), hard, gradient)
        if self.temperature != 1:
            z *= np.float32(1 / self.temperature)
        slope = factor * self.ratio * self.temperature  # T² / T: z is the logits divided by T
        if isinstance(teacher, TopK):
            kls = _sparse(self.kl, z, teacher, slope, gradient)
        else:
            if self.temperature != 1:
                teacher *= np.float32(1 / self.temperature)
            kls = _common(self.kl, z, teacher, slope, gradient)
        if gradient and of_labels is not None:
            z += of_labels
        return kls


def _common(kl: str, z: Array, t: Array, factor: float, gradient: bool) -> Array:
    """The divergences (n,) over only the tokens that are in both vocabularies. The logits of all other tokens
    get gradient 0.

    One vocabulary may be longer than the other, because some models pad the head's weight with unused rows.
    """
    common = min(z.shape[1], t.shape[1])
    if z.shape[1] == t.shape[1]:
        return _dense(kl, z, t, factor, gradient)
    ours = np.ascontiguousarray(z[:, :common])
    kls = _dense(kl, ours, np.ascontiguousarray(t[:, :common]), factor, gradient)
    if gradient:
        z[:, :common], z[:, common:] = ours, 0
    return kls


def _dense(kl: str, z: Array, t: Array, factor: float, gradient: bool) -> Array:
    """The divergences (n,), given all logits t of the teacher and z of the student. t and z are overwritten.

    At a high temperature, p and q are almost equal, and the divergence is much smaller than the terms of its
    sum. So the terms are added up in float64. Because of rounding, the probabilities do not add up to exactly
    1. So the sum of the terms is divided by the sum of p (forward) or of q (reverse).
    """
    log_ratio = t - z
    shift = _softmax(t) - _softmax(z)  # t is p, and z is q
    rounded = shift.astype(np.float32)
    log_ratio -= rounded[:, None]  # log(p / q)
    weights = t if kl == "forward" else z
    kls = _sums(weights * log_ratio) / weights.sum(axis=1) - (shift - rounded)
    kls = kls if kl == "forward" else -kls
    if gradient and kl == "forward":
        z -= t
        z *= np.float32(factor)
    elif gradient:
        log_ratio += kls[:, None].astype(np.float32)
        z *= log_ratio
        z *= np.float32(-factor)
    return np.asarray(kls)


def _sums(values: Array) -> Array:
    """The sum of each row, added up in float64."""
    return np.asarray(values.sum(axis=1, dtype=np.float64))


def _softmax(z: Array) -> Array:
    """Replace logits (n, vocabulary) by their softmax. Return log Σ exp(z), float64 (n,)."""
    first, losses = z[:, 0].astype(np.float64), np.empty(len(z))
    _core.cross_entropy(z, np.zeros(len(z), np.int64), 1.0, losses, True)
    z[:, 0] = np.exp(-losses)  # `_core.cross_entropy` has subtracted 1 from column 0
    return losses + first


def _sparse(kl: str, z: Array, teacher: TopK, factor: float, gradient: bool) -> Array:
    """The divergences (n,), given the teacher's most likely tokens. The student's logits are overwritten."""
    k = teacher.ids.shape[1]
    known = teacher.ids >= 0
    rows, places = np.nonzero(known)
    ids = teacher.ids[known]
    has_rest = bool(np.isfinite(teacher.log_probs[:, -1]).all())
    log_p = teacher.log_probs if has_rest else teacher.log_probs[:, :-1]
    log_q = np.full((len(z), k), -np.inf)
    log_q[rows, places] = z[rows, ids]
    log_q -= _softmax(z)[:, None]
    z[rows, ids] = 0  # now z holds q for the rest, and 0 for the teacher's tokens
    if has_rest:
        rest = np.maximum(_sums(z), _TINY)  # more exact than 1 - Σ q_i, which would lose digits
        log_q = np.column_stack([log_q, np.log(rest)])
    # Normalise q: rounding moves its sum away from 1. If there is no rest, the student's vocabulary may still
    # have further tokens, which are only padding but have a probability.
    log_q -= np.log(np.exp(log_q).sum(axis=1, keepdims=True))
    log_ratio, on_rest = np.zeros_like(log_q), np.zeros(len(z))
    np.subtract(log_p, log_q, out=log_ratio, where=np.isfinite(log_q))
    if kl == "forward":
        kls = (np.exp(log_p) * log_ratio).sum(axis=1)
        slopes = np.exp(log_q) - np.exp(log_p)
        if has_rest:
            on_rest = -np.expm1(log_ratio[:, -1])
    else:
        kls = -(np.exp(log_q) * log_ratio).sum(axis=1)
        slopes = -np.exp(log_q) * (log_ratio + kls[:, None])
        if has_rest:
            on_rest = -log_ratio[:, -1] - kls
    if gradient:
        z *= (factor * on_rest).astype(np.float32)[:, None]
        z[rows, ids] = factor * slopes[rows, places]
    return np.asarray(kls)
