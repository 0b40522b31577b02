"""FinetuneOptions and EvaluateOptions: the options of a run and of an evaluation, with their help texts.

If a help text names another option, the name is in backticks, and the command line prints `max_length` as
--max-length. The docstrings of `finetune` and `evaluate` repeat the help texts word for word.
"""

from __future__ import annotations

import dataclasses
import inspect
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import InitVar, dataclass
from typing import Any, TypeVar

from nplora import _check
from nplora.adapters import Adapter
from nplora.distributed.opening import DISTRIBUTED
from nplora.distributed.ordered_sum import COMMUNICATION_DTYPES
from nplora.finetuning.data import FORMATS, LEARN, ONE_ANSWER
from nplora.finetuning.data.dataset import ReadOptions
from nplora.finetuning.judging.metrics import MetricFunction
from nplora.finetuning.objective_options import (
    ALL_LOSS_TYPES,
    OBJECTIVES,
    check_objective,
    require_temperature,
)
from nplora.finetuning.planning import parse_bytes
from nplora.lm import LanguageModel
from nplora.lm.adapting import parse_blocks, parse_pattern, target_names
from nplora.lm.trained_rows import module_names, text_list, token_list
from nplora.models.divergence import DIVERGENCES
from nplora.nn import LoRALinear
from nplora.nn.optim import SCHEDULES
from nplora.trainer.fit_config import KEEP, require_outer_steps, require_resume
from nplora.trainer.reporters import REPORTERS
from nplora.trainer.training_setup import OUTER_LR, OUTER_MOMENTUM
from nplora.weights import COMPUTES, FLOAT_COMPUTES

T = TypeVar("T")

DEFAULT_EXAMPLES = 8
TEACHER_DTYPES = ("float16", "float32")
EVALUATED = (*ONE_ANSWER, "preference", "choice")
KEEP_PREFIX = ("off", "memory", "disk")
INT8_HEAD = ("auto", "off", "forward", "on")
_OF_THE_ADAPTER = (
    "rank", "alpha", "rank_pattern", "alpha_pattern", "targets", "layers", "use_rslora", "use_dora", "init",
    "trainable_tokens", "modules_to_save", "invocation", "add_tokens",
)  # fmt: skip

# Groups of options, as --help shows them.
_ADAPTER, _OBJECTIVE, _TEACHER, _TRAINING, _BATCHES, _DATA, _VALIDATION, _SPEED, _RUN, _ANSWERS = (
    "adapter", "objective", "teacher", "training", "batches", "data", "validation", "memory and speed", "run",
    "generated answers",
)  # fmt: skip


def _option(group: str | None, default: Any, text: str, **more: Any) -> Any:
    return dataclasses.field(default=default, metadata={"group": group, "help": text, **more})


def _unplanned(group: str, default: Any, text: str, **more: Any) -> Any:
    """Make the field of an option that `nplora plan --help` does not show."""
    return _option(group, default, text, planned=False, **more)


