"""Module: something with a forward and a backward pass, whose parts are found by name."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import operator
from collections.abc import Callable, Iterator, Mapping
from contextvars import ContextVar
from typing import Any, NamedTuple, Self, TypeAlias, cast

import numpy as np
import numpy.typing as npt

from nplora import _check
from nplora.lora.merging import MergeReport
from nplora.weights import FrozenWeight

Array = npt.NDArray[Any]
Commit = Callable[[], None]

# What a backward pass returns: dx, or None where need_dx is False. Any spares callers the check for None.
Gradient: TypeAlias = Array | Any

_inferring: ContextVar[bool] = ContextVar("nplora_inferring", default=False)


def inferring() -> bool:
    """Whether a module is being called (`model(x)`): no dropout, and nothing kept for a backward pass."""
    return _inferring.get()


@contextlib.contextmanager
def inference() -> Iterator[None]:
    """`with inference():` every pass is as if the module were being called."""
    token = _inferring.set(True)
    try:
        yield
    finally:
        _inferring.reset(token)


# The adapters that are switched off here: a dict for each `disable_adapter` block around. It holds the layers
# too, because the id of one that is gone could become another's.
_disabled: ContextVar[tuple[dict[int, AdapterLayer], ...]] = ContextVar("nplora_disabled", default=())


def quiet() -> np.errstate:
    """Let NaN and Inf propagate without NumPy's warnings: the loss shows them."""
    return np.errstate(over="ignore", invalid="ignore", divide="ignore")


def pair(module: Module, result: Any) -> tuple[Array, Any]:
    """What `forward` returned, if it is the pair that it should be."""
    if isinstance(result, tuple) and len(result) == 2:
        return result
    what = f"{len(result)} values" if isinstance(result, tuple) else type(result).__name__
    raise TypeError(f"{type(module).__name__}.forward returned {what}, expected the pair (y, saved)")


def name_error(error: ValueError, container: Module, culprit: Module | None = None) -> None:
    """Put "layer " and the dotted name, in `container`, of the module that raised in front of the message.

    The innermost container knows the culprit; those around it go on from there.
    """
    if len(error.args) != 1 or not isinstance(error.args[0], str):
        return
    module, message = vars(error).setdefault("nplora_origin", (culprit, error.args[0]))
    for name, candidate in container._walk("", set()):
        if candidate is module:
            error.args = (f"layer {name!r}: {message}",)
            return


class Parameter(NamedTuple):
    """A trainable array and its gradient: both live and writable, both of one shape and dtype."""

    name: str
    value: Array
    grad: Array


