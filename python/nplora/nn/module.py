"""Module: the base of layers and models, with a forward and a backward pass. It finds its parts by name."""

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

_MOST_SHOWN = 12  # modules in the `repr` of one that holds them

# What a backward pass returns: dx, or None if need_dx is False. With Any, callers need no check for None.
Gradient: TypeAlias = Array | Any

_inferring: ContextVar[bool] = ContextVar("nplora_inferring", default=False)


def inferring() -> bool:
    """Whether this is inference (`model(x)`): no dropout, and nothing is kept for a backward pass."""
    return _inferring.get()


@contextlib.contextmanager
def inference() -> Iterator[None]:
    """Inside `with inference():` every pass is inference."""
    token = _inferring.set(True)
    try:
        yield
    finally:
        _inferring.reset(token)


# The adapters that are switched off here: for each `disable_adapter` block around, a dict of layers by id. It
# holds the layers too, because an id could be reused after its layer is gone.
_disabled: ContextVar[tuple[dict[int, AdapterLayer], ...]] = ContextVar("nplora_disabled", default=())


def quiet() -> np.errstate:
    """A context without NumPy's warnings about NaN and Inf. They propagate to the loss, which shows them."""
    return np.errstate(over="ignore", invalid="ignore", divide="ignore")


def pair(module: Module, result: Any) -> tuple[Array, Any]:
    """Return the result of a `forward`, or raise TypeError if it is not a pair."""
    if isinstance(result, tuple) and len(result) == 2:
        return result
    what = f"{len(result)} values" if isinstance(result, tuple) else type(result).__name__
    raise TypeError(f"{type(module).__name__}.forward returned {what}, expected the pair (y, saved)")


def name_error(error: ValueError, container: Module, culprit: Module | None = None) -> None:
    """Begin an error's message with "layer " and the dotted name, in `container`, of the module at fault.

    The innermost container names the culprit. The containers around it lengthen that name.
    """
    if len(error.args) != 1 or not isinstance(error.args[0], str):
        return
    module, message = vars(error).setdefault("nplora_origin", (culprit, error.args[0]))
    for name, candidate in container._walk("", set()):
        if candidate is module:
            error.args = (f"layer {name!r}: {message}",)
            return


class Parameter(NamedTuple):
    """A trainable array and its gradient. Both are live and writable, and have the same shape and dtype.

    >>> import nplora, numpy as np
    >>> parameter = nplora.LoRALinear(np.eye(4), rank=2).parameters()[0]
    >>> parameter.name, parameter.value.shape, parameter.grad.shape
    ('A', (4, 2), (4, 2))
    """

    name: str
    value: Array
    grad: Array


