"""LoRA adapters on disk as PEFT keeps them: a directory of adapter_config.json and adapter_model.safetensors.

This module is the one place where this project's letters meet PEFT's. Here the update is scale * A B with
A (d_out, r) and B (r, d_in); PEFT, like the paper, has the letters the other way round:

    here             PEFT, a linear layer             PEFT, an embedding
    A (d_out, r)     lora_B.weight (d_out, r)         lora_embedding_A (r, vocab), transposed
    B (r, d_in)      lora_A.weight (r, d_in)          lora_embedding_B (dim, r), transposed
    m (d_out,)       lora_magnitude_vector (d_out,)

A layer that is trained whole (`trainable=True`) goes into PEFT's `modules_to_save`, all its arrays with it.
"""

import re
import warnings
from collections import Counter
from collections.abc import Hashable, Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from nplora.formats import bfloat16, files, peft_adapter
from nplora.formats.errors import FormatError, brief, counted, in_places, nearest_names
from nplora.formats.files import StrPath
from nplora.formats.peft_adapter import CONFIG, PREFIX, PeftAdapter
from nplora.formats.peft_config import Patterns, PeftConfig, short_number
from nplora.formats.safetensors import SafetensorsFile
from nplora.layers import LoRAEmbedding, LoRALayer
from nplora.module import Commit, Module

_MOST_SUGGESTIONS = 10  # unknown names for which the nearest ones are looked up

Array = NDArray[Any]
T = TypeVar("T", bound=Hashable)


@dataclass(frozen=True)
class Key:
    """How PEFT names and lays out one of a layer's arrays."""

    ours: str
    suffix: str
    transposed: bool = False


LINEAR_KEYS = (Key("A", ".lora_B.weight"), Key("B", ".lora_A.weight"), Key("m", ".lora_magnitude_vector"))
EMBEDDING_KEYS = (Key("A", ".lora_embedding_A", True), Key("B", ".lora_embedding_B", True))
_SUFFIXES = tuple(key.suffix for key in (*LINEAR_KEYS, *EMBEDDING_KEYS))


@dataclass(frozen=True)
class _Place:
    """Where a tensor of the file belongs: the array now, and the shape that the file must bring for it.

    Where `row_order` is given, row i of the array is row row_order[i] of the file's.
    """

    module: str
    key: Key
    array: Array
    shape: tuple[int, ...]
    row_order: Array | None = None

    @property
    def title(self) -> str:
        return f"{self.module}.{self.key.ours}"

    def to_file(self) -> Array:
        """The array as the file has it."""
        value = self.array
        if self.row_order is not None:
            value = np.empty_like(self.array)
            value[self.row_order] = self.array
        return value.T if self.key.transposed else value

    def from_file(self, value: Array) -> Array:
        """What the file has, as a fresh array in the layer's own layout."""
        value = value.T if self.key.transposed else value
        if self.row_order is not None:
            value = value[self.row_order]
        return np.array(value, self.array.dtype, order="C")


@dataclass(frozen=True)
class AdapterReport:
    """What `load_adapter` took from a directory.

    Attributes:
        directory: where it was read.
        layers: the names of the layers that received values.
        changes: where the file's rank, alpha or rsLoRA replaced the layers', one sentence for all alike.
        dropped: keys of adapter_config.json that nobody knows, ignored with a warning.
        base_model_name_or_path: what the file says about its base model.
    """

    directory: str
    layers: tuple[str, ...]
    changes: tuple[str, ...]
    dropped: tuple[str, ...]
    base_model_name_or_path: str | None

    def __str__(self) -> str:
        return "\n".join([f"{self.directory}: {counted(len(self.layers), 'layer')} loaded", *self.changes])


