"""FinetuneOptions and EvaluateOptions: the options of a run and of an evaluation, and the help of each."""

from __future__ import annotations

import dataclasses
from dataclasses import InitVar, dataclass
from typing import Any

from nplora import _check
from nplora.finetuning.data import LEARN
from nplora.finetuning.planning import parse_bytes
from nplora.lm.adapting import parse_blocks, target_names
from nplora.nn import LoRALinear
from nplora.nn.optim import SCHEDULES
from nplora.weights import COMPUTES, INFERENCE_COMPUTES

_OP = "finetune"
DEFAULT_EXAMPLES = 8
KEEP_PREFIX = ("off", "memory", "disk")
_OF_THE_ADAPTER = ("rank", "alpha", "targets", "layers", "use_rslora", "use_dora", "init")


def _option(default: Any, text: str, **more: Any) -> Any:
    return dataclasses.field(default=default, metadata={"help": text, **more})


def _unplanned(default: Any, text: str, **more: Any) -> Any:
    """An option that changes neither the memory nor the time of a step."""
    return _option(default, text, planned=False, **more)


@dataclass(frozen=True)
class FinetuneOptions:
    """The options of a fine-tuning run; `nplora finetune --help` prints their help.

    Raises:
        ValueError, TypeError: a value is out of its range, or two options exclude each other.
    """

    adapter: str | None = _option(
        None, "adapter to continue from, with its layers, ranks and alphas: PEFT directory or llama.cpp file"
    )
    rank: int = _option(8, "rank of the LoRA factors")
    alpha: float = _unplanned(16.0, "LoRA alpha: the update is scaled by alpha / rank")
    targets: tuple[str, ...] = _option(
        ("all-linear",), "layers that get an adapter: all-linear, or q_proj,v_proj,... (repeatable)"
    )
    layers: str | None = _option(None, "blocks that get an adapter: last:N or first:N (default: all)")
    dropout: float = _unplanned(0.0, "LoRA dropout probability")
    use_rslora: bool = _unplanned(False, "scale the update by alpha / sqrt(rank) (rsLoRA)")
    use_dora: bool = _option(False, "also train the magnitudes of the weights' rows (DoRA)")
    init: str = _option(
        "zero",
        "initial factors: zero (the model is unchanged at first), gaussian (both random, the model changes "
        "at once), or pissa or olora (the principal part of each weight; unquantised weights only)",
        choices=LoRALinear.inits,
    )
    lr: float = _unplanned(2e-4, "peak learning rate")
    schedule: str = _unplanned("cosine", "learning rate schedule", choices=tuple(SCHEDULES))
    warmup: int = _unplanned(0, "warm-up steps, during which the learning rate rises")
    weight_decay: float = _unplanned(0.01, "weight decay of AdamW")
    max_grad_norm: float = _unplanned(1.0, "gradient norm above which the gradients are scaled down to it")
    epochs: int | None = _option(None, "passes over the data (default: 1, unless --steps is given)")
    steps: int | None = _option(None, "optimiser steps, instead of epochs")
    batch_tokens: int | None = _option(
        None, "maximum tokens in a batch; it holds as many examples as fit, at least one"
    )
    batch_examples: int | None = _option(
        None, f"examples in a batch (default: {DEFAULT_EXAMPLES}, unless --batch-tokens is given)"
    )
    accumulate: int = _option(1, "batches in one step")
    max_length: int = _option(1024, "maximum tokens of an example; longer examples are cut")
    learn: str = _option(
        "completion", "tokens to train on: completions and assistant turns, or all", choices=LEARN
    )
    skip_bad: bool = _option(False, "skip and count bad lines of the data")
    strict: bool = _option(False, "refuse examples that are longer than --max-length")
    compute: str | None = _option(
        None,
        "arithmetic of the frozen products (default: float32, unless --memory is too small for it)",
        choices=tuple(COMPUTES),
    )
    recompute: bool = _option(
        False,
        "recompute activations in the backward pass (gradient checkpointing): slower, less memory",
        alias="checkpoint_blocks",
    )
    memory: str | int | None = _option(
        None, "memory limit of the whole process, as in 600M or 1.5G: the fastest plan that fits is used"
    )
    keep_prefix: str = _option(
        "off",
        "where later epochs find the output of the frozen blocks below the lowest adapter: memory, or disk "
        "(in the output directory while the run lasts); 4 bytes x hidden size per token",
        choices=KEEP_PREFIX,
    )
    seed: int = _option(0, "seed of the initial factors, the dropout and the order of the data")
    save_every: int = _unplanned(100, "steps between checkpoints")
    save_minutes: float = _unplanned(5.0, "maximum minutes between checkpoints; 0: no limit")
    resume: bool = _unplanned(False, "continue the run in the output directory, to the same bits")
    overwrite: bool = _unplanned(False, "drop the run and the adapter in the output directory")
    sample: tuple[str, ...] = _unplanned(
        (), "prompt to complete before and after training; plain text, not a chat (repeatable)"
    )
    checkpoint_blocks: InitVar[bool] = False  # the old name of recompute

    def __post_init__(self, checkpoint_blocks: bool) -> None:
        self._set("recompute", self.recompute or checkpoint_blocks)
        self._set("targets", target_names(self.targets))
        self._check_what_the_adapter_decides()
        self._check_exclusions()
        self._check_choices()
        self._check_numbers()
        self._set("sample", _check.texts(_OP, "sample", self.sample))
        if self.memory is not None:
            parse_bytes(self.memory)
        if isinstance(self.layers, str):
            parse_blocks(self.layers, _OP)

    def _set(self, name: str, value: Any) -> None:
        object.__setattr__(self, name, value)

    def _check_what_the_adapter_decides(self) -> None:
        defaults = {field.name: field.default for field in dataclasses.fields(self)}
        given = [name for name in _OF_THE_ADAPTER if getattr(self, name) != defaults[name]]
        if self.adapter is not None and given:
            raise ValueError(f"{_OP}: {given[0]} is decided by the adapter to continue from; leave it out")

    def _check_exclusions(self) -> None:
        if self.epochs is not None and self.steps is not None:
            raise ValueError(f"{_OP}: epochs and steps are both given; one of them ends the run")
        if self.batch_tokens is not None and self.batch_examples is not None:
            raise ValueError(f"{_OP}: batch_tokens and batch_examples are both given")
        if self.resume and self.overwrite:
            raise ValueError(f"{_OP}: resume and overwrite exclude each other")

    def _check_choices(self) -> None:
        for name, words in (
            ("schedule", SCHEDULES), ("learn", LEARN), ("init", LoRALinear.inits),
            ("keep_prefix", KEEP_PREFIX),
        ):  # fmt: skip
            _check.choice(_OP, name, getattr(self, name), words)
        if self.compute is not None:
            _check.choice(_OP, "compute", self.compute, COMPUTES)

    def _check_numbers(self) -> None:
        for name in ("epochs", "steps", "batch_tokens", "batch_examples"):
            if getattr(self, name) is not None:
                _check.integer(_OP, name, getattr(self, name), least=1)
        _check.rank(_OP, self.rank)
        for name, least in (
            ("accumulate", 1), ("save_every", 1), ("warmup", 0), ("seed", 0), ("max_length", 2),
        ):  # fmt: skip
            _check.integer(_OP, name, getattr(self, name), least=least)
        for name in ("lr", "alpha", "max_grad_norm"):
            if _check.number(_OP, name, getattr(self, name)) <= 0:
                raise ValueError(f"{_OP}: {name} is {getattr(self, name)}, expected above 0")
        _check.probability(_OP, "dropout", self.dropout)
        for name in ("weight_decay", "save_minutes"):
            _check.at_least(_OP, name, getattr(self, name), 0)


@dataclass(frozen=True)
class EvaluateOptions:
    """The options of an evaluation; `nplora eval --help` prints their help."""

    max_length: int | None = _option(
        None, "maximum tokens of an example; longer examples are cut (default: the model's context)"
    )
    learn: str = _option(
        "completion", "tokens that count: completions and assistant turns, or all", choices=LEARN
    )
    skip_bad: bool = _option(False, "skip and count bad lines of the data")
    strict: bool = _option(False, "refuse examples that are longer than --max-length")
    compute: str | None = _option(
        None,
        "arithmetic of the frozen products; int8: for quantised weights and few tokens (default: float32)",
        choices=INFERENCE_COMPUTES,
    )
