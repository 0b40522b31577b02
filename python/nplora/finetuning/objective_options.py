"""The options of the objectives: their ranges, and which of them can be combined."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from nplora import _check
from nplora.models.divergence import DIVERGENCES

OBJECTIVES = ("sft", "dpo", "orpo", "kto", "distill")
TEMPERATURES = (0.01, 100)  # the least and the largest
_COMPARING = ("dpo", "orpo", "kto")
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
    "teacher": ("distill",),
    "kl": ("distill",),
    "temperature": ("distill",),
    "kd_ratio": ("distill",),
}


def check_objective(op: str, options: Any, defaults: Mapping[str, Any]) -> None:
    """Check the options that belong to the training objective, such as `beta` and `teacher`.

    Args:
        options: a `FinetuneOptions`.
        defaults: the default of each option.
    Raises:
        ValueError, TypeError: a value is out of range, or an option is set that the chosen objective does not
            use.
    """
    objective = _check.choice(op, "objective", options.objective, OBJECTIVES)
    for name, objectives in _FOR.items():
        if getattr(options, name) != defaults[name] and objective not in objectives:
            meant = " or ".join(map(repr, objectives))
            raise ValueError(f"{op}: {name} is for objective {meant}, but the objective is {objective!r}")
    if options.loss_type is not None:
        _check.choice(op, f"loss_type (of {objective})", options.loss_type, LOSS_TYPES[objective])
    for name in ("beta", "desirable_weight", "undesirable_weight"):
        if _check.number(op, name, getattr(options, name)) <= 0:
            raise ValueError(f"{op}: {name} is {getattr(options, name)}, expected above 0")
    _check_smoothing(op, options)
    _check_distillation(op, options)
    if objective in _COMPARING and options.learn != "completion":
        raise ValueError(
            f"{op}: learn={options.learn!r} is for objective 'sft' or 'distill', but the objective is "
            f"{objective!r}"
        )
    if objective == "kto" and options.loss_type in (None, "kto") and options.batch_examples == 1:
        raise ValueError(
            f"{op}: batch_examples is 1, but objective 'kto' compares the answers of a batch; expected at "
            "least 2"
        )


def _check_distillation(op: str, options: Any) -> None:
    _check.choice(op, "kl", options.kl, DIVERGENCES)
    if options.temperature is not None:
        require_temperature(op, options.temperature)
    if not 0 < _check.number(op, "kd_ratio", options.kd_ratio) <= 1:
        raise ValueError(f"{op}: kd_ratio is {options.kd_ratio}, expected above 0 and at most 1")
    if options.objective != "distill":
        return
    if options.teacher is None:
        raise ValueError(
            f"{op}: objective 'distill' needs a teacher: a model, or a file that nplora teach made"
        )
    if options.filter_vocabulary:
        raise ValueError(
            f"{op}: filter_vocabulary={options.filter_vocabulary} and objective 'distill' exclude each "
            "other: the divergence from the teacher needs the probabilities of all tokens"
        )


def require_temperature(op: str, temperature: object) -> None:
    """Raise an error unless the value is a number from 0.01 to 100.

    At a lower temperature, the softmax gives nearly all probability to one token; at a higher temperature, it
    gives nearly the same probability to all tokens. In both cases, float32 is too imprecise for divergences.
    """
    least, most = TEMPERATURES
    if not least <= _check.number(op, "temperature", temperature) <= most:
        raise ValueError(f"{op}: temperature is {temperature}, expected {least} to {most}")


def _check_smoothing(op: str, options: Any) -> None:
    smoothing = _check.number(op, "label_smoothing", options.label_smoothing)
    if not 0 <= smoothing < 0.5:
        raise ValueError(f"{op}: label_smoothing is {smoothing}, expected at least 0 and below 0.5")
    if smoothing and options.loss_type not in _SMOOTHED:
        meant = ", ".join(map(repr, _SMOOTHED[1:]))
        raise ValueError(
            f"{op}: label_smoothing is for loss_type {meant}, but the loss_type is {options.loss_type!r}"
        )