@dataclass(frozen=True)
class FinetuneOptions:
    """The options of `finetune` and `plan`. The constructor checks all values.

    Raises:
        ValueError, TypeError: a value is out of range, or two options exclude each other.

    >>> options = nplora.finetuning.FinetuneOptions(rank=16, targets="q_proj,v_proj")
    >>> options.targets
    ('q_proj', 'v_proj')
    >>> nplora.finetuning.FinetuneOptions(epochs=1, steps=100)
    Traceback (most recent call last):
    ValueError: finetune: epochs and steps are both given, expected only one of them
    """

    rank: int = _option(_ADAPTER, 8, "rank of the LoRA factors")
    alpha: float = _unplanned(_ADAPTER, 16.0, "LoRA alpha: the update is scaled by alpha / rank")
    rank_pattern: Mapping[str, int] | str | None = _option(
        _ADAPTER,
        None,
        "separate ranks for layers whose names contain a given part, as in q_proj=16,layers.3.mlp=4",
        kind="pattern",
        metavar="NAME=RANK",
    )
    alpha_pattern: Mapping[str, float] | str | None = _unplanned(
        _ADAPTER,
        None,
        "separate alphas for layers whose names contain a given part, as in q_proj=32,layers.3.mlp=8",
        kind="pattern",
        metavar="NAME=ALPHA",
    )
    targets: tuple[str, ...] = _option(
        _ADAPTER,
        ("all-linear",),
        "layers that get an adapter: all-linear, or a list of names such as q_proj,v_proj",
        metavar="NAMES",
    )
    layers: str | None = _option(
        _ADAPTER, None, "blocks that get an adapter: last:N or first:N (default: all)", metavar="BLOCKS"
    )
    dropout: float = _unplanned(_ADAPTER, 0.0, "LoRA dropout probability")
    use_rslora: bool = _unplanned(_ADAPTER, False, "scale the update by alpha / sqrt(rank) (rsLoRA)")
    use_dora: bool = _option(_ADAPTER, False, "also train the magnitude of each row of the weights (DoRA)")
    freeze_B: bool = _option(  # noqa: N815
        _ADAPTER, False, "train only A (LoRA-FA), and keep B at its initial values; saves memory and time"
    )
    init: str = _option(
        _ADAPTER,
        "zero",
        "initial factors: zero (the model is unchanged at first), gaussian (both factors are random, so that "
        "the model changes at once), pissa or olora (the principal part of each weight; unquantised weights "
        "only)",
        choices=LoRALinear.inits,
    )
    trainable_tokens: str | Sequence[str | int] | None = _option(
        _ADAPTER,
        None,
        "tokens whose rows of the embedding and the head are trained too: ids or texts, as in "
        "<|im_start|>,<|im_end|>",
        metavar="TOKENS",
    )
    modules_to_save: str | Sequence[str] | None = _option(
        _ADAPTER,
        None,
        "layers to train as a whole, in float32: embed_tokens, lm_head or both",
        metavar="NAMES",
    )
    invocation: str | Sequence[int] | None = _option(
        _ADAPTER,
        None,
        "activated LoRA (aLoRA): the adapter acts from the last occurrence of this text onwards",
        metavar="TEXT",
    )
    add_tokens: str | Sequence[str] | None = _option(
        _ADAPTER,
        None,
        "new tokens to add to the vocabulary and to train, as in <tool>,</tool>",
        metavar="TOKENS",
    )
    adapter: str | os.PathLike[str] | Adapter | None = _option(  # noqa: RUF009
        _ADAPTER,
        None,
        "adapter to continue from: PEFT directory or llama.cpp file; its layers, ranks and alphas are kept",
        kind="adapter",
        metavar="PATH",
    )
    any_base: bool = _option(
        _ADAPTER, False, "accept an `adapter` that was trained on another model with the same shapes"
    )
    objective: str = _option(
        _OBJECTIVE,
        "sft",
        "goal of the training: sft (learn the answers), dpo or orpo (prefer chosen answers to rejected "
        "ones), kto (prefer good answers to bad ones) or distill (learn the predictions of a `teacher`)",
        choices=OBJECTIVES,
    )
    beta: float = _unplanned(
        _OBJECTIVE,
        0.1,
        "strength of the preference. For dpo and kto, larger values keep the outputs closer to those of the "
        "model without the adapter. For orpo, weight of the loss term that compares the two answers",
    )
    loss_type: str | None = _option(
        _OBJECTIVE,
        None,
        "variant of the loss; for dpo: sigmoid (the default), hinge, ipo, robust or sigmoid_norm; for kto: "
        "kto (the default) or apo_zero_unpaired",
        choices=ALL_LOSS_TYPES,
    )
    label_smoothing: float = _unplanned(
        _OBJECTIVE,
        0.0,
        "assumed share of pairs in which the chosen and the rejected answer are swapped; for dpo with "
        "sigmoid, sigmoid_norm or robust",
    )
    desirable_weight: float = _unplanned(_OBJECTIVE, 1.0, "weight of the good answers in the loss of kto")
    undesirable_weight: float = _unplanned(_OBJECTIVE, 1.0, "weight of the bad answers in the loss of kto")
    teacher: str | os.PathLike[str] | LanguageModel | None = _option(  # noqa: RUF009
        _OBJECTIVE,
        None,
        "teacher for distill: a model with the same vocabulary, or a file that nplora teach made",
        kind="path",
        metavar="PATH",
    )
    kl: str = _option(
        _OBJECTIVE,
        "forward",
        "divergence for distill: forward (learn everything that the teacher may say) or reverse (say only "
        "what the teacher would say)",
        choices=DIVERGENCES,
    )
    temperature: float | None = _option(
        _OBJECTIVE,
        None,
        "softmax temperature of teacher and student in distill (default: 1, or the temperature of a stored "
        "`teacher`)",
    )
    kd_ratio: float = _option(
        _OBJECTIVE,
        0.5,
        "weight of the divergence in the loss of distill, at most 1; the weight of the loss of sft is 1 "
        "minus this weight",
    )
    lr: float | None = _unplanned(
        _TRAINING,
        None,
        "peak learning rate (default: 0.8 / hidden size of the model, at most 2e-3; for dpo and kto three "
        "tenths of this)",
    )
    lora_plus_ratio: float = _unplanned(
        _TRAINING, 1.0, "learning rate of A divided by that of B (LoRA+); 16 is usual"
    )
    schedule: str = _unplanned(
        _TRAINING, "cosine", "learning rate schedule: cosine, linear or constant", choices=tuple(SCHEDULES)
    )
    warmup: int = _unplanned(_TRAINING, 0, "warm-up steps, in which the learning rate rises to its peak")
    weight_decay: float = _unplanned(_TRAINING, 0.01, "weight decay of AdamW")
    max_grad_norm: float = _unplanned(
        _TRAINING, 1.0, "maximum norm of the gradients; larger gradients are scaled down to this norm"
    )
    epochs: int | None = _option(
        _TRAINING, None, "passes over the data (default: 1, unless `steps` is given)"
    )
    steps: int | None = _option(_TRAINING, None, "optimiser steps, instead of `epochs`")
    seed: int = _option(
        _TRAINING, 0, "random seed of the initial factors, the dropout and the order of the data"
    )
    batch_examples: int | None = _option(
        _BATCHES, None, f"examples in a batch (default: {DEFAULT_EXAMPLES}, unless `batch_tokens` is given)"
    )
    batch_tokens: int | None = _option(
        _BATCHES, None, "maximum tokens in a batch; a batch holds as many examples as fit, at least one"
    )
    accumulate: int = _option(_BATCHES, 1, "batches in one step (gradient accumulation)")
    format: str | None = _option(
        _DATA,
        None,
        "format of the rows: messages, sharegpt, alpaca, completion, text, preference or kto (default: the "
        "names of the fields decide)",
        choices=FORMATS,
    )
    columns: Mapping[str, str] | str | None = _option(
        _DATA,
        None,
        "names of fields in the data, as in prompt=question,completion=answer",
        kind="columns",
        metavar="OURS=THEIRS",
    )
    chat: bool = _option(_DATA, False, "write prompts and completions with the model's chat template")
    valid_split: float | None = _option(
        _DATA,
        None,
        "share of the examples to hold out for validation; a hash of each example's text decides which",
    )
    max_length: int = _option(_DATA, 1024, "maximum tokens of an example; longer examples are cut")
    learn: str = _option(
        _DATA,
        "completion",
        "tokens to train on: completion (completions and assistant turns) or all",
        choices=LEARN,
    )
    skip_bad: bool = _option(_DATA, False, "skip bad lines of the data, and count them")
    strict: bool = _option(_DATA, False, "refuse examples that are longer than `max_length`")
    eval_every: int | None = _unplanned(
        _VALIDATION,
        None,
        "number of steps between two evaluations of the validation data; the run also evaluates after every "
        "epoch",
    )
    patience: int | None = _unplanned(
        _VALIDATION,
        None,
        "end the run after this number of evaluations in a row without a lower validation loss (early "
        "stopping)",
    )
    keep: str = _option(
        _VALIDATION,
        "best",
        "adapter to save if there are validation data: best (with the lowest validation loss) or last",
        choices=KEEP,
    )
    compute: str | None = _option(
        _SPEED,
        None,
        "arithmetic of the products with frozen weights: float32, bfloat16 or int8 (default: float32, unless "
        "`memory` is too small for float32)",
        choices=COMPUTES,
    )
    int8_head: str = _option(
        _SPEED,
        "auto",
        "arithmetic of the head if `compute` is int8: off (bfloat16), forward (int8 in the forward pass, "
        "bfloat16 in the backward pass), on (int8 in both, with stochastic rounding in the backward pass), "
        "or auto (forward if the processor has instructions for bfloat16, otherwise on)",
        choices=INT8_HEAD,
    )
    keep_int8: bool = _option(
        _SPEED,
        False,
        "keep weights in memory as 8-bit integers too, with compute int8, so that they are converted only "
        "once; this takes one byte for each weight of the first adapted block and of all later blocks; steps "
        "become faster, above all with few tokens or with weights in 16 or 32 bits (default: only with a "
        "memory limit, if there is room and steps become faster)",
    )
    recompute: bool = _option(
        _SPEED,
        False,
        "gradient checkpointing: recompute activations in the backward pass; slower, but saves memory",
        alias="checkpoint_blocks",
    )
    filter_vocabulary: float = _unplanned(
        _SPEED,
        0.0,
        "probability such as 1e-6: the gradient of the output layer leaves out all tokens of the vocabulary "
        "that are less likely; makes steps faster, with a small error (default: 0, no token is left out)",
        metavar="P",
    )
    memory: str | int | None = _option(
        _SPEED,
        None,
        "memory limit of the whole process, such as 600M or 1.5G; the fastest plan that fits is used",
        metavar="SIZE",
    )
    keep_prefix: str = _option(
        _SPEED,
        "off",
        "where to cache the outputs of the frozen blocks below the lowest adapter, so that later epochs "
        "skip these blocks: off, memory, or disk (in the output directory, during the run); each token "
        "takes 4 x hidden size bytes",
        choices=KEEP_PREFIX,
    )
    save_every: int = _unplanned(_RUN, 100, "steps between checkpoints")
    save_minutes: float = _unplanned(_RUN, 5.0, "maximum minutes between checkpoints; 0: no limit")
    report_to: tuple[str, ...] = _unplanned(
        _RUN,
        (),
        "where to report metrics: csv, tensorboard, wandb, mlflow; csv and tensorboard write into reports/ "
        "in the output directory",
        metavar="NAMES",
    )
    profile: bool = _unplanned(
        _RUN,
        False,
        "print how long each kind of work in a step takes, and what share of the processor's top speed it "
        "reaches",
    )
    resume: bool = _unplanned(
        _RUN,
        False,
        "continue the run in the output directory; the results are bit for bit the same as without a stop",
    )
    change_compute: bool = _unplanned(
        _RUN,
        False,
        "with `resume`: continue the run even if `compute` or `int8_head` has changed",
    )
    overwrite: bool = _unplanned(_RUN, False, "delete the run and the adapter in the output directory")
    sample: tuple[str, ...] = _unplanned(
        _RUN,
        (),
        "prompt that the model answers before and after training; sent as a chat if the training data are "
        "chats",
        metavar="PROMPT",
    )
    distributed: str | None = _option(
        _RUN,
        None,
        "how several processes train: mpi (all processes of one mpirun train one adapter together, each with "
        "some batches of every step) or off (each process makes a separate run)",
        choices=DISTRIBUTED,
    )
    communication_dtype: str = _option(
        _RUN,
        "float32",
        "precision in which ranks send gradients: float32, or bfloat16, which halves the number of bytes; a "
        "run in one process rounds its gradients in the same way",
        choices=COMMUNICATION_DTYPES,
    )
    local_steps: int | None = _option(
        _RUN,
        None,
        "number of steps that every rank makes alone before the ranks average their changes (DiLoCo), for "
        "slow networks (default: the ranks exchange gradients in every step)",
    )
    outer_lr: float = _unplanned(
        _RUN,
        OUTER_LR,
        "learning rate of the outer step, which updates the trained values with the average change after "
        "every `local_steps` steps",
    )
    outer_momentum: float = _unplanned(_RUN, OUTER_MOMENTUM, "Nesterov momentum of the outer step")
    checkpoint_blocks: InitVar[bool] = False  # the old name of recompute
    op: InitVar[str] = "finetune"  # the name with which error messages begin

    def __post_init__(self, checkpoint_blocks: bool, op: str) -> None:
        for field in dataclasses.fields(self):
            if field.type == "bool":
                _check.boolean(op, field.name, getattr(self, field.name))
        self._set("recompute", self.recompute or checkpoint_blocks)
        self._set("targets", target_names(self.targets))
        self._check_what_the_adapter_decides(op)
        self._set_trained_rows(op)
        self._check_exclusions(op)
        self._check_choices(op)
        self._check_numbers(op)
        check_objective(op, self, {field.name: field.default for field in dataclasses.fields(self)})
        self.reading(self.max_length, op)
        for name in ("rank_pattern", "alpha_pattern"):
            parse_pattern(op, name, getattr(self, name))
        self._set("report_to", _reporter_names(self.report_to, op))
        self._set("sample", _check.texts(op, "sample", self.sample))
        if self.memory is not None:
            parse_bytes(self.memory, op)
        if isinstance(self.layers, str):
            parse_blocks(self.layers, op)

    def _set(self, name: str, value: Any) -> None:
        object.__setattr__(self, name, value)

    def _set_trained_rows(self, op: str) -> None:
        if self.trainable_tokens is not None:
            self._set("trainable_tokens", token_list(op, self.trainable_tokens) or None)
        if self.modules_to_save is not None:
            self._set("modules_to_save", module_names(op, self.modules_to_save) or None)
        if self.add_tokens is not None:
            self._set("add_tokens", text_list(op, self.add_tokens) or None)

    def _check_what_the_adapter_decides(self, op: str) -> None:
        defaults = {field.name: field.default for field in dataclasses.fields(self)}
        given = [name for name in _OF_THE_ADAPTER if getattr(self, name) != defaults[name]]
        if self.adapter is not None and given:
            raise ValueError(f"{op}: {given[0]} is decided by the adapter to continue from; leave it out")

    def _check_exclusions(self, op: str) -> None:
        for one, other in (
            ("epochs", "steps"), ("batch_tokens", "batch_examples"), ("resume", "overwrite"),
            ("trainable_tokens", "modules_to_save"),
        ):  # fmt: skip
            if all(getattr(self, name) not in (None, False) for name in (one, other)):
                raise ValueError(f"{op}: {one} and {other} are both given, expected only one of them")

        require_resume(op, self.change_compute, self.resume)

    def _check_choices(self, op: str) -> None:
        for name, words in (
            ("schedule", SCHEDULES), ("init", LoRALinear.inits),
            ("keep_prefix", KEEP_PREFIX), ("keep", KEEP), ("int8_head", INT8_HEAD),
        ):  # fmt: skip
            _check.choice(op, name, getattr(self, name), words)
        if self.distributed is not None:
            _check.choice(op, "distributed", self.distributed, DISTRIBUTED)
        _check.choice(op, "communication_dtype", self.communication_dtype, COMMUNICATION_DTYPES)
        if self.distributed == "mpi" and self.keep_prefix != "off":
            raise ValueError(
                f"{op}: keep_prefix={self.keep_prefix!r} and distributed='mpi' exclude each other: an "
                "example may be on another rank in the next epoch, and the cache of that rank lacks it"
            )
        if self.compute is not None:
            _check.choice(op, "compute", self.compute, COMPUTES)
            self.require_fitting(op, self.compute)
        if self.freeze_B and self.lora_plus_ratio != 1:
            raise ValueError(
                f"{op}: lora_plus_ratio={self.lora_plus_ratio} and freeze_B exclude each other: the ratio "
                "compares the learning rates of A and B, and B is not trained"
            )
        given = {"outer_lr": OUTER_LR, "outer_momentum": OUTER_MOMENTUM}
        if self.local_steps is None and (
            own := [n for n, value in given.items() if getattr(self, n) != value]
        ):
            raise ValueError(f"{op}: {own[0]} needs local_steps, which is not set")

    def require_fitting(self, op: str, compute: str) -> None:
        """Raise a ValueError if `int8_head` or `keep_int8` is set and `compute` is not "int8"."""
        int8_head = False if self.int8_head == "auto" else self.int8_head
        require_int8(op, compute, int8_head=int8_head, keep_int8=self.keep_int8)

    def require_int8_for_head(self, op: str, trains_head: bool) -> None:
        """Raise a ValueError if `int8_head` is "on", but the head's backward pass cannot be in int8.

        Args:
            trains_head: whether rows of the head are trained directly, not through a low-rank adapter.
        """
        if self.int8_head != "on":
            return
        if self.filter_vocabulary:
            raise ValueError(
                f"{op}: int8_head='on' and filter_vocabulary={self.filter_vocabulary} exclude each other: "
                "the word filter does not compute the head's backward pass in int8"
            )
        if trains_head:
            names = ("trainable_tokens", "add_tokens", "modules_to_save")
            cause = next((name for name in names if getattr(self, name)), "the adapter to continue from")
            raise ValueError(
                f"{op}: int8_head='on' needs a head without trained rows, because their backward pass is not "
                f"in int8; {cause} trains rows of the head"
            )

    def _check_numbers(self, op: str) -> None:
        counts = (
            "epochs", "steps", "batch_tokens", "batch_examples", "eval_every", "patience", "local_steps",
        )  # fmt: skip
        for name in counts:
            if getattr(self, name) is not None:
                _check.integer(op, name, getattr(self, name), least=1)
        _check.rank(op, self.rank)
        for name, least in (
            ("accumulate", 1), ("save_every", 1), ("warmup", 0), ("seed", 0),
        ):  # fmt: skip
            _check.integer(op, name, getattr(self, name), least=least)
        lr = () if self.lr is None else ("lr",)
        for name in (*lr, "lora_plus_ratio", "alpha", "max_grad_norm", "outer_lr"):
            if _check.number(op, name, getattr(self, name)) <= 0:
                raise ValueError(f"{op}: {name} is {getattr(self, name)}, expected above 0")
        for name in ("dropout", "outer_momentum", "filter_vocabulary"):
            _check.probability(op, name, getattr(self, name))
        self.require_int8_for_head(op, trains_head=False)
        for name in ("weight_decay", "save_minutes"):
            _check.at_least(op, name, getattr(self, name), 0)
        require_outer_steps(op, self.eval_every, self.local_steps)
        if self.valid_split is not None and not 0 < _check.number(op, "valid_split", self.valid_split) < 1:
            raise ValueError(f"{op}: valid_split is {self.valid_split}, expected between 0 and 1")

    def reading(self, max_length: int, op: str = "finetune") -> ReadOptions:
        """The options for reading the data. `max_length` is the maximum number of tokens of an example."""
        return _reading(self, max_length, op)