@dataclasses.dataclass(frozen=True, slots=True)
class Saved:
    """What a forward pass keeps for its backward pass: references, so leave the arrays unchanged.

    Attributes:
        layer: the module whose pass it was, which `backward` compares; None is not compared.
    """

    layer: Module | None = dataclasses.field(default=None, kw_only=True, repr=False, compare=False)

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays kept, those that several layers share counted once."""
        return saved_nbytes(self)


def saved_nbytes(saved: object) -> int:
    """Bytes of the arrays in a Saved or any nest of arrays, tuples, lists and dicts.

    An array that is kept several times counts once; a view of a part of it counts beside it.
    """
    return sum({(a.__array_interface__["data"][0], a.nbytes): a.nbytes for a in _arrays(saved)}.values())


def _arrays(saved: object) -> Iterator[Array]:
    if isinstance(saved, np.ndarray):
        yield saved
    elif isinstance(saved, Saved):
        for field in dataclasses.fields(saved):
            yield from _arrays(getattr(saved, field.name))
    elif isinstance(saved, dict):
        yield from _arrays(list(saved.values()))
    elif isinstance(saved, list | tuple):
        for item in saved:
            yield from _arrays(item)


class Module:
    """The base of every layer and of models written by users.

    A subclass gives `forward` and `backward`. Modules that it keeps in attributes, or in lists, tuples and
    dicts in attributes, are found by name ("fc1", "blocks.0.q_proj"); there is nothing to register and no
    __init__ to call.

        class Net(nplora.Module):
            def __init__(self, W1, W2):
                self.fc1, self.act, self.fc2 = nplora.LoRALinear(W1), nplora.ReLU(), nplora.LoRALinear(W2)

            def forward(self, x):
                h, s1 = self.fc1.forward(x)
                h, s2 = self.act.forward(h)
                y, s3 = self.fc2.forward(h)
                return y, (s1, s2, s3)

            def backward(self, dy, saved, need_dx=True):
                dh = self.fc2.backward(dy, saved[2])
                dh = self.act.backward(dh, saved[1])
                return self.fc1.backward(dh, saved[0], need_dx)
    """

    task_type: str | None = None  # PEFT's word for what the model does, in the adapters that it saves

    def base_digest(self) -> str | None:
        """What the frozen model is told by in the adapters that it saves; None where nothing tells it."""
        return None

    def stored_row_order(self, name: str) -> Array | None:
        """As `LoRALayer.row_order`, of the layer of a dotted name; None: its rows are in the usual order."""
        return None

    # ---- the two passes ----

    def forward(self, x: Any) -> tuple[Array, Any]:
        """The training pass: the output, and what `backward` needs."""
        raise NotImplementedError(f"{type(self).__name__} has no forward")

    def backward(self, dy: Array, saved: Any, need_dx: bool = True) -> Gradient:
        """Add to the gradients of the parameters; return dx, or None where need_dx is False.

        `saved` comes from a forward pass of this very module: the layers of nplora raise ValueError for that
        of another one. A second call with the same `saved` adds the same gradients again. A module that frees
        what it kept while it computes, as `LanguageModel` does, raises RuntimeError instead.
        """
        raise NotImplementedError(f"{type(self).__name__} has no backward")

    def __call__(self, x: Any) -> Array:
        """Inference: the output of `forward` without dropout, keeping nothing.

        Raises:
            TypeError: forward did not return a pair.
        """
        try:
            with inference():
                return pair(self, self.forward(x))[0]
        except ValueError as error:
            if hasattr(error, "nplora_origin"):
                name_error(error, self)
            raise

    # ---- what this module holds itself, apart from its children ----

    def local_parameters(self) -> list[Parameter]:
        """The trainable arrays that this module holds itself."""
        return []

    def local_frozen(self) -> list[FrozenWeight | Array]:
        """The frozen arrays that this module holds itself; they are counted, not trained."""
        return []

    def named_children(self) -> Iterator[tuple[str, Module]]:
        """The modules in this one's attributes, by name, in the order of their definition."""
        for name, value in vars(self).items():
            if isinstance(value, _HOLDERS):
                yield from _modules_in(value, name)

    # ---- the tree ----

    def named_modules(self) -> Iterator[tuple[str, Module]]:
        """Every module in here by dotted name, this one first as ""; a shared one once, by its first name.

        Raises:
            ValueError: two modules have the same name, as {"a.b": one, "a": {"b": other}} gives them.
        """
        names: set[str] = set()
        for name, module in self._walk("", set()):
            if name in names:
                raise ValueError(f"{type(self).__name__}: two modules are named {name!r}; rename one")
            names.add(name)
            yield name, module

    def _walk(self, prefix: str, seen: set[int]) -> Iterator[tuple[str, Module]]:
        if id(self) in seen:
            return
        seen.add(id(self))
        yield prefix, self
        for name, child in self.named_children():
            yield from child._walk(_join(prefix, name), seen)

    def parameters(self) -> list[Parameter]:
        """The trainable arrays by dotted name ("fc1.A"), in the order of their definition."""
        return [
            Parameter(_join(name, p.name), p.value, p.grad)
            for name, module in self.named_modules()
            for p in module.local_parameters()
        ]

    def zero_grad(self) -> None:
        """Set every gradient to zero."""
        for parameter in self.parameters():
            parameter.grad.fill(0)

    @property
    def num_trainable(self) -> int:
        """The number of trainable elements."""
        return sum(p.value.size for p in self.parameters())

    @property
    def num_parameters(self) -> int:
        """The number of elements, trainable and frozen; what several modules share counts once."""
        held = {id(a): a.size for _, module in self.named_modules() for a in module.local_frozen()}
        return sum(held.values()) + self.num_trainable

    def print_trainable_parameters(self) -> None:
        """Print PEFT's line: trainable elements, all elements, and the share of the former in per cent."""
        trainable, total = self.num_trainable, self.num_parameters
        percent = 100 * trainable / total if total else 0.0
        print(f"trainable params: {trainable:,d} || all params: {total:,d} || trainable%: {percent:.4f}")

    # ---- the adapter layers of the whole tree ----

    def adapter_layers(self) -> dict[str, AdapterLayer]:
        """The layers with an adapter, by dotted name."""
        return {name: m for name, m in self.named_modules() if isinstance(m, AdapterLayer)}

    def merge(self, dtype: str | None = None) -> list[MergeReport]:
        """Fold every adapter into a copy of its frozen weight, which answers alone until `unmerge`.

        Every merged weight is built before the first is put in place: a failure leaves all layers as they
        were. `merge` and `unmerge` hold for every thread. If another thread is in the middle of a pass, that
        pass uses each layer as it is then, merged or not. Its result differs by the rounding of the merged
        weights. If that pass was for training, its backward raises RuntimeError.

        Args:
            dtype: the storage of the merged weights: "same" as the frozen one's, or a name of
                `FrozenWeight`'s, rounded from a float32 sum. None: the frozen one's, but float32 where that
                has low-bit blocks, whose steps may swallow the update.
        Returns:
            with a dtype, a report for each layer: how much of the update the storage kept. None: empty.
        Raises:
            RuntimeError: a layer is merged already.
            ValueError: finite values would become infinite; a layer's rows are no whole blocks of the
                storage, or one of the two computes in float64 and the other does not.
        """
        prepared = [layer.prepare_merge(name, dtype) for name, layer in self.adapter_layers().items()]
        for commit, _ in prepared:
            commit()
        return [report for _, report in prepared if report is not None]

    def unmerge(self) -> None:
        """Bring the frozen weights back, bit for bit.

        Raises:
            RuntimeError: a layer is not merged; then none is changed.
        """
        commits = [layer.prepare_unmerge() for layer in self.adapter_layers().values()]
        for commit in commits:
            commit()

    def merge_and_unload(self) -> Module:
        """Replace every adapter layer by a plain frozen one of the merged weight; return the model.

        The model is changed in place and returned; a single layer returns its replacement. Factors and
        original weights are gone afterwards. Every replacement is built first: a failure leaves all as they
        were.

        Raises:
            ValueError: finite values would become infinite.
        """
        replaced = {id(layer): layer.unloaded() for layer in self.adapter_layers().values()}
        layers = list(self.adapter_layers().values())
        self.exchange(replaced)
        for layer in layers:
            layer.discard()
        return replaced.get(id(self), self)

    def exchange(self, replaced: Mapping[int, Module]) -> None:
        """Put other modules in the places of those in here with these ids."""
        for module in [m for _, m in self.named_modules() if id(m) not in replaced]:
            for name, value in vars(module).items():
                vars(module)[name] = _replace(value, replaced)

    def copied(self, replaced: Mapping[int, Module]) -> Self:
        """A copy of the tree with other modules in the places of those with these ids. Arrays are shared."""
        made = dict(replaced)
        return cast(Self, _copied(self, made))

    @contextlib.contextmanager
    def disable_adapter(self) -> Iterator[Self]:
        """`with model.disable_adapter():` the frozen weights compute alone, merged or not.

        This holds for the thread (or asyncio task) that enters the block. Calls in other threads keep the
        adapters, also in threads that are started inside the block. As with every context variable, a
        generator that yields inside the block hands the effect to its caller until it is resumed.
        """
        layers = {id(layer): layer for layer in self.adapter_layers().values()}
        _disabled.set((*_disabled.get(), layers))
        try:
            yield self
        finally:
            _disabled.set(tuple(held for held in _disabled.get() if held is not layers))

    def seed(self, seed: int) -> None:
        """Draw the starting factors of every adapter layer anew, and start its dropout stream.

        A layer draws from a stream keyed by (seed, its dotted name): equal shapes differ, and neither the
        order of the layers nor the presence of others matters.

        Raises:
            RuntimeError: a layer is merged; then none is changed.
        """
        seed = _check.integer("seed", "seed", seed, least=0)
        layers = self.adapter_layers()
        for layer in layers.values():
            layer.require_unmerged("seed")
        for name, layer in layers.items():
            layer.reset(layer_stream(seed, name))

    def random_state(self) -> dict[str, list[int]]:
        """The dropout streams: {dotted name of an adapter layer: [seed, number of passes so far]}."""
        return {name: list(layer.dropout_stream) for name, layer in self.adapter_layers().items()}

    def set_random_state(self, state: dict[str, list[int]]) -> None:
        """Go on from what `random_state` returned.

        Raises:
            ValueError: the names are not those of this model's adapter layers, or an entry is not two
                integers.
        """
        op, layers = "set_random_state", self.adapter_layers()
        if state.keys() != layers.keys():
            missing, unknown = sorted(layers.keys() - state.keys()), sorted(state.keys() - layers.keys())
            raise ValueError(f"{op}: layers missing from the state: {missing}; not in the model: {unknown}")
        streams = {}
        for name, entry in state.items():
            if len(entry) != 2:
                raise ValueError(f"{op}: the state of {name!r} is {entry!r}, expected [seed, calls]")
            streams[name] = (
                _check.integer(op, f"the seed of {name!r}", entry[0], least=0),
                _check.integer(op, f"the calls of {name!r}", entry[1], least=0),
            )
        for name, stream in streams.items():
            layers[name].dropout_stream = stream


