"""Optimisers, which update parameters in place; the norm of the gradients; and learning-rate schedules."""

import itertools
import math
import operator
from collections.abc import Iterable, Iterator, Mapping, Sequence, Sized
from typing import Any

import numpy as np
import numpy.typing as npt

from nplora import _check, _core
from nplora.nn.module import Parameter
from nplora.weights import buffers

Array = npt.NDArray[Any]

SCHEDULES = ("constant", "linear", "cosine")

_LINE = _core.constants.cache_line

_name_of = operator.itemgetter(0)  # the name of a Parameter


class Optimizer:
    """Base class of AdamW and SGD.

    The parameters of the model are passed to every step. For each parameter, identified by its name, the
    optimiser stores up to two state arrays, called moments.

        >>> import nplora, numpy as np
        >>> layer = nplora.LoRALinear(np.eye(4), rank=1, rng=0)
        >>> optimizer = nplora.SGD(lr=0.1)
        >>> layer.dA[...] = 1
        >>> optimizer.step(layer.parameters())
        >>> optimizer.steps, layer.A[:, 0]
        (1, array([-0.1, -0.1, -0.1, -0.1], dtype=float32))

    Attributes:
        lr: the base learning rate.
        lr_ratio: the learning rate of every parameter named "A" is multiplied by this ratio (LoRA+, Hayou et
            al. 2024, eq. 6). The parameter "A" is called B in the paper.
        steps: the number of steps that the optimiser has made.
    """

    _moments: tuple[str, ...] = ()  # the names of the state arrays of each parameter

    def __init__(self, lr: float, weight_decay: float, lr_ratio: float) -> None:
        op = type(self).__name__
        for name, value in (("lr", lr), ("weight_decay", weight_decay), ("lr_ratio", lr_ratio)):
            _check_scalar(op, name, value)
        self.lr = _check.at_least(op, "lr", lr, 0)
        self.weight_decay = _check.at_least(op, "weight_decay", weight_decay, 0)
        self.lr_ratio = _check.at_least(op, "lr_ratio", lr_ratio, 0)
        self.steps = 0
        self._state: dict[str, tuple[Array, ...]] | None = None  # {moment: an array for each parameter}
        self._names: tuple[str, ...] = ()  # the names of the parameters, in the order of the arrays
        self._is_a = np.zeros(0, bool)  # which of the parameters are named "A"

    def init(self, parameters: Iterable[Parameter]) -> None:
        """Set the number of steps, and the state arrays for these parameters, to zero.

        The first call of `step` calls `init` if the caller has not done so.

            >>> import nplora, numpy as np
            >>> layer = nplora.LoRALinear(np.eye(4), rank=1)
            >>> optimizer = nplora.AdamW()
            >>> optimizer.init(layer.parameters())
            >>> sorted(optimizer.state_dict())
            ['exp_avg.A', 'exp_avg.B', 'exp_avg_sq.A', 'exp_avg_sq.B', 'steps']

        Raises:
            TypeError: `parameters` is not a list of `Parameter`; `model.parameters()` returns such a list.
            ValueError: a parameter is not C-contiguous, or the shape or dtype of its gradient is different.
        """
        parameters = _checked(f"{type(self).__name__}.init", parameters)
        for parameter in parameters:
            self._check_parameter(parameter)
        values = {p.name: p.value for p in parameters}
        self._state = None  # releases the old arrays, so that _zeros can reuse their memory
        self._keep(_zeros(dict.fromkeys(self._moments, values)), tuple(values))
        self.steps = 0

    def step(
        self,
        parameters: Iterable[Parameter],
        lr: float | None = None,
        grad_scale: float = 1.0,
        max_norm: float | None = None,
    ) -> float | None:
        """Update every parameter in place, from its gradient times `grad_scale`.

            >>> import nplora, numpy as np
            >>> layer = nplora.LoRALinear(np.eye(4), rank=1, rng=0)
            >>> layer.dA[...] = 1
            >>> nplora.AdamW().step(layer.parameters(), max_norm=1.0)     # the norm before clipping
            2.0

        Args:
            parameters: the result of `model.parameters()`, with the same parameters at every step.
            lr: the learning rate of this step, or None for `self.lr`.
            grad_scale: the gradients are multiplied by this number, such as 1 / the number of accumulated
                batches.
            max_norm: a limit on the Euclidean norm of all gradients together, after the multiplication by
                `grad_scale`. If the norm is above the limit, all gradients are scaled down. None means no
                limit, and no norm is computed.
        Returns:
            the norm before clipping, or None if `max_norm` is None. If the norm is not finite, the optimiser
            makes no step and changes no parameter.
        Raises:
            ValueError: the parameters are not the same as in the first step.
            TypeError: `parameters` is not a list of `Parameter`; `model.parameters()` returns such a list.
            RuntimeError: a parameter is read-only, such as the factors of a merged layer.
        """
        op = f"{type(self).__name__}.step"
        rate = self.lr if lr is None else _check.at_least(op, "lr", lr, 0)
        grad_scale = _check.number(op, "grad_scale", grad_scale)
        if max_norm is not None and not max_norm > 0:
            raise ValueError(f"{op}: max_norm is {max_norm}, expected above 0 or None")
        parameters = _checked(op, parameters)
        if self._state is None:
            self.init(parameters)
        names = tuple(map(_name_of, parameters))
        if names != self._names:
            self._check_state(parameters)
            self._keep(self._by_name(), names)
        try:
            norm = self._update(parameters, rate, grad_scale, max_norm)
        except (TypeError, ValueError):
            self._check_state(parameters)  # raises an error with a better message if it finds the cause
            raise
        if norm is None or math.isfinite(norm):
            self.steps += 1
        return norm

    def _update(
        self, parameters: tuple[Parameter, ...], lr: float, grad_scale: float, max_norm: float | None
    ) -> float | None:
        """Make a step in one call of the C++ core. The core checks all arrays before it changes any array."""
        raise NotImplementedError

    def _keep(self, state: Mapping[str, Mapping[str, Array]], names: tuple[str, ...]) -> None:
        """Store `state`, a dict {moment: {parameter name: array}}. `names` has the parameter names in the
        order in which the model lists its parameters."""
        self._state = {moment: tuple(held[name] for name in names) for moment, held in state.items()}
        self._names, self._is_a = names, np.array([_is_a(name) for name in names], bool)

    def _by_name(self) -> dict[str, dict[str, Array]]:
        """Return the state as a dict {moment: {parameter name: array}}."""
        state = self._state or {}
        return {moment: dict(zip(self._names, arrays, strict=True)) for moment, arrays in state.items()}

    # ---- state ----

    def state_dict(self, copy: bool = True) -> dict[str, Array]:
        """Return the state as a dict: the key "steps", and a key "<moment>.<parameter name>" for each array.

        With copy=False, the result has the optimiser's own arrays, which the next step changes.

        >>> import nplora, numpy as np
        >>> layer, optimizer = nplora.LoRALinear(np.eye(4), rank=1), nplora.AdamW()
        >>> optimizer.step(layer.parameters())
        >>> state = optimizer.state_dict()
        >>> state["steps"]
        array(1)
        >>> nplora.AdamW().load_state_dict(state)
        """
        arrays = {"steps": np.array(self.steps, np.int64)}
        for moment, by_name in self._by_name().items():
            arrays |= {f"{moment}.{name}": array.copy() if copy else array for name, array in by_name.items()}
        return arrays

    def load_state_dict(self, state: Mapping[str, Array]) -> None:
        """Continue from a result of `state_dict`, whose docstring has an example.

        The values of `state` are copied. After `init` or a step, `state` must fit the parameters of the
        optimiser. Until then, the optimiser does not know its parameters, so its first step checks whether
        `state` fits.

        `state_dict(copy=False)` returns the optimiser's own arrays. If you swap the names of these arrays, do
        not load them into the same optimiser: the first copy would overwrite an array before it is read.

        Raises:
            ValueError: an array is missing or unknown, or has the wrong shape or dtype. The message lists all
                such arrays.
        """
        op = f"{type(self).__name__}.load_state_dict"
        loaded, _ = self._by_moment(state)
        first = next(iter(loaded.values()), {})
        wanted = dict.fromkeys(self._moments, first) if self._state is None else self._by_name()
        problems = self._misfits(state, wanted)
        if problems:
            raise ValueError(f"{op}: the state does not fit: {'; '.join(problems)}")
        steps = int(state["steps"])
        if self._state is None and (steps or first):
            self._keep(_zeros(loaded), tuple(first))
        for moment, held in self._by_name().items():
            for name, array in held.items():
                np.copyto(array, loaded[moment][name])
        self.steps = steps

    def differences(self, state: Mapping[str, Array], parameters: Sequence[Parameter]) -> list[str]:
        """List the reasons why `load_state_dict` would refuse `state` in an optimiser of these parameters."""
        values = {p.name: p.value for p in parameters}
        return self._misfits(state, dict.fromkeys(self._moments, values))

    def _misfits(self, state: Mapping[str, Array], wanted: Mapping[str, Mapping[str, Array]]) -> list[str]:
        """Return a sentence for each difference between `state` and the arrays `wanted`."""
        loaded, unknown = self._by_moment(state)
        problems = [f"unknown entry {key!r}" for key in unknown]
        if "steps" not in state:
            problems.append("the state has no 'steps'")
        else:
            steps = np.asarray(state["steps"])
            if steps.shape or steps.dtype.kind not in "iu" or steps < 0:
                problems.append(
                    f"steps is {np.array2string(steps, threshold=5)}, expected an integer of at least 0"
                )
        for moment, held in wanted.items():
            problems += _differences(moment, loaded[moment], held)
        return problems

    def _by_moment(self, state: Mapping[str, Array]) -> tuple[dict[str, dict[str, Array]], list[str]]:
        """Return the arrays of a state as a dict {moment: {parameter name: array}}, and a list of the keys of
        `state` that this optimiser does not know."""
        loaded: dict[str, dict[str, Array]] = {moment: {} for moment in self._moments}
        unknown = []
        for key, array in state.items():
            moment, _, name = key.partition(".")
            if moment in loaded and name:
                loaded[moment][name] = np.asarray(array)
            elif key != "steps":
                unknown.append(key)
        return loaded, unknown

    def _check_state(self, parameters: Sequence[Parameter]) -> None:
        op = f"{type(self).__name__}.step"
        for parameter in parameters:
            self._check_parameter(parameter)
            if not parameter.value.flags.writeable:
                raise RuntimeError(f"{op}: parameter {parameter.name!r} is read-only; is its layer merged?")
        values = {p.name: p.value for p in parameters}
        if len(values) != len(parameters):
            raise ValueError(f"{op}: two parameters have the same name")
        problems = [p for moment, held in self._by_name().items() for p in _differences(moment, held, values)]
        if problems:
            raise ValueError(
                f"{op}: the parameters do not fit the optimiser's state ({'; '.join(problems)}); "
                "init() resets the state"
            )

    def __repr__(self) -> str:
        settings = {name: value for name, value in vars(self).items() if not name.startswith("_")}
        settings["steps"] = settings.pop("steps")  # last
        return f"{type(self).__name__}({', '.join(f'{name}={value!r}' for name, value in settings.items())})"

    def _check_parameter(self, parameter: Parameter) -> None:
        op, (name, value, grad) = type(self).__name__, parameter
        for what, array in ((name, value), (f"the gradient of {name}", grad)):
            if not isinstance(array, np.ndarray) or array.dtype not in (np.float32, np.float64):
                raise TypeError(f"{op}: {what} is not an array of float32 or float64")
            if not array.flags.c_contiguous:
                raise ValueError(f"{op}: {what} is not C-contiguous")
        if grad.shape != value.shape or grad.dtype != value.dtype:
            raise ValueError(
                f"{op}: {name} is {value.dtype} {value.shape}, but its gradient is {grad.dtype} {grad.shape}"
            )


