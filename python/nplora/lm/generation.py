"""Text generation: reading prompts, generating several texts together, and streaming."""

from __future__ import annotations

import contextvars
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Protocol, TypeVar, cast

import numpy as np
import numpy.typing as npt

from nplora import _check
from nplora.adapters import Adapter
from nplora.formats.errors import counted
from nplora.lm.answer import Answer, StopText
from nplora.lm.sampling import (
    Sampling,
    choose,
    keep_top_k,
    keep_top_p,
    penalise,
    penalise_repetition,
    softmax,
)
from nplora.runtime.user_warning import warn_user
from nplora.tokenizer import Tokenizer

Array = npt.NDArray[Any]
T = TypeVar("T")
Message = Mapping[str, Any]
Prompt = str | Sequence[Message]  # a text, or a chat
Adapters = Sequence[str | Adapter | None]  # for each prompt a name, an adapter, or None

__all__ = [
    "Adapters", "GeneratingModel", "Message", "Prompt", "Sampling", "StopText", "choose", "generate",
    "generate_ids", "keep_top_k", "keep_top_p", "penalise", "penalise_repetition", "prompt_ids",
    "prompt_pieces", "softmax", "stream", "stream_all",
]  # fmt: skip

PIECE = 512  # the maximum number of a prompt's tokens that are computed at a time, to limit the memory
PAGE = 64  # a prompt is cut at multiples of this many tokens
_OP = "generate"


class GeneratingModel(Protocol):
    """The methods that generation needs from a model. `nplora.LanguageModel` has these methods.

    >>> import nplora
    >>> lm = nplora.load_model("model.gguf")
    >>> cache = lm.new_cache(slots=1, capacity=8)
    >>> lm.decode([[5, 6]], [0], cache).shape == (1, lm.config.vocab_size)
    True
    """

    @property
    def tokenizer(self) -> Tokenizer: ...
    @property
    def config(self) -> Any: ...
    def new_cache(self, slots: int, capacity: int) -> Any: ...
    def decode(self, token_ids: npt.ArrayLike, slots: npt.ArrayLike, cache: Any) -> Array: ...


class AdapterChoosingModel(GeneratingModel, Protocol):
    """A model that also has the method `named_model`, which generation needs if prompts have adapters."""

    def named_model(self, adapter: str | Adapter, op: str) -> GeneratingModel: ...
    def selected_model(self, op: str) -> GeneratingModel: ...


def generate(
    lm: GeneratingModel,
    prompts: Sequence[Prompt],
    sampling: Sampling | None = None,
    adapters: Adapters | None = None,
) -> list[str]:
    """Generate a text after each prompt.

    The prompts are processed together, as rows of one batch. A text does not depend on the other prompts.

        >>> import nplora
        >>> lm = nplora.load_model("model.gguf")
        >>> sampling = nplora.generate.Sampling(max_new_tokens=4)
        >>> texts = nplora.generate.generate(lm, ["Hello", "Good"], sampling)
        >>> len(texts)
        2

    Args:
        prompts: texts, or chats. A chat is a list of messages; the model's chat template renders it as text.
        sampling: how tokens are chosen. None: choose the most likely token each time, up to 128 tokens.
        adapters: for each prompt, the name of a named adapter, an `Adapter`, or None for the model with its
            selected adapters.
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
    """Generate a text after one prompt, and yield the text in pieces. No piece ends within a character.

    `stream` uses the adapter that is selected at the time of the call, even if the pieces are read later. The
    errors and warnings are those of `generate`. An error in the arguments is raised by the call itself, not
    when the first piece is read.

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

    The adapters, errors and warnings are those of `stream`.

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
    ids = [prompt_ids(_OP, model, prompt) for model, prompt in zip(models.of_prompts, prompts, strict=True)]
    return _stream_ids(models, ids, sampling or Sampling())


