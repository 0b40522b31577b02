"""Module: the base class of layers and models, which finds and names the modules in its attributes."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any, NamedTuple, Self, TypeAlias, cast

import numpy as np
import numpy.typing as npt

from nplora import _check
from nplora.lora.merging import MergeReport
from nplora.weights import FrozenWeight

if TYPE_CHECKING:  # `import nplora` loads no formats
    from nplora.formats.label_record import LabelRecord
    from nplora.formats.tokenizer_json import AddedToken

Array = npt.NDArray[Any]
Commit = Callable[[], None]
SharedWeights: TypeAlias = dict[int, FrozenWeight]  # merged weights, by the id of their `TrainedRows`

_MOST_SHOWN = 12  # the most modules that a `repr` lists

# What a backward pass returns: dx, or None if need_dx is False. With Any, callers need no check for None.
Gradient: TypeAlias = Array | Any

_inferring: ContextVar[bool] = ContextVar("nplora_inferring", default=False)


def inferring() -> bool:
    """Whether the current pass is inference, such as `model(x)`, which has no dropout and saves no values."""
    return _inferring.get()


@contextlib.contextmanager
def inference() -> Iterator[None]:
    """Inside `with inference():` every pass is inference."""
    token = _inferring.set(True)
    try:
        yield
    finally:
        _inferring.reset(token)


# The disabled adapters: for each `disable_adapter` block around the current code, a dict of layers by id. The
# dict holds the layers themselves, so that no id is reused for another object.
_disabled: ContextVar[tuple[dict[int, AdapterLayer], ...]] = ContextVar("nplora_disabled", default=())


def quiet() -> np.errstate:
    """Silence NumPy's warnings about NaN and infinity, because training checks the loss for such values."""
    return np.errstate(over="ignore", invalid="ignore", divide="ignore")


def pair(module: Module, result: Any) -> tuple[Array, Any]:
    """Return `result`, the output of a `forward`. Raise TypeError if `result` is not a pair (y, saved)."""
    if isinstance(result, tuple) and len(result) == 2:
        return result
    what = f"{len(result)} values" if isinstance(result, tuple) else type(result).__name__
    raise TypeError(f"{type(module).__name__}.forward returned {what}, expected the pair (y, saved)")


def name_error(error: ValueError, container: Module, culprit: Module | None = None) -> None:
    """Make the error's message begin with "layer " and the dotted name of the module that failed.

    The innermost container calls this function with `culprit`, the module that failed. Each enclosing
    container then calls this function without `culprit`. Each of these calls changes the name in the
    message to the dotted name that the failed module has in the enclosing container.
    """
    if len(error.args) != 1 or not isinstance(error.args[0], str):
        return
    module, message = vars(error).setdefault("nplora_origin", (culprit, error.args[0]))
    for name, candidate in container._walk("", set()):
        if candidate is module:
            error.args = (f"layer {name!r}: {message}",)
            return