class AdamW(Optimizer):
    """Adam with decoupled weight decay (Loshchilov & Hutter 2019, algorithm 2).

    m = β₁ m + (1 - β₁) g;  v = β₂ v + (1 - β₂) g²;  p = p (1 - lr λ) - lr m̂ / (√v̂ + eps)

    Here p is a parameter and g its gradient. After t steps, m̂ = m / (1 - β₁ᵗ) and v̂ = v / (1 - β₂ᵗ).

        >>> import nplora
        >>> nplora.AdamW(lr=2e-4)
        AdamW(lr=0.0002, weight_decay=0.01, lr_ratio=1.0, betas=(0.9, 0.999), eps=1e-08, steps=0)

    Args:
        lr: learning rate.
        betas: β₁ and β₂, each in [0, 1).
        eps: added to √v̂; at least 0.
        weight_decay: λ, at least 0.
        lr_ratio: the learning rate of every A is multiplied by this ratio (LoRA+).
    """

    _moments = ("exp_avg", "exp_avg_sq")

    @_check.keywords
    def __init__(
        self,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.01,
        lr_ratio: float = 1.0,
    ) -> None:
        super().__init__(lr, weight_decay, lr_ratio)
        try:
            beta1, beta2 = betas
        except (TypeError, ValueError) as error:
            got = f"a {type(betas).__name__} of {len(betas)}" if isinstance(betas, Sized) else repr(betas)
            raise TypeError(f"AdamW: betas is {got}, expected two numbers (β₁, β₂)") from error
        for name, value in (("betas[0]", beta1), ("betas[1]", beta2), ("eps", eps)):
            _check_scalar("AdamW", name, value)
        self.betas = (
            _check.probability("AdamW", "betas[0]", beta1),
            _check.probability("AdamW", "betas[1]", beta2),
        )
        self.eps = _check.at_least("AdamW", "eps", eps, 0)

    def _update(
        self, parameters: tuple[Parameter, ...], lr: float, grad_scale: float, max_norm: float | None
    ) -> float | None:
        assert self._state is not None
        return _core.adamw_step(
            parameters,
            self._state["exp_avg"],
            self._state["exp_avg_sq"],
            lr,
            lr * self.lr_ratio,
            self._is_a,
            self.weight_decay,
            *self.betas,
            self.eps,
            self.steps + 1,
            grad_scale,
            max_norm,
        )