def require_int8(op: str, compute: str, **options: object) -> None:
    """Raise a ValueError if any of `options` is set (not False) while `compute` is not "int8".

    Args:
        options: options that need int8.
    """
    set_ones = {name: value for name, value in options.items() if value is not False}
    if set_ones and compute != "int8":
        shown = [name if value is True else f"{name}={value!r}" for name, value in set_ones.items()]
        need = "needs" if len(shown) == 1 else "need"
        raise ValueError(f"{op}: {' and '.join(shown)} {need} compute='int8', but compute is {compute!r}")


def default_lr(hidden_size: int, objective: str = "sft") -> float:
    """The learning rate, with two significant digits, of a run whose options do not set one.

    A wider model needs a smaller learning rate, and so do DPO and KTO. `bench/defaults.py` tests the rule 0.8
    / (hidden size) on narrow models. For wide models, the rule agrees with the QLoRA paper: 2e-4 for width
    4096, and 1e-4 for width 8192.
    """
    share = 0.3 if objective in ("dpo", "kto") else 1.0
    return float(f"{share * min(0.8 / hidden_size, 2e-3):.2g}")


def _same_option(name: str, **more: Any) -> Any:
    """Copy the field of the option `name` of `finetune`, with the entries of `more` in its metadata."""
    field = next(field for field in dataclasses.fields(FinetuneOptions) if field.name == name)
    return dataclasses.field(default=field.default, metadata={**field.metadata, **more})