def save_adapter(
    model: Module, directory: StrPath | files.Directory, base_model_name_or_path: str | None = None
) -> None:
    """Write the factors of every LoRA layer, and every layer trained whole, as a PEFT adapter directory.

    The directory is made if needed. Both files are complete on the disk before either takes its name, so a
    full or unwritable disk leaves an older adapter as it was. `load_adapter` finds either the old adapter or
    the new one, also while the files are replaced and after a crash. The files keep the permissions of those
    that they replace. Temporary files that a crash left there are removed.

    Layers of init="pissa" or "olora" are written as plain LoRA of twice the rank for the weight that they
    were given, as PEFT's `path_initial_model_for_weight_conversion` does.

    Args:
        base_model_name_or_path: what the adapter says about the model that it belongs to.
    Raises:
        ValueError: there is no LoRA layer, a value is NaN or infinite, or PEFT's format cannot say it: layers
            that differ in rsLoRA or DoRA, or a name that PEFT would take for another one too.
        OSError: the disk refuses; how many bytes were needed is in the message.
    """
    layers, whole = _adapted("save_adapter", model)
    plain = {name: layer.plain_update() for name, layer in layers.items()}
    config = _config(model, layers, whole, plain, base_model_name_or_path)
    tensors = {}
    arrays = {name: {"A": a, "B": b, "m": layers[name].m} for name, (a, b, _) in plain.items()}
    for name, place in _places(
        layers, whole, arrays, {name: len(b) for name, (_, b, _) in plain.items()}
    ).items():
        if not np.isfinite(place.array).all():
            raise ValueError(f"save_adapter: {place.title} holds NaN or an infinity")
        tensors[name] = place.to_file()
    peft_adapter.save(directory, config, tensors, model.base_digest())


def load_adapter(
    model: Module, directory: StrPath, edited_config: bool = False, any_base: bool = False
) -> AdapterReport:
    """Read a PEFT adapter directory into the LoRA layers of a model.

    The rank, alpha and rsLoRA of the file win over the layer. Where the rank differs, A and B are new arrays,
    so an optimiser that holds the old ones must be made anew; otherwise the live arrays are written. Every
    layer must be in the file and every tensor of the file in the model. Everything is checked before anything
    changes, sizes before anything is read.

    Args:
        edited_config: take an adapter_config.json that is not the one that `save_adapter` wrote with the
            tensors, because it was edited on purpose. Saving the adapter again makes the two a pair.
        any_base: take an adapter that was saved from another language model of these shapes, as its digest
            of the model's norms tells. Adapters without one are taken in any case.
    Returns:
        what was loaded, and which settings changed.
    Raises:
        FormatError: a file breaks its format or does not fit the model, all that does not fit is listed; or
            it is of another model.
        CorruptError: adapter_config.json was edited after `save_adapter` wrote it.
        UnsafeError: the weights are a pickle (adapter_model.bin), or the configuration could run or hang.
        RuntimeError: a layer is merged.
        ValueError: the model has no LoRA layer.
        OSError: a file cannot be read.
    Warns:
        UserWarning: adapter_config.json has keys that nobody knows.
    """
    _loadable(model)  # before anything is read
    with peft_adapter.reading(directory) as adapter:
        return load_opened(model, adapter, edited_config, any_base)


def load_opened(
    model: Module, adapter: PeftAdapter, edited_config: bool = False, any_base: bool = False
) -> AdapterReport:
    """As `load_adapter`, from a directory that is open."""
    layers, whole = _loadable(model)
    config, tensors = adapter.config, adapter.tensors
    settings = {name: _Settings(config.rank(name), float(config.alpha(name))) for name in layers}
    live = {name: {"A": layer.A, "B": layer.B, "m": layer.m} for name, layer in layers.items()}
    places = _places(layers, whole, live, {name: setting.rank for name, setting in settings.items()})
    values: dict[str, Array] = {}
    problems = _dora_problems(layers, config) + _name_problems(model, places, tensors)
    for name in places:
        if name in tensors:
            values[name], found = _fit(name, tensors, places[name])
            problems += found
    if not (problems or any_base):
        adapter.require_base(model.base_digest())
    if problems:
        raise FormatError(f"{adapter.directory}: the adapter does not fit the model {in_places(problems)}")
    if not edited_config:
        adapter.require_pair()

    changes = _changes(layers, settings, config)
    commits = _prepare(layers, config, settings, places, values)
    if config.unknown:
        keys = ", ".join(map(brief, config.unknown))
        warnings.warn(f"{Path(adapter.directory, CONFIG)}: unknown keys are ignored: {keys}", stacklevel=3)
    for commit in commits:
        commit()
    loaded = tuple(dict.fromkeys(place.module for place in places.values()))
    return AdapterReport(adapter.directory, loaded, changes, config.unknown, config.base_model_name_or_path)