class SGD(Optimizer):
    """Stochastic gradient descent with torch's formulas.

    g += λ p;  buf = momentum · buf + g;  p -= lr · buf, or with Nesterov p -= lr · (g + momentum · buf)

    Here p is a parameter and g its gradient.

        >>> import nplora
        >>> nplora.SGD(lr=0.1, momentum=0.9)
        SGD(lr=0.1, weight_decay=0.0, lr_ratio=1.0, momentum=0.9, nesterov=False, steps=0)

    Args:
        lr: learning rate.
        momentum: at least 0 and below 1. With 0, the optimiser keeps no state arrays.
        weight_decay: λ, at least 0.
        nesterov: use Nesterov's momentum, which needs `momentum` above 0.
        lr_ratio: the learning rate of every A is multiplied by this ratio (LoRA+).
    """

    @_check.keywords
    def __init__(
        self,
        lr: float,
        momentum: float = 0.0,
        weight_decay: float = 0.0,
        nesterov: bool = False,
        lr_ratio: float = 1.0,
    ) -> None:
        super().__init__(lr, weight_decay, lr_ratio)
        _check_scalar("SGD", "momentum", momentum)
        self.momentum = _check.probability("SGD", "momentum", momentum)
        self.nesterov = bool(nesterov)
        if nesterov and not momentum:
            raise ValueError("SGD: nesterov=True needs momentum above 0")
        self._moments = ("momentum",) if momentum else ()

    def _update(
        self, parameters: tuple[Parameter, ...], lr: float, grad_scale: float, max_norm: float | None
    ) -> float | None:
        assert self._state is not None
        return _core.sgd_step(
            parameters,
            self._state["momentum"] if self.momentum else None,
            lr,
            lr * self.lr_ratio,
            self._is_a,
            self.weight_decay,
            self.momentum,
            self.nesterov,
            grad_scale,
            max_norm,
        )


