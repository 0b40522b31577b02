"""Adapters as PEFT keeps them: a directory of adapter_config.json and adapter_model.safetensors.

A layer that is trained whole (`trainable=True`) goes into PEFT's `modules_to_save`, all its arrays with it.
"""

import re
from collections import Counter
from collections.abc import Hashable, Iterable
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from nplora.adapters import letters
from nplora.adapters.adapter import Adapter
from nplora.adapters.fitting import ANYTHING, Target, collecting
from nplora.formats import files, peft_adapter
from nplora.formats.errors import FormatError, brief
from nplora.formats.files import StrPath
from nplora.formats.peft_adapter import EMBEDDING, LINEAR, MAGNITUDE, PREFIX, PeftAdapter
from nplora.formats.peft_config import Patterns, PeftConfig, short_number
from nplora.lora.delta import LoraDelta

Array = NDArray[Any]
T = TypeVar("T", bound=Hashable)


# ---- reading ----


def read(
    directory: StrPath, target: Target = ANYTHING, edited_config: bool = False, any_base: bool = False
) -> Adapter:
    """The adapter of a directory, for a target; no tensor is read before its shape fits.

    Raises:
        FormatError: a file breaks its format, or the adapter does not fit, all that does not fit is listed;
            or it is of another model.
        CorruptError: the directory's adapter_config.json was edited. OSError: a file cannot be read.
    """
    with peft_adapter.reading(directory) as opened:
        return read_opened(opened, target, edited_config, any_base)


def read_opened(
    opened: PeftAdapter, target: Target = ANYTHING, edited_config: bool = False, any_base: bool = False
) -> Adapter:
    """As `read`, of a directory that is open."""
    config, problems = opened.config, list[str]()
    tensors = opened.whole()
    passed_over = {tensor for parameters in tensors.values() for tensor in parameters.values()}
    deltas, whole = dict[str, LoraDelta](), dict[str, dict[str, Array]]()
    factors = opened.factors(problems, passed_over)
    for name, halves in factors.items():
        with collecting(problems):
            deltas[name] = _delta(opened, name, halves, target)
    for layer, parameters in tensors.items():
        for parameter, tensor in parameters.items():
            with collecting(problems):
                whole.setdefault(layer, {})[parameter] = _whole(opened, layer, parameter, tensor, target)
    problems += target.missing([*factors, *tensors])
    base = config.base_model_name_or_path, opened.base_digest
    target.require(opened.directory, base, problems, [*deltas, *whole], any_base)
    if not edited_config:
        opened.require_pair()
    whole |= {name: {} for name in config.modules_to_save if not whole}  # PEFT's names, for messages
    return Adapter(
        opened.directory, deltas, base[0], config.task_type, base[1], whole, unknown=config.unknown
    )


def _delta(opened: PeftAdapter, name: str, halves: tuple[str, str], target: Target) -> LoraDelta:
    config, entries = opened.config, opened.tensors.entries
    opened.require_rank(name, halves)
    embedding = halves[0].endswith(EMBEDDING[0])
    shape_a, shape_b = (entries[half].shape for half in halves)
    shape = letters.weight_shape(shape_a, shape_b, embedding)
    dtype = target.place_of(name, shape, embedding, config.use_dora).dtype
    m, magnitude = None, PREFIX + name + MAGNITUDE
    if config.use_dora:
        if magnitude not in entries:
            raise FormatError(f"tensor {brief(magnitude, 200)} is missing, which DoRA needs")
        if entries[magnitude].shape != shape[:1]:
            found = entries[magnitude].shape
            raise FormatError(f"{brief(name)}: magnitudes of shape {found}, expected {shape[:1]}")
        m = opened.array(magnitude, dtype)
    lora_a, lora_b = (opened.array(half, dtype) for half in halves)
    a, b = letters.from_peft(lora_a, lora_b, embedding)
    return LoraDelta.of_alpha(a, b, config.alpha(name), config.use_rslora, m, embedding)