class Parameter(NamedTuple):
    """A trainable array and its gradient. The value and the gradient are writable arrays of the model, of the
    same shape and dtype.

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
    """The values that a forward pass keeps for its backward pass.

    Arrays are kept without a copy, so do not change them before the backward pass.

    Attributes:
        layer: the module that ran the forward pass. `backward` of another module raises ValueError. With
            None, this is not checked.
    """

    layer: Module | None = dataclasses.field(default=None, kw_only=True, repr=False, compare=False)

    @property
    def nbytes(self) -> int:
        """The number of bytes of all arrays. An array that several layers share counts once."""
        return saved_nbytes(self)


def saved_nbytes(saved: object) -> int:
    """Return the number of bytes of all arrays in a Saved, or in nested tuples, lists and dicts.

    An array that occurs several times counts once. A view of a part of an array counts separately, even if
    the whole array counts too.

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
    """Base class of every layer, and of your own networks.

    A subclass defines `forward` and `backward`. Modules in its attributes are found and named automatically
    ("fc1"), even if they are in lists, tuples or dicts ("blocks.0.q_proj"). Modules need not be registered,
    and a subclass need not call `Module.__init__`.

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

    task_type: str | None = None  # PEFT's name for the model's task, which is written into saved adapters

    # For saved adapters: PEFT's names for the fully trained layers, and a classifier's task and labels.
    saved_names: tuple[str, ...] = ()
    label_record: LabelRecord | None = None

    # The layers whose rows can be trained (`TrainedRowsLayer`). `ties_head` says whether head and embedding
    # share one weight.
    trained_row_layers: tuple[str, ...] = ()
    ties_head: bool = False

    def base_digest(self) -> str | None:
        """Return a text that identifies the frozen model, or None. A saved adapter contains this text.

        >>> import nplora, numpy as np
        >>> nplora.Linear(np.eye(2)).base_digest() is None
        True
        """
        return None

    def configuration(self) -> str:
        """Return a text with all settings that affect the output, but without arrays. The default is ""."""
        return ""

    def new_tokens(self, tokens: Sequence[AddedToken]) -> tuple[AddedToken, ...]:
        """An adapter adds `tokens`. Return those of them that the model itself does not have."""
        return tuple(tokens)

    def tokenizer_files(self) -> Mapping[str, bytes]:
        """Return {file name: content} of a tokenizer with new tokens. Adapters are saved with these files."""
        return {}

    def stored_row_order(self, name: str) -> Array | None:
        """Return `LoRALayer.row_order` for this dotted name. None: rows are ordered as in adapter files."""
        return None

    # ---- the two passes ----

    def forward(self, x: Any) -> tuple[Array, Any]:
        """Run a training pass: return the output, and the values that `backward` needs.

        >>> import nplora, numpy as np
        >>> y, saved = nplora.LoRALinear(np.eye(4), rank=1).forward(np.ones((2, 4)))
        >>> y.shape
        (2, 4)
        """
        raise NotImplementedError(f"{type(self).__name__} has no forward")

    def backward(self, dy: Array, saved: Any, need_dx: bool = True) -> Gradient:
        """Add this pass's gradients to `grad` of each parameter; return dx, or None if need_dx is False.

        `saved` must come from a forward pass of this module: the layers of nplora raise ValueError otherwise.
        A second call with the same `saved` adds the same gradients again. `LanguageModel`, however, frees the
        saved values during its backward pass, so a second call raises RuntimeError.

            >>> import nplora, numpy as np
            >>> layer = nplora.LoRALinear(np.eye(4), rank=1)
            >>> y, saved = layer.forward(np.ones((2, 4)))
            >>> layer.backward(np.ones_like(y), saved).shape
            (2, 4)
        """
        raise NotImplementedError(f"{type(self).__name__} has no backward")

    def __call__(self, x: Any) -> Array:
        """Run inference: return the output of `forward` without dropout, and keep nothing for `backward`.

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
        """Return the trainable arrays of this module itself, but not those of its children.

        Override this method in a layer of your own.

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
        """Return the frozen arrays of this module itself, but not those of its children."""
        return []

    def named_children(self) -> Iterator[tuple[str, Module]]:
        """Yield (name, module) for each module in this module's attributes, in the order of their definition.

        >>> import nplora, numpy as np
        >>> model = nplora.Sequential(nplora.Linear(np.eye(2)), nplora.Tanh())
        >>> [(name, type(child).__name__) for name, child in model.named_children()]
        [('0', 'Linear'), ('1', 'Tanh')]
        """
        for name, value in list(vars(self).items()):  # a copy: another thread may set `_prepared` meanwhile
            if isinstance(value, _HOLDERS):
                yield from _modules_in(value, name)

    # ---- the tree ----

    def named_modules(self) -> Iterator[tuple[str, Module]]:
        """Yield ("", this module), and then (dotted name, module) for every module inside this module.

        A module with several names is yielded once, under its first name.

            >>> import nplora, numpy as np
            >>> net = nplora.Sequential(nplora.LoRALinear(np.eye(4), rank=1), nplora.ReLU())
            >>> [name for name, module in net.named_modules()]
            ['', '0', '1']

        Raises:
            ValueError: two modules have the same name, such as "a.b" in {"a.b": m1, "a": {"b": m2}}.
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
        """Return the trainable arrays by dotted name ("fc1.A"), in the order of their definition.

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
        """The number of trainable and frozen elements. An array that several modules share counts once."""
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
        """Return the layers with an adapter, by dotted name.

        >>> import nplora, numpy as np
        >>> net = nplora.Sequential(nplora.LoRALinear(np.eye(4), rank=1), nplora.Linear(np.eye(4)))
        >>> list(net.adapter_layers())
        ['0']
        """
        return {name: m for name, m in self.named_modules() if isinstance(m, AdapterLayer)}

    def require_trainable(self, what: str) -> None:
        """Raise RuntimeError if a layer is merged, because merged layers compute no gradients.

        Args:
            what: the name of the operation that needs the gradients, for the message.

        >>> import nplora, numpy as np
        >>> model = nplora.Sequential(nplora.LoRALinear(np.eye(2), rank=1, rng=0))
        >>> model.require_trainable("my_loop")
        >>> reports = model.merge()
        >>> model.require_trainable("my_loop")
        Traceback (most recent call last):
        RuntimeError: LoRALinear.my_loop: the layer is merged; call unmerge() first
        """
        for layer in self.adapter_layers().values():
            layer.require_trainable(what)

    def merge(self, dtype: str | None = None) -> list[MergeReport]:
        """Add each update to a copy of its frozen weight. The layers use these copies until `unmerge`.

        All merged weights are built before the first one is used, so a failure leaves every layer unchanged.
        `merge` and `unmerge` take effect in every thread. A pass that another thread runs at the same time
        may use some layers before and some layers after the merge. The rounding of the merged weights may
        change the result of such a pass. The `backward` of a layer that was merged during its forward pass
        raises RuntimeError.

            >>> import nplora, numpy as np
            >>> layer = nplora.LoRALinear(np.eye(4), rank=2, init="gaussian", rng=0)
            >>> before = layer(np.ones(4))
            >>> reports = layer.merge()
            >>> np.allclose(layer(np.ones(4)), before, atol=1e-5), layer.merged
            (True, True)

        Args:
            dtype: the storage format to which the merged weights are rounded: a format of `FrozenWeight`, or
                "same" for the format of the frozen weight. None means float32 for a quantised weight, because
                rounding to the coarse steps of a quantised format may lose the update. For any other weight,
                None means "same".
        Returns:
            a list with one report for each layer, or an empty list if `dtype` is None. A report says how much
            of the update is left after the rounding to the storage format.
        Raises:
            RuntimeError: a layer is merged already.
            ValueError: finite values would become infinite; a weight's row length is not a multiple of the
                block size of the storage format; `dtype` changes a weight from or to float64; or an adapter
                is an activated LoRA.
        """
        prepared = [layer.prepare_merge(name, dtype) for name, layer in self.adapter_layers().items()]
        for commit, _ in prepared:
            commit()
        return [report for _, report in prepared if report is not None]

    def unmerge(self) -> None:
        """Restore the frozen weights, bit for bit.

            >>> import nplora, numpy as np
            >>> layer = nplora.LoRALinear(np.eye(4), rank=2, init="gaussian")
            >>> reports = layer.merge()
            >>> layer.unmerge()
            >>> np.array_equal(layer.weight.to_numpy(), np.eye(4))
            True

        Raises:
            RuntimeError: a layer is not merged; no layer is changed.
        """
        commits = [layer.prepare_unmerge() for layer in self.adapter_layers().values()]
        for commit in commits:
            commit()

    def merge_and_unload(self) -> Module:
        """Replace every adapter layer by a plain frozen layer with the merged weight; return the model.

        The model is changed in place and returned. If the model is a single layer, its replacement is
        returned. The factors A and B and the original weights are released. All replacements are built before
        the first one is used, so a failure leaves every layer unchanged.

            >>> import nplora, numpy as np
            >>> nplora.LoRALinear(np.eye(4), rank=2).merge_and_unload()
            Linear((4, 4), dtype='float32', trainable=False)

        Raises:
            ValueError: finite values would become infinite.
        """
        layers, shared = list(self.adapter_layers().values()), dict[int, FrozenWeight]()
        replaced = {id(layer): layer.unloaded(shared) for layer in layers}
        self.exchange(replaced)
        for layer in layers:
            layer.discard()
        return replaced.get(id(self), self)

    def exchange(self, replaced: Mapping[int, Module]) -> None:
        """Replace modules inside this module. `replaced` is a dict {id(old module): new module}."""
        for module in [m for _, m in self.named_modules() if id(m) not in replaced]:
            for name, value in vars(module).items():
                vars(module)[name] = _replace(value, replaced)

    def copied(self, replaced: Mapping[int, Module]) -> Self:
        """Copy the tree of modules, and replace modules in the copy as in `exchange`. Arrays are shared."""
        made = dict(replaced)
        return cast(Self, _copied(self, made))

    @contextlib.contextmanager
    def disable_adapter(self) -> Iterator[Self]:
        """Inside `with model.disable_adapter():` the model computes with its frozen weights alone.

        Adapters are disabled only for the thread (or asyncio task) that enters the block. Other threads use
        the adapters, even threads that are started inside the block. If a generator yields inside the block,
        adapters are also disabled for the code that called the generator, until the generator leaves the
        block. (Python's context variables behave in this way.)

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
        """Draw the initial factors of all adapter layers again, and restart the dropout streams.

        Each layer draws from its own random stream, which depends only on the seed and the layer's dotted
        name. So two layers of the same shape start differently, and a layer starts with the same factors
        regardless of the other layers in the model.

            >>> import nplora, numpy as np
            >>> one, other = (nplora.LoRALinear(np.eye(4), rank=2) for _ in range(2))
            >>> one.seed(1), other.seed(1)
            (None, None)
            >>> np.array_equal(one.B, other.B)
            True

        Raises:
            RuntimeError: a layer is merged; no layer is changed.
        """
        seed = _check.integer("seed", "seed", seed, least=0)
        layers = self.adapter_layers()
        for layer in layers.values():
            layer.require_unmerged("seed")
        for name, layer in layers.items():
            layer.reset(layer_stream(seed, name))

    def random_state(self) -> dict[str, list[int]]:
        """Return the dropout streams: {dotted name of a layer: [seed, number of passes with dropout so far]}.

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
        """Continue the dropout streams from a result of `random_state`, whose docstring has an example.

        Raises:
            ValueError: the names differ from the names of this model's adapter layers, or an entry is not two
                integers.

        >>> import nplora, numpy as np
        >>> model = nplora.Sequential(nplora.LoRALinear(np.eye(4), rank=1, dropout=0.5, rng=0))
        >>> state = model.random_state()
        >>> y = model.forward(np.ones((2, 4)))
        >>> model.random_state() == state
        False
        >>> model.set_random_state(state)
        >>> model.random_state() == state
        True
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
                _check.integer(op, f"the number of calls of {name!r}", entry[1], least=0),
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
        """Return the line for this module in the `repr` of the module that contains it."""
        if type(self).__repr__ is Module.__repr__:
            return self._heading()
        return repr(self).partition("\n")[0]


class AdapterLayer(Module):
    """Base class of layers with an adapter.

    A `Module` calls the methods of this class for each adapter layer inside the module.

    Attributes:
        dropout_stream: the pair (seed, calls), from which a training pass draws its dropout mask. If dropout
            is above 0, every training pass adds 1 to `calls`.
    """

    dropout_stream: tuple[int, int]

    _enabled = True

    @property
    def adapter_enabled(self) -> bool:
        """Whether the layer uses its adapter. Inside `disable_adapter`, the result is False.

        Setting `adapter_enabled` to False disables the adapter in every thread.
        """
        blocks = _disabled.get()  # usually empty; decoding reads it for each layer and token
        return self._enabled and not (blocks and any(id(self) in layers for layers in blocks))

    @adapter_enabled.setter
    def adapter_enabled(self, enabled: bool) -> None:
        self._enabled = bool(enabled)

    @property
    def merged(self) -> bool:
        """Whether the layer computes with its merged weight at the moment."""
        raise NotImplementedError

    def settings(self) -> dict[str, int | float | bool | str]:
        """Return the settings that affect the layer's results. A resumed run must have the same settings."""
        raise NotImplementedError

    def require_unmerged(self, what: str) -> None:
        """Raise RuntimeError if the layer is merged. `what` is the name of the operation, for the message."""
        if self.merged:
            raise RuntimeError(f"{type(self).__name__}.{what}: the layer is merged; call unmerge() first")

    def require_trainable(self, what: str) -> None:
        """Raise RuntimeError if the layer is merged, because a merged layer computes no gradients."""
        self.require_unmerged(what)

    def prepare_merge(self, name: str, dtype: str | None) -> tuple[Commit, MergeReport | None]:
        """Build the merged weight. The returned function makes the layer use this weight, and cannot fail.

        If `dtype` is given, also return a report. `name` is the name of the layer in the report.
        """
        raise NotImplementedError

    def prepare_unmerge(self) -> Commit:
        """Check that the layer is merged. The returned function undoes the merge, and cannot fail."""
        raise NotImplementedError

    def unloaded(self, shared: SharedWeights) -> Module:
        """Return a plain frozen layer with the merged weight.

        Args:
            shared: a dict through which tied layers share one merged weight during `merge_and_unload`. The
                first of the tied layers stores its merged weight in the dict, and the other tied layers use
                it.
        """
        raise NotImplementedError

    def frozen(self) -> Module:
        """Return a plain layer that shares the frozen weight.

        Raises:
            ValueError: init "pissa" or "olora" moved a part of the weight into the adapter.
        """
        raise NotImplementedError

    def discard(self) -> None:
        """Release the factors and weights, after a plain layer has replaced this one."""
        raise NotImplementedError

    def restart_dropout(self, stream: np.random.SeedSequence) -> None:
        """Restart the dropout stream. The factors do not change."""
        self.dropout_stream = (int(np.random.default_rng(stream).integers(2**63)), 0)

    def reset(self, stream: np.random.SeedSequence) -> None:
        """Draw new initial factors and a new seed for dropout. The random numbers come from `stream`."""
        raise NotImplementedError


def layer_stream(seed: int, name: str) -> np.random.SeedSequence:
    """Return the random stream of the layer with this dotted name."""
    return np.random.SeedSequence(seed, spawn_key=tuple(name.encode()))


_CONTAINERS = (dict, list, tuple)
_HOLDERS = (Module, *_CONTAINERS)  # types that can hold modules; most attributes have other types


def _modules_in(value: object, name: str, around: tuple[int, ...] = ()) -> Iterator[tuple[str, Module]]:
    """Yield (name, module) for the modules in `value`. `around` holds the ids of the containers around
    `value`. A container that contains itself is not entered again."""
    if isinstance(value, Module):
        yield name, value
    elif isinstance(value, _CONTAINERS) and id(value) not in around:
        for key, item in value.items() if isinstance(value, dict) else enumerate(value):
            yield from _modules_in(item, f"{name}.{key}", (*around, id(value)))


def _replace(value: Any, replaced: Mapping[int, Module], around: tuple[int, ...] = ()) -> Any:
    """Return `value` with modules replaced. Lists and dicts change in place; tuples are copied."""
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
    """Return `value` with copies of its modules. `made` maps the id of a module to its copy."""
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