def require(op: str, optimizer: object) -> None:
    """Raise TypeError if `optimizer` is not an optimiser of nplora.

    Raises:
        TypeError: `optimizer` is something else, such as an optimiser of torch.

    >>> require("my_loop", AdamW(lr=0.01))
    >>> require("my_loop", "adam")
    Traceback (most recent call last):
    TypeError: my_loop: optimizer is 'adam', expected an AdamW(...) or SGD(...) of nplora
    """
    if not isinstance(optimizer, Optimizer):
        got = _check.kind(optimizer)
        raise TypeError(f"{op}: optimizer is {got}, expected an AdamW(...) or SGD(...) of nplora")


def global_norm(parameters: Iterable[Parameter]) -> float:
    """Return the Euclidean norm of all gradients together, summed in float64.

        >>> import nplora, numpy as np
        >>> layer = nplora.LoRALinear(np.eye(4), rank=1)
        >>> layer.dA[...] = 1
        >>> nplora.optim.global_norm(layer.parameters())
        2.0

    Raises:
        TypeError: `parameters` is not a list of `Parameter`; `model.parameters()` returns such a list.
    """
    return math.sqrt(_core.sum_of_squares(tuple(p[2] for p in _checked("global_norm", parameters))))


def schedule(name: str, step: int, total: int, warmup: int = 0) -> float:
    """Return the factor that multiplies the base learning rate at a step.

    During the warm-up, the factor rises linearly; it reaches 1 at step `warmup`. After the warm-up, the
    factor stays 1 ("constant"), falls along a line ("linear"), or falls along half a cosine wave ("cosine").
    A falling factor reaches 0 at step `total`.

        >>> import nplora
        >>> [nplora.optim.schedule("linear", step, total=5, warmup=1) for step in range(5)]
        [0.5, 1.0, 0.75, 0.5, 0.25]

    Args:
        name: "constant", "linear" or "cosine".
        step: the number of the step, counted from 0.
        total: the number of steps of the run.
        warmup: the number of warm-up steps.
    Raises:
        ValueError: there is no schedule of this name.
    """
    _check.choice("schedule", "name", name, SCHEDULES)
    if step < warmup:
        return (step + 1) / (warmup + 1)
    if name == "constant":
        return 1.0
    done = min(1.0, (step - warmup) / max(1, total - warmup))
    return 1 - done if name == "linear" else (1 + math.cos(math.pi * done)) / 2


