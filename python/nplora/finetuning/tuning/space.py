"""The options that a search tries, and the values of each."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from nplora import _check
from nplora.finetuning.options import FinetuneOptions
from nplora.lm import LanguageModel
from nplora.lm.adapting import ALL_LINEAR, block_of, by_layer, parse_pattern, target_names, targeted
from nplora.nn import Linear

Settings: TypeAlias = dict[str, Any]  # options of `finetune`, by name

_DEFAULTS: dict[str, Any] = {field.name: field.default for field in dataclasses.fields(FinetuneOptions)}
_RATES = range(-2, 3)  # half decades around the default: from a tenth of it to ten times as much
_RANKS = (4, 32)  # in addition to the default
_EPOCHS = (1, 2, 4)
# What belongs to one run, not to a search.
UNSEARCHED = (
    "resume", "overwrite", "sample", "save_every", "save_minutes", "seed", "steps", "valid_split", "memory",
    "keep_prefix", "compute", "int8_head", "keep_int8", "recompute", "filter_vocabulary", "format", "columns",
    "chat", "learn", "max_length", "skip_bad", "profile", "change_compute",
    "strict", "adapter", "any_base", "layers", "rank_pattern", "alpha_pattern", "eval_every", "patience",
    "keep", "report_to", "objective", "teacher", "distributed", "communication_dtype", "local_steps",
    "outer_lr", "outer_momentum",
    # Trials of one rung make equally many steps. With batches of different sizes, they would read different
    # amounts of data.
    "batch_examples", "batch_tokens", "accumulate",
)  # fmt: skip
_PATTERNS = ("rank_pattern", "alpha_pattern")
_OF_AN_ADAPTER = ("rank", "alpha", "targets", "use_rslora", "use_dora", "init")


@dataclass(frozen=True)
class Space:
    """The values that a search tries.

    Attributes:
        rates: learning rates, from small to large.
        others: a dict from names of other options to their values; the search starts with the first value of
            each option.
        epochs: numbers of epochs, from small to large; empty if the user has fixed the number of epochs or
            steps.
        alpha_ratio: the ratio alpha / rank of every trial; None if ranks are not searched, or if alpha is
            given or searched.
    """

    rates: tuple[float, ...]
    others: Mapping[str, tuple[Any, ...]]
    epochs: tuple[int, ...]
    alpha_ratio: float | None

    def settings(self, lr: float, **changes: Any) -> Settings:
        """The settings of a trial: `lr`, `changes`, and the first value of every other searched option."""
        made = {"lr": lr, **{name: values[0] for name, values in self.others.items()}, **changes}
        if self.alpha_ratio is not None:
            made["alpha"] = self.alpha_ratio * made["rank"]
        return made

    def variations(self) -> Iterator[tuple[str, Any]]:
        """Yield pairs (option, value): first the second value of each option, then the third value of each,
        and so on."""
        rows = [[(name, value) for value in values[1:]] for name, values in self.others.items()]
        for turn in range(max(map(len, rows), default=0)):
            yield from (row[turn] for row in rows if turn < len(row))

    @property
    def names(self) -> list[str]:
        """The names of the searched options except the number of epochs."""
        return ["lr", *self.others, *(["alpha"] if self.alpha_ratio is not None else [])]

    def described(self) -> dict[str, Any]:
        """The values as JSON."""
        return {"lr": self.rates, **self.others, "epochs": self.epochs}


def space_of(
    lm: LanguageModel,
    given: Mapping[str, Any],
    search: Mapping[str, Sequence[Any]],
    default_lr: float,
    op: str = "tune",
) -> Space:
    """Make the space of a search: the values in `search`, and usual values of lr, rank, targets and epochs.

    Options in `search` or `given` get no usual values. If `given` sets `rank_pattern` or `alpha_pattern`, the
    usual targets are not tried, because some of them do not include the layers that the pattern names.

    Args:
        given: the options of `finetune` that the user has fixed.
        default_lr: the learning rate of a run whose options do not set one.
    Raises:
        ValueError: a searched option is unknown or has no values; or a layer that `rank_pattern` or
            `alpha_pattern` names is missing from some of the targets.
    """
    wanted = {name: listed_values(op, name, values) for name, values in search.items()}
    continues = given.get("adapter") is not None
    if continues and (own := [name for name in wanted if name in _OF_AN_ADAPTER]):
        raise ValueError(f"{op}: {own[0]} is decided by the adapter to continue from; do not search it")
    rates = wanted.pop("lr", (given["lr"],) if given.get("lr") else rates_around(default_lr))
    is_fixed = "epochs" in given or "steps" in given
    epochs = wanted.pop("epochs", () if is_fixed else _EPOCHS)
    usual = {} if continues else {"rank": (_DEFAULTS["rank"], *_RANKS), "targets": _target_sets(lm)}
    if any(given.get(option) for option in _PATTERNS):
        usual.pop("targets", None)
    others = {name: values for name, values in usual.items() if name not in given} | wanted
    for targets in others.get("targets", ()):
        _require_layers(op, lm, targets, given)
    ratio = _DEFAULTS["alpha"] / _DEFAULTS["rank"]
    keeps_ratio = "rank" in others and "alpha" not in given and "alpha" not in others
    return Space(tuple(sorted(rates)), others, tuple(sorted(epochs)), ratio if keeps_ratio else None)


def _require_layers(op: str, lm: LanguageModel, targets: Any, given: Mapping[str, Any]) -> None:
    """Raise a ValueError if `rank_pattern` or `alpha_pattern` names a layer that `targets` do not include."""
    for option in _PATTERNS:
        if pattern := parse_pattern(op, option, given.get(option)):
            names = targeted(lm, lm.config.num_hidden_layers, targets, given.get("layers"), op)
            by_layer(op, option, pattern, names)


def require_searchable(op: str, name: str) -> None:
    """Raise ValueError unless a search can try values of the option `name`."""
    known = [key for key in _DEFAULTS if key not in UNSEARCHED]
    if name not in known:
        near = _check.suggestion(name, known)
        raise ValueError(f"{op}: {name} cannot be searched{near or ', expected one of ' + ', '.join(known)}")


def require_values(op: str, search: Mapping[str, Sequence[Any]], given: Mapping[str, Any]) -> None:
    """Check every value in `search`, and every combination of two values, as `finetune` does.

    Args:
        given: the options of `finetune` that the user has fixed.
    Raises:
        ValueError, TypeError: a searched option is also given, a value is out of range, or two values exclude
            each other.
    """
    for name in search:
        if name in given:
            raise ValueError(
                f"{op}: {name} is set to one value and also searched, expected only one of the two"
            )
    if "epochs" in search and "steps" in given:
        raise ValueError(f"{op}: epochs are searched, and steps is given, expected only one of them")
    choices = [(name, value) for name, values in search.items() for value in values]
    for one, other in itertools.combinations_with_replacement(choices, 2):
        FinetuneOptions(**(dict(given) | dict([one, other])), op=op)


def listed_values(op: str, name: str, values: Iterable[Any]) -> tuple[Any, ...]:
    """The values to try for one option, without repetitions. `require_values` checks each value.

    Raises:
        ValueError, TypeError: the option cannot be searched, or there are no values.
    """
    require_searchable(op, name)
    if isinstance(values, str) or not isinstance(values, Iterable):
        raise TypeError(f"{op}: search has {name}: {_check.kind(values)}, expected a list of values")
    given = list(dict.fromkeys(target_names(v) if name == "targets" else v for v in values))
    if not given:
        raise ValueError(f"{op}: search has no values for {name}")
    return tuple(given)


def rates_around(default: float) -> tuple[float, ...]:
    """Learning rates around the default. Each rate is about √10 times the previous rate."""
    return tuple(rounded(default * 10 ** (step / 2)) for step in _RATES)


def rounded(rate: float) -> float:
    """A learning rate with two significant digits, as people write it."""
    return float(f"{rate:.2g}")


def _target_sets(lm: LanguageModel) -> tuple[tuple[str, ...], ...]:
    """Three sets of targets: all linear layers, those of attention, and those of the MLP."""
    kinds: dict[str, list[str]] = {"self_attn": [], "mlp": []}
    for name, module in lm.named_modules():
        parts = name.split(".")
        if isinstance(module, Linear) and block_of(name) is not None and parts[-2] in kinds:
            kinds[parts[-2]].append(parts[-1])
    sets = [tuple(dict.fromkeys(names)) for names in kinds.values() if names]
    return ((ALL_LINEAR,), *sets)
