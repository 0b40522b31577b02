"""The options of the objectives: which go together, and their ranges."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from nplora import _check

OBJECTIVES = ("sft", "dpo", "orpo", "kto")
LOSS_TYPES = {
    "dpo": ("sigmoid", "hinge", "ipo", "robust", "sigmoid_norm"),
    "kto": ("kto", "apo_zero_unpaired"),
}
ALL_LOSS_TYPES = tuple(name for names in LOSS_TYPES.values() for name in names)
_SMOOTHED = (None, "sigmoid", "sigmoid_norm", "robust")
_FOR = {  # the objectives that each option is for
    "beta": ("dpo", "orpo", "kto"),
    "loss_type": ("dpo", "kto"),
    "label_smoothing": ("dpo",),
    "desirable_weight": ("kto",),
    "undesirable_weight": ("kto",),
}


def check_objective(op: str, options: Any, defaults: Mapping[str, Any]) -> None:
    """Check the options of the objective.

    Args:
        options: a `FinetuneOptions`.
        defaults: the default of each option.
    Raises:
        ValueError, TypeError: an option is out of range, or is not for this objective.
    """
    objective = _check.choice(op, "objective", options.objective, OBJECTIVES)
    for name, objectives in _FOR.items():
        if getattr(options, name) != defaults[name] and objective not in objectives:
            meant = " or ".join(map(repr, objectives))
            raise ValueError(f"{op}: {name} is for objective {meant}, and the objective is {objective!r}")
    if options.loss_type is not None:
        _check.choice(op, f"loss_type (of {objective})", options.loss_type, LOSS_TYPES[objective])
    for name in ("beta", "desirable_weight", "undesirable_weight"):
        if _check.number(op, name, getattr(options, name)) <= 0:
            raise ValueError(f"{op}: {name} is {getattr(options, name)}, expected above 0")
    _check_smoothing(op, options)
    if objective != "sft" and options.learn != "completion":
        raise ValueError(
            f"{op}: learn={options.learn!r} is for objective 'sft', and the objective is {objective!r}"
        )
    if objective == "kto" and options.loss_type in (None, "kto") and options.batch_examples == 1:
        raise ValueError(
            f"{op}: batch_examples is 1, but objective 'kto' compares the answers of a batch; expected at "
            "least 2"
        )


def _check_smoothing(op: str, options: Any) -> None:
    smoothing = _check.number(op, "label_smoothing", options.label_smoothing)
    if not 0 <= smoothing < 0.5:
        raise ValueError(f"{op}: label_smoothing is {smoothing}, expected at least 0 and below 0.5")
    if smoothing and options.loss_type not in _SMOOTHED:
        meant = ", ".join(map(repr, _SMOOTHED[1:]))
        raise ValueError(
            f"{op}: label_smoothing is for loss_type {meant}, and the loss_type is {options.loss_type!r}"
        )