@dataclass(frozen=True)
class EvaluateOptions:
    """The options of `evaluate`. The constructor checks all values.

    Raises:
        ValueError, TypeError: a value is out of range.

    >>> nplora.finetuning.EvaluateOptions(learn="all").learn
    'all'
    """

    metric: tuple[str | MetricFunction, ...] = _option(
        _ANSWERS,
        (),
        "how generated answers are scored: exact_match, f1, or a function of yours as module:function, which "
        "is called with the answer, the reference and the row. Commas separate several metrics",
        kind="metric",
        metavar="NAMES",
    )
    max_new_tokens: int = _option(_ANSWERS, 128, "maximum tokens of a generated answer")
    format: str | None = _option(
        _DATA,
        None,
        "format of the rows: messages, sharegpt, alpaca, completion, text, preference or choice (default: "
        "the names of the fields decide)",
        choices=EVALUATED,
    )
    columns: Mapping[str, str] | str | None = _same_option("columns")
    chat: bool = _same_option("chat")
    max_length: int | None = _option(
        _DATA, None, "maximum tokens of an example; longer examples are cut (default: the model's context)"
    )
    learn: str = _option(
        _DATA,
        "completion",
        "tokens in the loss: completion (completions and assistant turns) or all",
        choices=LEARN,
    )
    skip_bad: bool = _same_option("skip_bad")
    strict: bool = _same_option("strict")
    compute: str | None = _option(
        _SPEED,
        None,
        "arithmetic of the products with frozen weights: float32, bfloat16 or int8 (default: float32); "
        "int8 needs weights in GGUF's quantised formats. In int8, the loss is computed a few tokens at a "
        "time, as in decoding",
        choices=COMPUTES,
    )
    op: InitVar[str] = "evaluate"  # the name with which error messages begin

    def __post_init__(self, op: str) -> None:
        metrics = self.metric
        single = isinstance(metrics, str) or callable(metrics)
        object.__setattr__(self, "metric", (metrics,) if single else tuple(metrics))
        _check.integer(op, "max_new_tokens", self.max_new_tokens, least=1)
        _check_format(op, self.format, EVALUATED)
        self.reading(self.max_length, op)
        if self.compute is not None:
            _check.choice(op, "compute", self.compute, COMPUTES)

    def reading(self, max_length: int | None, op: str = "evaluate") -> ReadOptions:
        """The options for reading the data. `max_length` is the maximum number of tokens of an example."""
        return _reading(self, max_length, op)


