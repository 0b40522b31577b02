"""Text generation: how each token is chosen, when generation ends, and streaming."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, cast

import numpy as np
import numpy.typing as npt

from nplora import _check
from nplora.adapters import Adapter
from nplora.formats.errors import counted
from nplora.runtime.user_warning import warn_user
from nplora.tokenizer import Tokenizer

Array = npt.NDArray[Any]
Message = Mapping[str, Any]
Prompt = str | Sequence[Message]  # a text, or a chat
Adapters = Sequence[str | Adapter | None]  # for each prompt a name, an adapter, or None

_PIECE = 512  # tokens of a prompt that are read at a time, which limits the memory that they take
_CONTEXT = 8  # last tokens of a prompt; they show whether the first generated token begins with a space
_OP = "generate"


class GeneratingModel(Protocol):
    """The methods that generation needs from a model. `nplora.LanguageModel` has them."""

    @property
    def tokenizer(self) -> Tokenizer: ...
    @property
    def config(self) -> Any: ...
    def new_cache(self, slots: int, capacity: int) -> Any: ...
    def decode(self, token_ids: npt.ArrayLike, slots: npt.ArrayLike, cache: Any) -> Array: ...


class AdapterChoosingModel(GeneratingModel, Protocol):
    """The method that generation needs too, if prompts have adapters."""

    def named_model(self, adapter: str | Adapter) -> GeneratingModel: ...


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
    top_k: int | None = _option(None, "number of most likely tokens to sample from")
    top_p: float | None = _option(
        None, "total probability of the most likely tokens to sample from, above 0 and at most 1"
    )
    repetition_penalty: float = _option(
        1.0, "repetition penalty; above 1, earlier tokens become less likely to be chosen again"
    )
    stop: tuple[str, ...] = _option((), "stop text: generation ends before it (repeatable)")
    seed: int = _option(0, "random seed of the sampling")

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
                f"{_OP}: {names} {have} no effect at temperature 0, which always takes the most likely token"
            )
        if _check.number(_OP, "repetition_penalty", self.repetition_penalty) <= 0:
            raise ValueError(f"{_OP}: repetition_penalty is {self.repetition_penalty}, expected above 0")
        object.__setattr__(self, "stop", _check.texts(_OP, "stop", self.stop))
        if "" in self.stop:
            raise ValueError(f"{_OP}: stop is {self.stop!r}, expected a list of non-empty texts")
        _check.integer(_OP, "seed", self.seed, least=0)


def generate(
    lm: GeneratingModel,
    prompts: Sequence[Prompt],
    sampling: Sampling | None = None,
    adapters: Adapters | None = None,
) -> list[str]:
    """Generate a text after each prompt.

    The prompts are computed together, as rows of one batch. The other prompts do not affect a text.

        >>> import nplora
        >>> lm = nplora.load_model("model.gguf")
        >>> sampling = nplora.generate.Sampling(max_new_tokens=4)
        >>> texts = nplora.generate.generate(lm, ["Hello", "Good"], sampling)
        >>> len(texts)
        2

    Args:
        prompts: texts, or chats. A chat is a list of messages; the model's chat template renders it as text.
        sampling: how tokens are chosen, or None for always the most likely token, up to 128 tokens.
        adapters: for each prompt, the name of a named adapter or an `Adapter`; None for the model as it is.
    Returns:
        the generated texts, without their prompts.
    Raises:
        TypeError: a prompt is neither a text nor a chat.
        ValueError: a prompt is empty, has tokens outside the model's vocabulary, or fills the context; or the
            numbers of prompts and adapters differ.
        KeyError: an adapter is unknown.
        FloatingPointError: the model's scores are NaN, or the largest one is infinite.
    Warns:
        UserWarning: a text ended early because the model's context was full.
    """
    texts = [""] * len(prompts)
    for index, piece in stream_all(lm, prompts, sampling, adapters):
        texts[index] += piece
    return texts


def stream(
    lm: GeneratingModel,
    prompt: Prompt,
    sampling: Sampling | None = None,
    adapter: str | Adapter | None = None,
) -> Iterator[str]:
    """Generate a text after one prompt, and yield it in pieces of whole characters.

    The errors and warnings are those of `generate`.

    >>> import nplora
    >>> lm = nplora.load_model("model.gguf")
    >>> sampling = nplora.generate.Sampling(max_new_tokens=4)
    >>> pieces = list(nplora.generate.stream(lm, "Hello", sampling))
    >>> "".join(pieces) == lm.generate("Hello", max_new_tokens=4)
    True
    """
    return (piece for _, piece in stream_all(lm, [prompt], sampling, [adapter]))


def stream_all(
    lm: GeneratingModel,
    prompts: Sequence[Prompt],
    sampling: Sampling | None = None,
    adapters: Adapters | None = None,
) -> Iterator[tuple[int, str]]:
    """Generate a text after each prompt, and yield pairs (index of the prompt, piece of its text).

    The errors and warnings are those of `generate`.

        >>> import nplora
        >>> lm = nplora.load_model("model.gguf")
        >>> texts = ["", ""]
        >>> sampling = nplora.generate.Sampling(max_new_tokens=4)
        >>> for index, piece in nplora.generate.stream_all(lm, ["Hello", "Good"], sampling):
        ...     texts[index] += piece
        >>> texts == lm.generate(["Hello", "Good"], max_new_tokens=4)
        True
    """
    models = _models(lm, prompts, adapters)
    ids = [prompt_ids(_OP, model, prompt) for model, prompt in zip(models, prompts, strict=True)]
    return _stream_ids(lm, ids, sampling or Sampling(), models, adapters)


def generate_ids(
    lm: GeneratingModel,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling,
    adapters: Adapters | None = None,
) -> list[str]:
    """Generate a text after each prompt, given as token ids. The errors and warnings are those of `generate`.

    >>> import nplora
    >>> lm = nplora.load_model("model.gguf")
    >>> sampling = nplora.generate.Sampling(max_new_tokens=4)
    >>> nplora.generate.generate_ids(lm, [lm.tokenizer.encode_prompt("Hello")], sampling) == [
    ...     lm.generate("Hello", max_new_tokens=4)
    ... ]
    True
    """
    texts = [""] * len(prompts)
    models = _models(lm, prompts, adapters)
    checked = [_checked_ids(_OP, model, list(ids)) for model, ids in zip(models, prompts, strict=True)]
    for index, piece in _stream_ids(lm, checked, sampling, models, adapters):
        texts[index] += piece
    return texts


def _models(
    lm: GeneratingModel, prompts: Sequence[Any], adapters: Adapters | None
) -> Sequence[GeneratingModel]:
    """The model of each prompt, whose tokenizer has the tokens that its adapter adds."""
    if adapters is None:
        return [lm] * len(prompts)
    if len(adapters) != len(prompts):
        raise ValueError(
            f"{_OP}: {len(adapters)} adapters for {counted(len(prompts), 'prompt')}, expected one for each"
        )
    chooser = cast(AdapterChoosingModel, lm)
    return [lm if adapter is None else chooser.named_model(adapter) for adapter in adapters]


def _stream_ids(
    lm: GeneratingModel,
    prompts: Sequence[list[int]],
    sampling: Sampling,
    models: Sequence[GeneratingModel],
    adapters: Adapters | None,
) -> Iterator[tuple[int, str]]:
    context = int(lm.config.max_position_embeddings)
    longest = _longest_before_switch(lm.config)
    answers = [
        _Answer(model.tokenizer, index, ids, sampling)
        for index, (model, ids) in enumerate(zip(models, prompts, strict=True))
    ]
    if not answers or not sampling.max_new_tokens:
        return
    limits = [min(context, len(answer.ids) + sampling.max_new_tokens) for answer in answers]
    cache = lm.new_cache(len(answers), max(limits))
    for slot, adapter in enumerate(adapters or ()):
        if adapter is not None:
            cache.adapters[slot] = adapter
    for answer, limit in zip(answers, limits, strict=True):
        if hasattr(cache, "activate"):  # a model with its own kind of cache has no activated LoRA
            cache.activate(answer.slot, answer.ids)
        cache.limits[answer.slot] = limit if len(answer.ids) > longest else min(limit, longest)
        scores = _read(lm, answer.ids, answer.slot, cache)
        yield from answer.advance(scores, cache.capacity)
    while active := [answer for answer in answers if not answer.ended]:
        switching = [answer for answer in active if len(answer.ids) == longest + 1]
        for answer in switching:  # its keys were rotated by the short factors
            cache.lengths[answer.slot], cache.limits[answer.slot] = 0, limits[answer.slot]
            yield from answer.advance(_read(lm, answer.ids, answer.slot, cache), cache.capacity)
        others = [answer for answer in active if answer not in switching]
        if not others:
            continue
        rows = lm.decode([answer.ids[-1] for answer in others], [answer.slot for answer in others], cache)
        for answer, scores in zip(others, rows, strict=True):
            yield from answer.advance(scores, cache.capacity)
    for count in sorted({answer.count for answer in answers if answer.cut_off}):
        warn_user(
            f"{_OP}: the text ends after {count:,} tokens because the model's context of {context:,} is full"
        )


def _longest_before_switch(config: Any) -> float:
    """The maximum length for which LongRoPE uses its short factors; infinite without LongRoPE.

    When a sequence outgrows this maximum, all its tokens are computed again with the long factors, as in
    transformers. So the text does not depend on `max_new_tokens`.
    """
    long = config.rope.long
    return math.inf if long is None else int(long.original_length)


def prompt_ids(op: str, lm: GeneratingModel, prompt: Prompt) -> list[int]:
    """Encode a prompt, and check its tokens.

    Raises:
        TypeError: the prompt is neither a text nor a chat.
        ValueError: the prompt has no tokens, fills the context, or has tokens outside the vocabulary.
    """
    tokenizer, chat = lm.tokenizer, not isinstance(prompt, str)
    if chat and not (isinstance(prompt, Sequence) and all(isinstance(m, Mapping) for m in prompt)):
        raise TypeError(f"{op}: prompt is {prompt!r}, expected a text or a chat (a list of messages)")
    ids = tokenizer.encode_chat(prompt, True) if chat else tokenizer.encode_prompt(prompt)  # type: ignore[arg-type]
    return _checked_ids(op, lm, ids)


def _checked_ids(op: str, lm: GeneratingModel, ids: list[int]) -> list[int]:
    """Check the tokens of a prompt. Raises as `prompt_ids`."""
    tokenizer, context = lm.tokenizer, lm.config.max_position_embeddings
    vocab = getattr(lm, "vocab_size", lm.config.vocab_size)  # with the tokens that an adapter adds
    if not ids:
        raise ValueError(f"{op}: the prompt is empty")
    if max(ids) >= vocab:
        raise ValueError(
            f"{op}: the prompt has token {max(ids)} of {tokenizer}, "
            f"the model's vocabulary ends with {vocab - 1}"
        )
    if len(ids) >= context:
        raise ValueError(f"{op}: the prompt has {len(ids):,} tokens, the model's context is {context:,}")
    return ids


def _read(lm: GeneratingModel, ids: list[int], slot: int, cache: Any) -> Array:
    """Add tokens to an empty slot of the cache, and return the scores of the next token."""
    for begin in range(0, len(ids), _PIECE):
        scores = lm.decode([ids[begin : begin + _PIECE]], [slot], cache)
    return np.asarray(scores[0])


class _Answer:
    """One prompt and the tokens generated after it."""

    def __init__(self, tokenizer: Tokenizer, slot: int, ids: list[int], sampling: Sampling) -> None:
        self.slot, self.ids, self.ended, self.cut_off = slot, ids, False, False
        self._prompt = len(ids)
        self._left, self._sampling, self._ends = sampling.max_new_tokens, sampling, tokenizer.eos_ids
        self._vocab = tokenizer.vocab_size  # the model's embedding may be padded with more rows
        self._text = tokenizer.stream(context=ids[-_CONTEXT:])
        self._stop = StopText(sampling.stop)
        seed = np.random.SeedSequence(sampling.seed, spawn_key=(slot,))
        self._rng = np.random.Generator(np.random.PCG64(seed))

    @property
    def count(self) -> int:
        """The number of generated tokens."""
        return len(self.ids) - self._prompt

    def advance(self, scores: Array, capacity: int) -> Iterator[tuple[int, str]]:
        """Choose the next token, and yield the text that it completes."""
        token = choose(scores[: self._vocab], self.ids, self._sampling, self._rng)
        self._left -= 1
        piece = ""
        if token in self._ends:
            self.ended = True
        else:
            self.ids.append(token)
            piece = self._stop.push(self._text.push(token))
            self.ended = self._stop.found or not self._left
            self.cut_off = not self.ended and len(self.ids) >= capacity
            self.ended = self.ended or self.cut_off
        if self.ended and not self._stop.found:
            piece += self._stop.push(self._text.flush()) + self._stop.flush()
        if piece:
            yield self.slot, piece


class StopText:
    """Cuts a text before the first stop text. Characters that may begin a stop text are held back.

    Attributes:
        found: whether a stop text was found. After a stop text, no more text is returned.
    """

    def __init__(self, stop: Sequence[str]) -> None:
        self._stop, self._held, self.found = tuple(stop), "", False

    def push(self, piece: str) -> str:
        """Add a piece of text, and return the text that certainly does not begin a stop text."""
        if self.found:
            return ""
        text = self._held + piece
        places = [place for stop in self._stop if (place := text.find(stop)) >= 0]
        if places:
            self.found, self._held = True, ""
            return text[: min(places)]
        longest = max(map(len, self._stop), default=1) - 1
        begun = (size for size in range(min(longest, len(text)), 0, -1) if self._may_begin(text[-size:]))
        keep = len(text) - next(begun, 0)
        self._held = text[keep:]
        return text[:keep]

    def flush(self) -> str:
        """End the text, and return the characters that were held back."""
        held, self._held = self._held, ""
        return held

    def _may_begin(self, end: str) -> bool:
        return any(stop.startswith(end) for stop in self._stop)


# ---- the choice of a token ----


def choose(scores: Array, before: Sequence[int], sampling: Sampling, rng: np.random.Generator) -> int:
    """Choose the next token.

    Args:
        scores: (vocab,), the score of each token of the vocabulary.
        before: the tokens of the sequence so far, for the repetition penalty.
        rng: the random generator for sampling.

    Raises:
        FloatingPointError: a score is NaN, or the largest one is infinite.
    """
    scores = np.array(scores, np.float64)
    place, largest = f"the token at position {len(before)}", scores.max()
    if np.isnan(largest):
        raise FloatingPointError(f"{_OP}: the scores of {place} are NaN")
    if not np.isfinite(largest):
        raise FloatingPointError(
            f"{_OP}: the largest score of {place} is {largest}, expected a finite number"
        )
    if sampling.repetition_penalty != 1:
        penalise_repetition(scores, before, sampling.repetition_penalty)
    if sampling.temperature == 0:
        return int(scores.argmax())
    with np.errstate(over="ignore"):  # only -inf can come out: the largest score becomes 0 first
        scores -= scores.max()
        scores /= sampling.temperature
    if sampling.top_k is not None:
        keep_top_k(scores, sampling.top_k)
    if sampling.top_p is not None:
        keep_top_p(scores, sampling.top_p)
    shares = np.cumsum(softmax(scores))
    return int(np.searchsorted(shares, rng.random() * shares[-1], side="right"))


def softmax(scores: Array) -> Array:
    """Compute exp(scores) / sum(exp(scores)). The largest score must be finite."""
    powers = np.exp(scores - scores.max())
    return np.asarray(powers / powers.sum())


def penalise_repetition(scores: Array, before: Sequence[int], penalty: float) -> None:
    """Lower the scores of earlier tokens in place (Keskar et al. 2019, section 4.1). Scores stay finite."""
    seen = np.unique(np.asarray(before, np.int64))
    seen = seen[np.isfinite(scores[seen])]
    with np.errstate(over="ignore"):
        changed = np.where(scores[seen] < 0, scores[seen] * penalty, scores[seen] / penalty)
    largest = np.finfo(np.float64).max
    scores[seen] = np.clip(changed, -largest, largest)


def keep_top_k(scores: Array, k: int) -> None:
    """Set all scores below the k-th largest to -inf, in place."""
    if k < len(scores):
        scores[scores < np.partition(scores, -k)[-k]] = -np.inf


def keep_top_p(scores: Array, p: float) -> None:
    """Set the scores of the least likely tokens, up to a total probability of 1 - p, to -inf.

    The scores are changed in place (nucleus sampling, Holtzman et al. 2020).
    """
    order = np.argsort(scores, kind="stable")
    unlikely = np.cumsum(softmax(scores)[order]) <= 1 - p
    unlikely[-1] = False
    scores[order[unlikely]] = -np.inf
