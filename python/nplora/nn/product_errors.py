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
from nplora.nn.int8 import Int8Layer, in_int8
from nplora.nn.lora_linear import LoRALinear
from nplora.nn.module import Module
from nplora.nn.trained_rows import TrainedHead
from nplora.weights import FrozenWeight, Int8Error
from nplora.weights.int8_error import SAMPLES, sample

Array = npt.NDArray[Any]


class ProductErrors:
    """Measures x Wᵀ in each linear layer that multiplies in int8, for a sample of the layer's inputs.

    A layer is measured in its first forward pass of many rows that is computed in int8. `worst` returns the
    largest error, and forgets all errors. So between two calls of `worst`, a layer is measured once at most.
    Frozen convolutions, and layers with so few rows that only their backward pass is in int8, are listed in
    `seen`, but not measured.

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
        seen: the names of the layers that multiplied in int8, in the order of their first products.
    """

    def __init__(self, model: Module) -> None:
        self._model = model
        self.found: dict[str, Int8Error] = {}
        self.seen: list[str] = []

    def sampled(self, run: Callable[[], Any]) -> Callable[[], Any]:
        """Return a function that calls `run` and samples the products in this call."""

        def sampling() -> Any:
            with self._watching():
                return run()

        return sampling

    def worst(self) -> dict[str, Any]:
        """The layer with the largest measured error, as values for the run's log.

        "worst_product" is the name of the layer. "product_error" and "product_bound" are the attributes
        `measured` and `bound` of its `Int8Error`. If no layer was measured, all three values are None.
        """
        found, self.found, self.seen = self.found, {}, []
        if not found:
            return {"worst_product": None, "product_error": None, "product_bound": None}
        name, error = max(found.items(), key=lambda item: nan_as_infinity(item[1].measured))
        return {"worst_product": name, "product_error": error.measured, "product_bound": error.bound}

    @contextlib.contextmanager
    def _watching(self) -> Iterator[None]:
        """Inside the `with` block, replace those methods of the layers that get x."""
        with contextlib.ExitStack() as stack:
            for name, layer in int8_layers(self._model):
                for method in _methods(layer):
                    stack.enter_context(self._replaced(layer, method, name))
            yield

    @contextlib.contextmanager
    def _replaced(self, layer: Any, method: str, name: str) -> Iterator[None]:
        original = getattr(layer, method)

        def sampling(x: npt.ArrayLike, *arguments: Any) -> Any:
            if name not in self.found and in_int8(layer):
                self._sample(name, layer, np.asarray(x))
            return original(x, *arguments)

        vars(layer)[method] = sampling
        try:
            yield
        finally:
            del vars(layer)[method]

    def _sample(self, name: str, layer: Any, x: Array) -> None:
        is_convolution = isinstance(layer, Conv2d)
        rows = (
            x if is_convolution else x.reshape(-1, layer.weight.shape[1])
        )  # the x of a convolution are images
        if name not in self.seen and (is_convolution or len(rows) > _core.constants.float_batch):
            self.seen.append(name)  # at least the backward pass is in int8
        if not is_convolution and len(rows) > _core.constants.small_batch:
            self.found[name] = layer.weight.int8_error(rows[sample(len(rows), SAMPLES)])


def int8_layers(model: Module) -> Iterator[tuple[str, Int8Layer]]:
    """Yield the names and layers of a model that can multiply frozen weights in int8."""
    for name, module in model.named_modules():
        is_whole = isinstance(module, TrainedHead) and module.is_whole  # no frozen row is left
        weight = getattr(module, "weight", None)
        in_codes = isinstance(weight, FrozenWeight) and weight.compute == "int8"
        if isinstance(module, Int8Layer) and in_codes and not is_whole:
            yield name, module


def _methods(layer: Any) -> Iterator[str]:
    """Yield the names of the methods that get x; for a frozen convolution, the one that gets images.

    A stack of layers calls `forward_part`. `LoRALinear.forward` calls `forward_part`, too; in other classes,
    `forward` does not.
    """
    if hasattr(layer, "forward_part") and not isinstance(layer, Conv2d):
        yield "forward_part"
    if not isinstance(layer, LoRALinear):
        yield "forward"


def nan_as_infinity(error: float) -> float:
    """Return the error, or infinity for NaN, so that NaN counts as the largest error."""
    return math.inf if math.isnan(error) else error
