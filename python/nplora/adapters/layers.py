"""Adapters and the LoRA layers of models: taken from them, loaded into them, put on plain layers."""

import contextlib
import itertools
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nplora.adapters import peft_files
from nplora.adapters.content import AdapterContent
from nplora.adapters.fitting import Place, Target
from nplora.formats import files, peft_adapter
from nplora.formats.errors import brief, counted, nearest_names
from nplora.formats.files import StrPath
from nplora.formats.peft_config import short_number
from nplora.lora.delta import LoraDelta
from nplora.nn import Embedding, Linear, LoRAEmbedding, LoRALayer, LoRALinear
from nplora.nn.module import Module, layer_stream
from nplora.weights import FrozenWeight, buffers

Array = NDArray[Any]

_MOST_SUGGESTIONS = 10  # unknown names for which the nearest ones are looked up


# ---- from a model ----


def save_adapter(
    model: Module, directory: StrPath | files.Directory, base_model_name_or_path: str | None = None
) -> None:
    """Write the factors of every LoRA layer, and every layer trained whole, as a PEFT adapter directory.

    The directory is made if needed. `load_adapter` finds either the old adapter or the new one, also while
    the files are replaced, after a crash, and on a full disk. New files keep the permissions of those that
    they replace. Layers of init="pissa" or "olora" are written as plain LoRA of twice the rank for the weight
    that they were given, as PEFT's `path_initial_model_for_weight_conversion` does.

    Args:
        base_model_name_or_path: what the adapter says about the model that it belongs to.
    Raises:
        ValueError: there is no LoRA layer, a value is NaN or infinite, or PEFT's format cannot say it: layers
            that differ in rsLoRA or DoRA, or a name that PEFT would take for another one too.
        FileExistsError: the directory holds a model. OSError: the disk refuses.
    """
    adapter = from_model(model, "save_adapter")
    adapter.base_model_name_or_path = base_model_name_or_path
    peft_files.save(adapter, directory)


def from_model(model: Module, op: str) -> AdapterContent:
    """A model's adapter, with the arrays of `LoRALayer.plain_update`."""
    layers, whole = _trained(op, model)
    return AdapterContent(
        type(model).__name__,
        {name: layer.plain_update() for name, layer in layers.items()},
        task_type=model.task_type,
        base_digest=model.base_digest(),
        modules_to_save=whole,
        dropout=Counter(layer.dropout for layer in layers.values()).most_common(1)[0][0],
        neighbours=tuple(name for name, _ in model.named_modules() if name not in layers),
    )


def _trained(op: str, model: Module) -> tuple[dict[str, LoRALayer], dict[str, dict[str, Array]]]:
    """The LoRA layers, and the arrays of the layers that are trained whole, by name."""
    layers, whole = dict[str, LoRALayer](), dict[str, dict[str, Array]]()
    for name, module in model.named_modules():
        if isinstance(module, LoRALayer):
            layers[name] = module
        elif parameters := module.local_parameters():
            whole[name] = {parameter.name: parameter.value for parameter in parameters}
    kind = type(model).__name__
    if not layers:
        way = ": add_lora() first, or load both with finetuning.load_with_adapter"
        raise ValueError(f"{op}: the {kind} has no LoRA layer{way if hasattr(model, 'add_lora') else ''}")
    if "" in layers or "" in whole:
        raise ValueError(
            f"{op}: the model is itself a {kind}, and PEFT names layers in a model: use Sequential"
        )
    return layers, whole


# ---- into the LoRA layers that a model has ----


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


def load_adapter(
    model: Module, directory: StrPath, edited_config: bool = False, any_base: bool = False
) -> AdapterReport:
    """Read a PEFT adapter directory into the LoRA layers of a model.

    The rank, alpha and rsLoRA of the file win over the layer. Where the rank differs, A and B are new arrays,
    so an optimiser that holds the old ones must be made anew; otherwise the live arrays are written. The file
    and the model must have the same layers: `Adapter.attach` with `replace=True` takes an adapter of others.
    Everything is checked before anything changes, sizes before anything is read. The arguments and errors are
    those that `nplora.adapters` describes.

    Returns:
        what was loaded, and which settings changed.
    Raises:
        RuntimeError: a layer is merged. ValueError: the model has no LoRA layer, or one that began as "pissa"
            or "olora".
    Warns:
        UserWarning: adapter_config.json has keys that nobody knows.
    """
    layers, whole = _trained("load_adapter", model)
    for layer in layers.values():
        layer.require_unmerged("load_adapter")
    target = _target(model, live=True, required=[*layers, *whole], whole=whole)
    adapter = peft_files.read(directory, target, edited_config, any_base)
    changes = _changes(layers, adapter)
    commits = [layer.prepare_adopt(adapter[name]) for name, layer in layers.items()]
    for name, parameters in adapter.modules_to_save.items():
        commits += [partial(np.copyto, whole[name][key], value) for key, value in parameters.items()]
    _warn_of_unknown(adapter)
    for commit in commits:
        commit()
    base = adapter.base_model_name_or_path
    return AdapterReport(adapter.source, (*layers, *whole), changes, adapter.unknown, base)