@dataclass(frozen=True)
class PreviewOptions:
    """The options of the command `data`, besides the files."""

    examples: int = _option(None, 3, "number of examples to show, from the beginning of the data")
    format: str | None = _same_option(
        "format",
        group=None,
        help="format of the rows: messages, sharegpt, alpaca, completion, text, preference, kto or choice "
        "(default: the names of the fields decide)",
        choices=(*FORMATS, "choice"),
    )
    columns: Mapping[str, str] | str | None = _same_option("columns", group=None)
    chat: bool = _same_option("chat", group=None)
    valid_split: float | None = _same_option("valid_split", group=None)
    max_length: int = _same_option("max_length", group=None)
    learn: str = _same_option("learn", group=None)


@dataclass(frozen=True)
class TeachOptions:
    """The options of `teach`. The constructor checks all values.

    Raises:
        ValueError, TypeError: a value is out of range.

    >>> nplora.finetuning.TeachOptions(top_k=8).dtype
    'float16'
    """

    top_k: int = _option(_TEACHER, 32, "how many of the most likely tokens to store for each trained token")
    temperature: float = _option(
        _TEACHER,
        1.0,
        "softmax temperature of the stored probabilities; fine-tuning uses the same temperature",
    )
    dtype: str = _option(
        _TEACHER,
        "float16",
        "storage type of the log-probabilities: float16 or float32",
        choices=TEACHER_DTYPES,
    )
    format: str | None = _option(
        _DATA,
        None,
        "format of the rows: messages, sharegpt, alpaca, completion or text (default: the names of the "
        "fields decide)",
        choices=ONE_ANSWER,
    )
    columns: Mapping[str, str] | str | None = _same_option("columns")
    chat: bool = _same_option("chat")
    max_length: int = _same_option("max_length")
    learn: str = _option(
        _DATA,
        "completion",
        "tokens to predict: completion (completions and assistant turns) or all",
        choices=LEARN,
    )
    skip_bad: bool = _same_option("skip_bad")
    strict: bool = _same_option("strict")
    compute: str | None = _option(
        _SPEED,
        None,
        "arithmetic of the products with frozen weights: float32 or bfloat16 (default: float32)",
        choices=FLOAT_COMPUTES,
    )
    overwrite: bool = _option(_RUN, False, "replace an existing file")
    op: InitVar[str] = "teach"  # the name with which error messages begin

    def __post_init__(self, op: str) -> None:
        _check_format(op, self.format, ONE_ANSWER)
        self.reading(self.max_length, op)
        _check.integer(op, "top_k", self.top_k, least=1)
        require_temperature(op, self.temperature)
        _check.choice(op, "dtype", self.dtype, TEACHER_DTYPES)
        if self.compute is not None:
            _check.choice(op, "compute", self.compute, FLOAT_COMPUTES)

    def reading(self, max_length: int, op: str = "teach") -> ReadOptions:
        """The options for reading the data. `max_length` is the maximum number of tokens of an example."""
        return _reading(self, max_length, op)


