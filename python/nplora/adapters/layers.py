"""Adapters and the LoRA layers of models: taken from them, loaded into them, put on plain layers."""

import contextlib
import dataclasses
import os
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nplora.adapters import gguf_files, peft_files
from nplora.adapters.adapter import Adapter
from nplora.adapters.fitting import Place, Target
from nplora.formats import files, peft_adapter
from nplora.formats.errors import brief, counted, nearest_names
from nplora.formats.files import StrPath
from nplora.formats.peft_config import short_number
from nplora.lora.delta import LoraDelta
from nplora.nn import Embedding, Linear, LoRAEmbedding, LoRALayer, LoRALinear
from nplora.nn.module import Commit, Module, layer_stream
from nplora.weights import buffers

Array = NDArray[Any]

_MOST_SUGGESTIONS = 10  # unknown names for which the nearest ones are looked up


# ---- from a model ----


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
    adapter = from_model(model, "save_adapter")
    adapter.base_model_name_or_path = base_model_name_or_path
    peft_files.save(adapter, directory)


def from_model(model: Module, op: str) -> Adapter:
    """A model's adapter. Its arrays are the live ones, unless their rows are in another order there."""
    layers, whole = _trained(op, model)
    deltas = dict[str, LoraDelta]()
    for name, layer in layers.items():
        a, b, alpha = layer.plain_update()
        delta = LoraDelta.of_alpha(a, b, alpha, layer.use_rslora, layer.m, isinstance(layer, LoRAEmbedding))
        # row order[i] of the adapter is row i of the layer
        deltas[name] = delta if layer.row_order is None else delta.rows(np.argsort(layer.row_order))
    return Adapter(
        type(model).__name__,
        deltas,
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
    layers, whole = _trained("load_adapter", model)
    for layer in layers.values():
        layer.require_unmerged("load_adapter")
    target = Target(
        "the model",
        partial(_place_in, dict(model.named_modules()), LoRALayer, Counter()),
        model.base_digest(),
        required=[*layers, *whole],
        whole=whole,
    )
    adapter = peft_files.read(directory, target, edited_config, any_base)
    changes = _changes(layers, adapter)
    commits = [_adopting(layer, adapter[name]) for name, layer in layers.items()]
    for name, parameters in adapter.modules_to_save.items():
        commits += [partial(np.copyto, whole[name][key], value) for key, value in parameters.items()]
    _warn_of_unknown(adapter)
    for commit in commits:
        commit()
    return AdapterReport(
        adapter.source,
        (*layers, *whole),
        changes,
        adapter.unknown,
        adapter.base_model_name_or_path,
    )


def _warn_of_unknown(adapter: Adapter) -> None:
    if adapter.unknown:
        keys = ", ".join(map(brief, adapter.unknown))
        config = Path(adapter.source, peft_adapter.CONFIG)
        warnings.warn(f"{config}: unknown keys are ignored: {keys}", stacklevel=3)


def _adopting(layer: LoRALayer, delta: LoraDelta) -> Commit:
    """Get a layer ready to take an update over; what is returned allocates no arrays and cannot fail."""
    delta = delta.rows(layer.row_order)
    factors = {"A": delta.A, "B": delta.B, **({} if delta.m is None else {"m": delta.m})}
    return layer.prepare_adopt(factors, delta.stated_alpha, delta.use_rslora)


def _changes(layers: Mapping[str, LoRALayer], adapter: Adapter) -> tuple[str, ...]:
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


# ---- onto plain layers ----


def plain_target(model: Module) -> Target:
    """A model's layers that an adapter can be put on."""
    place = partial(_place_in, dict(model.named_modules()), (Linear, Embedding, LoRALayer), Counter())
    return Target("the model", place, model.base_digest(), whole={})


def read_for(model: Module, path: StrPath, base: StrPath, any_base: bool = False) -> Adapter:
    """Read a file's adapter for a model's layers: of PEFT, no tensor is read before its shape fits.

    Args:
        base: the model's file or directory, which llama.cpp's adapters may need.
    Raises:
        as `attach_adapter`.
    """
    if os.path.isfile(path):
        return gguf_files.read(path, base, any_base)[0]
    return peft_files.read(path, plain_target(model), any_base=any_base)


def attach(adapter: Adapter, model: Module, any_base: bool = False) -> None:
    """As `Adapter.attach`."""
    if on := len(model.adapter_layers()):
        raise ValueError(f"attach_adapter: the model has an adapter already, on {counted(on, 'layer')}")
    made = new_layers(adapter, model, any_base)
    plain = dict(model.named_modules())
    model.exchange({id(plain[name]): layer for name, layer in made.items()})


def new_layers(adapter: Adapter, model: Module, any_base: bool = False) -> dict[str, LoRALayer]:
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
            _adopting(layer, delta)()
    _warn_of_unknown(adapter)
    return made


def _new_layer(layer: Linear | Embedding | LoRALayer, delta: LoraDelta) -> LoRALayer:
    """A LoRA layer of an update's settings over a layer's frozen weight."""
    if isinstance(layer, Embedding | LoRAEmbedding):
        return LoRAEmbedding(layer.weight, delta.rank, delta.stated_alpha, use_rslora=delta.use_rslora, rng=0)
    assert isinstance(layer, Linear | LoRALinear)
    return LoRALinear(
        layer.weight,
        delta.rank,
        delta.stated_alpha,
        layer.bias,
        use_rslora=delta.use_rslora,
        use_dora=delta.use_dora,
        rng=0,
    )


@contextlib.contextmanager
def rollback_on_error(model: Module) -> Iterator[None]:
    """Take the adapters that the body puts on a model off again where it fails."""
    before = dict(model.named_modules())
    try:
        yield
    except BaseException:
        now = dict(model.named_modules())
        added = {
            id(now[name]): before[name] for name in model.adapter_layers() if now[name] is not before[name]
        }
        model.exchange(added)
        raise


def _place_in(
    modules: Mapping[str, Module],
    kinds: type | tuple[type, ...],
    unknown: Counter[str],
    layer: str,
    shape: tuple[int, ...],
) -> Place | str:
    """A layer's place among a model's modules, or why it has none. `unknown` counts what was not found."""
    module = modules.get(layer)
    if module is None:
        unknown["layers"] += 1
        near = nearest_names(layer, filter(None, modules)) if unknown["layers"] <= _MOST_SUGGESTIONS else []
        return "the model has no such layer" + (
            f", the nearest names: {', '.join(map(repr, near))}" if near else ""
        )
    if not isinstance(module, kinds):
        return f"the model's is a {type(module).__name__}, which has no place for it"
    assert isinstance(module, Linear | Embedding | LoRALayer)
    place = Place("the model's layer", module.weight.shape, isinstance(module, Embedding | LoRAEmbedding))
    if isinstance(module, LoRALayer) and kinds is LoRALayer:  # whose arrays are written
        return dataclasses.replace(place, use_dora=module.use_dora, dtype=module.A.dtype)
    return place
