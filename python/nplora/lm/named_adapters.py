"""Several named adapters of one language model. Each thread or asyncio task selects the adapters it uses.

Each selection has its own copy of the model's modules, which shares the frozen weights but not the LoRA
layers. A call fetches the copy of its selection once, when it begins, and computes with this copy to the end.
So other threads can select, replace or delete adapters without an effect on a running call.

The selection is a context variable. Code that creates an asyncio task or calls `asyncio.to_thread` passes its
selection on to the new task or call.
"""

from __future__ import annotations

import contextlib
import copy
import threading
import weakref
from collections.abc import Iterator, Mapping
from contextvars import ContextVar
from types import MappingProxyType
from typing import Any, Generic, Protocol, Self, TypeVar

from nplora.adapters import Adapter, combine
from nplora.formats.errors import brief, missing_name, nearest_names
from nplora.nn import LoRALayer
from nplora.nn.module import AdapterLayer

Names = tuple[str, ...]

MOST_SUMS = 8  # the maximum number of sums of adapters for which a copy of the model is stored

# For each NamedAdapters object, the names that are selected in the current context.
_selected: ContextVar[Mapping[weakref.ref[Any], Names]] = ContextVar("nplora_selected", default={})  # noqa: B039
# For each `none_selected` block around the current code, a list with its NamedAdapters object.
_disabled: ContextVar[tuple[list[NamedAdapters[Any]], ...]] = ContextVar("nplora_none_selected", default=())


class _Model(Protocol):
    """The methods of a LanguageModel that `NamedAdapters` uses."""

    def with_adapter(self, adapter: Adapter, any_base: bool = False) -> Self: ...
    def adapter_layers(self) -> dict[str, AdapterLayer]: ...


Model = TypeVar("Model", bound=_Model)


def _constant(model: Model) -> Model:
    """Make a model's LoRA factors read-only, so that inference may cache copies of them. Return the model."""
    for layer in model.adapter_layers().values():
        if isinstance(layer, LoRALayer):
            for array in (layer.A, layer.B):
                array.flags.writeable = False
    return model


def _read_only(adapter: Adapter) -> Adapter:
    """Make an adapter's arrays read-only: a change would not reach the copies in models with this adapter."""
    arrays = [array for delta in adapter.values() for array in (delta.A, delta.B, delta.m)]
    arrays += [array for rows in adapter.token_rows.values() for array in (rows.ids, rows.values)]
    arrays += [array for module in adapter.modules_to_save.values() for array in module.values()]
    for array in arrays:
        if array is not None:
            array.flags.writeable = False
    return adapter


