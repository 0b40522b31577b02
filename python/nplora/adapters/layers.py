"""Saves a model's LoRA layers as an adapter, loads an adapter into a model, and makes new LoRA layers."""

import contextlib
import itertools
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nplora.adapters import peft_files
from nplora.adapters.content import AdapterContent
from nplora.adapters.fitting import Place, Target
from nplora.adapters.trained_rows import TokenRows, trained_layers
from nplora.formats import files, peft_adapter
from nplora.formats.errors import FormatError, UnsupportedError, brief, counted, nearest_names
from nplora.formats.files import StrPath
from nplora.formats.peft_config import short_number
from nplora.formats.tokenizer_json import AddedToken
from nplora.lora.delta import LoraDelta
from nplora.nn import (
    Conv2d,
    Embedding,
    Linear,
    LoRAConv2d,
    LoRAEmbedding,
    LoRALayer,
    LoRALinear,
    TrainedEmbedding,
    TrainedHead,
    TrainedRowsLayer,
)
from nplora.nn.module import AdapterLayer, Module, layer_stream
from nplora.runtime.user_warning import warn_user
from nplora.weights import FrozenWeight, buffers

Array = NDArray[Any]

_MOST_SUGGESTIONS = 10  # unknown layer names for which a message suggests similar names


# ---- from a model ----


def save_adapter(
    model: Module,
    directory: StrPath | files.Directory,
    base_model_name_or_path: str | None = None,
    *,
    chat_template: bool | None = None,
) -> None:
    """Save a model's LoRA layers, trained tokens and fully trained layers as a PEFT adapter directory.

    The directory is created if needed. The files are replaced in one step: a reader finds the complete old
    adapter or the complete new one, even during the save, after a crash, and on a full disk. New files keep
    the permissions of the files they replace. A layer with init="pissa" or "olora" is saved as plain LoRA for
    its original weight, with twice the rank. PEFT's `path_initial_model_for_weight_conversion` does the same.

    Args:
        base_model_name_or_path: the name of the base model, to be stored with the adapter.
        chat_template: whether the training data were formatted with the model's chat template; None: not
            known. This argument is stored with the adapter. `nplora generate` prints a warning if training
            and generation differ in their use of the chat template.
    Raises:
        TypeError: `model` is not a `Module`, for example because the two arguments are swapped.
        ValueError: the model has no LoRA layer, or a value is NaN or infinite. Or PEFT's format cannot
            express the adapter, because layers differ in rsLoRA or DoRA, or because PEFT would apply the name
            of one layer to another layer too.
        FileExistsError: the directory holds a model.
        OSError: a file cannot be written.

    >>> model = nplora.Sequential(nplora.LoRALinear(np.eye(4, dtype=np.float32), rank=2, rng=0))
    >>> nplora.save_adapter(model, "adapter")
    >>> sorted(os.listdir("adapter"))
    ['adapter_config.json', 'adapter_model.safetensors']
    """
    adapter = from_model(model, "save_adapter")
    adapter.base_model_name_or_path = base_model_name_or_path
    adapter.chat_template = chat_template
    peft_files.save(adapter, directory)


def from_model(model: Module, op: str) -> AdapterContent:
    """Return the adapter of a model's LoRA layers, with the factors that `LoRALayer.plain_update` returns."""
    layers, whole = _trained(op, model)
    return AdapterContent(
        type(model).__name__,
        {name: layer.plain_update() for name, layer in layers.items()},
        task_type=model.task_type,
        base_digest=model.base_digest(),
        modules_to_save=whole,
        saved_names=model.saved_names,
        labels=model.label_record,
        token_rows=_token_rows(model),
        invocation_tokens=next(layer.invocation_tokens for layer in layers.values()),
        is_tied=any(layer.is_tied and layer.is_whole for layer in _trained_rows(model).values()),
        added_tokens=_added_tokens(model),
        tokenizer_files=model.tokenizer_files(),
        dropout=Counter(layer.dropout for layer in layers.values()).most_common(1)[0][0],
        neighbours=tuple(name for name, _ in model.named_modules() if name not in layers),
    )


def _trained(op: str, model: Module) -> tuple[dict[str, LoRALayer], dict[str, dict[str, Array]]]:
    """Two dicts: the LoRA layers by name, and the arrays of fully trained layers by layer and parameter."""
    if not isinstance(model, Module):
        raise TypeError(
            f"{op}: model is {brief(model)}, expected a model; pass the model first, then the directory"
        )
    layers, whole = dict[str, LoRALayer](), dict[str, dict[str, Array]]()
    for name, module in model.named_modules():
        if isinstance(module, LoRALayer):
            layers[name] = module
        elif isinstance(module, TrainedRowsLayer):
            if module.is_whole:
                whole[name] = {"weight": module.rows.value}  # even if two layers share this array
        elif parameters := module.local_parameters():
            whole[name] = {parameter.name: parameter.value for parameter in parameters}
    kind = type(model).__name__
    if not layers:
        hint = ": call add_lora() first, or load the model with finetuning.load_with_adapter"
        raise ValueError(f"{op}: the {kind} has no LoRA layer{hint if hasattr(model, 'add_lora') else ''}")
    if "" in layers or "" in whole:
        raise ValueError(
            f"{op}: the model is a single {kind}, which has no name for PEFT's format; put it in a Sequential"
        )
    return layers, whole