@dataclasses.dataclass(frozen=True, slots=True)
class Saved:
    """The values that a forward pass keeps for its backward pass: references, so do not change the arrays.

    Attributes:
        layer: the module whose pass it was. `backward` refuses a `saved` of another module, unless this is
            None.
    """

    layer: Module | None = dataclasses.field(default=None, kw_only=True, repr=False, compare=False)

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays kept. An array that several layers share counts once."""
        return saved_nbytes(self)


def saved_nbytes(saved: object) -> int:
    """Bytes of the arrays in a Saved or any nest of arrays, tuples, lists and dicts.

    An array that is kept several times counts once. A view of a part of it counts too.

        >>> import nplora, numpy as np
        >>> layer = nplora.LoRALinear(np.eye(4), rank=2)
        >>> y, saved = layer.forward(np.ones((10, 4), np.float32))
        >>> nplora.saved_nbytes(saved)      # x (10, 4) and z (10, 2)
        240
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
    """The base of every layer, and of your own networks.

    A subclass defines `forward` and `backward`. Modules in its attributes, or in lists, tuples and dicts in
    attributes, are found by name ("fc1", "blocks.0.q_proj"). There is nothing to register, and the __init__
    of Module need not be called.

        >>> import nplora, numpy as np
        >>> class Net(nplora.Module):
        ...     def __init__(self, W1, W2):
        ...         self.fc1 = nplora.LoRALinear(W1, rank=2)
        ...         self.act = nplora.ReLU()
        ...         self.fc2 = nplora.LoRALinear(W2, rank=2)
        ...     def forward(self, x):
        ...         h, s1 = self.fc1.forward(x)
        ...         h, s2 = self.act.forward(h)
        ...         y, s3 = self.fc2.forward(h)
        ...         return y, (s1, s2, s3)
        ...     def backward(self, dy, saved, need_dx=True):
        ...         dh = self.fc2.backward(dy, saved[2])
        ...         dh = self.act.backward(dh, saved[1])
        ...         return self.fc1.backward(dh, saved[0], need_dx)
        >>> net = Net(np.ones((32, 16)), np.ones((3, 32)))
        >>> net
        Net: 166 of 774 values trained
          fc1: LoRALinear((32, 16), rank=2, alpha=16, dtype='float32', num_trainable=96)
          act: ReLU()
          fc2: LoRALinear((3, 32), rank=2, alpha=16, dtype='float32', num_trainable=70)
    """

    task_type: str | None = None  # PEFT's word for what the model does, for the adapters that it saves

    def base_digest(self) -> str | None:
        """A text that identifies the frozen model in the adapters that it saves; None if there is none."""
        return None

    def stored_row_order(self, name: str) -> Array | None:
        """The `LoRALayer.row_order` of the layer of this dotted name; None: the usual order."""
        return None

    # ---- the two passes ----

    def forward(self, x: Any) -> tuple[Array, Any]:
        """The training pass: return the output, and the values that `backward` needs.

        >>> import nplora, numpy as np
        >>> y, saved = nplora.LoRALinear(np.eye(4), rank=1).forward(np.ones((2, 4)))
        >>> y.shape
        (2, 4)
        """
        raise NotImplementedError(f"{type(self).__name__} has no forward")

    def backward(self, dy: Array, saved: Any, need_dx: bool = True) -> Gradient:
        """Add to the gradients of the parameters; return dx, or None if need_dx is False.

        `saved` must come from a forward pass of this module: the layers of nplora raise ValueError otherwise.
        A second call with the same `saved` adds the same gradients again. `LanguageModel` frees what it kept
        while it computes, and raises RuntimeError at a second call.

            >>> import nplora, numpy as np
            >>> layer = nplora.LoRALinear(np.eye(4), rank=1)
            >>> y, saved = layer.forward(np.ones((2, 4)))
            >>> layer.backward(np.ones_like(y), saved).shape
            (2, 4)
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
        """The trainable arrays of this module alone, without its children. A layer of your own overrides it.

        >>> import nplora, numpy as np
        >>> class Scale(nplora.Module):
        ...     def __init__(self, d):
        ...         self.w, self.dw = np.ones(d, np.float32), np.zeros(d, np.float32)
        ...     def local_parameters(self):
        ...         return [nplora.Parameter("w", self.w, self.dw)]
        ...     def forward(self, x):
        ...         return x * self.w, x
        ...     def backward(self, dy, x, need_dx=True):
        ...         self.dw += (dy * x).sum(axis=0)
        ...         return dy * self.w if need_dx else None
        >>> net = nplora.Sequential(nplora.LoRALinear(np.eye(4), rank=1), Scale(4))
        >>> [parameter.name for parameter in net.parameters()]
        ['0.A', '0.B', '1.w']
        """
        return []

    def local_frozen(self) -> list[FrozenWeight | Array]:
        """The frozen arrays of this module alone, without its children. They are counted, not trained."""
        return []

    def named_children(self) -> Iterator[tuple[str, Module]]:
        """The modules in this module's attributes, by name, in the order of their definition."""
        for name, value in vars(self).items():
            if isinstance(value, _HOLDERS):
                yield from _modules_in(value, name)

    # ---- the tree ----

    def named_modules(self) -> Iterator[tuple[str, Module]]:
        """This module as "", then every module in it by dotted name.

        A module that is shared comes once, under its first name.

            >>> import nplora, numpy as np
            >>> net = nplora.Sequential(nplora.LoRALinear(np.eye(4), rank=1), nplora.ReLU())
            >>> [name for name, module in net.named_modules()]
            ['', '0', '1']

        Raises:
            ValueError: two modules have the same name, as in {"a.b": one, "a": {"b": other}}.
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
        """The trainable arrays by dotted name ("fc1.A"), in the order of their definition.

        >>> import nplora, numpy as np
        >>> net = nplora.Sequential(nplora.LoRALinear(np.eye(4), rank=1), nplora.ReLU())
        >>> [parameter.name for parameter in net.parameters()]
        ['0.A', '0.B']
        """
        return [
            Parameter(_join(name, p.name), p.value, p.grad)
            for name, module in self.named_modules()
            for p in module.local_parameters()
        ]

    def zero_grad(self) -> None:
        """Set every gradient to zero.

        >>> import nplora, numpy as np
        >>> layer = nplora.LoRALinear(np.eye(4), rank=1)
        >>> layer.dA[...] = 1
        >>> layer.zero_grad()
        >>> bool(layer.dA.any())
        False
        """
        for parameter in self.parameters():
            parameter.grad.fill(0)

    @property
    def num_trainable(self) -> int:
        """The number of trainable elements.

        >>> import nplora, numpy as np
        >>> layer = nplora.LoRALinear(np.eye(64), rank=2)
        >>> layer.num_trainable, layer.num_parameters
        (256, 4352)
        """
        return sum(p.value.size for p in self.parameters())

    @property
    def num_parameters(self) -> int:
        """The number of elements, trainable and frozen. An array that several modules share counts once."""
        held = {id(a): a.size for _, module in self.named_modules() for a in module.local_frozen()}
        return sum(held.values()) + self.num_trainable

    def print_trainable_parameters(self) -> None:
        """Print the same line as PEFT: trainable elements, all elements, and the trainable percentage.

        >>> import nplora, numpy as np
        >>> nplora.LoRALinear(np.eye(64), rank=2).print_trainable_parameters()
        trainable params: 256 || all params: 4,352 || trainable%: 5.8824
        """
        trainable, total = self.num_trainable, self.num_parameters
        percent = 100 * trainable / total if total else 0.0
        print(f"trainable params: {trainable:,d} || all params: {total:,d} || trainable%: {percent:.4f}")

    # ---- the adapter layers of the whole tree ----

    def adapter_layers(self) -> dict[str, AdapterLayer]:
        """The layers with an adapter, by dotted name.

        >>> import nplora, numpy as np
        >>> net = nplora.Sequential(nplora.LoRALinear(np.eye(4), rank=1), nplora.Linear(np.eye(4)))
        >>> list(net.adapter_layers())
        ['0']
        """
        return {name: m for name, m in self.named_modules() if isinstance(m, AdapterLayer)}

    def require_trainable(self, what: str) -> None:
        """Raise RuntimeError if a layer has no gradients, because it is merged or for inference only.

        Args:
            what: the operation that needs the gradients, for the message.
        """
        for layer in self.adapter_layers().values():
            layer.require_trainable(what)

    def merge(self, dtype: str | None = None) -> list[MergeReport]:
        """Add every adapter to a copy of its frozen weight. The layers use these copies until `unmerge`.

        All merged weights are built before any is put in place: after a failure all layers are as they were.
        `merge` and `unmerge` take effect in every thread. A pass that another thread is making meanwhile uses
        each layer as it finds it, merged or not, so its result differs by the rounding of the merged weights.
        If that pass is for training, its backward raises RuntimeError.

            >>> import nplora, numpy as np
            >>> layer = nplora.LoRALinear(np.eye(4), rank=2, init="gaussian", rng=0)
            >>> before = layer(np.ones(4))
            >>> reports = layer.merge()
            >>> np.allclose(layer(np.ones(4)), before, atol=1e-5), layer.merged
            (True, True)

        Args:
            dtype: the storage of the merged weights: "same" as the frozen weight's, or another storage
                of `FrozenWeight`, rounded from a float32 sum. None: the storage of the frozen weight, but
                float32 for a quantised one, whose coarse steps may lose the update.
        Returns:
            with a dtype, a report for each layer: how much of the update the storage kept. Without a dtype:
                an empty list.
        Raises:
            RuntimeError: a layer is merged already.
            ValueError: finite values would become infinite; a layer's rows do not divide into blocks of the
                storage; or only one of the two computes in float64.
        """
        prepared = [layer.prepare_merge(name, dtype) for name, layer in self.adapter_layers().items()]
        for commit, _ in prepared:
            commit()
        return [report for _, report in prepared if report is not None]

    def unmerge(self) -> None:
        """Bring the frozen weights back, bit for bit.

            >>> import nplora, numpy as np
            >>> layer = nplora.LoRALinear(np.eye(4), rank=2, init="gaussian")
            >>> reports = layer.merge()
            >>> layer.unmerge()
            >>> np.array_equal(layer.weight.to_numpy(), np.eye(4))
            True

        Raises:
            RuntimeError: a layer is not merged. No layer is changed.
        """
        commits = [layer.prepare_unmerge() for layer in self.adapter_layers().values()]
        for commit in commits:
            commit()

    def merge_and_unload(self) -> Module:
        """Replace every adapter layer by a plain frozen layer with the merged weight; return the model.

        The model is changed in place and returned; a single layer returns its replacement. The factors and
        the original weights are dropped. All replacements are built first: after a failure all layers are as
        they were.

            >>> import nplora, numpy as np
            >>> nplora.LoRALinear(np.eye(4), rank=2).merge_and_unload()
            Linear((4, 4), dtype='float32', trainable=False)

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
        """Replace the modules whose ids are the keys of `replaced` by its values."""
        for module in [m for _, m in self.named_modules() if id(m) not in replaced]:
            for name, value in vars(module).items():
                vars(module)[name] = _replace(value, replaced)

    def copied(self, replaced: Mapping[int, Module]) -> Self:
        """A copy of this module and its parts, with some replaced as in `exchange`. The arrays are shared."""
        made = dict(replaced)
        return cast(Self, _copied(self, made))

    @contextlib.contextmanager
    def disable_adapter(self) -> Iterator[Self]:
        """Inside `with model.disable_adapter():` the model computes with its frozen weights alone.

        This holds for the thread (or asyncio task) that enters the block. Other threads keep the adapters,
        even threads that are started inside the block. As with every context variable, if a generator yields
        inside the block, its caller is affected until the generator resumes.

            >>> import nplora, numpy as np
            >>> layer = nplora.LoRALinear(np.eye(2), rank=1, init="gaussian")
            >>> with layer.disable_adapter():
            ...     layer([1, 2])
            array([1., 2.], dtype=float32)
        """
        layers = {id(layer): layer for layer in self.adapter_layers().values()}
        _disabled.set((*_disabled.get(), layers))
        try:
            yield self
        finally:
            _disabled.set(tuple(held for held in _disabled.get() if held is not layers))

    def seed(self, seed: int) -> None:
        """Draw the initial factors of every adapter layer again, and restart its dropout stream.

        Each layer draws from its own stream, keyed by (seed, its dotted name). So two layers of the same
        shape differ, and other layers or their order do not matter.

            >>> import nplora, numpy as np
            >>> one, other = (nplora.LoRALinear(np.eye(4), rank=2) for _ in range(2))
            >>> one.seed(1), other.seed(1)
            (None, None)
            >>> np.array_equal(one.B, other.B)
            True

        Raises:
            RuntimeError: a layer is merged. No layer is changed.
        """
        seed = _check.integer("seed", "seed", seed, least=0)
        layers = self.adapter_layers()
        for layer in layers.values():
            layer.require_unmerged("seed")
        for name, layer in layers.items():
            layer.reset(layer_stream(seed, name))

    def random_state(self) -> dict[str, list[int]]:
        """The dropout streams: {dotted name of an adapter layer: [seed, number of passes so far]}.

        >>> import nplora, numpy as np
        >>> layer = nplora.LoRALinear(np.eye(4), rank=2, dropout=0.1)
        >>> state = layer.random_state()
        >>> y, saved = layer.forward(np.eye(4))
        >>> layer.set_random_state(state)           # the next pass draws the same mask
        >>> np.array_equal(layer.forward(np.eye(4))[0], y)
        True
        """
        return {name: list(layer.dropout_stream) for name, layer in self.adapter_layers().items()}

    def set_random_state(self, state: dict[str, list[int]]) -> None:
        """Continue the dropout streams from the result of `random_state`, which has an example.

        Raises:
            ValueError: the names differ from the names of this model's adapter layers, or an entry is not two
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

    def __repr__(self) -> str:
        children = list(self.named_children())
        shown = children if len(children) <= _MOST_SHOWN else children[: _MOST_SHOWN - 1]
        lines = [self._heading(), *(f"  {name}: {child._one_line()}" for name, child in shown)]
        if len(shown) < len(children):
            lines.append(f"  and {len(children) - len(shown):,} more modules")
        return "\n".join(lines)

    def _heading(self) -> str:
        return f"{type(self).__name__}: {self.num_trainable:,} of {self.num_parameters:,} values trained"

    def _one_line(self) -> str:
        """The line of this module in the `repr` of the one that holds it."""
        if type(self).__repr__ is Module.__repr__:
            return self._heading()
        return repr(self).partition("\n")[0]


class AdapterLayer(Module):
    """The members that a layer with an adapter needs for the methods of `Module` that work on a whole model.

    Attributes:
        dropout_stream: (seed, calls): the key of the dropout mask. Every training pass adds 1 to `calls`.
    """

    dropout_stream: tuple[int, int]

    _enabled = True

    @property
    def adapter_enabled(self) -> bool:
        """Whether the layer adds its update: not inside `disable_adapter`, and not if this was set to False.

        Setting it takes effect in every thread.
        """
        blocks = _disabled.get()  # mostly empty; decoding reads it for each layer and token
        return self._enabled and not (blocks and any(id(self) in layers for layers in blocks))

    @adapter_enabled.setter
    def adapter_enabled(self, enabled: bool) -> None:
        self._enabled = bool(enabled)

    @property
    def merged(self) -> bool:
        """Whether the layer computes with its merged weight at the moment."""
        raise NotImplementedError

    def settings(self) -> dict[str, int | float | bool | str]:
        """The settings that, with the arrays, decide the layer's results. Checkpoints compare them."""
        raise NotImplementedError

    def require_unmerged(self, what: str) -> None:
        """Raise RuntimeError if the layer is merged, because `what` needs an unmerged layer."""
        if self.merged:
            raise RuntimeError(f"{type(self).__name__}.{what}: the layer is merged; call unmerge() first")

    def require_trainable(self, what: str) -> None:
        """Raise RuntimeError if the layer has no gradients, because it is merged or for inference only."""
        self.require_unmerged(what)

    def prepare_merge(self, name: str, dtype: str | None) -> tuple[Commit, MergeReport | None]:
        """Build the merged weight; the returned function puts it in place and cannot fail.

        With a dtype there is also a report, which names the layer by `name`.
        """
        raise NotImplementedError

    def prepare_unmerge(self) -> Commit:
        """Check that the layer is merged; the returned function brings the original back and cannot fail."""
        raise NotImplementedError

    def unloaded(self) -> Module:
        """A plain frozen layer of the merged weight."""
        raise NotImplementedError

    def frozen(self) -> Module:
        """A plain layer that shares the frozen weight.

        Raises:
            ValueError: the adapter took a part of the weight.
        """
        raise NotImplementedError

    def discard(self) -> None:
        """Release the factors and weights, after a plain layer has replaced this one."""
        raise NotImplementedError

    def restart_dropout(self, stream: np.random.SeedSequence) -> None:
        """Restart the dropout stream; the factors stay."""
        self.dropout_stream = (int(np.random.default_rng(stream).integers(2**63)), 0)

    def reset(self, stream: np.random.SeedSequence) -> None:
        """Draw the initial factors and the dropout stream from `stream`."""
        raise NotImplementedError


def layer_stream(seed: int, name: str) -> np.random.SeedSequence:
    """The random stream of the layer with this dotted name."""
    return np.random.SeedSequence(seed, spawn_key=tuple(name.encode()))


_CONTAINERS = (dict, list, tuple)
_HOLDERS = (Module, *_CONTAINERS)  # what may hold modules; most attributes are something else


def _modules_in(value: object, name: str, around: tuple[int, ...] = ()) -> Iterator[tuple[str, Module]]:
    """The modules in nested containers. `around` holds the ids of the containers around this one."""
    if isinstance(value, Module):
        yield name, value
    elif isinstance(value, _CONTAINERS) and id(value) not in around:
        for key, item in value.items() if isinstance(value, dict) else enumerate(value):
            yield from _modules_in(item, f"{name}.{key}", (*around, id(value)))


def _replace(value: Any, replaced: Mapping[int, Module], around: tuple[int, ...] = ()) -> Any:
    """`value` with modules replaced: lists and dicts are changed in place, tuples with a change are new."""
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
    """`value` with copies of its modules. `made` holds the copies by the ids of the originals."""
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
