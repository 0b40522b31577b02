"""ClassifyOptions: the options of `train_classifier`, with their help texts."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from nplora import _check
from nplora.distributed.opening import DISTRIBUTED
from nplora.finetuning.classification.labelled import require_separator
from nplora.finetuning.options import FinetuneOptions, parse_columns
from nplora.formats.label_record import TASKS
from nplora.lm.adapting import parse_blocks, target_names
from nplora.nn import LoRALinear
from nplora.nn.optim import SCHEDULES
from nplora.trainer.fit_config import KEEP, require_resume
from nplora.weights import COMPUTES

TASKS_OF_ROWS = (*TASKS, "tokens")
CLASS_WEIGHTS = ("none", "balanced")


def _option(group: str, default: Any, text: str, **more: Any) -> Any:
    return dataclasses.field(default=default, metadata={"group": group, "help": text, **more})


def _same(name: str, **more: Any) -> Any:
    """Copy the option of `finetune` with this name. `more` replaces parts of the option's metadata."""
    field = next(field for field in dataclasses.fields(FinetuneOptions) if field.name == name)
    return dataclasses.field(default=field.default, metadata={**field.metadata, **more})


@dataclass(frozen=True)
class ClassifyOptions:
    """The options of `train_classifier`. The constructor checks all values.

    Raises:
        ValueError, TypeError: a value is out of range, or two options exclude each other.

    >>> nplora.finetuning.ClassifyOptions(task="multi", epochs=2).task
    'multi'
    """

    task: str | None = _option(
        "labels",
        None,
        "kind of the labels: single (one label for each text, the default), multi (any number of labels for "
        "each text), regression (a number for each text) or tokens (one label for each word, the default for "
        "rows with words and tags)",
        choices=TASKS_OF_ROWS,
    )
    class_weights: str = _option(
        "labels",
        "none",
        "weights of the labels in the loss: none, or balanced (rare labels count more, so that all labels "
        "have the same total weight; only for single and tokens)",
        choices=CLASS_WEIGHTS,
    )
    separator: str = _option(
        "labels", "|", "text between two labels of a row, if the labels are not given as a list"
    )
    calibrate: bool = _option(
        "labels",
        False,
        "after training, divide the logits by the temperature that fits the validation data best",
    )
    rank: int = _same("rank")
    alpha: float = _same("alpha")
    targets: tuple[str, ...] = _same(
        "targets", help="layers that get an adapter: all-linear, or a list of names such as query,value"
    )
    layers: str | None = _same("layers")
    dropout: float = _same("dropout")
    use_rslora: bool = _same("use_rslora")
    use_dora: bool = _same("use_dora")
    init: str = _same("init")
    lr: float | None = _same(
        "lr", help="peak learning rate (default: 0.8 / hidden size of the model, at most 2e-3)"
    )
    schedule: str = _same("schedule")
    warmup: int = _same("warmup")
    weight_decay: float = _same("weight_decay")
    max_grad_norm: float = _same("max_grad_norm")
    epochs: int | None = _same("epochs", help="passes over the data (default: 3, unless `steps` is given)")
    steps: int | None = _same("steps")
    seed: int = _same("seed", help="random seed of the initial values, the dropout and the order of the data")
    batch_examples: int = _option("batches", 32, "texts in a batch")
    accumulate: int = _same("accumulate")
    columns: Mapping[str, str] | str | None = _same(
        "columns", help="names of fields in the data, as in text=review,label=stars or tokens=words,tags=pos"
    )
    valid_split: float | None = _same(
        "valid_split",
        help="share of the rows to hold out for validation; a hash of each row's text decides which rows",
    )
    max_length: int | None = _option(
        "data", None, "maximum tokens of a text; longer texts are cut (default: the model's maximum)"
    )
    skip_bad: bool = _same("skip_bad", help="skip bad rows of the data, and count them")
    eval_every: int | None = _same("eval_every")
    patience: int | None = _same("patience")
    keep: str = _same("keep")
    compute: str | None = _option(
        "memory and speed",
        None,
        "arithmetic of the products with frozen weights: float32, bfloat16 or int8 (default: float32, or "
        "with `resume` the arithmetic of the run)",
        choices=COMPUTES,
    )
    keep_int8: bool = _same(
        "keep_int8",
        help="keep weights in memory as 8-bit integers too, with compute int8, so that they are converted "
        "only once; steps become faster, but the integers take one byte for each weight of the first "
        "adapted block and of all later blocks",
    )
    save_every: int = _same("save_every")
    save_minutes: float = _same("save_minutes")
    resume: bool = _same("resume")
    change_compute: bool = _same(
        "change_compute",
        help="with `resume`: continue the run even if `compute` has changed",
    )
    overwrite: bool = _same(
        "overwrite",
        command_help="train: delete the run and the adapter in the output directory; eval and predict: "
        "replace an existing file",
    )
    distributed: str | None = _same("distributed")

    def __post_init__(self) -> None:
        op = "train_classifier"
        for field in dataclasses.fields(self):
            if field.type == "bool":
                _check.boolean(op, field.name, getattr(self, field.name))
        object.__setattr__(self, "targets", target_names(self.targets))
        self._check_choices(op)
        self._check_numbers(op)
        parse_columns(self.columns, op)
        if isinstance(self.layers, str):
            parse_blocks(self.layers, op)

    def _check_choices(self, op: str) -> None:
        require_resume(op, self.change_compute, self.resume)
        for one, other in (("epochs", "steps"), ("resume", "overwrite")):
            if all(getattr(self, name) not in (None, False) for name in (one, other)):
                raise ValueError(f"{op}: {one} and {other} are both given, expected only one of them")
        for name, words in (
            ("class_weights", CLASS_WEIGHTS), ("schedule", SCHEDULES), ("keep", KEEP),
            ("init", LoRALinear.inits),
        ):  # fmt: skip
            _check.choice(op, name, getattr(self, name), words)
        for name, words in (
            ("task", TASKS_OF_ROWS), ("compute", COMPUTES), ("distributed", DISTRIBUTED),
        ):  # fmt: skip
            if getattr(self, name) is not None:
                _check.choice(op, name, getattr(self, name), words)
        if self.class_weights == "balanced" and self.task in ("multi", "regression"):
            raise ValueError(
                f"{op}: class_weights='balanced' is for the tasks 'single' and 'tokens', not {self.task!r}"
            )
        if self.calibrate and self.task == "regression":
            raise ValueError(f"{op}: calibrate is for labels, but the task is a regression")
        require_separator(op, self.separator)

    def _check_numbers(self, op: str) -> None:
        for name in ("epochs", "steps", "eval_every", "patience", "max_length"):
            if getattr(self, name) is not None:
                _check.integer(op, name, getattr(self, name), least=1)
        _check.rank(op, self.rank)
        for name, least in (
            ("batch_examples", 1), ("accumulate", 1), ("save_every", 1), ("warmup", 0), ("seed", 0),
        ):  # fmt: skip
            _check.integer(op, name, getattr(self, name), least=least)
        for name in (*(() if self.lr is None else ("lr",)), "alpha", "max_grad_norm"):
            if _check.number(op, name, getattr(self, name)) <= 0:
                raise ValueError(f"{op}: {name} is {getattr(self, name)}, expected above 0")
        _check.probability(op, "dropout", self.dropout)
        for name in ("weight_decay", "save_minutes"):
            _check.at_least(op, name, getattr(self, name), 0)
        if self.valid_split is not None and not 0 < _check.number(op, "valid_split", self.valid_split) < 1:
            raise ValueError(f"{op}: valid_split is {self.valid_split}, expected between 0 and 1")