def _loadable(model: Module) -> tuple[dict[str, LoRALayer], dict[str, Module]]:
    """As `_adapted`, if nothing is merged."""
    layers, whole = _adapted("load_adapter", model)
    for layer in layers.values():
        layer.require_unmerged("load_adapter")
    return layers, whole


def _adapted(op: str, model: Module) -> tuple[dict[str, LoRALayer], dict[str, Module]]:
    """The LoRA layers and the layers that are trained whole, by name."""
    layers, whole = {}, {}
    for name, module in model.named_modules():
        if isinstance(module, LoRALayer):
            layers[name] = module
        elif module.local_parameters():
            whole[name] = module
    if not layers:
        way = ": add_lora() first, or load both with finetuning.load_with_adapter"
        raise ValueError(f"{op}: the model has no LoRA layer{way if hasattr(model, 'add_lora') else ''}")
    if "" in layers or "" in whole:
        kind = type(model).__name__
        raise ValueError(
            f"{op}: the model is itself a {kind}, and PEFT names layers in a model: use Sequential"
        )
    return layers, whole


def _places(
    layers: dict[str, LoRALayer],
    whole: dict[str, Module],
    arrays: dict[str, dict[str, Array | None]],
    ranks: dict[str, int],
) -> dict[str, _Place]:
    """Every tensor that a file of these ranks must hold for this model, by its name in the file."""
    places = {}
    for name, layer in layers.items():
        for key in EMBEDDING_KEYS if isinstance(layer, LoRAEmbedding) else LINEAR_KEYS:
            array = arrays[name].get(key.ours)
            if array is not None:
                shape = {"A": (len(array), ranks[name]), "B": (ranks[name], array.shape[-1])}
                row_order = None if key.ours == "B" else layer.row_order
                places[PREFIX + name + key.suffix] = _Place(
                    name, key, array, shape.get(key.ours, array.shape), row_order
                )
    for name, module in whole.items():
        for parameter in module.local_parameters():
            key = Key(parameter.name, "." + parameter.name)
            places[PREFIX + name + key.suffix] = _Place(name, key, parameter.value, parameter.value.shape)
    return places


# ---- writing ----


def _config(
    model: Module,
    layers: dict[str, LoRALayer],
    whole: dict[str, Module],
    plain: dict[str, tuple[Array, Array, float]],
    base: str | None,
) -> PeftConfig:
    others = [name for name, _ in model.named_modules() if name not in layers]
    for name in whole:
        _require_unmistakable(name, [*layers, *(other for other in others if other != name)])
    ranks = {name: len(b) for name, (_, b, _) in plain.items()}
    alphas = {name: short_number(alpha) for name, (_, _, alpha) in plain.items()}
    rank, alpha = _most_common(ranks.values()), _most_common(alphas.values())
    return PeftConfig(
        r=rank,
        lora_alpha=alpha,
        target_modules=_targets(list(layers), others),
        modules_to_save=tuple(whole),
        use_rslora=_common("use_rslora", layers),
        use_dora=_common("use_dora", layers),
        rank_pattern=Patterns.exact({name: value for name, value in ranks.items() if value != rank}),
        alpha_pattern=Patterns.exact({name: value for name, value in alphas.items() if value != alpha}),
        lora_dropout=_most_common(layer.dropout for layer in layers.values()),
        base_model_name_or_path=base,
        task_type=model.task_type,
    )


def _targets(names: list[str], others: list[str]) -> tuple[str, ...] | str:
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


def _common(setting: str, layers: dict[str, LoRALayer]) -> bool:
    """A setting that PEFT has once for the whole adapter."""
    values = {name: bool(getattr(layer, setting)) for name, layer in layers.items()}
    if len(set(values.values())) > 1:
        found = ", ".join(f"{name} {value}" for name, value in values.items())
        raise ValueError(
            f"save_adapter: PEFT's format has one {setting} for all layers, the model has {found}"
        )
    return next(iter(values.values()))


def _most_common(values: Iterable[T]) -> T:
    return Counter(values).most_common(1)[0][0]


# ---- reading ----