def _trained_rows(model: Module) -> dict[str, TrainedRowsLayer]:
    return {name: m for name, m in model.named_modules() if isinstance(m, TrainedRowsLayer)}


def _added_tokens(model: Module) -> tuple[AddedToken, ...]:
    return next((layer.rows.tokens for layer in _trained_rows(model).values()), ())


def _token_rows(model: Module) -> dict[str, TokenRows]:
    """The trained rows of each layer that trains only some rows.

    A head that shares the embedding's rows has no entry in the result.
    """
    return {
        name: TokenRows(layer.rows.ids, layer.rows.value)
        for name, layer in _trained_rows(model).items()
        if layer.rows.ids is not None and not layer.is_tied
    }


# ---- into the LoRA layers that a model has ----


@dataclass(frozen=True)
class AdapterReport:
    """A report about the adapter that `load_adapter` loaded.

    Attributes:
        directory: the adapter's directory.
        layers: the names of the layers that were loaded.
        changes: lines about layers whose rank, alpha or rsLoRA setting has changed. Layers with the same
            change share a line.
        dropped: unknown keys of adapter_config.json, which are ignored with a warning.
        base_model_name_or_path: the name of the base model in adapter_config.json, or None.

    >>> model = nplora.Sequential(nplora.LoRALinear(np.eye(4, dtype=np.float32), rank=2, rng=0))
    >>> nplora.save_adapter(model, "mine", base_model_name_or_path="eye")
    >>> report = nplora.load_adapter(model, "mine")
    >>> report.layers, report.changes, report.base_model_name_or_path
    (('0',), (), 'eye')
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
    """Load a PEFT adapter directory into the LoRA layers of a model.

    The layers get the rank, alpha and rsLoRA setting of the file. If a layer's rank stays the same, the
    values are written into its arrays A and B. If the rank changes, A and B become new arrays, and an
    optimiser that holds the old arrays must be created anew. The model must have LoRA on the same layers as
    the file. If these layers differ, use `Adapter.attach` with `replace=True`. The model only changes after
    all checks have passed. The sizes of tensors are checked before the tensors are read. See
    `nplora.adapters` for the arguments and the other errors.

    Returns:
        the loaded layers and the changed settings.
    Raises:
        RuntimeError: the update of a layer is merged into the layer's weight.
        TypeError: `model` is not a `Module`, for example because the two arguments are swapped.
        ValueError: the model has no LoRA layer, or a layer was made with init="pissa" or "olora".
    Warns:
        UserWarning: adapter_config.json has unknown keys, or the file has copies of the base model's weights.

    >>> small = nplora.Sequential(nplora.LoRALinear(np.eye(4, dtype=np.float32), rank=1, rng=0))
    >>> nplora.save_adapter(small, "adapter")
    >>> model = nplora.Sequential(nplora.LoRALinear(np.eye(4, dtype=np.float32), rank=2, rng=0))
    >>> print(nplora.load_adapter(model, "adapter"))
    adapter: 1 layer loaded
    0: rank 2 -> 1
    """
    (layers, whole), tokens = _trained("load_adapter", model), _token_rows(model)
    for layer in model.adapter_layers().values():
        layer.require_unmerged("load_adapter")
    target = _target(model, live=True, required=[*layers, *whole, *tokens], whole=whole)
    adapter = peft_files.read(directory, target, edited_config, any_base)
    _require_same_tokens(adapter, tokens)
    _require_same_texts(adapter, model)
    require_plain_invocation(adapter, model)
    changes = _changes(layers, adapter)
    commits = [layer.prepare_adopt(adapter[name]) for name, layer in layers.items()]
    for name, parameters in adapter.modules_to_save.items():
        commits += [partial(np.copyto, whole[name][key], value) for key, value in parameters.items()]
    for name, rows in adapter.token_rows.items():
        commits.append(partial(np.copyto, tokens[name].values, rows.values))
    _warn_of_unknown(adapter)
    for commit in commits:
        commit()
    for lora in layers.values():
        lora.invocation_tokens = adapter.invocation_tokens
    base = adapter.base_model_name_or_path
    return AdapterReport(adapter.source, (*layers, *whole, *tokens), changes, adapter.unknown, base)


def _require_same_tokens(adapter: AdapterContent, tokens: Mapping[str, TokenRows]) -> None:
    """Raise FormatError if the trained tokens of an adapter differ from the model's trained tokens."""
    for name, rows in adapter.token_rows.items():
        if not np.array_equal(rows.ids, tokens[name].ids):
            raise FormatError(
                f"{adapter.source}: {brief(name)}: the adapter trains the tokens {brief(rows.ids.tolist())}, "
                f"but the model trains {brief(tokens[name].ids.tolist())}; use Adapter.attach with "
                "replace=True"
            )


