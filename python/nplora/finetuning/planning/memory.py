"""The peak memory of training: a sum of terms that follow the code of `models`, array by array.

Sizes are per token: d is the width of the residual stream, q and kv are the widths of all heads together, and
f is the width of the MLP.
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
from nplora.models.footprint import NOT_ADAPTED, Adapted
from nplora.models.head import most_rows
from nplora.nn.principal import PRINCIPAL_INITS

_FLOAT, _BITS = 4, 2
_LANES = _core.constants.lanes_bytes
_PASS = _core.constants.l3_block_bytes
_TOKENS = 2 * _core.constants.task_tokens  # of a token block in backward, for every two threads
_THREAD = 3 << 19  # the other scratch of a thread, rounded up
_HEAP = 10 << 20  # code read from the disk, small arrays, and memory that malloc keeps


@dataclass(frozen=True)
class MicroBatch:
    """The size of one forward and backward pass: its tokens, its trained tokens and its longest example."""

    tokens: int
    targets: int
    longest: int


@dataclass(frozen=True)
class ExecutionPlan:
    """An execution plan: how a step is computed. Plans differ in memory and time; their results differ by
    rounding only.

    Attributes:
        compute: arithmetic of the frozen products.
        recompute: activations are recomputed in backward (gradient checkpointing).
        micro_tokens: maximum tokens of the micro-batches that a batch is cut into; None: it is not cut.
    """

    compute: str
    recompute: bool
    micro_tokens: int | None = None

    def __str__(self) -> str:
        activations = "activations recomputed" if self.recompute else "activations kept"
        cut = "" if self.micro_tokens is None else f", micro-batches of up to {self.micro_tokens} tokens"
        return f"{self.compute}, {activations}{cut}"


@dataclass(frozen=True)
class Adapters:
    """The adapted layers: dotted name -> (d_out, d_in)."""

    shapes: Mapping[str, tuple[int, int]]
    rank: int
    use_dora: bool = False
    taken: int = 0  # bytes of the new frozen weights that init="pissa" and "olora" make
    calls: Mapping[str, str] = dataclasses.field(default_factory=dict)  # layer -> the call that computes it

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
        """The layers that `lm.add_lora` would adapt. Raises its errors; `op` begins their messages."""
        modules: dict[str, Any] = dict(lm.named_modules())
        names = adapting.targeted(lm, lm.config.num_hidden_layers, targets, layers, op)
        for name in names:
            adapting.require_init(name, modules[name], init, op)
        shapes = {name: modules[name].weight.shape for name in names}
        made = cls(shapes, rank, use_dora, calls=_calls(lm))
        if init not in PRINCIPAL_INITS:
            return made
        weights = sum(modules[name].weight.nbytes for name in names)
        return dataclasses.replace(made, taken=weights + _FLOAT * made.numbers)  # with the initial factors

    @property
    def numbers(self) -> int:
        """The number of trained values."""
        magnitudes = sum(d_out for d_out, _ in self.shapes.values()) if self.use_dora else 0
        return self.rank * sum(map(sum, self.shapes.values())) + magnitudes

    def scratch(self, narrow: bool, tokens: int, threads: int) -> int:
        """The maximum scratch, in bytes, for the factors of the layers of one call, and for their z and dz.

        It is kLowGradients, kLowLanes, kLanes and kFactor in csrc/ops/scratch.h: B in two layouts, and the
        sums of its gradient (a single float32 layer needs one layout less); A, or the sums of its gradient;
        and layouts of A in bfloat16.
        """
        ranks: Counter[str] = Counter()
        inputs: Counter[str] = Counter()
        outputs: Counter[str] = Counter()
        for name, (d_out, d_in) in self.shapes.items():
            call = self.calls.get(name, name)
            if not name.endswith("embed_tokens"):  # NumPy computes the embedding
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
            of_outputs, of_tokens = 2 * of_outputs, 3 * of_tokens  # z and dz, also in bfloat16 pairs
        return _FLOAT * (of_inputs + of_outputs + of_tokens)

    @functools.cached_property
    def _blocks(self) -> dict[int, dict[str, int]]:
        """The d_out of the adapted layers of each block."""
        found: dict[int, dict[str, int]] = {}
        for name, shape in self.shapes.items():
            block = adapting.block_of(name)
            if block is not None:
                found.setdefault(block, {})[name.rpartition(".")[2]] = shape[0]
        return found

    def of_block(self, block: int) -> Adapted:
        """The adapted layers of a block."""
        return Adapted(self.rank, self.use_dora, self._blocks.get(block, {}))

    def first_block(self, blocks: int) -> int:
        """The lowest block that keeps activations for backward."""
        return 0 if "model.embed_tokens" in self.shapes else min(self._blocks, default=blocks)


@dataclass(frozen=True)
class Memory:
    """Peak memory in bytes, term by term; `total` is the peak of the whole process."""

    process: int = dataclasses.field(metadata={"text": "this process, with model, tokenizer and data"})
    weights: int = dataclasses.field(metadata={"text": "weights that are not read yet"})
    factors: int = dataclasses.field(metadata={"text": "factors, their gradients and moments"})
    prefix: int = dataclasses.field(metadata={"text": "outputs of frozen blocks, cached for later epochs"})
    kept: int = dataclasses.field(metadata={"text": "activations kept for backward"})
    work: int = dataclasses.field(metadata={"text": "working memory of a block, or of head and loss"})
    scratch: int = dataclasses.field(metadata={"text": "scratch of the threads, and small arrays"})

    @property
    def total(self) -> int:
        return sum(vars(self).values())

    def __str__(self) -> str:
        return "\n".join(
            f"  {getattr(self, field.name) / 1e6:6.0f} MB  {field.metadata['text']}"
            for field in dataclasses.fields(self)
        )


def predicted(
    lm: LanguageModel,
    adapters: Adapters,
    step: MicroBatch,
    evaluated: int,
    plan: ExecutionPlan,
    threads: int,
    resident: tuple[int, int],
    prefix_tokens: int = 0,
) -> Memory:
    """The peak memory of training.

    Args:
        step: the largest micro-batch.
        evaluated: the number of tokens in the largest batch of an evaluation; 0 without an evaluation.
        resident: bytes in memory before the adapters are made, and bytes of the weights not read yet.
        prefix_tokens: the number of tokens whose rows a `PrefixCache` holds in memory.
    """
    narrow, config, layers = plan.compute == "bfloat16", lm.config, lm.model.layers
    first = adapters.first_block(len(layers))
    blocks = [layers[i].footprint(adapters.of_block(i), narrow) for i in range(first, len(layers))]
    width = _FLOAT * config.hidden_size
    stream = width * step.tokens
    head = _head(config, step.targets) + 2 * stream  # the stream's gradient, and its last row
    if plan.recompute:
        kept = len(blocks) * width
        works = [max(2 * width + block.saved + block.backward, block.forward) for block in blocks]
    else:
        kept = sum(block.saved for block in blocks)
        works = [max(2 * width + block.backward, width + block.forward - block.saved) for block in blocks]
    kept *= step.tokens
    frozen = max(block.footprint(NOT_ADAPTED, False).forward for block in layers)
    inference = max(frozen * max(step.tokens if first else 0, evaluated), _head(config, evaluated))
    work = max(head, step.tokens * max(works, default=0), inference - kept)  # inference comes first
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
    """The logits of a chunk; its rows of the stream, after the norm, and their gradients."""
    rows = min(most_rows(targets, config.vocab_size), targets)
    return _FLOAT * rows * (config.vocab_size + 4 * config.hidden_size)


def _calls(lm: LanguageModel) -> dict[str, str]:
    """The layers of a model that are computed in one call: layer -> the first layer of the call."""
    calls = dict[str, str]()
    for index, block in enumerate(lm.model.layers):
        for name, mixer in block.mixers.items():
            first, *others = (f"model.layers.{index}.{name}.{layer}" for layer in mixer.reading)
            calls |= dict.fromkeys(others, first)
    return calls