@dataclass(frozen=True)
class _Settings:
    """What the file's configuration says of one layer."""

    rank: int
    alpha: float


def _dora_problems(layers: dict[str, LoRALayer], config: PeftConfig) -> list[str]:
    return [
        f"{name}: use_dora is {config.use_dora} in the file and {layer.use_dora} in the layer"
        for name, layer in layers.items()
        if layer.use_dora != config.use_dora
    ]


def _name_problems(model: Module, places: dict[str, _Place], tensors: SafetensorsFile) -> list[str]:
    problems = [
        f"{place.title}: tensor {name!r} of shape {_file_shape(place)} is missing in the file"
        for name, place in places.items()
        if name not in tensors
    ]
    modules = dict(model.named_modules())
    unknown = [name for name in tensors if name not in places]
    return problems + [
        f"tensor {brief(name, 200)}: {_why_unknown(name, modules, position < _MOST_SUGGESTIONS)}"
        for position, name in enumerate(unknown)
    ]


def _why_unknown(name: str, modules: dict[str, Module], suggest: bool) -> str:
    if not name.startswith(PREFIX):
        return f"expected a name that begins with {PREFIX!r}"
    target = name.removeprefix(PREFIX)
    suffix = next(
        (suffix for suffix in _SUFFIXES if target.endswith(suffix)), "." + target.rpartition(".")[2]
    )
    target = target.removesuffix(suffix)
    if target in modules:
        return f"the model's {target!r} is a {type(modules[target]).__name__} that has no place for it"
    near = nearest_names(target, filter(None, modules)) if suggest else []
    return f"the model has no {brief(target)}" + (
        f", the nearest names: {', '.join(map(repr, near))}" if near else ""
    )


def _fit(name: str, tensors: SafetensorsFile, place: _Place) -> tuple[Array, list[str]]:
    """The tensor as the layer holds it, and what is wrong with it; unread unless it has its place's shape."""
    where, entry = f"{place.title}: tensor {name!r}", tensors.entries[name]
    if entry.shape != _file_shape(place):
        return place.array, [f"{where} has shape {entry.shape}, expected {_file_shape(place)}"]
    if entry.dtype not in ("float32", "float16", "bfloat16", "float64"):
        return place.array, [f"{where} is {entry.dtype}, expected floats"]
    array = tensors[name].array
    if entry.dtype == "bfloat16":
        array = bfloat16.widen(array)
    with np.errstate(over="ignore"):
        value = place.from_file(array)
    if not np.isfinite(value).all():
        return value, [f"{where} holds NaN or an infinity"]
    return value, []


def _file_shape(place: _Place) -> tuple[int, ...]:
    return place.shape[::-1] if place.key.transposed else place.shape


def _changes(
    layers: dict[str, LoRALayer], settings: dict[str, _Settings], config: PeftConfig
) -> tuple[str, ...]:
    changed: dict[str, list[str]] = {}
    for name, layer in layers.items():
        pairs = (
            ("rank", layer.rank, settings[name].rank),
            ("alpha", short_number(layer.alpha), short_number(settings[name].alpha)),
            ("use_rslora", layer.use_rslora, config.use_rslora),
        )
        change = ", ".join(f"{setting} {old} -> {new}" for setting, old, new in pairs if old != new)
        changed.setdefault(change, []).append(name)
    changed.pop("", None)
    return tuple(
        f"{names[0]}{f' and {len(names) - 1:,} more' * (len(names) > 1)}: {change}"
        for change, names in changed.items()
    )


# ---- putting in place ----


def _prepare(
    layers: dict[str, LoRALayer],
    config: PeftConfig,
    settings: dict[str, _Settings],
    places: dict[str, _Place],
    values: dict[str, Array],
) -> list[Commit]:
    """What remains to be done, as functions that allocate no arrays and cannot fail."""
    commits: list[Commit] = []
    factors: dict[str, dict[str, Array]] = {name: {} for name in layers}
    for name, place in places.items():
        if place.module in factors:
            factors[place.module][place.key.ours] = values[name]
        else:
            commits.append(partial(np.copyto, place.array, values[name]))
    for name, layer in layers.items():
        commits.append(layer.prepare_adopt(factors[name], settings[name].alpha, config.use_rslora))
    return commits
