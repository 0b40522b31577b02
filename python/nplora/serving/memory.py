"""Plans how much memory an engine uses for keys and values, for adapters, and for other purposes."""

from __future__ import annotations

import dataclasses
import math

from nplora import _core
from nplora.finetuning.planning import available_memory, parse_bytes
from nplora.finetuning.planning.choice import resident_memory
from nplora.finetuning.planning.resident import unread
from nplora.lm import Encoder, LanguageModel
from nplora.lm.generation import PAGE, PIECE
from nplora.models.config import ModelConfig
from nplora.models.footprint import NOT_ADAPTED
from nplora.platform.memory import current_memory
from nplora.runtime import get_num_threads

_FLOAT = 4
_THREAD = 3 << 19  # a thread's scratch memory in addition to the rows of a product, rounded up
_HEAP = (9 << 20) + _core.constants.spare_buffer_bytes  # small arrays, texts of requests, idle memory, code
# The bytes of a token of a prompt: an integer object (32), a pointer in each of three lists with up to an
# eighth of spare room (27), and a part of the key of its page (2), rounded up.
PROMPT_TOKEN = 64
# The most bytes of all waiting prompts; a single prompt may have more. The tokens of a running prompt take
# only about a hundredth of the memory of its keys and values.
WAITING = 16 << 20
_PART = 0.5  # without a memory limit, the engine may take this part of the available memory
_ADAPTERS = 8  # by default, adapters that are loaded later get 1 / _ADAPTERS of the memory the model leaves
_LEAST_PAGES = 4


@dataclasses.dataclass(frozen=True)
class MemoryPlan:
    """A plan for the memory of a process, in bytes. `total` is the most memory that the process will use.

    Attributes:
        process: the memory of this process before the engine starts, including the model and its adapters.
        weights: the memory for weights that are not in memory yet: a file's weights are read on first use.
        adapters: the memory that is reserved for adapters that are loaded later.
        work: the working memory: scratch memory, the activations of one call of the model, and the waiting
            requests; for a language model, also the scores of each request's next token.
        pages: the number of pages for keys and values.
        page_bytes: the number of bytes of one page.
        longest: the number of tokens of the longest text that fits into the memory; 0 for a language model.
    """

    process: int
    weights: int
    adapters: int
    work: int
    pages: int
    page_bytes: int
    longest: int = 0

    @property
    def total(self) -> int:
        fixed = self.process + self.weights + self.adapters + self.work
        return fixed + self.pages * self.page_bytes

    def __str__(self) -> str:
        return self.table("adapters that are loaded later")

    def table(self, adapters: str) -> str:
        """Return a line for each part of the memory. `adapters` is the text of the line for adapters."""
        rows = (
            (self.process, "this process, with model and adapters"),
            (self.weights, "weights that are not read yet"),
            (self.adapters, adapters),
            (self.work, "working memory"),
            (self.pages * self.page_bytes, f"keys and values of {self.pages * PAGE:,} tokens"),
        )
        return "\n".join(f"  {size / 1e6:6,.0f} MB  {text}" for size, text in rows if size)


