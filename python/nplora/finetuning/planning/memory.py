"""The peak memory of training, as a sum of terms that follow the code of `models`, array by array.

Shapes are per token: d the residual stream, q and kv the heads side by side, f the width of the MLP.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

from nplora import _core
from nplora.lm import LanguageModel, adapting
from nplora.models.config import ModelConfig
from nplora.models.head import most_rows
from nplora.nn.principal import PRINCIPAL_INITS

_FLOAT, _BITS = 4, 2
_LANES = _core.constants.lanes_bytes
_PASS = _core.constants.l3_block_bytes
_TOKENS = 2 * _core.constants.task_tokens  # of a token block in backward, for each two threads
_THREAD = 3 << 19  # the rest of a thread's scratch, rounded up
_SAME_CALL = {"k_proj": "q_proj", "v_proj": "q_proj", "up_proj": "gate_proj"}  # they read one input
_HEAP = 10 << 20  # code read from the disk, small arrays, and what malloc keeps of them


@dataclass(frozen=True)
class Pass:
    """What one forward and backward pass reads: tokens, those that are learned, the longest sequence."""

    tokens: int
    targets: int
    longest: int


@dataclass(frozen=True)
class Candidate:
    """A way of computing a step. None of them changes what is learned, but for rounding.

    Attributes:
        compute: arithmetic of the frozen products.
        checkpoint_blocks: activations are computed again in backward.
        micro_tokens: a batch is cut into pieces of at most so many tokens; None: it is not.
    """

    compute: str
    checkpoint_blocks: bool
    micro_tokens: int | None = None

    def __str__(self) -> str:
        kept = "activations computed again" if self.checkpoint_blocks else "activations kept"
        pieces = (
            "" if self.micro_tokens is None else f", batches in pieces of up to {self.micro_tokens} tokens"
        )
        return f"{self.compute}, {kept}{pieces}"


@dataclass(frozen=True)
class Adapters:
    """The layers with an adapter, by dotted name with (d_out, d_in)."""

    shapes: Mapping[str, tuple[int, int]]
    rank: int
    use_dora: bool = False
    taken: int = 0  # bytes of new frozen weights, where the factors start as a part of the old ones

    @classmethod
    def of(
        cls,
        lm: LanguageModel,
        rank: int,
        targets: str | Iterable[str],
        layers: str | Sequence[int] | None,
        use_dora: bool = False,
        init: str = "zero",
        op: str = "add_lora",
    ) -> Self:
        """Those that `lm.add_lora` would make. Raises as it does, in op's name, where it would not."""
        modules: dict[str, Any] = dict(lm.named_modules())
        names = adapting.targeted(lm, lm.config.num_hidden_layers, targets, layers, op)
        for name in names:
            adapting.require_init(name, modules[name], init, op)
        made = cls({name: modules[name].weight.shape for name in names}, rank, use_dora)
        if init not in PRINCIPAL_INITS:
            return made
        weights = sum(modules[name].weight.nbytes for name in names)
        return dataclasses.replace(
            made, taken=weights + _FLOAT * made.numbers
        )  # and the factors at the start

    @property
    def numbers(self) -> int:
        """Trained numbers."""
        magnitudes = sum(d_out for d_out, _ in self.shapes.values()) if self.use_dora else 0
        return self.rank * sum(map(sum, self.shapes.values())) + magnitudes

    def scratch(self, narrow: bool, tokens: int, threads: int) -> int:
        """Bytes of scratch for the factors of one call's layers, and their z and dz, at most.

        In csrc/ops/scratch.h they are kLowGradients, kLowLanes, kLanes and kFactor: B in two layouts, of
        which a lone layer's float32 is one itself, and the sums of its gradient; A, or such sums, and in
        bfloat16 layouts of A.
        """
        ranks: Counter[tuple[str, str]] = Counter()
        inputs: Counter[tuple[str, str]] = Counter()
        outputs: Counter[tuple[str, str]] = Counter()
        for name, (d_out, d_in) in self.shapes.items():
            path, _, layer = name.rpartition(".")
            call = path, _SAME_CALL.get(layer, layer)
            if layer != "embed_tokens":  # which NumPy computes
                ranks[call] += self.rank
                inputs[call] += self.rank * d_in
                outputs[call] += self.rank * d_out
        copies = {call: 3 if narrow or n > self.rank else 2 for call, n in ranks.items()}
        of_inputs = max((n * copies[call] for call, n in inputs.items()), default=0)
        of_ranks, of_outputs = (max(n.values(), default=0) for n in (ranks, outputs))
        narrowest = max(1, min(map(min, self.shapes.values()), default=1))
        shared = _PASS // ((_BITS if narrow else _FLOAT) * narrowest)
        of_tokens = of_ranks * min(tokens, max(shared, _TOKENS * math.ceil(threads / 2)))
        if narrow:
            of_outputs, of_tokens = 2 * of_outputs, 3 * of_tokens  # z, dz and their pairs
        return _FLOAT * (of_inputs + of_outputs + of_tokens)

    @functools.cached_property
    def _blocks(self) -> dict[int, dict[str, tuple[int, int]]]:
        found: dict[int, dict[str, tuple[int, int]]] = {}
        for name, shape in self.shapes.items():
            block = adapting.block_of(name)
            if block is not None:
                found.setdefault(block, {})[name.rpartition(".")[2]] = shape
        return found

    def of_block(self, block: int) -> Mapping[str, tuple[int, int]]:
        """The adapted layers of a block, by the last part of their names."""
        return self._blocks.get(block, {})

    def first_block(self, blocks: int) -> int:
        """The lowest block that keeps something for backward."""
        return 0 if "model.embed_tokens" in self.shapes else min(self._blocks, default=blocks)