def _zeros(like: Mapping[str, Mapping[str, Array]]) -> dict[str, dict[str, Array]]:
    """Return arrays of zeros with the shapes and dtypes of the arrays in `like`.

    All new arrays are in one block, which can reuse the memory of an earlier state that was released.
    """
    sizes = [-(-array.nbytes // _LINE) * _LINE for held in like.values() for array in held.values()]
    block = buffers.empty((sum(sizes),), np.uint8)
    block.fill(0)
    offsets = itertools.accumulate(sizes, initial=0)
    return {
        moment: {
            name: np.ndarray(array.shape, array.dtype, block, offset)
            for (name, array), offset in zip(held.items(), offsets, strict=False)
        }
        for moment, held in like.items()
    }


def _checked(op: str, parameters: Any) -> tuple[Parameter, ...]:
    """Return the parameters as a tuple. Raise TypeError if an item is not a parameter."""
    wanted = "expected a list of Parameter, such as model.parameters() returns"
    if isinstance(parameters, str | bytes) or not np.iterable(parameters):
        raise TypeError(f"{op}: parameters is {_check.kind(parameters)}, {wanted}")
    checked = tuple(parameters)
    if {*map(type, checked)} <= {Parameter}:
        return checked
    for index, item in enumerate(checked):
        if not (isinstance(item, tuple) and len(item) == 3 and isinstance(item[0], str)):
            raise TypeError(f"{op}: parameters[{index}] is {_check.kind(item)}, {wanted}")
    return tuple(itertools.starmap(Parameter, checked))


def _check_scalar(op: str, name: str, value: object) -> None:
    """Raise TypeError if `value` is a collection, such as a list. The message does not show the items."""
    if isinstance(value, Sized | Iterator) and not isinstance(value, str):
        hint = _check.parameters_hint(name, value)
        raise TypeError(f"{op}: {name} is a {type(value).__name__}, expected a number{hint}")


def _is_a(name: str) -> bool:
    return name == "A" or name.endswith(".A")


def _differences(moment: str, found: Mapping[str, Array], wanted: Mapping[str, Array]) -> list[str]:
    """Return a sentence for each array that is missing or unknown, or has the wrong shape or dtype."""
    problems = [f"{moment}.{name} is missing" for name in wanted if name not in found]
    problems += [f"{moment}.{name} is unknown" for name in found if name not in wanted]
    for name in wanted.keys() & found.keys():
        have, want = found[name], wanted[name]
        if have.shape != want.shape or have.dtype != want.dtype:
            problems.append(
                f"{moment}.{name} is {have.dtype} {have.shape}, expected {want.dtype} {want.shape}"
            )
    return sorted(problems)
