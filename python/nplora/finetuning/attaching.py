"""A PEFT adapter directory, put on a language model."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

from nplora.adapters import load_adapter
from nplora.formats import model_digest, peft_adapter
from nplora.formats.errors import FormatError, brief, in_places, nearest_names
from nplora.formats.files import StrPath
from nplora.formats.peft_adapter import PeftAdapter
from nplora.layers import Embedding, Linear
from nplora.models import LanguageModel, load_model

_MOST_SUGGESTIONS = 10  # layers of an adapter, unknown to the model, for which the nearest ones are looked up


def load_with_adapter(
    model: StrPath, adapter: StrPath | None = None, compute: str = "float32", any_base: bool = False
) -> LanguageModel:
    """A model, with a PEFT adapter directory put on it. Raises as `load_model` and `attach_adapter`."""
    lm = load_model(model, compute)
    if adapter is not None:
        attach_adapter(lm, adapter, any_base)
    return lm


def attach_adapter(lm: LanguageModel, directory: StrPath, any_base: bool = False) -> None:
    """Put the adapter of a PEFT directory on a model that has none: on the layers that are in the file.

    Args:
        any_base: as in `load_adapter`.
    Raises:
        FormatError: it does not fit the model, which stays as it was, or is of another one. Others as
            `load_adapter`.
        ValueError: the model has an adapter.
    """
    if lm.adapter_layers():
        raise ValueError(
            f"attach_adapter: the model has an adapter already, on {len(lm.adapter_layers())} layers"
        )
    if os.path.isfile(directory):
        raise FormatError(
            f"{os.fspath(directory)}: expected the directory of a PEFT adapter; "
            "nplora convert makes one of a GGUF file"
        )
    with peft_adapter.reading(directory) as adapter:
        names, use_dora = _fitting(lm, adapter), adapter.config.use_dora
    with as_it_was(lm):
        lm.add_lora(1, targets=names, use_dora=use_dora)  # load_adapter brings the file's ranks
        load_adapter(lm, directory, any_base=any_base)


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
    layers = {name: m for name, m in lm.named_modules() if isinstance(m, Linear | Embedding)}
    problems: list[str] = []
    factors = adapter.factors(problems)
    for name, halves in factors.items():
        layer = layers.get(name)
        if layer is None:
            near = (
                ", ".join(map(repr, nearest_names(name, layers))) if len(problems) < _MOST_SUGGESTIONS else ""
            )
            problems.append(
                f"layer {brief(name)} is not in the model{near and f', the nearest names: {near}'}"
            )
            continue
        try:
            adapter.require_rank(name, halves)
        except FormatError as error:
            problems.append(str(error))
            continue
        d_in, d_out = (adapter.tensors.entries[half].shape[1 - i] for i, half in enumerate(halves))
        wanted = layer.weight.shape[::-1] if isinstance(layer, Linear) else layer.weight.shape
        if (d_in, d_out) != wanted:
            problems.append(
                f"layer {brief(name)}: the adapter is of {(d_out, d_in)}, the weight {wanted[::-1]}"
            )
    if not factors and not problems:
        raise FormatError(f"{adapter.directory}: the adapter has no layers")
    if problems:
        subject = model_digest.subject(
            adapter.config.base_model_name_or_path, adapter.base_digest, lm.base_digest()
        )
        raise FormatError(f"{adapter.directory}: {subject} does not fit the model {in_places(problems)}")
    return list(factors)