def _require_same_texts(adapter: AdapterContent, model: Module) -> None:
    """Raise FormatError if the new tokens of an adapter differ from the model's new tokens."""
    theirs = {token.id: token.text for token in model.new_tokens(adapter.added_tokens)}
    ours = {token.id: token.text for token in _added_tokens(model)}
    if theirs != ours:
        raise FormatError(
            f"{adapter.source}: the adapter has the new tokens {brief(theirs)}, but the model has "
            f"{brief(ours)}; use Adapter.attach with replace=True"
        )


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
        warn_user(f"{config}: unknown keys are ignored: {keys}")


# ---- new LoRA layers ----


def require_no_adapter(model: Module) -> None:
    """Raise ValueError if a model has LoRA layers."""
    if on := len(model.adapter_layers()):
        raise ValueError(
            f"attach_adapter: the model already has an adapter, on {counted(on, 'layer')}; "
            "replace=True removes it"
        )


def new_layers(
    adapter: AdapterContent, model: Module, any_base: bool = False, freeze_B: bool = False
) -> dict[str, AdapterLayer]:
    """Make new LoRA layers from an adapter and a model's frozen weights. The model itself does not change.

    If the adapter trains some or all rows of the embedding or the head, the new layer is a
    `TrainedRowsLayer`.

    Raises:
        FormatError: the adapter does not fit the model, or belongs to another model.

    >>> lm = nplora.load_model("model.gguf")
    >>> layers = nplora.adapters.new_layers(nplora.read_adapter("adapter"), lm)
    >>> layers["model.layers.0.self_attn.q_proj"].rank
    2
    >>> len(layers), len(lm.adapter_layers())
    (14, 0)
    """
    if not model.trained_row_layers:
        adapter.require_low_rank("this kind of model can only take low-rank factors")
    plain_target(model).check(adapter, any_base)
    modules: dict[str, Any] = dict(model.named_modules())
    sizes = [4 * factor.size for delta in adapter.values() for factor in (delta.A, delta.B)]
    made = dict[str, AdapterLayer]()
    require_plain_invocation(adapter, model)
    with buffers.side_by_side(*sizes):
        for name, delta in adapter.items():
            layer = made[name] = _new_layer(modules[name], delta, freeze_B)
            layer.row_order = model.stored_row_order(name)
            layer.restart_dropout(layer_stream(0, name))
            layer.prepare_adopt(delta)()
            layer.invocation_tokens = adapter.invocation_tokens
    rows = _new_trained_rows(adapter, model)
    if both := ", ".join(made.keys() & rows.keys()):
        raise FormatError(
            f"{adapter.source}: {both}: for this weight, the adapter has both LoRA factors and trained rows, "
            "which is not supported"
        )
    made |= rows
    _warn_of_unknown(adapter)
    return made


def _new_layer(layer: Any, delta: LoraDelta, freeze_B: bool) -> LoRALayer:
    """Make a LoRA layer with the rank, alpha and options of `delta`, over the frozen weight of `layer`."""
    settings: dict[str, Any] = {"use_rslora": delta.use_rslora, "freeze_B": freeze_B, "rng": 0}
    if isinstance(layer, Embedding | LoRAEmbedding | TrainedEmbedding):
        return LoRAEmbedding(layer.weight, delta.rank, delta.stated_alpha, **settings)
    assert isinstance(layer, Linear | LoRALinear | TrainedHead)
    settings["use_dora"] = delta.use_dora
    if isinstance(layer, Conv2d | LoRAConv2d):
        return LoRAConv2d.over(layer, delta.rank, delta.stated_alpha, **settings)
    return LoRALinear(layer.weight, delta.rank, delta.stated_alpha, layer.bias, **settings)


def require_plain_invocation(adapter: AdapterContent, model: Module) -> None:
    """Raise UnsupportedError if an activated LoRA has parts that nplora does not support.

    An activated LoRA can only adapt layers of a language model's blocks, without DoRA and trained rows.
    """
    if adapter.invocation_tokens is None:
        return
    inside = "model.layers."
    others = [name for name in adapter if not name.startswith(inside)]
    if others or adapter.use_dora or adapter.trained_rows or not model.trained_row_layers:
        raise UnsupportedError(
            f"{adapter.source}: an activated LoRA (aLoRA) can only adapt linear layers of a language "
            "model's blocks, and cannot use DoRA or trained rows"
        )


