"""What can be chosen of a fine-tuning run."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from nplora import _check
from nplora.finetuning.data import LEARN
from nplora.finetuning.planning import parse_bytes
from nplora.lm.adapting import parse_blocks, target_names
from nplora.nn import LoRALinear
from nplora.nn.optim import SCHEDULES
from nplora.weights import COMPUTES

_OP = "finetune"
DEFAULT_EXAMPLES = 8
KEEP_PREFIX = ("off", "memory", "disk")
_OF_THE_ADAPTER = ("rank", "alpha", "targets", "layers", "use_rslora", "use_dora", "init")


def _option(default: Any, text: str, **more: Any) -> Any:
    return dataclasses.field(default=default, metadata={"help": text, **more})


def _beside(default: Any, text: str, **more: Any) -> Any:
    """An option on which neither memory nor time depends."""
    return _option(default, text, planned=False, **more)


@dataclass(frozen=True)
class FinetuneOptions:
    """All that can be chosen; the help of each is what `nplora finetune --help` prints.

    Raises:
        ValueError, TypeError: a value is out of its range, or two exclude each other.
    """

    adapter: str | None = _option(
        None,
        "continue from this adapter, with its layers, ranks and alphas: PEFT's directory or llama.cpp's file",
    )
    rank: int = _option(8, "of the factors")
    alpha: float = _beside(16.0, "the update is scaled by alpha / rank")
    targets: tuple[str, ...] = _option(
        ("all-linear",),
        "layers with an adapter: all-linear, or q_proj,v_proj,... (may be given several times)",
    )
    layers: str | None = _option(None, "blocks with an adapter: last:N or first:N; all without it")
    dropout: float = _beside(0.0, "share of an adapter's inputs that a step leaves out")
    use_rslora: bool = _beside(False, "scale by alpha / sqrt(rank)")
    use_dora: bool = _option(False, "train the magnitudes of the weights' rows too (DoRA)")
    init: str = _option(
        "zero",
        "how the factors start: zero (as the model), gaussian (both random, which changes the "
        "model at once), or pissa, olora: from the principal part of each weight, which must be of floats",
        choices=LoRALinear.inits,
    )
    lr: float = _beside(2e-4, "learning rate at its highest")
    schedule: str = _beside("cosine", "what becomes of the learning rate", choices=tuple(SCHEDULES))
    warmup: int = _beside(0, "steps over which the learning rate rises")
    weight_decay: float = _beside(0.01, "of AdamW")
    max_grad_norm: float = _beside(1.0, "gradients that are larger together are scaled down to this")
    epochs: int | None = _option(None, "passes over the data (1 if no steps are given)")
    steps: int | None = _option(None, "updates, instead of epochs")
    batch_tokens: int | None = _option(
        None, "most tokens of a batch, which has as many examples as fit, one at least"
    )
    batch_examples: int | None = _option(None, f"examples of a batch ({DEFAULT_EXAMPLES} without both)")
    accumulate: int = _option(1, "batches that make one step")
    max_length: int = _option(1024, "longer examples are cut to this many tokens")
    learn: str = _option(
        "completion",
        "what is learned: completions and assistants' turns, or all tokens",
        choices=LEARN,
    )
    skip_bad: bool = _option(False, "pass over bad lines of the data, and count them")
    strict: bool = _option(False, "take an example that is too long for an error")
    compute: str | None = _option(
        None,
        "arithmetic of the frozen products (float32, unless memory is too small for it)",
        choices=tuple(COMPUTES),
    )
    checkpoint_blocks: bool = _option(
        False, "keep less for backward and compute it again: slower, less memory"
    )
    memory: str | int | None = _option(
        None, "the most memory of the process in all, as 600M or 1.5G: the way of computing that fits is used"
    )
    keep_prefix: str = _option(
        "off",
        "keep what the frozen blocks below the lowest adapter make of each example, for later epochs: "
        "4 bytes x hidden size a token, in memory, or on disk in the output directory while the run lasts",
        choices=KEEP_PREFIX,
    )
    seed: int = _option(0, "of the factors' start, the dropout and the order of the data")
    save_every: int = _beside(100, "steps between checkpoints")
    save_minutes: float = _beside(5.0, "the most minutes between checkpoints; 0: no limit")
    resume: bool = _beside(False, "continue the run in the output directory, to the same bits")
    overwrite: bool = _beside(False, "drop the run and the adapter in the output directory")
    sample: tuple[str, ...] = _beside(
        (), "a prompt, as it is and not as a chat, answered before and after (may be given several times)"
    )

    def __post_init__(self) -> None:
        object.__setattr__(self, "targets", target_names(self.targets))
        self._require_nothing_that_the_adapter_has()
        if self.epochs is not None and self.steps is not None:
            raise ValueError(f"{_OP}: epochs and steps are both given; one of them ends the run")
        if self.batch_tokens is not None and self.batch_examples is not None:
            raise ValueError(f"{_OP}: batch_tokens and batch_examples are both given")
        if self.resume and self.overwrite:
            raise ValueError(f"{_OP}: resume and overwrite exclude each other")
        for name in ("epochs", "steps", "batch_tokens", "batch_examples"):
            if getattr(self, name) is not None:
                _check.integer(_OP, name, getattr(self, name), least=1)
        _check.rank(_OP, self.rank)
        for name, least in (("accumulate", 1), ("save_every", 1), ("warmup", 0), ("seed", 0)):
            _check.integer(_OP, name, getattr(self, name), least=least)
        _check.integer(_OP, "max_length", self.max_length, least=2)
        for name, words in (
            ("schedule", SCHEDULES), ("learn", LEARN), ("init", LoRALinear.inits),
            ("keep_prefix", KEEP_PREFIX),
        ):  # fmt: skip
            _check.choice(_OP, name, getattr(self, name), words)
        if self.compute is not None:
            _check.choice(_OP, "compute", self.compute, COMPUTES)
        if self.memory is not None:
            parse_bytes(self.memory)
        for name in ("lr", "alpha", "max_grad_norm"):
            if _check.number(_OP, name, getattr(self, name)) <= 0:
                raise ValueError(f"{_OP}: {name} is {getattr(self, name)}, expected above 0")
        _check.probability(_OP, "dropout", self.dropout)
        for name in ("weight_decay", "save_minutes"):
            _check.at_least(_OP, name, getattr(self, name), 0)
        object.__setattr__(self, "sample", _check.texts(_OP, "sample", self.sample))
        if isinstance(self.layers, str):
            parse_blocks(self.layers, _OP)

    def _require_nothing_that_the_adapter_has(self) -> None:
        defaults = {field.name: field.default for field in dataclasses.fields(self)}
        given = [name for name in _OF_THE_ADAPTER if getattr(self, name) != defaults[name]]
        if self.adapter is not None and given:
            raise ValueError(
                f"{_OP}: {given[0]} is the adapter's where a run continues from one; leave it out"
            )