def _check_format(op: str, given: str | None, formats: tuple[str, ...]) -> None:
    if given is not None:
        _check.choice(op, "format", given, formats)


def _reading(
    options: FinetuneOptions | EvaluateOptions | TeachOptions, max_length: int | None, op: str
) -> ReadOptions:
    return ReadOptions(
        max_length, options.learn, options.format, parse_columns(options.columns, op), options.chat,
        options.skip_bad, options.strict, op,
    )  # fmt: skip


def _reporter_names(given: Any, op: str) -> tuple[str, ...]:
    """Split "csv,wandb", or several such texts, into names."""
    texts = _check.texts(op, "report_to", [given] if isinstance(given, str) else given)
    names = (name.strip() for text in texts for name in text.split(","))
    return tuple(_check.choice(op, "report_to", name, REPORTERS) for name in dict.fromkeys(names))


def parse_columns(columns: Mapping[str, str] | str | None, op: str = "finetune") -> Mapping[str, str]:
    """Turn a text such as "prompt=question,completion=answer" into a dict: nplora's name of a field -> name
    in the data. If `columns` is a mapping already, return it unchanged.

    Raises:
        ValueError: the text does not have this form.
        TypeError: `columns` is neither a text nor a mapping.
    """
    if columns is None or isinstance(columns, Mapping):
        return columns or {}
    if not isinstance(columns, str):
        raise TypeError(f"{op}: columns is {_check.kind(columns)}, expected a dictionary or a text")
    found = dict[str, str]()
    for pair in columns.split(","):
        ours, equals, theirs = (part.strip() for part in pair.partition("="))
        if not (ours and equals and theirs):
            raise ValueError(f"{op}: columns is {columns!r}, expected OURS=THEIRS as in prompt=question")
        if ours in found:
            raise ValueError(f"{op}: columns is {columns!r}, which names {ours!r} twice")
        found[ours] = theirs
    return found


def from_arguments(op: str, options: Callable[..., T], arguments: Mapping[str, Any]) -> T:
    """Make an object of the class `options` from the arguments of a function with a keyword for each option.

    Args:
        arguments: the result of `locals()` at the start of the function.
    Raises the errors that the class `options` raises.
    """
    names = [name for name in inspect.signature(options).parameters if name != "op"]
    return options(op=op, **{name: arguments[name] for name in names})
