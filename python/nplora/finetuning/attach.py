"""Attach adapters to a language model, from files or from memory."""

from __future__ import annotations

import numbers
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeAlias, TypeGuard

from nplora import _check
from nplora.adapters import Adapter, combine, read_for
from nplora.adapters.layers import require_no_adapter
from nplora.adapters.sources import trained_with_template
from nplora.finetuning.load import loaded, require_plain
from nplora.formats import files, peft_adapter
from nplora.formats.files import StrPath
from nplora.lm import LanguageModel
from nplora.runtime.user_warning import warn_user

OneAdapter: TypeAlias = StrPath | Adapter
Adapters: TypeAlias = OneAdapter | tuple[OneAdapter, float] | Sequence[OneAdapter | tuple[OneAdapter, float]]


@_check.keywords
def load_with_adapter(
    model: StrPath, adapter: Adapters | None = None, compute: str = "float32", any_base: bool = False
) -> LanguageModel:
    """Load a model and attach an adapter, or the weighted sum of several adapters.

    Args:
        model, compute: see `load_model`.
        adapter, any_base: see `attach_adapter`. Without `adapter`, the model gets no adapter.
    Raises the same errors as `load_model` and `attach_adapter`.

    >>> lm = nplora.finetuning.load_with_adapter("model.gguf", "adapter")
    >>> lm.num_trainable > 0
    True
    >>> half = nplora.finetuning.load_with_adapter("model.gguf", ("adapter", 0.5))
    """
    lm = loaded("load_with_adapter", model, compute)
    if adapter is not None:
        attach("load_with_adapter", lm, adapter, any_base)
    return lm


@_check.keywords
def attach_adapter(
    lm: LanguageModel, adapter: Adapters, any_base: bool = False, replace: bool = False
) -> None:
    """Attach an adapter to a model, as `Adapter.attach` does; add up the updates of several adapters.

    Args:
        adapter: one adapter (a PEFT directory, a llama.cpp file or an `Adapter`), a pair (adapter, weight),
            or a list of adapters and pairs.
        any_base: accept an adapter that was trained on another model with the same shapes.
        replace: first remove the adapter that the model already has.
    Raises:
        TypeError: `adapter` has the wrong type.
        ValueError: the weight of an adapter is not finite, or the list of adapters is empty.
        Other errors: see `Adapter.attach`, and `combine` for several adapters.
    Warns:
        UserWarning: the same adapter is given more than once, the adapter_config.json of an adapter has
            unknown keys, or the file of an adapter holds copies of the base model's weights.

    >>> lm = nplora.load_model("model.gguf")
    >>> nplora.finetuning.attach_adapter(lm, nplora.read_adapter("adapter"))
    >>> nplora.finetuning.attach_adapter(lm, ("adapter", 0.5), replace=True)
    """
    attach("attach_adapter", lm, adapter, any_base, replace)


def attach(
    op: str, lm: LanguageModel, adapter: Adapters, any_base: bool = False, replace: bool = False
) -> None:
    """Attach an adapter as `attach_adapter` does, with error messages that begin with `op`."""
    if not replace:
        require_no_adapter(lm)
    _sum(op, lm, adapter, any_base).attach(lm, any_base, replace)


def with_adapters(op: str, lm: LanguageModel, adapter: Adapters, any_base: bool) -> LanguageModel:
    """Return a model that shares the weights of `lm` and has the adapter. `lm` itself does not change."""
    require_plain(op, lm)
    return lm.with_adapter(_sum(op, lm, adapter, any_base), any_base)


def files_of(op: str, adapter: Adapters | None) -> list[Path]:
    """The files from which the adapters are read."""
    given = [] if adapter is None else [one for one, _ in _weighted(op, adapter)]
    return [path for one in given if not isinstance(one, Adapter) for path in peft_adapter.files_of(one)]


def warn_of_form(op: str, adapter: Adapters, chat: bool | None, use: str, remedy: str) -> None:
    """Warn if an adapter was trained with the chat template, but is used without it, or the other way round.

    Args:
        chat: whether the template is used now; None: unknown, so there is no warning.
        use: what the warning calls the input of the model, such as "this text".
        remedy: the advice in the warning if the input does not go through the template.
    """
    for one, _ in _weighted(op, adapter):
        trained = one.chat_template if isinstance(one, Adapter) else trained_with_template(one)
        if None not in (trained, chat) and trained != chat:
            with_or_without = "with" if trained else "without"
            does = f"is not formatted with it; {remedy}" if trained else "is formatted with it"
            warn_user(f"{op}: {_name(one)} was trained {with_or_without} the chat template, but {use} {does}")


def _sum(op: str, lm: LanguageModel, adapter: Adapters, any_base: bool) -> Adapter:
    weighted = _weighted(op, adapter)
    if len(weighted) == 1 and weighted[0][1] == 1:
        given = weighted[0][0]
        return given if isinstance(given, Adapter) else read_for(lm, given, lm.source, any_base)
    _warn_of_repetition(op, [one for one, _ in weighted])
    return combine(weighted, base=lm.source, any_base=any_base)


def _weighted(op: str, adapter: object) -> list[tuple[OneAdapter, float]]:
    """Pair each adapter with its weight, which is 1 by default."""
    given = adapter if isinstance(adapter, list | tuple) and not _is_pair(adapter) else [adapter]
    if not given:
        raise ValueError(f"{op}: adapter is {adapter!r}, expected at least one adapter")
    found = list[tuple[OneAdapter, float]]()
    for item in given:
        one, weight = item if _is_pair(item) else (item, 1.0)
        if not isinstance(one, str | os.PathLike | Adapter):
            raise TypeError(
                f"{op}: adapter is {item!r}, expected a path, an Adapter, a pair (one of these, weight), "
                "or a list of these"
            )
        found.append((one, _check.number(op, f"the weight of {_name(one)}", weight)))
    return found


def _is_pair(value: object) -> TypeGuard[tuple[Any, float]]:
    return isinstance(value, tuple) and len(value) == 2 and isinstance(value[1], numbers.Real)


def _name(adapter: OneAdapter) -> str:
    return adapter.source if isinstance(adapter, Adapter) else files.name(adapter)


def _warn_of_repetition(op: str, adapters: list[OneAdapter]) -> None:
    alike: dict[object, list[OneAdapter]] = {}
    for one in adapters:
        alike.setdefault(id(one) if isinstance(one, Adapter) else os.path.realpath(one), []).append(one)
    for same in alike.values():
        if (n := len(same)) > 1:
            warn_user(f"{op}: {_name(same[0])} is given {n} times, so its update is added {n} times")
