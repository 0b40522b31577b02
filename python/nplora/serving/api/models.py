"""Models: the base model and its adapters, under the names that requests use."""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

from nplora.adapters import Adapter, combine, read_for
from nplora.formats.errors import brief, nearest_names
from nplora.serving.adapter_memory import AdapterMemory, most_needed
from nplora.serving.fields import Fields, checked_integer, checked_number, wrong
from nplora.serving.model_name import checked_name
from nplora.serving.request_error import RequestError

_MOST_SCALE = 1000.0
_MOST_SUMS = 16  # the most sums of scaled adapters that are kept
_MOST_HEADER = 1 << 20  # the most bytes of an adapter's file that do not belong to values


class ServedModel(Protocol):
    """A `LanguageModel` or a `ServedEncoder`: `Models` uses only the members that are declared here."""

    @property
    def source(self) -> Path: ...
    @property
    def adapters(self) -> Mapping[str, Adapter]: ...
    def load_adapter(
        self,
        adapter: Adapter,
        name: str,
        /,
        any_base: bool = False,
        dtype: str | None = None,
        replace: bool = False,
    ) -> None: ...
    def delete_adapter(self, name: str) -> None: ...
    def named_model(self, name: str, /) -> object: ...


LM = TypeVar("LM", bound=ServedModel)


