"""Sampling: chooses the next token."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from nplora import _check
from nplora.runtime.user_warning import warn_user

Array = npt.NDArray[Any]

_OP = "generate"


def _option(default: Any, text: str, **more: Any) -> Any:
    return dataclasses.field(default=default, metadata={"help": text, **more})


@dataclass(frozen=True)
class Sampling:
    """How the next tokens are chosen, and when generation ends.

        >>> import nplora
        >>> nplora.generate.Sampling(temperature=0.8, top_p=0.95, stop=["###"]).stop
        ('###',)

    Raises:
        ValueError, TypeError: a value is out of range, or has a wrong type.
    Warns:
        UserWarning: `top_k` or `top_p` is given, and `temperature` is 0.
    """

    max_new_tokens: int = _option(128, "maximum number of generated tokens")
    temperature: float = _option(
        0.0, "sampling temperature; 0: always the most likely token, 1: the model's own probabilities"
    )
    top_k: int | None = _option(None, "number of tokens to sample from, the most likely ones")
    top_p: float | None = _option(
        None, "total probability of the most likely tokens to sample from, above 0 and at most 1"
    )
    repetition_penalty: float = _option(
        1.0, "repetition penalty; a value above 1 makes tokens that are already in the text less likely"
    )
    stop: tuple[str, ...] = _option((), "stop text: generation ends before this text (repeatable)")
    seed: int = _option(0, "random seed of the sampling")
    presence_penalty: float = _option(
        0.0, "number that is subtracted from the score of every token that was generated already"
    )
    frequency_penalty: float = _option(
        0.0, "number that is subtracted from a token's score once for each time that the token was generated"
    )
    logit_bias: Mapping[int, float] | tuple[tuple[int, float], ...] = _option(
        (), "numbers that are added to the scores of tokens, by token id", command=False
    )

    def __post_init__(self) -> None:
        _check.integer(_OP, "max_new_tokens", self.max_new_tokens, least=0)
        _check.at_least(_OP, "temperature", self.temperature, 0)
        if self.top_k is not None:
            _check.integer(_OP, "top_k", self.top_k, least=1)
        if self.top_p is not None and not 0 < _check.number(_OP, "top_p", self.top_p) <= 1:
            raise ValueError(f"{_OP}: top_p is {self.top_p}, expected above 0 and at most 1")
        narrowed = [name for name in ("top_k", "top_p") if getattr(self, name) not in (None, 1)]
        if narrowed and self.temperature == 0:
            names = " and ".join(narrowed)
            have = "have" if len(narrowed) > 1 else "has"
            warn_user(
                f"{_OP}: {names} {have} no effect at temperature 0, where the most likely token is chosen"
            )
        if _check.number(_OP, "repetition_penalty", self.repetition_penalty) <= 0:
            raise ValueError(f"{_OP}: repetition_penalty is {self.repetition_penalty}, expected above 0")
        object.__setattr__(self, "stop", _check.texts(_OP, "stop", self.stop))
        if "" in self.stop:
            raise ValueError(f"{_OP}: stop is {self.stop!r}, expected a list of non-empty texts")
        _check.integer(_OP, "seed", self.seed, least=0)
        for name in ("presence_penalty", "frequency_penalty"):
            _check.number(_OP, name, getattr(self, name))
        object.__setattr__(self, "logit_bias", _biases(self.logit_bias))

    @property
    def plain(self) -> bool:
        """Whether the token with the model's highest score is always chosen."""
        return self.only_biased and not self.logit_bias

    @property
    def only_biased(self) -> bool:
        """Whether sampling always chooses the token with the highest sum of score and `logit_bias`."""
        penalties = self.presence_penalty, self.frequency_penalty
        return self.temperature == 0 and self.repetition_penalty == 1 and not any(penalties)


def _biases(given: Any) -> tuple[tuple[int, float], ...]:
    """Check biases, given as a mapping or as a sequence of pairs. Return pairs (token, bias)."""
    try:
        pairs = dict(given)
    except (TypeError, ValueError):
        raise TypeError(
            f"{_OP}: logit_bias is {given!r}, expected a mapping from token ids to numbers"
        ) from None
    for token, bias in pairs.items():
        _check.integer(_OP, "a token of logit_bias", token, least=0)
        if bias != -math.inf:  # -inf is allowed: it rules the token out
            _check.number(_OP, f"logit_bias of token {token}", bias)
    return tuple((int(token), float(bias)) for token, bias in pairs.items())


