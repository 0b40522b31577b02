"""Adapters' files, put on a language model."""

from __future__ import annotations

import contextlib
import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TypeAlias

from nplora.adapters import Adapter, combine, load_opened, read_adapter
from nplora.formats import files, model_digest, peft_adapter
from nplora.formats.errors import FormatError, brief, counted, in_places, nearest_names
from nplora.formats.files import StrPath
from nplora.formats.model_directory import CONFIG
from nplora.formats.peft_adapter import EMBEDDING, PeftAdapter
from nplora.layers import Embedding, Linear, LoRALayer
from nplora.models import LanguageModel, load_model

Adapters: TypeAlias = StrPath | Sequence[StrPath]

_MOST_SUGGESTIONS = 10  # layers of an adapter, unknown to the model, for which the nearest ones are looked up


def load_with_adapter(
    model: StrPath, adapter: Adapters | None = None, compute: str = "float32", any_base: bool = False
) -> LanguageModel:
    """A model, with an adapter, or several, put on it. Raises as `load_model` and `attach_adapter`."""
    lm = load_model(model, compute)
    if adapter is not None:
        attach_adapter(lm, adapter, any_base)
    return lm


def attach_adapter(lm: LanguageModel, adapter: Adapters, any_base: bool = False) -> None:
    """Put an adapter on a model that has none: on the layers that are in its files.

    Args:
        adapter: a PEFT directory, llama.cpp's file, or a list of these, which add up as in `combine`.
        any_base: as in `load_adapter`.
    Raises:
        FormatError: it does not fit the model, which stays as it was, or is of another one. Others as
            `load_adapter`, or as `combine` where there are several.
        ValueError: the model has an adapter.
    Warns:
        UserWarning: an adapter is given more than once. Others as `load_adapter`.
    """
    if lm.adapter_layers():
        on = counted(len(lm.adapter_layers()), "layer")
        raise ValueError(f"attach_adapter: the model has an adapter already, on {on}")
    paths = [adapter] if isinstance(adapter, str | os.PathLike) else list(adapter)
    if len(paths) == 1 and not os.path.isfile(paths[0]):
        with peft_adapter.reading(paths[0]) as opened:
            names = _fitting(lm, opened)
            with as_it_was(lm):
                lm.add_lora(1, targets=names, use_dora=opened.config.use_dora)  # at the file's ranks below
                load_opened(lm, opened, any_base=any_base)
    elif len(paths) == 1:
        _attach_updates(lm, read_adapter(paths[0], _base(lm), any_base=any_base))
    else:
        alike: dict[str, list[StrPath]] = {}
        for path in paths:
            alike.setdefault(os.path.realpath(path), []).append(path)
        for same in alike.values():
            if (n := len(same)) > 1:
                warnings.warn(f"{files.name(same[0])} is given {n} times, and added {n} times", stacklevel=3)
        _attach_updates(lm, combine([(path, 1.0) for path in paths], base=_base(lm), any_base=any_base))


def _base(lm: LanguageModel) -> Path:
    """The model's file or directory."""
    source = Path(lm.config.source)
    return source.parent if source.name == CONFIG else source


def _attach_updates(lm: LanguageModel, adapter: Adapter) -> None:
    layers, problems = _layers(lm), list[str]()
    for name, update in adapter.items():
        problems += _misfit(name, update.shape, update.embedding, layers, len(problems))
    if problems:
        raise FormatError(f"{adapter.source} does not fit the model {in_places(problems)}")
    with as_it_was(lm):
        lm.add_lora(1, targets=list(adapter))
        for name, layer in lm.named_modules():
            if not isinstance(layer, LoRALayer):
                continue
            update, order = adapter[name], layer.row_order
            factors = {"A": update.A if order is None else update.A[order], "B": update.B}
            layer.prepare_adopt(factors, update.scale * update.rank, False)()


@contextlib.contextmanager
def as_it_was(lm: LanguageModel) -> Iterator[None]:
    """Take the adapters that the body adds off again where it fails."""
    modules = dict(lm.named_modules())
    try:
        yield
    except BaseException:
        for name in lm.adapter_layers():
            parent, _, attribute = name.rpartition(".")
            setattr(modules[parent], attribute, modules[name])
        raise


def _fitting(lm: LanguageModel, adapter: PeftAdapter) -> list[str]:
    """The layers of an adapter, each of which the model has, and with factors of its shape."""
    layers, problems = _layers(lm), list[str]()
    factors = adapter.factors(problems)
    for name, halves in factors.items():
        is_embedding = halves[0].endswith(EMBEDDING[0])
        d_in, d_out = (adapter.tensors.entries[half].shape[1 - i] for i, half in enumerate(halves))
        try:
            adapter.require_rank(name, halves)
        except FormatError as error:
            problems.append(str(error))
            continue
        shape = (d_in, d_out) if is_embedding else (d_out, d_in)
        problems += _misfit(name, shape, is_embedding, layers, len(problems))
    if not factors and not problems:
        raise FormatError(f"{adapter.directory}: the adapter has no layers")
    if problems:
        subject = model_digest.subject(
            adapter.config.base_model_name_or_path, adapter.base_digest, lm.base_digest()
        )
        raise FormatError(f"{adapter.directory}: {subject} does not fit the model {in_places(problems)}")
    return list(factors)


def _layers(lm: LanguageModel) -> dict[str, Linear | Embedding]:
    return {name: m for name, m in lm.named_modules() if isinstance(m, Linear | Embedding)}


def _misfit(
    name: str,
    shape: tuple[int, int],
    is_embedding: bool,
    layers: Mapping[str, Linear | Embedding],
    problems: int,
) -> list[str]:
    """What is wrong with an update of this shape for this layer, when so many problems are known: 0 or 1."""
    layer = layers.get(name)
    if layer is None:
        near = ", ".join(map(repr, nearest_names(name, layers))) if problems < _MOST_SUGGESTIONS else ""
        return [f"layer {brief(name)} is not in the model{near and f', the nearest names: {near}'}"]
    if is_embedding != isinstance(layer, Embedding):
        kinds = ("an embedding", "linear") if is_embedding else ("a linear layer", "an embedding")
        return [f"layer {brief(name)}: the adapter is of {kinds[0]}, the layer is {kinds[1]}"]
    if shape != layer.weight.shape:
        return [f"layer {brief(name)}: the adapter is of {shape}, the weight {layer.weight.shape}"]
    return []