class Models(Generic[LM]):
    """The base model and its adapters.

    All methods may be called from any thread.

    Args:
        lm: the base model. `Models` loads and deletes the named adapters of this model.
        name: the name of the base model.
        any_base: whether to accept adapters that were trained on another model with the same shapes.
        read: a function that reads an adapter, like `nplora.adapters.read_for`.
        dtype: the dtype to which loaded adapters are rounded, as in `LanguageModel.load_adapter`. The sum of
            several loaded adapters is not rounded again.
    Attributes:
        lm, name: see the arguments.
        memory: the `AdapterMemory` that reserves memory for each new adapter; None: no limit.
    """

    def __init__(
        self,
        lm: LM,
        name: str,
        any_base: bool = False,
        read: Callable[..., Adapter] = read_for,
        dtype: str | None = None,
    ) -> None:
        checked_name("the model's name", name)
        self.lm, self.name, self._read, self._dtype = lm, name, read, dtype
        self.memory: AdapterMemory | None = None
        self._any_base, self._lock = any_base, threading.RLock()
        self._changing = threading.RLock()  # for loading and unloading; requests do not wait for this lock
        self._loaded: dict[str, tuple[int, str]] = {}  # {name of an adapter: (its id, its path)}
        self._next_id = 0
        self._scales: dict[int, float] = {}  # {adapter's id: default scale in requests to the base model}
        self._sums: dict[str, str] = {}  # {description of a sum: its adapter's name}; not shown to clients
        self._since = int(time.time())

    # ---- adapters ----

    def load(self, name: str, path: str | Path, replace: bool = False) -> None:
        """Load an adapter.

        Args:
            replace: if an adapter already has this name, replace it as soon as the new adapter is read. The
                new adapter gets the id and the scale of the old adapter.
        Raises:
            RequestError: the name has wrong characters or is taken, or there is too little memory.
            OSError, ValueError: the adapter cannot be read, or does not fit the model.
        """
        checked_name("the adapter's name", name)
        with self._changing:
            if name == self.name:
                raise RequestError(
                    f"{brief(name)} is the name of the base model", 400, "lora_name", "name_taken"
                )
            known = self._loaded.get(name)
            if known is not None and not replace:
                message = f"the name {brief(name)} is taken: unload that adapter first, or set load_inplace"
                raise RequestError(message, 400, "lora_name", "name_taken")
            if self.memory is not None:
                self.memory.require(name, _file_size(Path(path)))
            adapter = self._read(self.lm, path, self.lm.source, self._any_base)
            self._add(adapter, name, self._any_base, replace)
            with self._lock:
                self._loaded[name] = (self._next_id if known is None else known[0]), str(path)
                self._next_id += known is None
                self._forget_sums()

    def _add(self, adapter: Adapter, name: str, any_base: bool, replace: bool = False) -> None:
        is_sum = name.startswith("=")  # a sum must not wait for memory, because requests wait for the sum
        dtype = None if is_sum else self._dtype
        if self.memory is None:
            self.lm.load_adapter(adapter, name, any_base, dtype, replace)
            return
        with self.memory.room(self.lm, name, adapter.nbytes, waits=not is_sum):
            self.lm.load_adapter(adapter, name, any_base, dtype, replace)
        if replace:
            self.memory.unloaded()

    def unload(self, name: str) -> None:
        """Remove an adapter. Requests that already use the adapter continue to use it."""
        with self._changing, self._lock:
            if name not in self._loaded:
                raise self._unknown(name, "adapter", "lora_name")
            id_, _ = self._loaded.pop(name)
            self._scales.pop(id_, None)
            self.lm.delete_adapter(name)
            self._forget_sums()
            if self.memory is not None:
                self.memory.unloaded()

    def _forget_sums(self) -> None:
        for hidden in self._sums.values():
            self.lm.delete_adapter(hidden)
        self._sums.clear()

    # ---- requests ----

    def chosen(self, body: Fields) -> tuple[str, str | None]:
        """Return the model that a request chooses, as a pair of names.

        The first name is the model's name in the answer. The second is the adapter's name; None: no adapter.

        Raises:
            RequestError: there is no such model or adapter.
        """
        name = body.text("model", self.name) or self.name
        scales = body.get("lora")
        if name != self.name:
            if scales is not None:
                raise RequestError(
                    "lora is given, but model names an adapter: set model to the base model", param="lora"
                )
            if name not in self._loaded:
                raise self._unknown(name, "model", "model")
            return name, name
        return name, self._sum(self._scales if scales is None else self._read_scales("lora", scales))

    def _sum(self, scales: Mapping[int, float]) -> str | None:
        """Return the name of a weighted sum of adapters. `scales` is a dict from ids to weights."""
        with self._lock:
            names = {id_: name for name, (id_, _) in self._loaded.items()}
            parts = [(names[id_], scale) for id_, scale in sorted(scales.items()) if scale and id_ in names]
            if not parts:
                return None
            if len(parts) == 1 and parts[0][1] == 1:
                return parts[0][0]
            key = "+".join(f"{name}*{scale!r}" for name, scale in parts)
            if key not in self._sums:
                adapters = [(self.lm.adapters[name], scale) for name, scale in parts]
                while len(self._sums) >= _MOST_SUMS:
                    self.lm.delete_adapter(self._sums.pop(next(iter(self._sums))))
                try:
                    self._add_sum(combine(adapters, any_base=True), f"={key}")
                except ValueError as error:
                    raise RequestError(str(error), param="lora") from error
                self._sums[key] = f"={key}"
            return self._sums[key]

    def _add_sum(self, adapter: Adapter, name: str) -> None:
        """Add an adapter that is a sum. If there is too little memory, first delete all other sums."""
        try:
            self._add(adapter, name, any_base=True)
        except RequestError:
            if not self._sums:
                raise
            self._forget_sums()
            self._add(adapter, name, any_base=True)

    def _read_scales(self, field: str, value: object) -> dict[int, float]:
        """Turn llama.cpp's list of {"id": an adapter's number, "scale": its scale} into {id: scale}."""
        if not isinstance(value, list):
            raise wrong(field, value, 'a list of {"id": ..., "scale": ...}')
        with self._lock:
            known = {id_ for id_, _ in self._loaded.values()}
        found = dict[int, float]()
        for index, item in enumerate(value):
            one = Fields(item, f"{field}[{index}].")
            one.require_known({"id", "scale"}, {})
            id_ = checked_integer(one.name("id"), one.required("id"), 0)
            if id_ not in known:
                raise RequestError(f"{one.name('id')} is {id_}: no adapter has this id", param=one.name("id"))
            if id_ in found:
                raise RequestError(f"{one.name('id')} is {id_}, which is given twice", param=one.name("id"))
            scale = checked_number(one.name("scale"), one.required("scale"), -_MOST_SCALE, _MOST_SCALE)
            found[id_] = scale
        return found

    def _unknown(self, name: str, what: str, param: str) -> RequestError:
        near = ", ".join(map(repr, nearest_names(name, self.names)))
        hint = f", the nearest names: {near}" if near else ""
        return RequestError(
            f"the {what} {brief(name)} does not exist{hint}", 404, param=param, code="model_not_found"
        )

    # ---- lists ----

    @property
    def names(self) -> list[str]:
        return [self.name, *self._loaded]

    def cards(self, limits: Mapping[str, int]) -> list[dict[str, Any]]:
        """The models in the form of OpenAI's API, with vLLM's fields for adapters.

        Args:
            limits: additional fields of each model, with its limits in tokens.
        """
        with self._lock:
            paths = {name: path for name, (_, path) in self._loaded.items()}
        base = self._card(self.name, str(self.lm.source), None)
        adapters = (self._card(name, path, self.name) for name, path in paths.items())
        return [{**card, **limits} for card in (base, *adapters)]

    def _card(self, name: str, root: str, parent: str | None) -> dict[str, Any]:
        return {
            "id": name,
            "object": "model",
            "created": self._since,
            "owned_by": "nplora",
            "root": root,
            "parent": parent,
        }

    def card(self, name: str, limits: Mapping[str, int]) -> dict[str, Any]:
        for card in self.cards(limits):
            if card["id"] == name:
                return card
        raise self._unknown(name, "model", "model")

    def scales(self) -> list[dict[str, Any]]:
        """The adapters in llama.cpp's form, with their default scales (see `set_scales`)."""
        with self._lock:
            return [
                {"id": id_, "name": name, "path": path, "scale": self._scales.get(id_, 0.0)}
                for name, (id_, path) in self._loaded.items()
            ]

    def set_scales(self, value: object) -> None:
        """Set the default scales, for requests that name the base model but contain no scales.

        Adapters that are not in the list get the scale 0.
        """
        scales = self._read_scales("the body", value)
        with self._lock:
            self._scales = scales