def _changes(layers: Mapping[str, LoRALayer], adapter: AdapterContent) -> tuple[str, ...]:
    changed: dict[str, list[str]] = {}
    for name, layer in layers.items():
        delta = adapter[name]
        pairs = (
            ("rank", layer.rank, delta.rank),
            ("alpha", short_number(layer.alpha), short_number(delta.stated_alpha)),
            ("use_rslora", layer.use_rslora, delta.use_rslora),
        )
        change = ", ".join(f"{setting} {old} -> {new}" for setting, old, new in pairs if old != new)
        changed.setdefault(change, []).append(name)
    changed.pop("", None)
    return tuple(
        f"{names[0]}{f' and {len(names) - 1:,} more' * (len(names) > 1)}: {change}"
        for change, names in changed.items()
    )


def _warn_of_unknown(adapter: AdapterContent) -> None:
    if adapter.unknown:
        keys = ", ".join(map(brief, adapter.unknown))
        config = Path(adapter.source, peft_adapter.CONFIG)
        warnings.warn(f"{config}: unknown keys are ignored: {keys}", stacklevel=3)


# ---- new LoRA layers ----


def require_no_adapter(model: Module) -> None:
    """Raise ValueError if a model has LoRA layers."""
    if on := len(model.adapter_layers()):
        raise ValueError(
            f"attach_adapter: the model has an adapter already, on {counted(on, 'layer')}; "
            "replace=True drops it"
        )


def attach(adapter: AdapterContent, model: Module, any_base: bool, replace: bool) -> None:
    """As `Adapter.attach`."""
    if not replace:
        require_no_adapter(model)
    plain = dict[int, Module]()
    for layer in model.adapter_layers().values():
        layer.require_unmerged("attach")
        plain[id(layer)] = layer.frozen()
    modules = dict(model.named_modules())
    made = new_layers(adapter, model, any_base)
    model.exchange({**plain, **{id(modules[name]): layer for name, layer in made.items()}})


def new_layers(adapter: AdapterContent, model: Module, any_base: bool = False) -> dict[str, LoRALayer]:
    """LoRA layers of an adapter over the frozen weights of a model, which is left as it is.

    Raises:
        FormatError: the adapter does not fit the model, or is of another one.
    """
    adapter.require_low_rank()
    plain_target(model).check(adapter, any_base)
    modules: dict[str, Any] = dict(model.named_modules())
    sizes = [4 * factor.size for delta in adapter.values() for factor in (delta.A, delta.B)]
    made = dict[str, LoRALayer]()
    with buffers.side_by_side(*sizes):
        for name, delta in adapter.items():
            layer = made[name] = _new_layer(modules[name], delta)
            layer.row_order = model.stored_row_order(name)
            layer.restart_dropout(layer_stream(0, name))
            layer.prepare_adopt(delta)()
    _warn_of_unknown(adapter)
    return made


def _new_layer(layer: Linear | Embedding | LoRALayer, delta: LoraDelta) -> LoRALayer:
    """A LoRA layer of an update's settings over a layer's frozen weight."""
    settings: dict[str, Any] = {"use_rslora": delta.use_rslora, "rng": 0}
    if isinstance(layer, Embedding | LoRAEmbedding):
        return LoRAEmbedding(layer.weight, delta.rank, delta.stated_alpha, **settings)
    assert isinstance(layer, Linear | LoRALinear)
    settings["use_dora"] = delta.use_dora
    return LoRALinear(layer.weight, delta.rank, delta.stated_alpha, layer.bias, **settings)


@contextlib.contextmanager
def rollback_on_error(model: Module) -> Iterator[None]:
    """Put back the layers that the body exchanged, if it fails."""
    before = dict(model.named_modules())
    try:
        yield
    except BaseException:
        now = dict(model.named_modules())
        changed = [name for name in before.keys() & now.keys() if before[name] is not now[name]]
        model.exchange({id(now[name]): before[name] for name in changed})
        raise


# ---- what fits ----


def plain_target(model: Module) -> Target:
    """A model's layers that an adapter can be put on."""
    return _target(model, live=False, whole={})


def _target(model: Module, live: bool, **more: Any) -> Target:
    """A model's LoRA layers, whose arrays are written, or (not live) all layers that can become one."""
    modules, asked = dict(model.named_modules()), itertools.count()

    def place(layer: str, shape: tuple[int, ...]) -> Place | str:
        module = modules.get(layer)
        if module is None:
            near = nearest_names(layer, filter(None, modules)) if next(asked) < _MOST_SUGGESTIONS else []
            words = f", the nearest names: {', '.join(map(repr, near))}" if near else ""
            return f"the model has no such layer{words}"
        if not isinstance(module, LoRALayer if live else Linear | Embedding | LoRALayer):
            wanted = "a LoRA layer" if live else "a linear layer or an embedding"
            return f"the model has a {type(module).__name__} there, expected {wanted}"
        if isinstance(module, Linear | Embedding) and module.trainable:
            return "the model's layer is trained whole"
        assert isinstance(module.weight, FrozenWeight)
        embedding = isinstance(module, Embedding | LoRAEmbedding)
        use_dora = False if embedding else None  # any, of a new layer
        if live and isinstance(module, LoRALayer):
            use_dora = module.use_dora
        return Place(
            "the model's layer", module.weight.shape, embedding, use_dora, module.weight.compute_dtype
        )

    return Target("the model", place, model.base_digest(), **more)
