"""Predicts the peak memory of training: adds up the sizes of the arrays that `nplora.models` makes.

The method `footprint` of a model's block returns the bytes that the block takes for each token.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Self

from nplora import _core
from nplora.adapters.trained_rows import EMBEDDING, HEAD, rows_needed, with_rows_beyond
from nplora.finetuning.int8_check import COMPARED
from nplora.formats.tokenizer_json import AddedToken
from nplora.lm import LanguageModel, adapting
from nplora.models.config import ModelConfig
from nplora.models.decoder import frozen_weights
from nplora.models.footprint import NOT_ADAPTED, Adapted
from nplora.models.head import most_rows
from nplora.models.word_filter import FLAT_ROWS
from nplora.nn import Linear, LoRALinear
from nplora.nn.int8 import arithmetic_of_inference
from nplora.nn.principal import PRINCIPAL_INITS
from nplora.weights.int8_error import sample_nbytes

_FLOAT, _BITS = 4, 2
_LANES = _core.constants.lanes_bytes
_PASS = _core.constants.l3_block_bytes
_TOKENS = 2 * _core.constants.task_tokens  # tokens in a block of the backward pass, for every two threads
_THREAD = 3 << 19  # the other scratch of a thread, rounded up
_HEAP = 10 << 20  # code read from the disk, small arrays, and memory that malloc keeps


@dataclass(frozen=True)
class MicroBatch:
    """The size of a micro-batch: the tokens of one forward and backward pass.

    Attributes:
        tokens: the number of tokens.
        targets: the number of trained tokens.
        longest: the number of tokens of the longest example.

    >>> nplora.finetuning.planning.MicroBatch(tokens=13, targets=5, longest=8)
    MicroBatch(tokens=13, targets=5, longest=8)
    """

    tokens: int
    targets: int
    longest: int


class ProductMethod(NamedTuple):
    """How the products with frozen weights are computed.

    Attributes:
        compute: the arithmetic of the products.
        keep_int8: whether weights are kept in memory as 8-bit integers (see `FrozenWeight.keep_int8`).
    """

    compute: str
    keep_int8: bool = False

    @property
    def of_inference(self) -> ProductMethod:
        """The method of inference, and of the blocks before the first adapted block."""
        return ProductMethod(arithmetic_of_inference(self.compute))


@dataclass(frozen=True)
class ExecutionPlan:
    """How a training step is computed. Plans differ in memory and time; results differ only by rounding.

    Attributes:
        compute: arithmetic of the products with frozen weights.
        recompute: whether activations are recomputed in the backward pass (gradient checkpointing).
        micro_tokens: maximum number of tokens in a micro-batch; None: batches are not cut into micro-batches.
        keep_int8: whether weights are kept in memory as 8-bit integers (see `FrozenWeight.keep_int8`).

    >>> print(nplora.finetuning.planning.ExecutionPlan("bfloat16", recompute=True, micro_tokens=512))
    bfloat16, activations recomputed, micro-batches of up to 512 tokens
    """

    compute: str
    recompute: bool
    micro_tokens: int | None = None
    keep_int8: bool = False

    @property
    def method(self) -> ProductMethod:
        return ProductMethod(self.compute, self.keep_int8)

    def __str__(self) -> str:
        kept = ", weights kept as 8-bit integers" if self.keep_int8 else ""
        activations = "activations recomputed" if self.recompute else "activations kept"
        cut = "" if self.micro_tokens is None else f", micro-batches of up to {self.micro_tokens} tokens"
        return f"{self.compute}{kept}, {activations}{cut}"


@dataclass(frozen=True)
class Adapters:
    """The layers that get an adapter. `shapes` maps the dotted name of a layer to its shape (d_out, d_in).

    `ranks` maps the names of some layers to their ranks. All other layers have the rank `rank`.

    >>> adapters = nplora.finetuning.planning.Adapters({"model.layers.0.mlp.up_proj": (48, 16)}, rank=2)
    >>> adapters.numbers  # (48 + 16) * 2
    128
    >>> mlp = {f"model.layers.0.mlp.{name}": (48, 16) for name in ("gate_proj", "up_proj")}
    >>> nplora.finetuning.planning.Adapters(mlp, rank=2, ranks={"model.layers.0.mlp.up_proj": 3}).numbers
    320
    """

    shapes: Mapping[str, tuple[int, int]]
    rank: int
    use_dora: bool = False
    taken: int = 0  # bytes of the new frozen weights that init="pissa" and "olora" make
    rows: Mapping[str, int] = dataclasses.field(default_factory=dict)  # layer -> values of its trained rows
    calls: Mapping[str, str] = dataclasses.field(default_factory=dict)  # layer -> the call that computes it
    ranks: Mapping[str, int] = dataclasses.field(default_factory=dict)
    added: int = 0  # rows of the embedding and the head beyond those of the model
    freeze_B: bool = False  # noqa: N815
    trains_head: bool = False  # whether rows of the head, or of a tied embedding, are trained
    trains_whole_head: bool = False  # whether all rows of the head are trained

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
        rank_pattern: Mapping[str, int] | None = None,
        freeze_B: bool = False,
    ) -> Self:
        """The layers that `lm.add_lora` would adapt.

        Args:
            op: name of the public function that the user called. Error messages begin with this name.
        Raises the errors of `add_lora`.
        """
        modules: dict[str, Any] = dict(lm.named_modules())
        names = adapting.targeted(lm, lm.config.num_hidden_layers, targets, layers, op)
        for name in names:
            adapting.require_init(name, modules[name], init, op)
        shapes = {name: modules[name].weight.shape for name in names}
        ranks = adapting.by_layer(op, "rank_pattern", rank_pattern or {}, names)
        made = cls(shapes, rank, use_dora, calls=_calls(lm), ranks=ranks, freeze_B=freeze_B)
        if init not in PRINCIPAL_INITS:
            return made
        weights = sum(modules[name].weight.nbytes for name in names)
        factors = _FLOAT * (made.numbers + made.frozen)  # the initial factors
        return dataclasses.replace(made, taken=weights + factors)

    def with_rows(
        self,
        lm: LanguageModel,
        rows: Mapping[str, Any],
        tokens: Sequence[AddedToken] = (),
        least: int = 0,
        tie_whole: bool = True,
    ) -> Self:
        """Return a copy of these adapters that also trains rows of the embedding and the head.

        Args:
            rows: maps a layer's name to the ids of its trained rows, or to None if all rows are trained.
            tokens: the tokens that are added to the model.
            least: the minimum number of rows that the embedding and the head must have, including added rows.
            tie_whole: matters only if all rows of the embedding are trained, and the head shares the
                embedding's weight. If True, the head uses the trained rows; if False, the frozen weight.
        """
        stored, width = lm.config.vocab_size, lm.config.hidden_size
        size = max(least, rows_needed(stored, {}, tokens))
        rows = with_rows_beyond(lm.ties_head, rows, stored, size)
        counts = {name: width * (size if ids is None else len(ids)) for name, ids in rows.items()}
        shared = EMBEDDING in rows and lm.ties_head and (tie_whole or rows[EMBEDDING] is not None)
        trains_head = HEAD in rows or shared or size > stored
        whole = rows.get(HEAD, ()) is None or (shared and rows[EMBEDDING] is None)
        return dataclasses.replace(
            self, rows=counts, added=size - stored, trains_head=trains_head, trains_whole_head=whole
        )

    @property
    def numbers(self) -> int:
        """The number of trained values."""
        rescaled = (shape for name, shape in self.shapes.items() if not _is_embedding(name))
        magnitudes = sum(d_out for d_out, _ in rescaled) if self.use_dora else 0
        factors = sum(self.rank_of(name) * sum(shape) for name, shape in self.shapes.items())
        return factors - self.frozen + magnitudes + sum(self.rows.values())

    @property
    def frozen(self) -> int:
        """The number of values in frozen factors B."""
        of_b = sum(self.rank_of(name) * d_in for name, (_, d_in) in self.shapes.items())
        return of_b if self.freeze_B else 0

    def rank_of(self, name: str) -> int:
        """The rank of a layer."""
        return self.ranks.get(name, self.rank)

    def scratch(self, narrow: bool, tokens: int, threads: int) -> int:
        """The maximum bytes of scratch memory that a call of the C++ core needs for low-rank factors.

        The scratch consists of four buffers in csrc/ops/scratch.h: kLowGradients, kLowLanes, kLanes and
        kFactor. Together, they hold z = x Bᵀ and its gradient dz, two layouts of B, the gradient of B, A or
        the gradient of A, and the bfloat16 layouts of A. A call with one float32 layer needs only one layout
        of B. A frozen B has no gradient.
        """
        layers: Counter[str] = Counter()
        ranks: Counter[str] = Counter()
        inputs: Counter[str] = Counter()
        outputs: Counter[str] = Counter()
        for name, (d_out, d_in) in self.shapes.items():
            call = self.calls.get(name, name)
            if not _is_embedding(name):  # NumPy computes the embedding
                rank = self.rank_of(name)
                layers[call] += 1
                ranks[call] += rank
                inputs[call] += rank * d_in
                outputs[call] += rank * d_out
        sums = 0 if self.freeze_B else 1
        copies = {call: sums + (2 if narrow or n > 1 else 1) for call, n in layers.items()}
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
        """A dict: index of an adapted block -> a dict from the names of its adapted layers to their d_out."""
        found: dict[int, dict[str, int]] = {}
        for name, shape in self.shapes.items():
            block = adapting.block_of(name)
            if block is not None:
                found.setdefault(block, {})[name.rpartition(".")[2]] = shape[0]
        return found

    def of_block(self, block: int) -> Adapted:
        """The adapted layers of a block."""
        ranks = {
            name.rpartition(".")[2]: rank
            for name, rank in self.ranks.items()
            if adapting.block_of(name) == block
        }
        return Adapted(self.rank, self.use_dora, self._blocks.get(block, {}), ranks, self.freeze_B)

    def first_block(self, blocks: int) -> int:
        """The index of the lowest block that stores activations for the backward pass.

        Args:
            blocks: the number of blocks, which is the result if no block stores activations.
        """
        return (
            0 if "model.embed_tokens" in {**self.shapes, **self.rows} else min(self._blocks, default=blocks)
        )


@dataclass(frozen=True)
class Memory:
    """Peak memory in bytes, term by term; `total` is the peak of the whole process.

    `gradients` is the memory of gradients that are stored until they can be added up in a fixed order. It is
    0 if the gradients of each batch are added to the gradients of the step at once. `codes` is the memory
    that the option `keep_int8` takes.

    >>> memory = nplora.plan("model.gguf", "train.jsonl").memory
    >>> memory.total > memory.process
    True
    """

    process: int = dataclasses.field(metadata={"text": "this process, with model, tokenizer and data"})
    weights: int = dataclasses.field(metadata={"text": "weights that are not read yet"})
    factors: int = dataclasses.field(metadata={"text": "factors, their gradients and moments"})
    prefix: int = dataclasses.field(metadata={"text": "outputs of frozen blocks, cached for later epochs"})
    kept: int = dataclasses.field(metadata={"text": "activations kept for backward"})
    work: int = dataclasses.field(metadata={"text": "working memory of a block, or of head and loss"})
    scratch: int = dataclasses.field(metadata={"text": "scratch of the threads, and small arrays"})
    gradients: int = dataclasses.field(
        default=0, metadata={"text": "gradients, until they are added up over all ranks"}
    )
    codes: int = dataclasses.field(default=0, metadata={"text": "weights kept as 8-bit integers"})

    @property
    def total(self) -> int:
        return sum(vars(self).values())

    def __str__(self) -> str:
        return "\n".join(
            f"  {getattr(self, field.name) / 1e6:6.0f} MB  {field.metadata['text']}"
            for field in dataclasses.fields(self)
            if field.default is dataclasses.MISSING or getattr(self, field.name)
        )


@dataclass(frozen=True)
class Extra:
    """The numbers of bytes that a loss takes in addition to the arrays of the head.

    Attributes:
        kept: bytes that the loss stores from the forward pass of a micro-batch to the end of its backward
            pass.
        head: bytes that the loss needs while the head computes the logits of one chunk of tokens.
        inference: bytes that the loss needs at the start of a micro-batch, when no activations are stored
            yet.
        evaluation: bytes that the loss needs in an evaluation, in addition to those of the model's forward
            pass.

    >>> nplora.finetuning.planning.memory.Extra(kept=5).head
    0
    """

    kept: int = 0
    head: int = 0
    inference: int = 0
    evaluation: int = 0


NOTHING = Extra()


def with_filter(extra: Extra, config: ModelConfig, targets: int) -> Extra:
    """Add the bytes that a `WordFilter` takes.

    For each token, the C++ core lists the entries of the vocabulary that the filter does not skip: at most a
    quarter of the vocabulary. The core stores the gradient of the logit of each listed entry, the last byte
    of its id, and where each list starts. If the filter would skip too few entries for a token, the token's
    gradient is computed without the filter, from a copy of the logits of at most FLAT_ROWS tokens at a time.
    """
    logits = _FLOAT * min(most_rows(targets, config.vocab_size), targets) * config.vocab_size
    copied = _FLOAT * FLAT_ROWS * (config.vocab_size + config.hidden_size)
    return dataclasses.replace(extra, kept=extra.kept + logits * 11 // 32, head=extra.head + copied)


def predicted(
    lm: LanguageModel,
    adapters: Adapters,
    step: MicroBatch,
    evaluated: int,
    plan: ExecutionPlan,
    threads: int,
    resident: tuple[int, int],
    prefix_tokens: int = 0,
    extra: Extra = NOTHING,
    keeps_best: bool = False,
) -> Memory:
    """Predict the peak memory of training.

    Args:
        step: the largest micro-batch.
        evaluated: the number of tokens in the largest batch of an evaluation; 0 without an evaluation.
        resident: two sizes in bytes, as `resident_memory` returns them before the adapters are made.
        prefix_tokens: the number of tokens for which a `PrefixCache` holds block outputs in memory.
        extra: bytes that the loss takes in addition to the head.
        keeps_best: whether a copy of the best factors is kept.

    >>> planning = nplora.finetuning.planning
    >>> lm = nplora.load_model("model.gguf")
    >>> adapters = planning.Adapters.of(lm, rank=2, targets="all-linear", layers=None)
    >>> plan = planning.ExecutionPlan("float32", recompute=False)
    >>> sizes = planning.MicroBatch(100, 50, 20), planning.MicroBatch(1000, 500, 20)
    >>> small, large = (planning.predicted(lm, adapters, size, 0, plan, 1, (0, 0)) for size in sizes)
    >>> large.kept == 10 * small.kept
    True
    """
    narrow, config, layers = plan.compute != "float32", lm.config, lm.model.layers
    first = adapters.first_block(len(layers))
    blocks = [layers[i].footprint(adapters.of_block(i), narrow) for i in range(first, len(layers))]
    width = _FLOAT * config.hidden_size
    stream = width * step.tokens
    more = adapters.added
    head = (
        _head(config, step.targets, more) + extra.head + 2 * stream
    )  # the residual stream, and its gradient
    if plan.recompute:
        kept = len(blocks) * width
        works = [max(2 * width + block.saved + block.backward, block.forward) for block in blocks]
    else:
        kept = sum(block.saved for block in blocks)
        works = [max(2 * width + block.backward, width + block.forward - block.saved) for block in blocks]
    kept *= step.tokens
    frozen = max(block.footprint(NOT_ADAPTED, False).forward for block in layers)
    inference = max(frozen * max(step.tokens if first else 0, evaluated), _head(config, evaluated, more))
    inference = max(inference + extra.evaluation, extra.inference)
    work = max(
        head + extra.kept, step.tokens * max(works, default=0) + extra.kept, inference - kept
    )  # nothing is kept yet during inference
    rows = min(most_rows(step.targets, config.vocab_size), step.targets)
    lanes = (
        _BITS * max(rows * config.vocab_size, step.tokens * config.intermediate_size)
        if narrow
        else _FLOAT * min(step.tokens, 256) * config.intermediate_size
    )
    pairs = max(step.tokens, evaluated) * max(
        block.footprint(NOT_ADAPTED, narrow).scratch for block in layers
    )
    int8 = _of_int8(lm, adapters) if plan.compute == "int8" else 0
    trained = frozen_weights(layers[first:] if plan.keep_int8 else [])
    codes = sum(weight.int8_nbytes for weight in trained if not weight.keeps_int8)
    process, weights = resident
    return Memory(
        process,
        weights,
        _FLOAT * ((5 if keeps_best else 4) * adapters.numbers + (2 if keeps_best else 1) * adapters.frozen)
        + adapters.taken,
        _FLOAT * config.hidden_size * prefix_tokens,
        kept,
        work,
        threads * (min(_LANES, lanes) + _THREAD)
        + pairs
        + adapters.scratch(narrow, max(step.tokens, evaluated), threads)
        + int8
        + _HEAP
        + _core.constants.spare_buffer_bytes,
        codes=codes,
    )


def _of_int8(lm: LanguageModel, adapters: Adapters) -> int:
    """The bytes that int8 takes in addition: a scale for each row of weights, the gradient values that
    `Int8Check` compares, and the arrays with which it measures the error of a product."""
    layers = [module for _, module in lm.named_modules() if isinstance(module, Linear | LoRALinear)]
    rows = sum(int(layer.weight.shape[0]) for layer in layers)
    largest = max((sample_nbytes(*layer.weight.shape) for layer in layers), default=0)
    return _FLOAT * (rows + min(COMPARED, adapters.numbers)) + largest


def _is_embedding(name: str) -> bool:
    return name.endswith("embed_tokens")


def _head(config: ModelConfig, targets: int, added: int) -> int:
    """The bytes that the head takes for one chunk of tokens.

    The head holds the logits of the chunk, the residual stream of the chunk before the norm and after it, and
    the gradients of both arrays of the residual stream. If tokens were added to the model, the head also
    holds a second array, with the logits of the frozen weight.

    Args:
        added: the number of rows that were added to the head of the model.
    """
    rows = min(most_rows(targets, config.vocab_size), targets)
    logits = 2 * config.vocab_size + added if added else config.vocab_size
    return _FLOAT * rows * (logits + 4 * config.hidden_size)


def _calls(lm: LanguageModel) -> dict[str, str]:
    """Return which layers the C++ core computes in the same call.

    One call of the core computes one or more layers of a block. The keys of the result are the names of
    all layers that are not the first layer of their call. Each value is the name of the call's first layer.
    """
    calls = dict[str, str]()
    for index, block in enumerate(lm.model.layers):
        for name, mixer in block.mixers.items():
            first, *others = (f"model.layers.{index}.{name}.{layer}" for layer in mixer.reading)
            calls |= dict.fromkeys(others, first)
    return calls
