"""Optimisers that write the live parameters in place, the norm of a gradient, and learning-rate schedules."""

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

_name_of = operator.itemgetter(0)  # of a Parameter


class Optimizer:
    """The base of AdamW and SGD.

    An optimiser takes the parameters of a model with every step, and keeps a state array or two for each, by
    name.

    Attributes:
        lr: the base learning rate.
        lr_ratio: multiplies the rate of every parameter named "A" (LoRA+, Hayou et al. 2024, eq. 6: this
            project's A is the paper's B).
        steps: the number of steps made.
    """

    _moments: tuple[str, ...] = ()  # the names of the state arrays that each parameter has

    def __init__(self, lr: float, weight_decay: float, lr_ratio: float) -> None:
        op = type(self).__name__
        for name, value in (("lr", lr), ("weight_decay", weight_decay), ("lr_ratio", lr_ratio)):
            _check_scalar(op, name, value)
        self.lr = _check.at_least(op, "lr", lr, 0)
        self.weight_decay = _check.at_least(op, "weight_decay", weight_decay, 0)
        self.lr_ratio = _check.at_least(op, "lr_ratio", lr_ratio, 0)
        self.steps = 0
        self._state: dict[str, tuple[Array, ...]] | None = None  # {moment: an array for each parameter}
        self._names: tuple[str, ...] = ()  # of those parameters
        self._is_a = np.zeros(0, bool)  # which of them are named "A"

    def init(self, parameters: Iterable[Parameter]) -> None:
        """Start afresh for these parameters: state of zeros, no steps made.

        Raises:
            TypeError: parameters is not what `model.parameters()` returns.
            ValueError: a parameter is not C-contiguous, or its gradient is of another shape or dtype.
        """
        parameters = _checked(f"{type(self).__name__}.init", parameters)
        for parameter in parameters:
            self._check_parameter(parameter)
        values = {p.name: p.value for p in parameters}
        self._state = None  # lets go of its memory, which _zeros takes again
        self._keep(_zeros(dict.fromkeys(self._moments, values)), tuple(values))
        self.steps = 0

    def step(
        self,
        parameters: Iterable[Parameter],
        lr: float | None = None,
        grad_scale: float = 1.0,
        max_norm: float | None = None,
    ) -> float | None:
        """Write every parameter in place, from its gradient times `grad_scale`.

        Args:
            parameters: as `model.parameters()` gives them; the same ones at every step.
            lr: the rate of this step; None: `self.lr`.
            grad_scale: multiplies the gradients (averaging over accumulated batches).
            max_norm: the gradients are scaled down to this Euclidean norm of all of them together, where
                theirs, times `grad_scale`, is above it; None: the norm is not looked at.
        Returns:
            None without a max_norm. With one, the norm before it was clipped; if it is not finite, there was
            no step and nothing is changed.
        Raises:
            ValueError: the parameters are not those of the first step.
            TypeError: parameters is not what `model.parameters()` returns.
            RuntimeError: a parameter is read-only, as those of a merged layer are.
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
            self._check_state(parameters)  # says what is wrong in the user's words
            raise
        if norm is None or math.isfinite(norm):
            self.steps += 1
        return norm

    def _update(
        self, parameters: tuple[Parameter, ...], lr: float, grad_scale: float, max_norm: float | None
    ) -> float | None:
        """One call of the core, which checks all of the arrays before it writes to the first."""
        raise NotImplementedError

    def _keep(self, state: Mapping[str, Mapping[str, Array]], names: tuple[str, ...]) -> None:
        """Hold this state, in the order of these parameters."""
        self._state = {moment: tuple(held[name] for name in names) for moment, held in state.items()}
        self._names, self._is_a = names, np.array([_is_a(name) for name in names], bool)

    def _by_name(self) -> dict[str, dict[str, Array]]:
        """The state as {moment: {parameter: array}}."""
        state = self._state or {}
        return {moment: dict(zip(self._names, arrays, strict=True)) for moment, arrays in state.items()}

    # ---- state ----

    def state_dict(self, copy: bool = True) -> dict[str, Array]:
        """The state: "steps", and "<moment>.<parameter name>" for every array; copy=False: live arrays."""
        arrays = {"steps": np.array(self.steps, np.int64)}
        for moment, by_name in self._by_name().items():
            arrays |= {f"{moment}.{name}": array.copy() if copy else array for name, array in by_name.items()}
        return arrays

    def load_state_dict(self, state: Mapping[str, Array]) -> None:
        """Go on from what `state_dict` returned.

        Where `init` was called before, the state must fit its parameters, and is written into the arrays that
        are there; else the first step checks it. Live arrays, of `state_dict(copy=False)`, must not come
        under other names than their own.

        Raises:
            ValueError: an array is missing, unknown or of another shape or dtype; all of them are listed.
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
        """One sentence for all that keeps `load_state_dict` from taking a state after `init(parameters)`."""
        values = {p.name: p.value for p in parameters}
        return self._misfits(state, dict.fromkeys(self._moments, values))

    def _misfits(self, state: Mapping[str, Array], wanted: Mapping[str, Mapping[str, Array]]) -> list[str]:
        """One sentence for all in a state that is not as wanted: {moment: {parameter: an array like it}}."""
        loaded, unknown = self._by_moment(state)
        problems = [f"unknown entry {key!r}" for key in unknown]
        if "steps" not in state:
            problems.append("the state has no 'steps'")
        else:
            steps = np.asarray(state["steps"])
            if steps.shape or steps.dtype.kind not in "iu" or steps < 0:
                problems.append(f"steps is {np.array2string(steps, threshold=5)}, expected a count")
        for moment, held in wanted.items():
            problems += _differences(moment, loaded[moment], held)
        return problems

    def _by_moment(self, state: Mapping[str, Array]) -> tuple[dict[str, dict[str, Array]], list[str]]:
        """The arrays of a state as {moment: {parameter: array}}, and the keys that belong to none."""
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
                f"{op}: these are not the parameters of the state ({'; '.join(problems)}); init() starts anew"
            )

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

    Args:
        lr: learning rate.
        betas: β₁ and β₂, each in [0, 1).
        eps: at least 0.
        weight_decay: λ, at least 0.
        lr_ratio: multiplies the rate of every A (LoRA+).
    """

    _moments = ("exp_avg", "exp_avg_sq")

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
    """Stochastic gradient descent, as torch computes it.

    g += λ p;  buf = momentum · buf + g;  p -= lr · (g + momentum · buf with nesterov, else buf)

    Args:
        lr: learning rate.
        momentum: in [0, 1); 0 keeps no state.
        weight_decay: λ, at least 0.
        nesterov: look ahead; needs momentum.
        lr_ratio: multiplies the rate of every A (LoRA+).
    """

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
    """Refuse what is no optimiser of this package.

    Raises:
        TypeError: it is something else, an optimiser of torch for example.
    """
    if not isinstance(optimizer, Optimizer):
        got = _check.kind(optimizer)
        raise TypeError(f"{op}: optimizer is {got}, expected an AdamW(...) or SGD(...) of nplora")


def global_norm(parameters: Iterable[Parameter]) -> float:
    """The Euclidean norm of all gradients together, summed in float64.

    Raises:
        TypeError: parameters is not what `model.parameters()` returns.
    """
    return math.sqrt(_core.sum_of_squares(tuple(p[2] for p in _checked("global_norm", parameters))))


def schedule(name: str, step: int, total: int, warmup: int = 0) -> float:
    """What the base learning rate is multiplied by at a step.

    The factor rises in equal steps to 1, which it reaches at step `warmup`; then it stays ("constant"), or
    falls towards 0, which it would reach at step `total`, along a line ("linear") or half a cosine
    ("cosine").

    Args:
        name: "constant", "linear" or "cosine".
        step: counts from 0.
        total: the number of steps of the run.
        warmup: the number of steps before the factor is 1.
    """
    _check.choice("schedule", "name", name, SCHEDULES)
    if step < warmup:
        return (step + 1) / (warmup + 1)
    if name == "constant":
        return 1.0
    done = min(1.0, (step - warmup) / max(1, total - warmup))
    return 1 - done if name == "linear" else (1 + math.cos(math.pi * done)) / 2


def _zeros(like: Mapping[str, Mapping[str, Array]]) -> dict[str, dict[str, Array]]:
    """Zeros for each of these arrays, in one block of memory that an earlier state may have left."""
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
    """The parameters as a tuple; a TypeError names what is none."""
    wanted = "expected what model.parameters() returns, a list of Parameter"
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
    """Refuse what holds many values, such as `model.parameters()`, without showing all of them."""
    if isinstance(value, Sized | Iterator) and not isinstance(value, str):
        raise TypeError(f"{op}: {name} is a {type(value).__name__}, expected a number")


def _is_a(name: str) -> bool:
    return name == "A" or name.endswith(".A")


def _differences(moment: str, found: Mapping[str, Array], wanted: Mapping[str, Array]) -> list[str]:
    """One sentence for every array that is missing, unknown, or of another shape or dtype."""
    problems = [f"{moment}.{name} is missing" for name in wanted if name not in found]
    problems += [f"{moment}.{name} is unknown" for name in found if name not in wanted]
    for name in wanted.keys() & found.keys():
        have, want = found[name], wanted[name]
        if have.shape != want.shape or have.dtype != want.dtype:
            problems.append(
                f"{moment}.{name} is {have.dtype} {have.shape}, expected {want.dtype} {want.shape}"
            )
    return sorted(problems)