def _new_trained_rows(adapter: AdapterContent, model: Module) -> dict[str, TrainedRowsLayer]:
    """Make the embedding and head layers whose rows the adapter trains.

    Raises:
        FormatError: the adapter has no row for one of its new tokens.
    """
    wanted, tokens = adapter.trained_rows, adapter.added_tokens
    if not wanted:
        return {}
    modules: dict[str, Any] = dict(model.named_modules())
    size = max(adapter.rows, *(modules[name].weight.shape[0] for name in model.trained_row_layers))
    for token in tokens:
        if token.id >= size:
            raise FormatError(
                f"{adapter.source}: the new token {brief(token.text)} is token {token.id}, but neither "
                f"the adapter nor the model has more than {size} rows"
            )
    made = trained_layers(model, wanted, adapter.is_tied, model.new_tokens(tokens), size)
    for name in wanted:
        rows = adapter.token_rows.get(name)
        values = adapter.modules_to_save[name]["weight"] if rows is None else rows.values
        made[name].rows.value[: len(values)] = values
    return made


@contextlib.contextmanager
def rollback_on_error(model: Module) -> Iterator[Callable[[], None]]:
    """If the `with` body raises an error, restore the layers that the body replaced.

    The context manager yields a function. After the body has called this function, an error no longer
    restores the layers.

    >>> lm = nplora.load_model("model.gguf")
    >>> try:
    ...     with nplora.adapters.rollback_on_error(lm):
    ...         lm.add_lora(rank=2)
    ...         raise OSError("the disk is full")
    ... except OSError:
    ...     print(len(lm.adapter_layers()), "layers have adapters")
    0 layers have adapters
    """
    before = dict(model.named_modules())
    try:
        yield before.clear
    except BaseException:
        now = dict(model.named_modules())
        changed = [name for name in before.keys() & now.keys() if before[name] is not now[name]]
        model.exchange({id(now[name]): before[name] for name in changed})
        raise


# ---- what fits ----


def plain_target(model: Module) -> Target:
    """The `Target` for a new adapter: all layers of a model that LoRA can adapt."""
    modules: dict[str, Any] = dict(model.named_modules())
    weights = {name: modules[name].weight for name in model.trained_row_layers}
    whole = {
        name: {"weight": Place(shape=weight.shape, dtype=weight.compute_dtype)}
        for name, weight in weights.items()
    }
    return _target(model, live=False, whole=whole)


def _target(model: Module, live: bool, **more: Any) -> Target:
    """Return a `Target` for a model's LoRA layers if `live`, else for all layers that LoRA can adapt."""
    modules, asked = dict(model.named_modules()), itertools.count()
    tokens = _token_rows(model)

    def rows(layer: str) -> tuple[int, int] | str:
        if layer not in (tokens if live else model.trained_row_layers):
            return f"the model has no {'trained tokens' if live else 'rows to train'} in this layer"
        shape: tuple[int, int] = modules[layer].weight.shape  # type: ignore[attr-defined]
        return shape

    def place(layer: str, shape: tuple[int, ...]) -> Place | str:
        module = modules.get(layer)
        if module is None:
            near = nearest_names(layer, filter(None, modules)) if next(asked) < _MOST_SUGGESTIONS else []
            words = f", the nearest names: {', '.join(map(repr, near))}" if near else ""
            return f"the model has no such layer{words}"
        if not isinstance(module, LoRALayer if live else Linear | Embedding | LoRALayer | TrainedRowsLayer):
            wanted = "a LoRA layer" if live else "a linear layer or an embedding"
            return f"the model's layer is a {type(module).__name__}, expected {wanted}"
        if isinstance(module, Linear | Embedding) and module.trainable:
            return "the model's layer is fully trained, expected a frozen layer"
        assert isinstance(module.weight, FrozenWeight)
        embedding = isinstance(module, Embedding | LoRAEmbedding | TrainedEmbedding)
        use_dora = False if embedding else None  # None: a new layer can be made with or without DoRA
        if live and isinstance(module, LoRALayer):
            use_dora = module.use_dora
        kernel = module.kernel if isinstance(module, Conv2d | LoRAConv2d) else ()
        dtype = module.weight.compute_dtype
        return Place("the model's layer", module.weight.shape, embedding, use_dora, kernel, dtype)

    return Target(
        "the model", place, model.base_digest(), rows=rows, ties_head=model.ties_head,
        task_type=model.task_type, **more,
    )  # fmt: skip
