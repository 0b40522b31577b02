"""The formulas of preference losses, with their derivatives, on float64 arrays.

A log-ratio is log p(answer) - log p_ref(answer). The log-ratio measures how much likelier the adapter makes
an answer.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]

# The upper limit of the mean log-probabilities in ORPO, because a probability of 1 has infinite odds. Above
# the limit, the slope of a chosen answer is 0, because the answer cannot become likelier. The slope of a
# rejected answer is the slope at the limit.
_ALMOST_CERTAIN = -1e-7


def log_sigmoid(x: Array) -> Array:
    return np.asarray(-np.logaddexp(0.0, -x))


def sigmoid(x: Array) -> Array:
    return np.exp(log_sigmoid(x))


@dataclass(frozen=True)
class Dpo:
    """Direct preference optimisation, and similar losses.

    sigmoid: Rafailov et al. 2023, eq. 7; with label smoothing the conservative DPO of Mitchell 2023.
    robust: Chowdhury et al. 2024. hinge: Zhao et al. 2023 (SLiC). ipo: Azar et al. 2023, eq. 17.
    sigmoid_norm: the loss "sigmoid" with each log-ratio divided by the number of tokens of the answer.
    """

    loss_type: str
    beta: float
    label_smoothing: float = 0.0

    def __call__(self, ratios: Array, counts: Array) -> tuple[Array, Array]:
        """Return the losses (n,) of the pairs, and their derivatives (n, 2) with respect to the log-ratios.

        Args:
            ratios: log-ratios (n, 2) of the chosen and the rejected answers.
            counts: the numbers of tokens (n, 2) of these answers.
        """
        per_token = self.loss_type in ("ipo", "sigmoid_norm")
        scale = 1 / np.maximum(counts, 1) if per_token else np.ones_like(ratios)
        scores = ratios * scale
        values, slopes = self._of_margin(scores[:, 0] - scores[:, 1])
        return values, slopes[:, None] * scale * [1.0, -1.0]

    def _of_margin(self, margin: Array) -> tuple[Array, Array]:
        """Return the losses (n,) of the pairs, and their derivatives (n,) with respect to the margins.

        Args:
            margin: for each pair (n,), the score of the chosen answer minus the score of the rejected answer.
        """
        beta, smoothing = self.beta, self.label_smoothing
        x = beta * margin
        if self.loss_type == "ipo":
            off = margin - 1 / (2 * beta)
            return off**2, 2 * off
        if self.loss_type == "hinge":
            return np.maximum(0.0, 1 - x), np.where(x < 1, -beta, 0.0)
        right, wrong = -log_sigmoid(x), -log_sigmoid(-x)
        dright, dwrong = -beta * sigmoid(-x), beta * sigmoid(x)
        if self.loss_type == "robust":
            share = 1 - 2 * smoothing
            return (
                ((1 - smoothing) * right - smoothing * wrong) / share,
                ((1 - smoothing) * dright - smoothing * dwrong) / share,
            )
        return (1 - smoothing) * right + smoothing * wrong, (1 - smoothing) * dright + smoothing * dwrong


def odds_ratio(means: Array, beta: float) -> tuple[Array, Array]:
    """ORPO's penalties (n,), and their derivatives (n, 2) with respect to `means` (Hong et al. 2024, eq. 7).

    Args:
        means: array (n, 2), the mean log-probability of the tokens of each chosen and each rejected answer.
    """
    bounded = np.minimum(means, _ALMOST_CERTAIN)
    log_odds = bounded - np.log(-np.expm1(bounded))
    is_flat = (means >= _ALMOST_CERTAIN) & [True, False]
    dlog_odds = np.where(is_flat, 0.0, -1 / np.expm1(bounded))
    x = log_odds[:, 0] - log_odds[:, 1]
    return -beta * log_sigmoid(x), -beta * sigmoid(-x)[:, None] * dlog_odds * [1.0, -1.0]


@dataclass(frozen=True)
class Kto:
    """Kahneman-Tversky optimisation (Ethayarajh et al. 2024, eq. 7 and 8).

    For the loss type "apo_zero_unpaired", which uses no KL divergence, call the object with `kl` = 0.

    Attributes:
        desirable, undesirable: the weights of good and of bad answers.
    """

    loss_type: str
    beta: float
    desirable: float = 1.0
    undesirable: float = 1.0

    @property
    def uses_kl(self) -> bool:
        return self.loss_type == "kto"

    def __call__(self, ratios: Array, good: Array, kl: float) -> tuple[Array, Array]:
        """Return the losses (n,) of the answers, and their derivatives (n,) with respect to the log-ratios.

        Args:
            ratios: log-ratios (n,) of the answers.
            good: whether each answer is good (n,).
            kl: the estimated KL divergence. The derivatives treat `kl` as a constant.
        """
        sign = np.where(good, 1.0, -1.0)
        weight = np.where(good, self.desirable, self.undesirable)
        value = sigmoid(sign * self.beta * (ratios - kl))
        return weight * (1 - value), -weight * sign * self.beta * value * (1 - value)
