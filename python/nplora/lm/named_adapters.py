"""Several named adapters of one language model. Each thread or asyncio task selects the adapters it uses.

For each selection there is a copy of the model's modules. All copies share the frozen weights, but each copy
has its own LoRA layers. When a call begins, it fetches the copy for the selection of its thread. So other
threads can select or delete adapters without an effect on a running call.
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

# For each NamedAdapters object, the names that are selected in the current context.
_selected: ContextVar[Mapping[weakref.ref[Any], Names]] = ContextVar("nplora_selected", default={})  # noqa: B039


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


class NamedAdapters(Generic[Model]):
    """The named adapters of one model."""

    def __init__(self) -> None:
        self._adapters: dict[str, Adapter] = {}
        self._models: dict[Names, Model] = {}
        self._lock = threading.RLock()

    def __getstate__(self) -> dict[str, Any]:
        return {"_adapters": dict(self._adapters)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__()  # type: ignore[misc]
        self._adapters = state["_adapters"]

    @property
    def adapters(self) -> Mapping[str, Adapter]:
        """The adapters, as a read-only mapping from their names."""
        return MappingProxyType(self._adapters)

    @property
    def models(self) -> list[Model]:
        """The copies of the model. Each copy has one adapter, or the sum of several adapters."""
        return list(self._models.values())

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
        with self._lock:
            made = _constant(lm.with_adapter(adapter, any_base))
            if name in self._adapters and not replace:
                raise ValueError(
                    f"load_adapter: an adapter {name!r} is loaded already; call delete_adapter first"
                )
            others = {names: lm for names, lm in self._models.items() if name not in names}
            self._adapters = {**self._adapters, name: adapter}
            self._models = {**others, (name,): made}

    def delete(self, name: str) -> None:
        """Remove an adapter, also from this thread's selection. Raises KeyError for an unknown name."""
        with self._lock:
            self._require("delete_adapter", (name,))
            self._adapters = {known: adapter for known, adapter in self._adapters.items() if known != name}
            self._models = {names: lm for names, lm in self._models.items() if name not in names}
        self.select(tuple(other for other in self.selected if other != name))

    @property
    def selected(self) -> Names:
        """The names that this thread (or asyncio task) has selected."""
        return _selected.get().get(weakref.ref(self), ())

    def select(self, names: Names) -> None:
        """Select the adapters `names`, whose sum is used in this thread (or asyncio task)."""
        others = {key: value for key, value in _selected.get().items() if key() not in (None, self)}
        _selected.set({**others, weakref.ref(self): names} if names else others)

    @contextlib.contextmanager
    def none_selected(self) -> Iterator[None]:
        """A context in which no named adapter is selected."""
        before = self.selected
        self.select(())
        try:
            yield
        finally:
            self.select(before)

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
            if names not in self._models:
                chosen = [self._adapters[name] for name in names]
                summed = chosen[0] if len(chosen) == 1 else combine([(a, 1.0) for a in chosen], any_base=True)
                self._models[names] = _constant(lm.with_adapter(summed, any_base=True))
            return self._models[names]

    def model_of(self, lm: Model, op: str, adapter: str | Adapter) -> Model:
        """Return a copy of the model with one adapter.

        Args:
            adapter: a name, or an `Adapter` that is or was loaded under a name.
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
            self._models = {}

    def _require(self, op: str, names: Names) -> None:
        for name in names:
            if name not in self._adapters:
                raise self._missing(op, name)

    def _missing(self, op: str, name: object) -> KeyError:
        if nearest_names(str(name), self._adapters):
            return missing_name(op, name, self._adapters, "adapter")
        known = ", ".join(map(repr, self._adapters))
        hint = (
            f"the loaded adapters are {known}" if known else "no adapter is loaded; call load_adapter first"
        )
        return KeyError(f"{op}: no adapter {brief(name)}; {hint}")