def _whole(opened: PeftAdapter, layer: str, parameter: str, tensor: str, target: Target) -> Array:
    """An array of a layer that is trained whole."""
    if target.whole is None:
        return opened.array(tensor)
    live, shape = target.whole.get(layer, {}).get(parameter), opened.tensors.entries[tensor].shape
    if live is None:
        raise FormatError(f"{brief(layer)}: {target.title} has no {parameter!r} there that is trained whole")
    if live.shape != shape:
        raise FormatError(f"tensor {brief(tensor, 200)} has shape {shape}, expected {live.shape}")
    return opened.array(tensor, live.dtype)


# ---- writing ----


def save(adapter: Adapter, directory: StrPath | files.Directory) -> None:
    """Write an adapter. Raises as `save_adapter`."""
    if not adapter:
        raise ValueError(f"save_adapter: {adapter.source} has no layers")
    named = {
        f"{name}.{letter}": array
        for name, delta in adapter.items()
        for letter, array in (("A", delta.A), ("B", delta.B), ("m", delta.m))
    }
    for layer, parameters in adapter.modules_to_save.items():
        named |= {f"{layer}.{parameter}": array for parameter, array in parameters.items()}
    for title, array in named.items():
        if array is not None and not np.isfinite(array).all():
            raise ValueError(f"save_adapter: {title} holds NaN or an infinity")
    tensors = dict[str, Array]()
    for name, delta in adapter.items():
        pair = letters.to_peft(delta.A, delta.B, delta.embedding)
        suffixes = EMBEDDING if delta.embedding else LINEAR
        tensors |= {PREFIX + name + suffix: half for suffix, half in zip(suffixes, pair, strict=True)}
        if delta.m is not None:
            tensors[PREFIX + name + MAGNITUDE] = delta.m
    for layer, parameters in adapter.modules_to_save.items():
        tensors |= {f"{PREFIX}{layer}.{parameter}": array for parameter, array in parameters.items()}
    peft_adapter.save(directory, config_of(adapter), tensors, adapter.base_digest)


def config_of(adapter: Adapter) -> PeftConfig:
    """PEFT's configuration of an adapter.

    Raises:
        ValueError: PEFT's format cannot say it.
    """
    for name in adapter.modules_to_save:
        _require_unmistakable(name, [*adapter, *(other for other in adapter.neighbours if other != name)])
    ranks = {name: delta.rank for name, delta in adapter.items()}
    alphas = {name: short_number(delta.stated_alpha) for name, delta in adapter.items()}
    rank, alpha = _most_common(ranks.values()), _most_common(alphas.values())
    return PeftConfig(
        r=rank,
        lora_alpha=alpha,
        target_modules=_targets(list(adapter), adapter.neighbours),
        modules_to_save=tuple(adapter.modules_to_save),
        use_rslora=_common("use_rslora", adapter),
        use_dora=_common("use_dora", adapter),
        rank_pattern=Patterns.exact({name: value for name, value in ranks.items() if value != rank}),
        alpha_pattern=Patterns.exact({name: value for name, value in alphas.items() if value != alpha}),
        lora_dropout=adapter.dropout,
        base_model_name_or_path=adapter.base_model_name_or_path,
        task_type=adapter.task_type,
    )


def _targets(names: list[str], others: Iterable[str]) -> tuple[str, ...] | str:
    """The names as a list, or as one expression where the list would hit others (PEFT finds "0" in "1.0")."""
    if any(other.endswith("." + name) for name in names for other in others):
        return "|".join(map(re.escape, names))
    return tuple(names)


def _require_unmistakable(name: str, others: Iterable[str]) -> None:
    """PEFT takes for a module to save whatever ends in its name or lies in a module of its name."""
    for other in others:
        if other.endswith(name) or f".{name}." in f".{other}.":
            raise ValueError(
                f"save_adapter: PEFT's modules_to_save would take {other!r} for the trained layer {name!r}; "
                "rename one of them"
            )


def _common(setting: str, adapter: Adapter) -> bool:
    """A setting that PEFT has once for the whole adapter."""
    values = {name: bool(getattr(delta, setting)) for name, delta in adapter.items()}
    if len(set(values.values())) > 1:
        found = ", ".join(f"{name} {value}" for name, value in values.items())
        raise ValueError(
            f"save_adapter: PEFT's format has one {setting} for all layers, {adapter.source} has {found}"
        )
    return next(iter(values.values()))


def _most_common(values: Iterable[T]) -> T:
    return Counter(values).most_common(1)[0][0]
