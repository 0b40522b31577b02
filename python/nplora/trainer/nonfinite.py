"""The search for the first NaN or infinity, after a loss or a gradient was not finite."""

from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import numpy.typing as npt

from nplora.nn.module import Module, Parameter

Array = npt.NDArray[Any]

INPUT = "the input x is not finite"
TARGETS = "the targets y are not finite"


def first_nonfinite(model: Module, x: Any, y: Any) -> str:
    """Return a sentence that says where NaN or infinity appears first.

    The input is checked first. Then the forward pass is run again. Each module's output is checked as soon as
    the module's `forward` returns, so the sentence names the innermost module. The targets are checked last,
    because a user's loss may use NaN for rows without a label.
    """
    if _not_finite(x):
        return INPUT
    found: list[str] = []
    with np.errstate(all="ignore"):
        watched = [_watch(name, module, found) for name, module in model.named_modules()]
        try:
            model.forward(x)
        finally:
            for unwatch in watched:
                unwatch()
    if found:
        return found[0]
    return TARGETS if _not_finite(y) else "the output of every layer is finite, but the loss is not"


def _watch(name: str, module: Module, found: list[str]) -> Callable[[], None]:
    """Replace a module's `forward` by one that also checks the output; return a function that undoes this."""
    attributes, forward = vars(module), module.forward
    before = attributes.get("forward")

    def watching(x: Any) -> tuple[Array, Any]:
        y, saved = forward(x)
        if _not_finite(y):
            title = repr(name) if name else "the model itself"
            found.append(f"the first layer whose output is not finite is {title} ({type(module).__name__})")
        return y, saved

    def unwatch() -> None:
        if before is None:
            del attributes["forward"]
        else:
            attributes["forward"] = before

    attributes["forward"] = watching
    return unwatch


def nonfinite_parameters(parameters: Iterable[Parameter], gradients: bool) -> list[str]:
    """The names of the parameters whose values (or gradients, if `gradients` is true) are not finite."""
    return [p.name for p in parameters if _not_finite(p.grad if gradients else p.value)]


def _not_finite(x: Any) -> bool:
    if isinstance(x, tuple | list):
        return any(map(_not_finite, x))
    array = np.asarray(x)
    return array.dtype.kind in "fc" and not bool(np.isfinite(array).all())