class NamedAdapters(Generic[Model]):
    """The named adapters of one model."""

    def __init__(self) -> None:
        # Reading these dicts needs no lock. A dict is never changed, but replaced by a new dict.
        self._adapters: dict[str, Adapter] = {}
        self._models: dict[str, Model] = {}
        self._sums: dict[Names, Model] = {}  # by the sorted names, ordered by last use
        self._lock = threading.RLock()

    def __getstate__(self) -> dict[str, Any]:
        return {"_adapters": dict(self._adapters)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__()  # type: ignore[misc]
        self._adapters = {name: _read_only(adapter) for name, adapter in state["_adapters"].items()}

    @property
    def adapters(self) -> Mapping[str, Adapter]:
        """The adapters, as a read-only mapping from their names. The arrays of the adapters are read-only."""
        return MappingProxyType(self._adapters)

    @property
    def models(self) -> list[Model]:
        """The copies of the model. Each copy has one adapter, or the sum of several adapters."""
        return [*self._models.values(), *self._sums.values()]

    def add(
        self,
        lm: Model,
        name: str,
        adapter: Adapter,
        any_base: bool,
        dtype: str | None = None,
        replace: bool = False,
    ) -> None:
        """Check that an adapter fits the model, and store a copy under a name.

        If `dtype` is given, the factors of the copy are rounded to this type.
        """
        if not isinstance(name, str) or not name:
            raise TypeError(f"load_adapter: name is {name!r}, expected a non-empty text")
        adapter = copy.deepcopy(adapter)
        if dtype is not None:
            adapter.deltas = {name: delta.rounded(dtype) for name, delta in adapter.items()}
        _read_only(adapter)
        with self._lock:
            made = _constant(lm.with_adapter(adapter, any_base))
            if name in self._adapters and not replace:
                raise ValueError(
                    f"load_adapter: an adapter {name!r} is loaded already; pass replace=True, or call "
                    "delete_adapter first"
                )
            self._forget_sums_with(name)
            self._adapters = {**self._adapters, name: adapter}
            self._models = {**self._models, name: made}

    def delete(self, name: str) -> None:
        """Remove an adapter, and deselect it in this thread. Raises KeyError for an unknown name."""
        with self._lock:
            self._require("delete_adapter", (name,))
            self._forget_sums_with(name)
            self._adapters = {known: adapter for known, adapter in self._adapters.items() if known != name}
            self._models = {known: lm for known, lm in self._models.items() if known != name}
        self._select(tuple(other for other in self._chosen if other != name))  # also inside `none_selected`

    def _forget_sums_with(self, name: str) -> None:
        self._sums = {names: lm for names, lm in self._sums.items() if name not in names}

    @property
    def selected(self) -> Names:
        """The names that this thread (or asyncio task) has selected. Empty inside `none_selected`."""
        return () if self._is_disabled else self._chosen

    @property
    def _chosen(self) -> Names:
        return _selected.get().get(weakref.ref(self), ())

    @property
    def _is_disabled(self) -> bool:
        return any(self is disabled for (disabled,) in _disabled.get())

    def select(self, names: Names) -> None:
        """Use the sum of these adapters in this thread (or asyncio task).

        Raises:
            RuntimeError: this code is inside `none_selected`.
        """
        if self._is_disabled:
            raise RuntimeError(
                "set_adapter: this code is inside `with lm.disable_adapter()`, where no adapter can be "
                "selected; call set_adapter before or after the block"
            )
        self._select(names)

    def _select(self, names: Names) -> None:
        others = {key: value for key, value in _selected.get().items() if key() not in (None, self)}
        _selected.set({**others, weakref.ref(self): names} if names else others)

    @contextlib.contextmanager
    def none_selected(self) -> Iterator[None]:
        """A context without a selected named adapter. At its end, the earlier selection is valid again."""
        block: list[NamedAdapters[Any]] = [self]
        _disabled.set((*_disabled.get(), block))
        try:
            yield
        finally:
            _disabled.set(tuple(held for held in _disabled.get() if held is not block))

    def model(self, lm: Model, op: str, names: Names) -> Model:
        """Return a copy of the model with the sum of the adapters `names`.

        If `names` is empty, return the model itself.

        Raises:
            KeyError: one of the names is unknown; the message lists the nearest names, or all names.
            UnsupportedError: there are several names, and one of the adapters uses DoRA.
        """
        if not names:
            return lm
        with self._lock:
            self._require(op, names)
            if len(names) == 1:
                return self._model(lm, names[0])
            key = tuple(sorted(names))  # the bits of a sum depend on the order of its terms
            sums = dict(self._sums)
            made = sums.pop(key, None)
            if made is None:
                summed = combine([(self._adapters[name], 1.0) for name in key], any_base=True)
                made = _constant(lm.with_adapter(summed, any_base=True))
            sums[key] = made
            self._sums = dict(list(sums.items())[-MOST_SUMS:])
            return made

    def _model(self, lm: Model, name: str) -> Model:
        if name not in self._models:
            made = _constant(lm.with_adapter(self._adapters[name], any_base=True))
            self._models = {**self._models, name: made}
        return self._models[name]

    def model_of(self, lm: Model, op: str, adapter: str | Adapter) -> Model:
        """Return a copy of the model with one adapter.

        Args:
            adapter: the name of a loaded adapter, or an `Adapter` (even if it is no longer loaded).
        """
        if isinstance(adapter, str):
            return self.model(lm, op, (adapter,))
        with self._lock:
            for name, known in self._adapters.items():
                if known is adapter:
                    return self.model(lm, op, (name,))
        return _constant(lm.with_adapter(adapter, any_base=True))

    def forget_models(self) -> None:
        """Drop the copies of the model, because layers of the model were replaced.

        New copies are made when they are needed.
        """
        with self._lock:
            self._models, self._sums = {}, {}

    def _require(self, op: str, names: Names) -> None:
        for name in names:
            if name not in self._adapters:
                raise self._missing(op, name)

    def _missing(self, op: str, name: object) -> KeyError:
        if nearest_names(str(name), self._adapters):
            return missing_name(op, name, self._adapters, "adapter")
        known = ", ".join(map(repr, self._adapters))
        hint = (
            f"the loaded adapters are {known}"
            if known
            else "no named adapter is loaded; load one with load_adapter(path, name)"
        )
        return KeyError(f"{op}: no adapter {brief(name)}; {hint}")
