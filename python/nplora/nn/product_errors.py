"""ProductErrors: during a pass of a model, samples the errors of its int8 products."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

from nplora import _core
from nplora.nn.conv import Conv2d
from nplora.nn.int8 import in_int8
from nplora.nn.lora_linear import LoRALinear
from nplora.nn.module import Module
from nplora.weights import FrozenWeight, Int8Error
from nplora.weights.int8_error import SAMPLES, sample

Array = npt.NDArray[Any]


class ProductErrors:
    """Measures x Wᵀ in each linear layer that multiplies in int8, for a sample of the layer's inputs.

    A layer is measured in its first forward pass of many rows that is computed in int8. `worst` returns the
    largest error, and forgets all errors. So each layer is measured once between two calls of `worst`. Frozen
    convolutions are not measured.

    >>> import nplora, numpy as np
    >>> from nplora.nn.product_errors import ProductErrors
    >>> rng = np.random.default_rng(0)
    >>> layers = [nplora.LoRALinear(rng.standard_normal((64, 64)), rank=1, compute="int8") for _ in range(2)]
    >>> model, x = nplora.Sequential(*layers), rng.standard_normal((16, 64))
    >>> errors = ProductErrors(model)
    >>> y, saved = errors.sampled(lambda: model.forward(x))()
    >>> sorted(errors.found), errors.worst()["product_error"] < 0.02
    (['0', '1'], True)

    Attributes:
        found: a dict from the names of layers to their errors.
    """

    def __init__(self, model: Module) -> None:
        self._model = model
        self.found: dict[str, Int8Error] = {}

    def sampled(self, run: Callable[[], Any]) -> Callable[[], Any]:
        """Return a function that calls `run` and samples the products in this call."""

        def sampling() -> Any:
            with self._watching():
                return run()

        return sampling

    def worst(self) -> dict[str, Any]:
        """The layer with the largest measured error, for the run's log. Without a measured layer: None.

        "worst_product" is the name of the layer. "product_error" and "product_bound" are the attributes
        `measured` and `bound` of its `Int8Error`.
        """
        found, self.found = self.found, {}
        if not found:
            return {"worst_product": None, "product_error": None, "product_bound": None}
        name, error = max(found.items(), key=lambda item: _or_infinity(item[1].measured))
        return {"worst_product": name, "product_error": error.measured, "product_bound": error.bound}

    @contextlib.contextmanager
    def _watching(self) -> Iterator[None]:
        """Inside the `with` block, replace those methods of the layers that get x."""
        with contextlib.ExitStack() as stack:
            for name, module in self._model.named_modules():
                weight = getattr(module, "weight", None)
                if hasattr(module, "int8") and isinstance(weight, FrozenWeight) and weight.compute == "int8":
                    for method in _methods(module):
                        stack.enter_context(self._replaced(module, method, name))
            yield

    @contextlib.contextmanager
    def _replaced(self, layer: Any, method: str, name: str) -> Iterator[None]:
        original = getattr(layer, method)

        def sampling(x: npt.ArrayLike, *arguments: Any) -> Any:
            if name not in self.found and in_int8(layer):
                self._sample(name, layer.weight, np.asarray(x))
            return original(x, *arguments)

        vars(layer)[method] = sampling
        try:
            yield
        finally:
            del vars(layer)[method]

    def _sample(self, name: str, weight: FrozenWeight, x: Array) -> None:
        rows = x.reshape(-1, weight.shape[1])
        if len(rows) > _core.constants.small_batch:
            self.found[name] = weight.int8_error(rows[sample(len(rows), SAMPLES)])


def _methods(layer: Module) -> Iterator[str]:
    """Yield the names of the methods that get x.

    A stack of layers calls `forward_part`. `LoRALinear.forward` calls `forward_part`, too; in other classes,
    `forward` does not. The `forward` of a convolution gets images instead of x.
    """
    if hasattr(layer, "forward_part"):
        yield "forward_part"
    if not isinstance(layer, LoRALinear | Conv2d):
        yield "forward"


def _or_infinity(error: float) -> float:
    return math.inf if math.isnan(error) else error
