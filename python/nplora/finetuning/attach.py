"""Adapters' files, put on a language model."""

from __future__ import annotations

import os
import warnings
from collections.abc import Sequence
from typing import TypeAlias, TypeGuard

from nplora.adapters import combine, read_for
from nplora.adapters.layers import require_no_adapter
from nplora.formats import files
from nplora.formats.files import StrPath
from nplora.lm import LanguageModel, load_model

Adapters: TypeAlias = StrPath | tuple[StrPath, float] | Sequence[StrPath | tuple[StrPath, float]]


def load_with_adapter(
    model: StrPath, adapter: Adapters | None = None, compute: str = "float32", any_base: bool = False
) -> LanguageModel:
    """A model, with an adapter, or several, put on it. Raises as `load_model` and `attach_adapter`."""
    lm = load_model(model, compute)
    if adapter is not None:
        attach_adapter(lm, adapter, any_base)
    return lm


def attach_adapter(
    lm: LanguageModel, adapter: Adapters, any_base: bool = False, replace: bool = False
) -> None:
    """Put an adapter on a model as `Adapter.attach` does. Raises as that; as `combine` if there are several.

    Args:
        adapter: a PEFT directory, llama.cpp's file, or a pair of one and its weight; or a list of these,
            which add up as in `combine`.
    Raises:
        TypeError: it is something else.
    Warns:
        UserWarning: an adapter is given more than once, or its adapter_config.json has unknown keys.
    """
    if not replace:
        require_no_adapter(lm)
    weighted = _weighted(adapter)
    if len(weighted) == 1 and weighted[0][1] == 1:
        read_for(lm, weighted[0][0], lm.source, any_base).attach(lm, any_base, replace)
        return
    alike: dict[str, list[StrPath]] = {}
    for path, _ in weighted:
        alike.setdefault(os.path.realpath(path), []).append(path)
    for same in alike.values():
        if (n := len(same)) > 1:
            warnings.warn(f"{files.name(same[0])} is given {n} times, and added {n} times", stacklevel=3)
    combine(weighted, base=lm.source, any_base=any_base).attach(lm, any_base, replace)


def _weighted(adapter: object) -> list[tuple[StrPath, float]]:
    """Adapters and their weights."""
    given = adapter if isinstance(adapter, list | tuple) and not _is_pair(adapter) else [adapter]
    found = list[tuple[StrPath, float]]()
    for one in given:
        path, weight = one if _is_pair(one) else (one, 1.0)
        if not isinstance(path, str | os.PathLike):
            raise TypeError(f"adapter is {one!r}, expected a path, a pair (path, weight), or a list of these")
        found.append((path, weight))
    return found


def _is_pair(value: object) -> TypeGuard[tuple[object, float]]:
    return isinstance(value, tuple) and len(value) == 2 and isinstance(value[1], int | float)