def generate_ids(
    lm: GeneratingModel,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling,
    adapters: Adapters | None = None,
) -> list[str]:
    """Like `generate`, but the prompts are lists of token ids.

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
    checked = [
        checked_ids(_OP, model, list(ids)) for model, ids in zip(models.of_prompts, prompts, strict=True)
    ]
    for index, piece in _stream_ids(models, checked, sampling):
        texts[index] += piece
    return texts


class _Models(NamedTuple):
    """The models that one call of `generate` or `stream` uses. The call looks up its adapters only once, when
    it starts.

    Attributes:
        selected: the model with the selected adapters.
        of_prompts: for each prompt, the model with the prompt's adapter, or `selected` for the adapter None.
    """

    selected: GeneratingModel
    of_prompts: Sequence[GeneratingModel]


def _models(lm: GeneratingModel, prompts: Sequence[Any], adapters: Adapters | None) -> _Models:
    selected = _selected(_OP, lm)
    if adapters is None:
        return _Models(selected, [selected] * len(prompts))
    if isinstance(adapters, str) or not isinstance(adapters, Sequence):
        raise TypeError(
            f"{_OP}: adapters is {_check.kind(adapters)}, expected a list with one adapter for each prompt"
        )
    if len(adapters) != len(prompts):
        raise ValueError(
            f"{_OP}: {len(adapters)} adapters for {counted(len(prompts), 'prompt')}, expected one for each"
        )
    chooser = cast(AdapterChoosingModel, lm)
    keys = [adapter if isinstance(adapter, str) else id(adapter) for adapter in adapters]
    made = {
        key: selected if adapter is None else chooser.named_model(adapter, _OP)
        for key, adapter in dict(zip(keys, adapters, strict=True)).items()
    }
    return _Models(selected, [made[key] for key in keys])


def _selected(op: str, lm: GeneratingModel) -> GeneratingModel:
    """The model with its selected adapters; the model itself if it has no named adapters."""
    return cast(AdapterChoosingModel, lm).selected_model(op) if hasattr(lm, "selected_model") else lm


def _stream_ids(
    models: _Models, prompts: Sequence[list[int]], sampling: Sampling
) -> Iterator[tuple[int, str]]:
    """An iterator of pairs (index of the prompt, piece of its text), which computes pieces on demand."""
    lm = models.selected
    context = int(lm.config.max_position_embeddings)
    answers = [
        Answer(model.tokenizer, index, ids, sampling)
        for index, (model, ids) in enumerate(zip(models.of_prompts, prompts, strict=True))
    ]
    if not answers or not sampling.max_new_tokens:
        return iter(())
    limits = [min(context, len(answer.ids) + sampling.max_new_tokens) for answer in answers]
    cache = lm.new_cache(len(answers), max(limits))
    for slot, model in enumerate(models.of_prompts):
        if model is not lm:
            cache.adapters.put(slot, model)
    return _in_this_context(_generated(lm, answers, limits, cache))


def _in_this_context(items: Iterator[T]) -> Iterator[T]:
    """Return an iterator that computes the items with the values that the context variables have now.

    So `with disable_adapter()`, which sets a context variable, has no effect on items that are read inside
    this block.
    """
    context = contextvars.copy_context()
    end: Any = object()
    return (item for item in iter(lambda: context.run(next, items, end), end))


def _generated(
    lm: GeneratingModel, answers: Sequence[Answer], limits: Sequence[int], cache: Any
) -> Iterator[tuple[int, str]]:
    context = int(lm.config.max_position_embeddings)
    # When a sequence outgrows this length, all its tokens are computed again with LongRoPE's long factors, as
    # in transformers. So the text does not depend on `max_new_tokens`.
    longest: float = lm.config.rope.longest_short
    for answer, limit in zip(answers, limits, strict=True):
        if hasattr(cache, "activate"):  # a model with its own kind of cache has no activated LoRA
            cache.activate(answer.index, answer.ids)
        cache.limits[answer.index] = limit if len(answer.ids) > longest else min(limit, longest)
        scores = _read(lm, answer.ids, answer.index, cache)
        yield from _advanced(answer, scores, cache)
    while active := [answer for answer in answers if not answer.ended]:
        switching = [answer for answer in active if len(answer.ids) == longest + 1]
        for answer in switching:  # the cached keys were rotated by the short factors
            cache.lengths[answer.index], cache.limits[answer.index] = 0, limits[answer.index]
            yield from _advanced(answer, _read(lm, answer.ids, answer.index, cache), cache)
        others = [answer for answer in active if answer not in switching]
        if not others:
            continue
        rows = lm.decode([answer.ids[-1] for answer in others], [answer.index for answer in others], cache)
        for answer, scores in zip(others, rows, strict=True):
            yield from _advanced(answer, scores, cache)
    for count in sorted({answer.count for answer in answers if answer.cut_off}):
        warn_user(
            f"{_OP}: the text ends after {count:,} tokens because the model's context of {context:,} is full"
        )


def _advanced(answer: Answer, scores: Array, cache: Any) -> Iterator[tuple[int, str]]:
    if piece := answer.advance(scores, cache.capacity):
        yield answer.index, piece


def prompt_ids(op: str, lm: GeneratingModel, prompt: Prompt) -> list[int]:
    """Encode a prompt, and check its tokens.

    Raises:
        TypeError: the prompt is neither a text nor a chat.
        ValueError: the prompt has no tokens, fills the context, or has tokens outside the vocabulary.

    >>> import nplora
    >>> lm = nplora.load_model("model.gguf")
    >>> prompt_ids("my_program", lm, "Hello") == lm.tokenizer.encode_prompt("Hello")
    True
    >>> prompt_ids("my_program", lm, "")
    Traceback (most recent call last):
    ValueError: my_program: the prompt is empty
    """
    lm = _selected(op, lm)
    tokenizer, chat = lm.tokenizer, not isinstance(prompt, str)
    if chat and not (isinstance(prompt, Sequence) and all(isinstance(m, Mapping) for m in prompt)):
        raise TypeError(f"{op}: prompt is {prompt!r}, expected a text or a chat (a list of messages)")
    ids = tokenizer.encode_chat(prompt, True) if chat else tokenizer.encode_prompt(prompt)  # type: ignore[arg-type]
    return checked_ids(op, lm, ids)


def checked_ids(op: str, lm: GeneratingModel, ids: list[int], context: int | None = None) -> list[int]:
    """Check the tokens of a prompt.

    Args:
        context: the maximum number of tokens for which there is memory; None: the model's context length.
    Raises the errors that `prompt_ids` raises for tokens.
    """
    lm, context = _selected(op, lm), context or int(lm.config.max_position_embeddings)
    vocab = getattr(lm, "vocab_size", lm.config.vocab_size)  # with the tokens that an adapter adds
    if not ids:
        raise ValueError(f"{op}: the prompt is empty")
    if min(ids) < 0:
        raise ValueError(f"{op}: the prompt has token {min(ids)}, expected at least 0")
    if max(ids) >= vocab:
        raise ValueError(
            f"{op}: the prompt has token {max(ids)} of {lm.tokenizer}, "
            f"but the model's vocabulary ends with {vocab - 1}"
        )
    if len(ids) >= context:
        by_memory = context < int(lm.config.max_position_embeddings)
        reason = "more do not fit in memory" if by_memory else "the model's context"
        raise ValueError(
            f"{op}: the prompt has {len(ids):,} tokens, expected fewer than {context:,} ({reason})"
        )
    return ids


def _read(lm: GeneratingModel, ids: list[int], slot: int, cache: Any) -> Array:
    """Add tokens to an empty slot of the cache, and return the scores of the next token."""
    for begin, end in prompt_pieces(0, len(ids)):
        scores = lm.decode([ids[begin:end]], [slot], cache)
    return np.asarray(scores[0])


def prompt_pieces(begin: int, end: int, most: int = PIECE) -> Iterator[tuple[int, int]]:
    """Cut the tokens of a prompt into pieces, which the model reads one after the other.

    The C++ core rounds the results of a short piece differently from those of a long piece. The results of
    every token must have the same bits for all values of `most` and `begin`. So the tokens after the last
    multiple of PAGE always form a piece of their own.

    Args:
        begin: the number of tokens that are in the cache already, a multiple of PAGE.
        end: the number of tokens of the prompt.
        most: the maximum number of tokens in a piece, a multiple of PAGE.

    >>> list(prompt_pieces(0, 1100))
    [(0, 512), (512, 1024), (1024, 1088), (1088, 1100)]
    """
    whole = end // PAGE * PAGE
    for start in range(begin, whole, most):
        yield start, min(start + most, whole)
    if whole < end:
        yield max(begin, whole), end
