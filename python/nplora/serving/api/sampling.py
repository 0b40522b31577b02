"""Reads the sampling options of a request: OpenAI's fields, and additional fields of vLLM and llama.cpp."""

from __future__ import annotations

import math
import secrets
import warnings
from typing import Any

from nplora.lm.generation import Sampling
from nplora.serving.fields import (
    Fields,
    checked_integer,
    checked_list,
    checked_number,
    checked_text,
    wrong,
)
from nplora.serving.request_error import RequestError

MOST_CHOICES = 16
_MOST_STOPS, _LONGEST_STOP = 16, 1000
_MOST_BIASES = 1024
_MOST_TOKENS = 2**31 - 1
_LARGEST_SEED = 2**63 - 1

# The fields that limit the number of generated tokens. If a request has several, the first one here counts.
LIMITS = ("max_completion_tokens", "max_tokens", "n_predict")

FIELDS = frozenset(
    {
        *("temperature", "top_p", "top_k", "seed", "stop", "n"),
        *LIMITS,
        *("presence_penalty", "frequency_penalty", "repetition_penalty", "repeat_penalty", "logit_bias"),
        "repeat_last_n",
    }
)


def read_sampling(body: Fields, default_tokens: int, most_tokens: int, vocab_size: int) -> Sampling:
    """Read the options that determine how the engine chooses the tokens of an answer.

    Args:
        default_tokens: the limit of generated tokens if the request does not contain `max_tokens`.
        most_tokens: the limit of generated tokens if `max_tokens` is -1, which means "no limit".
    Raises:
        RequestError: a field is out of range or has a wrong type.
    """
    limits = [_limit(body, name, most_tokens) for name in LIMITS]
    temperature = body.number("temperature", 0, 100)
    options: dict[str, Any] = {
        "max_new_tokens": next((limit for limit in limits if limit is not None), default_tokens),
        "temperature": 1.0 if temperature is None else temperature,
        "stop": _stop(body),
        "seed": _seed(body),
        "logit_bias": _biases(body, vocab_size),
    }
    top_k, top_p = body.integer("top_k", -1), body.number("top_p", 0, 1)
    if options["temperature"] > 0:  # at temperature 0, top_k and top_p have no effect
        options["top_k"] = (
            top_k if top_k is not None and top_k > 0 else None
        )  # 0 and -1: no limit, as in vLLM
        options["top_p"] = None if top_p in (None, 1) else max(top_p, math.ulp(0.0))
    options |= {name: body.number(name, -2, 2) or None for name in ("presence_penalty", "frequency_penalty")}
    repetition = [body.number(name, 0.01, 100) for name in ("repetition_penalty", "repeat_penalty")]
    options["repetition_penalty"] = next((value for value in repetition if value is not None), 1.0)
    if options["repetition_penalty"] != 1 and body.integer("repeat_last_n", -1) not in (None, -1):
        raise RequestError(
            "repeat_last_n is not supported: the penalty applies to all tokens",
            param="repeat_last_n",
            code="unsupported_parameter",
        )
    given = {name: value for name, value in options.items() if value is not None}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return Sampling(**given)


def _limit(body: Fields, name: str, most: int) -> int | None:
    return most if body.integer(name, -1, _MOST_TOKENS) == -1 else body.integer(name, 1, _MOST_TOKENS)


def _stop(body: Fields) -> tuple[str, ...]:
    given = body.get("stop")
    if given is None:
        return ()
    texts = [given] if isinstance(given, str) else checked_list("stop", given, _MOST_STOPS)
    for text in texts:
        checked_text("stop", text)
        if len(text) > _LONGEST_STOP:
            raise RequestError(f"a stop text has more than {_LONGEST_STOP:,} characters", param="stop")
    return tuple(text for text in texts if text)  # many clients send an empty text for no stop text


def _seed(body: Fields) -> int:
    """Return the seed in the request, or else a new random seed. As in llama.cpp, a seed may be negative."""
    seed = body.integer("seed", -_LARGEST_SEED - 1, _LARGEST_SEED)
    return secrets.randbits(62) if seed is None else seed % (_LARGEST_SEED + 1)


def _biases(body: Fields, vocab_size: int) -> dict[int, float] | None:
    """Return a dict from token ids to biases. In the request, the ids are written as strings."""
    given = body.object("logit_bias")
    if given is None or not given.values:
        return None
    if len(given.values) > _MOST_BIASES:
        raise RequestError(f"logit_bias has more than {_MOST_BIASES:,} tokens", param="logit_bias")
    found = {}
    for name, value in given.values.items():
        if not (name.isascii() and name.isdecimal() and len(name) < 10):
            raise wrong("logit_bias", name, "tokens as integers", param="logit_bias")
        id_ = checked_integer("logit_bias", int(name), 0, vocab_size - 1)
        found[id_] = checked_number(f"logit_bias.{name}", value, -100, 100)
    return found


def read_choices(body: Fields, sampling: Sampling) -> int:
    """Read the field `n`: the number of answers to each prompt."""
    n = body.integer("n", 1, MOST_CHOICES) or 1
    best_of = body.integer("best_of", 1, MOST_CHOICES)
    if best_of not in (None, n):
        raise RequestError("best_of is not supported: use n", param="best_of", code="unsupported_parameter")
    return n