class AdapterLayer(Module):
    """What the whole-model methods of `Module` ask of a layer with an adapter.

    Attributes:
        dropout_stream: (seed, calls); the mask of a training pass is keyed by the two, and calls then rises
            by one.
    """

    dropout_stream: tuple[int, int]

    _enabled = True

    @property
    def adapter_enabled(self) -> bool:
        """False while the frozen weight computes alone: inside `disable_adapter`, or once set to False.

        What is set holds for every thread.
        """
        blocks = _disabled.get()  # mostly empty, and decoding asks for each layer and token
        return self._enabled and not (blocks and any(id(self) in layers for layers in blocks))

    @adapter_enabled.setter
    def adapter_enabled(self, enabled: bool) -> None:
        self._enabled = bool(enabled)

    @property
    def merged(self) -> bool:
        """Whether the merged weight answers at the moment."""
        raise NotImplementedError

    def settings(self) -> dict[str, int | float | bool | str]:
        """What decides the layer's results beside its arrays: plain values, for a checkpoint to compare."""
        raise NotImplementedError

    def require_unmerged(self, what: str) -> None:
        """Raise RuntimeError where `what` makes no sense on a merged layer."""
        if self.merged:
            raise RuntimeError(f"{type(self).__name__}.{what}: the layer is merged; call unmerge() first")

    def require_trainable(self, what: str) -> None:
        """Raise RuntimeError where the layer has no gradients: it is merged, or is for inference only."""
        self.require_unmerged(what)

    def prepare_merge(self, name: str, dtype: str | None) -> tuple[Commit, MergeReport | None]:
        """Build the merged weight; the function returned puts it in place and cannot fail.

        The report, which is made where there is a dtype, calls the layer by the name given.
        """
        raise NotImplementedError

    def prepare_unmerge(self) -> Commit:
        """Check that the layer is merged; the function returned brings the original back and cannot fail."""
        raise NotImplementedError

    def unloaded(self) -> Module:
        """The plain frozen layer of the merged weight."""
        raise NotImplementedError

    def frozen(self) -> Module:
        """A plain layer of the frozen weight, which is shared.

        Raises:
            ValueError: the adapter took a part of the weight.
        """
        raise NotImplementedError

    def discard(self) -> None:
        """Let go of factors and weights: a plain layer stands in this one's place."""
        raise NotImplementedError

    def restart_dropout(self, stream: np.random.SeedSequence) -> None:
        """Start the dropout stream anew; the factors stay."""
        self.dropout_stream = (int(np.random.default_rng(stream).integers(2**63)), 0)

    def reset(self, stream: np.random.SeedSequence) -> None:
        """Draw the starting factors and the dropout stream from `stream`."""
        raise NotImplementedError