def bytes_of_sums(size: int, users: int) -> int:
    """The most bytes that sums of adapters can take.

    Args:
        size: the total bytes of all loaded adapters.
        users: the maximum number of deleted sums that requests can still be using.
    """
    return most_needed(size, _MOST_SUMS + users)


def _file_size(path: Path) -> int:
    """A lower bound for the bytes of the values in an adapter's file; 0 if there is no file."""
    file = path / "adapter_model.safetensors" if path.is_dir() else path
    return max(0, file.stat().st_size - _MOST_HEADER) if file.is_file() else 0


def inside(directory: Path, path: str) -> Path:
    """Return the real path of an adapter in a directory. Refuse links that lead out of the directory.

    The files inside the adapter's directory are checked too.

    Raises:
        RequestError: the path is outside the directory, or does not exist.
    """
    if "\0" in path:
        raise wrong("lora_path", path, "a path")
    root = directory.resolve()
    try:
        found = (root / path).resolve()
        files = found.iterdir() if found.is_relative_to(root) and found.is_dir() else ()
        is_there = found.exists() and all(file.resolve().is_relative_to(root) for file in (found, *files))
    except (OSError, RuntimeError, ValueError):
        is_there = False
    if not is_there:
        raise RequestError(
            f"there is no adapter {brief(path)} in the server's directory of adapters",
            404,
            param="lora_path",
            code="adapter_not_found",
        )
    return found


def default_name(source: Path) -> str:
    """The default name of a model or an adapter whose path is `source`."""
    stem = source.name.removesuffix(".gguf")
    name = re.sub(r"[^\w.:@+-]", "-", stem).strip("._-")
    return re.sub(r"\.{2,}", ".", name) or "model"