def plan_memory(
    lm: LanguageModel,
    memory: int | str | None,
    max_requests: int,
    adapter_memory: int | str | None = 0,
    most_adapters: int | None = None,
    max_waiting: int = 0,
) -> MemoryPlan:
    """Plan the memory of a process that serves a language model.

    Args:
        memory: the memory limit of the process; None: the memory that the model needs, plus half of
            the available memory that remains.
        max_requests: how many requests are computed at the same time.
        adapter_memory, most_adapters: the memory for adapters that are loaded later, as in `Engine`.
        max_waiting: how many requests may wait.
    Raises:
        ValueError: the memory limit is not a size, or is too small.
    """
    _ = lm.tokenizer  # this reads the tokenizer, so that it counts as memory in use
    process, weights = resident_memory(lm)
    work, page = work_bytes(lm, max_requests, max_waiting), page_bytes(lm.config)
    most = max_requests * -(-lm.config.max_position_embeddings // PAGE)
    fixed = process + weights + work
    if memory is not None:
        budget = parse_bytes(memory, "Engine")
    else:
        available = available_memory()
        budget = fixed + (most * page if available is None else int(_PART * max(0, available - fixed)))
    left = max(0, budget - fixed)
    adapters = _adapter_bytes(adapter_memory, most_adapters, left)
    pages = (left - adapters) // page
    if pages < _LEAST_PAGES:
        least = _LEAST_PAGES * page
        needed = fixed + least
        needed += _adapter_bytes(adapter_memory, most_adapters, least * _ADAPTERS // (_ADAPTERS - 1) + 1)
        raise ValueError(
            f"Engine: memory is {budget / 1e6:,.0f} MB, expected at least "
            f"{math.ceil(needed / 1e6):,} MB: {process / 1e6:,.0f} MB are in use, "
            f"{weights / 1e6:,.0f} MB are needed for weights that are not read yet, "
            f"{adapters / 1e6:,.0f} MB for adapters, {work / 1e6:,.0f} MB as working memory and for waiting "
            f"prompts, and {least / 1e6:,.1f} MB for the keys and values of {_LEAST_PAGES * PAGE} tokens"
        )
    return MemoryPlan(process, weights, adapters, work, min(pages, most), page)


def plan_encoder_memory(
    encoder: Encoder,
    memory: int | str | None,
    tokens: int,
    adapter_memory: int | str | None = 0,
    waiting: int = 0,
    most_adapters: int | None = None,
) -> MemoryPlan:
    """Plan the memory of a process that serves an encoder. An encoder keeps no keys and values.

    A text with more than `tokens` tokens is computed alone, without other texts. The length of this text
    is limited only by the memory and by the encoder's `max_length`.

    Args:
        tokens: the largest total number of tokens when several texts are computed together.
        memory, adapter_memory, most_adapters: the same limits as in `plan_memory`.
        waiting: the number of bytes to reserve for waiting requests.
    Raises:
        ValueError: the memory limit is not a size, or is too small.
    """
    _ = encoder.tokenizer  # this reads the tokenizer, so that it counts as memory in use
    process, weights = current_memory(), unread(encoder.config.source)
    work = encoder_work_bytes(encoder, tokens) + waiting
    a_token = encoder_work_bytes(encoder, tokens + 1) + waiting - work
    most = max(tokens, encoder.max_length)
    fixed = process + weights + work
    if memory is not None:
        budget = parse_bytes(memory, "EncoderEngine")
    elif (available := available_memory()) is not None:
        budget = fixed + int(_PART * max(0, available - fixed))
    else:  # the available memory is unknown: assume enough for the longest text, with room for adapters
        budget = fixed + 2 * (most - tokens) * a_token
    left = budget - fixed
    adapters = _adapter_bytes(adapter_memory, most_adapters, max(0, left))
    if left < adapters and memory is not None:
        raise ValueError(
            f"EncoderEngine: memory is {budget / 1e6:,.0f} MB, expected at least "
            f"{math.ceil((fixed + adapters) / 1e6):,} MB: {process / 1e6:,.0f} MB are in use, "
            f"{weights / 1e6:,.0f} MB are needed for weights that are not read yet, "
            f"{adapters / 1e6:,.0f} MB for adapters, and {work / 1e6:,.0f} MB as working memory and for "
            "waiting requests"
        )
    more = min(max(0, left - adapters) // a_token, most - tokens)
    longest = min(tokens + more, encoder.config.max_position_embeddings)
    return MemoryPlan(process, weights, adapters, work + more * a_token, 0, 0, longest)


def encoder_work_bytes(encoder: Encoder, tokens: int) -> int:
    """Return an upper bound, in bytes, for the memory that an encoder needs for `tokens` tokens at once."""
    block = max(layer.footprint(NOT_ADAPTED, False).forward for layer in encoder.model.layers)
    streams = 3 * _FLOAT * encoder.config.hidden_size  # the residual stream, the norm's result and its copy
    scratch = get_num_threads() * (_core.constants.lanes_bytes + _THREAD)
    return tokens * (block + streams) + scratch + _HEAP


def _adapter_bytes(adapter_memory: int | str | None, most: int | None, left: int) -> int:
    """Return the number of bytes for adapters. Unlike other sizes, `adapter_memory` may be 0.

    Args:
        most: the argument `most_adapters` of `Engine`.
        left: the number of bytes that the model leaves free.
    """
    if adapter_memory is None:
        return left // _ADAPTERS if most is None else min(most, left // _ADAPTERS)
    if adapter_memory in (0, "0") and not isinstance(adapter_memory, bool | float):
        return 0
    return parse_bytes(adapter_memory, "Engine", "adapter_memory")


def page_bytes(config: ModelConfig) -> int:
    """Return the number of bytes of a page: the keys and values of PAGE tokens."""
    return 2 * _FLOAT * PAGE * config.key_value_width * config.num_hidden_layers


def work_bytes(lm: LanguageModel, max_requests: int, max_waiting: int = 0) -> int:
    """Return an upper bound, in bytes, for the memory of one round of the engine plus the waiting prompts."""
    config, threads = lm.config, get_num_threads()
    block = max(layer.footprint(NOT_ADAPTED, False).forward for layer in lm.model.layers)
    piece = PIECE * (block + 2 * _FLOAT * config.hidden_size)
    # The scores of all requests in float32, and one row four times in float64.
    scores = max_requests * config.vocab_size * _FLOAT + 4 * 8 * config.vocab_size
    lanes = _FLOAT * min(PIECE, 256) * config.intermediate_size
    scratch = threads * (min(_core.constants.lanes_bytes, lanes) + _THREAD)
    prompts = max_waiting * config.max_position_embeddings * PROMPT_TOKEN
    return piece + scores + scratch + min(prompts, WAITING) + _HEAP
