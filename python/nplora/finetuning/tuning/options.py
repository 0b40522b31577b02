"""TuneOptions: the options that `tune` has in addition to those of `finetune`, with their help texts."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import InitVar, dataclass
from typing import Any

from nplora import _check
from nplora.finetuning.tuning.schedule import parse_budget
from nplora.finetuning.tuning.space import listed_values

SAMPLERS = ("halving", "optuna")
# Options of `finetune` that a search decides itself, or that belong to one run.
NOT_PASSED = (
    "resume", "overwrite", "sample", "save_every", "save_minutes", "eval_every", "patience", "keep",
    "report_to", "distributed", "communication_dtype", "local_steps", "outer_lr", "outer_momentum",
)  # fmt: skip


def _option(default: Any, text: str, **more: Any) -> Any:
    return dataclasses.field(default=default, metadata={"group": "search", "help": text, **more})


@dataclass(frozen=True)
class TuneOptions:
    """The options that `tune` has in addition to those of `finetune`.

    The constructor checks the names in `search`, but not their values. `tune` checks the values, because they
    may depend on the options of `finetune`.

    Raises:
        ValueError, TypeError: a value is out of range.

    >>> nplora.finetuning.TuneOptions(budget="10m", search={"lr": [1e-3, 3e-3]}).search
    {'lr': (0.001, 0.003)}
    """

    budget: str | float = _option(
        "30m", "time for all trials, such as 90s, 30m or 1.5h; without a unit: minutes", metavar="TIME"
    )
    search: Mapping[str, Sequence[Any]] = dataclasses.field(
        default_factory=dict,
        metadata={
            "group": "search",
            "help": "values to try, as in lr=1e-4,1e-3 or targets=all-linear,q_proj+v_proj (default: usual "
            "values of lr, rank, targets and epochs); a fixed option, as in --rank 8, is not searched",
            "metavar": "NAME=VALUES",
        },
    )
    sampler: str = _option(
        "halving",
        "source of the first trials: halving (a grid of learning rates) or optuna (its TPE sampler)",
        choices=SAMPLERS,
    )
    resume: bool = _option(False, "continue the search in the output directory; no trial is repeated")
    overwrite: bool = _option(False, "delete the search in the output directory")
    op: InitVar[str] = "tune"  # the name with which error messages begin

    def __post_init__(self, op: str) -> None:
        parse_budget(self.budget, op)
        _check.choice(op, "sampler", self.sampler, SAMPLERS)
        if not isinstance(self.search, Mapping):
            raise TypeError(f"{op}: search is {_check.kind(self.search)}, expected a dictionary of lists")
        checked = {name: listed_values(op, name, values) for name, values in self.search.items()}
        object.__setattr__(self, "search", checked)
        if self.resume and self.overwrite:
            raise ValueError(f"{op}: resume and overwrite are both given, expected only one of them")