def choose(
    scores: Array, before: Sequence[int], sampling: Sampling, rng: np.random.Generator, prompt: int = 0
) -> int:
    """Choose the next token.

    Args:
        scores: (vocab,), the score of each token of the vocabulary.
        before: all tokens so far, beginning with the prompt. The penalties need these tokens.
        rng: the random generator for sampling.
        prompt: the number of tokens of the prompt. The presence and frequency penalties ignore the first
            `prompt` tokens of `before`.

    Raises:
        FloatingPointError: a score is NaN, or the largest score is infinite.

    >>> import numpy as np
    >>> rng = np.random.default_rng(0)
    >>> scores = np.array([0.0, 3.0, 1.0])
    >>> choose(scores, [], Sampling(), rng)
    1
    >>> [choose(scores, [], Sampling(temperature=2.0), rng) for _ in range(5)]
    [1, 1, 0, 0, 2]
    """
    best = int(scores.argmax())  # the first NaN, if there is one
    place, largest = f"the token at position {len(before)}", scores[best]
    if np.isnan(largest):
        raise FloatingPointError(f"{_OP}: the scores for {place} are NaN")
    if not np.isfinite(largest):
        raise FloatingPointError(
            f"{_OP}: the largest score for {place} is {largest}, expected a finite number"
        )
    if sampling.plain:
        return best
    if sampling.only_biased:
        biased = _likeliest_biased(scores, best, dict(sampling.logit_bias))
        if biased is not None:
            return biased
    scores = np.array(scores, np.float64)
    penalise(scores, before, sampling, prompt)
    if sampling.temperature == 0:
        return int(scores.argmax())
    with np.errstate(over="ignore"):  # the largest score is 0 then, so an overflow only gives -inf
        scores -= scores.max()
        scores /= sampling.temperature
    if sampling.top_k is not None:
        keep_top_k(scores, sampling.top_k)
    if sampling.top_p is not None:
        keep_top_p(scores, sampling.top_p)
    shares = np.cumsum(softmax(scores))
    return int(np.searchsorted(shares, rng.random() * shares[-1], side="right"))


def _likeliest_biased(scores: Array, best: int, biases: dict[int, float]) -> int | None:
    """The most likely token after `biases` are added to the scores, or None if all scores must be compared.

    `best` is the most likely token without biases. If `best` has a bias, all scores must be compared. If not,
    `best` is compared only with the tokens that have a bias, because all other tokens keep their scores.
    """
    found = {token: float(scores[token]) + bias for token, bias in biases.items() if token < len(scores)}
    if best in found:
        return None
    found[best] = float(scores[best])
    return max(found, key=lambda token: (found[token], -token))


def penalise(scores: Array, before: Sequence[int], sampling: Sampling, prompt: int = 0) -> None:
    """Apply the biases and the penalties to `scores` in place. The arguments are those of `choose`.

    Raises:
        ValueError: `logit_bias` makes the score of every token -inf.

    >>> import numpy as np
    >>> scores = np.array([1.0, 2.0, 3.0])
    >>> penalise(scores, [2, 2], Sampling(frequency_penalty=0.5))
    >>> scores
    array([1., 2., 2.])
    """
    for token, bias in dict(sampling.logit_bias).items():
        if token < len(scores):
            scores[int(token)] += bias
    if sampling.logit_bias and scores.max() == -np.inf:
        raise ValueError(f"{_OP}: logit_bias rules out every token")
    if sampling.repetition_penalty != 1:
        penalise_repetition(scores, before, sampling.repetition_penalty)
    if (sampling.presence_penalty or sampling.frequency_penalty) and len(before) > prompt:
        seen, times = np.unique(np.asarray(before[prompt:], np.int64), return_counts=True)
        seen, times = seen[np.isfinite(scores[seen])], times[np.isfinite(scores[seen])]
        largest = np.finfo(np.float64).max
        with np.errstate(over="ignore"):
            less = scores[seen] - (sampling.presence_penalty + sampling.frequency_penalty * times)
        scores[seen] = np.clip(less, -largest, largest)


def log_probabilities(scores: Array) -> Array:
    """Compute log(softmax(scores)) in float64. The largest score must be finite."""
    shifted = np.asarray(scores, np.float64) - scores.max()
    return np.asarray(shifted - np.log(np.exp(shifted).sum()))


def softmax(scores: Array) -> Array:
    """Compute exp(scores) / sum(exp(scores)). The largest score must be finite.

    >>> import numpy as np
    >>> softmax(np.log([1.0, 3.0]))
    array([0.25, 0.75])
    """
    powers = np.exp(scores - scores.max())
    return np.asarray(powers / powers.sum())


def penalise_repetition(scores: Array, before: Sequence[int], penalty: float) -> None:
    """Lower the scores of the tokens in `before`, in place (Keskar et al. 2019, section 4.1).

    Finite scores stay finite.

    >>> import numpy as np
    >>> scores = np.array([-1.0, 2.0, 3.0])
    >>> penalise_repetition(scores, [0, 1, 1], 2.0)
    >>> scores
    array([-2.,  1.,  3.])
    """
    seen = np.unique(np.asarray(before, np.int64))
    seen = seen[np.isfinite(scores[seen])]
    with np.errstate(over="ignore"):
        changed = np.where(scores[seen] < 0, scores[seen] * penalty, scores[seen] / penalty)
    largest = np.finfo(np.float64).max
    scores[seen] = np.clip(changed, -largest, largest)


def keep_top_k(scores: Array, k: int) -> None:
    """Set all scores below the k-th largest to -inf, in place.

    >>> import numpy as np
    >>> scores = np.array([1.0, 4.0, 3.0])
    >>> keep_top_k(scores, 2)
    >>> scores
    array([-inf,   4.,   3.])
    """
    if k < len(scores):
        scores[scores < np.partition(scores, -k)[-k]] = -np.inf


def keep_top_p(scores: Array, p: float) -> None:
    """Set the scores of the least likely tokens to -inf, in place (nucleus sampling, Holtzman et al. 2020).

    The total probability of these tokens is at most 1 - p.

    >>> import numpy as np
    >>> scores = np.log([0.1, 0.6, 0.3])
    >>> keep_top_p(scores, 0.8)
    >>> softmax(scores).round(3)
    array([0.   , 0.667, 0.333])
    """
    order = np.argsort(scores, kind="stable")
    unlikely = np.cumsum(softmax(scores)[order]) <= 1 - p
    unlikely[-1] = False
    scores[order[unlikely]] = -np.inf