def layer_stream(seed: int, name: str) -> np.random.SeedSequence:
    """What the layer of a dotted name draws from."""
    return np.random.SeedSequence(seed, spawn_key=tuple(name.encode()))


_CONTAINERS = (dict, list, tuple)
_HOLDERS = (Module, *_CONTAINERS)  # of modules; most attributes are none


def _modules_in(value: object, name: str, around: tuple[int, ...] = ()) -> Iterator[tuple[str, Module]]:
    """The modules in a nest of containers; `around` holds the ids of those that hold this one."""
    if isinstance(value, Module):
        yield name, value
    elif isinstance(value, _CONTAINERS) and id(value) not in around:
        for key, item in value.items() if isinstance(value, dict) else enumerate(value):
            yield from _modules_in(item, f"{name}.{key}", (*around, id(value)))


def _replace(value: Any, replaced: Mapping[int, Module], around: tuple[int, ...] = ()) -> Any:
    """`value` with modules exchanged; lists and dicts in place, tuples anew where something changed."""
    if isinstance(value, Module):
        return replaced.get(id(value), value)
    if id(value) in around:
        return value
    around = (*around, id(value))
    if isinstance(value, dict):
        for key, item in value.items():
            value[key] = _replace(item, replaced, around)
    elif isinstance(value, list):
        value[:] = [_replace(item, replaced, around) for item in value]
    elif isinstance(value, tuple):
        items = [_replace(item, replaced, around) for item in value]
        if any(map(operator.is_not, items, value)):
            return type(value)(*items) if hasattr(value, "_fields") else tuple(items)
    return value


def _copied(value: Any, made: dict[int, Module]) -> Any:
    """`value` with copies of its modules, which `made` holds by the ids of the originals."""
    if isinstance(value, Module):
        if id(value) not in made:
            made[id(value)] = new = copy.copy(value)
            for name, item in vars(new).items():
                vars(new)[name] = _copied(item, made)
        return made[id(value)]
    if not any(_modules_in(value, "")):
        return value
    if isinstance(value, dict):
        return {key: _copied(item, made) for key, item in value.items()}
    items = [_copied(item, made) for item in value]
    if isinstance(value, list):
        return items
    return type(value)(*items) if hasattr(value, "_fields") else tuple(items)


def _join(prefix: str, name: str) -> str:
    return f"{prefix}.{name}" if prefix else name