@dataclass(frozen=True)
class Memory:
    """Bytes at the peak, term by term; `total` is what the process has in all."""

    process: int = dataclasses.field(metadata={"text": "this process, with the model, tokenizer and data"})
    weights: int = dataclasses.field(metadata={"text": "weights that are not read yet"})
    factors: int = dataclasses.field(metadata={"text": "factors, their gradients and moments"})
    prefix: int = dataclasses.field(metadata={"text": "what frozen blocks made, for later epochs"})
    kept: int = dataclasses.field(metadata={"text": "activations kept for backward"})
    work: int = dataclasses.field(metadata={"text": "what a block, or head and loss, work in"})
    scratch: int = dataclasses.field(metadata={"text": "the threads' scratch, small arrays"})

    @property
    def total(self) -> int:
        return sum(vars(self).values())

    def __str__(self) -> str:
        return "\n".join(
            f"  {getattr(self, field.name) / 1e6:6.0f} MB  {field.metadata['text']}"
            for field in dataclasses.fields(self)
        )


def predicted(
    config: ModelConfig,
    adapters: Adapters,
    step: Pass,
    evaluated: int,
    way: Candidate,
    threads: int,
    resident: tuple[int, int],
    prefix_tokens: int = 0,
) -> Memory:
    """The peak of training.

    Args:
        step: the largest pass.
        evaluated: the tokens of a batch that is evaluated, 0 without any.
        resident: bytes in memory before the adapters are made, and those of the weights not read yet.
        prefix_tokens: for which a `KeptPrefix` holds rows in memory.
    """
    narrow = way.compute == "bfloat16"
    first = adapters.first_block(config.num_hidden_layers)
    blocks = [
        _Block(config, adapters, adapters.of_block(block), step.tokens, narrow)
        for block in range(first, config.num_hidden_layers)
    ]
    stream = _FLOAT * config.hidden_size * step.tokens
    head = _head(config, step.targets) + 2 * stream  # the stream's gradient, and its last row
    if way.checkpoint_blocks:
        kept = len(blocks) * stream
        works = [max(2 * stream + block.kept + block.backward, block.forward) for block in blocks]
    else:
        kept = sum(block.kept for block in blocks)
        works = [max(2 * stream + block.backward, stream + block.forward - block.kept) for block in blocks]
    kept_nothing = _Block(config, adapters, {}, max(step.tokens if first else 0, evaluated), False)
    inference = max(kept_nothing.forward, _head(config, evaluated))  # which comes before anything is kept
    work = max(head, *works, inference - kept)
    rows = min(most_rows(step.targets, config.vocab_size), step.targets)
    lanes = (
        _BITS * max(rows * config.vocab_size, step.tokens * config.intermediate_size)
        if narrow
        else _FLOAT * min(step.tokens, 256) * config.intermediate_size
    )
    process, weights = resident
    return Memory(
        process,
        weights,
        4 * _FLOAT * adapters.numbers + adapters.taken,
        _FLOAT * config.hidden_size * prefix_tokens,
        kept,
        work,
        threads * (min(_LANES, lanes) + _THREAD)
        + adapters.scratch(narrow, max(step.tokens, evaluated), threads)
        + _HEAP,
    )


def _head(config: ModelConfig, targets: int) -> int:
    """Logits of a chunk; its rows of the stream, normed, and their gradients."""
    rows = min(most_rows(targets, config.vocab_size), targets)
    return _FLOAT * rows * (config.vocab_size + 4 * config.hidden_size)


class _Block:
    """Bytes of a block of the decoder for a number of tokens; `part` are its adapted layers.

    Attributes:
        kept: of a `BlockSaved`.
        forward: the most in the forward pass, with what it is to keep.
        backward: the most in the backward pass, beside what was kept, the gradient and the last stream.
    """

    def __init__(
        self,
        config: ModelConfig,
        adapters: Adapters,
        part: Mapping[str, tuple[int, int]],
        tokens: int,
        narrow: bool,
    ) -> None:
        d, f = config.hidden_size, config.intermediate_size
        heads, groups = config.num_attention_heads, config.num_key_value_heads
        q, kv = heads * config.head_dim, groups * config.head_dim
        bits = _BITS if narrow else _FLOAT
        low = _FLOAT * adapters.rank * len(part)  # z
        if adapters.use_dora:
            low += _FLOAT * sum(d_out for d_out, _ in part.values())  # the outputs before they are rescaled
        attention = _FLOAT * (q + 2 * kv + heads) + bits * q
        self.kept = tokens * (bits * 2 * d + attention + bits * 2 * f + low)

        mlp = _FLOAT * (d + d + 3 * f + d) + (
            _BITS * 2 * f if narrow else 0
        )  # h, normed; gate, up, hidden; y
        self.forward = tokens * (_FLOAT * d + attention + mlp + low)

        widened = _FLOAT * (d + 2 * f) if narrow else 0  # h, gate, up
        reads = _FLOAT * d if {"gate_proj", "up_proj"} & part.keys() else 0  # normed h
        hidden = _FLOAT * f if "down_proj" in part else 0
        through_mlp = widened + reads + hidden + _FLOAT * (f + d)  # their gradients
        rotated = _FLOAT * 2 * (q + kv) if config.qk_norm else 0
        inputs = _FLOAT * d if {"q_proj", "k_proj", "v_proj"} & part.keys() else 0
        out = _FLOAT * (d + q) if narrow else 0  # x, and attention's output
        through_attention = out + inputs + rotated + _FLOAT * (q + q + 2 * kv + d)
        dora = _FLOAT * 2 * f if part and adapters.use_dora else 0
        self.backward = tokens * (max(through_mlp, through_attention) + dora)
