"""Adapters' files, put on a language model."""

from __future__ import annotations

import os
import warnings
from collections.abc import Sequence
from typing import TypeAlias

from nplora.adapters import combine, read_for
from nplora.formats import files
from nplora.formats.errors import counted
from nplora.formats.files import StrPath
from nplora.lm import LanguageModel, load_model

Adapters: TypeAlias = StrPath | Sequence[StrPath | tuple[StrPath, float]]


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
        adapter: a PEFT directory, llama.cpp's file, or a list of these, which add up as in `combine`. A pair
            in the list is an adapter and its weight.
        any_base: as in `load_adapter`.
    Raises:
        FormatError: it does not fit the model, which stays as it was, or is of another one. Others as
            `load_adapter`, or as `combine` where there are several.
        ValueError: the model has an adapter.
    Warns:
        UserWarning: an adapter is given more than once. Others as `load_adapter`.
    """
    if on := len(lm.adapter_layers()):
        raise ValueError(f"attach_adapter: the model has an adapter already, on {counted(on, 'layer')}")
    given = [adapter] if isinstance(adapter, str | os.PathLike) else adapter
    weighted = [(one, 1.0) if isinstance(one, str | os.PathLike) else one for one in given]
    if len(weighted) == 1 and weighted[0][1] == 1:
        read_for(lm, weighted[0][0], lm.source, any_base).attach(lm, any_base)
        return
    alike: dict[str, list[StrPath]] = {}
    for path, _ in weighted:
        alike.setdefault(os.path.realpath(path), []).append(path)
    for same in alike.values():
        if (n := len(same)) > 1:
            warnings.warn(f"{files.name(same[0])} is given {n} times, and added {n} times", stacklevel=3)
    combine(weighted, base=lm.source, any_base=any_base).attach(lm, any_base)
