"""SharedWeights: provides the frozen weights of a model in memory, to create another model from them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from nplora.formats.files import Stamp
from nplora.models import families
from nplora.models.config import ModelConfig
from nplora.models.families import TensorSpec
from nplora.nn.module import Module
from nplora.weights import FrozenWeight

Array = npt.NDArray[Any]


class SharedWeights:
    """Provides the tensors of an existing model, without its adapter, to create a new model from them.

    If both models compute in the same arithmetic, they share all matrices. If not, they share only quantised
    matrices and matrices in mapped files, and all other matrices are copied.

    Args:
        modules: a dict from names to the modules of the existing model.
        compute: the arithmetic in which the new model multiplies with frozen weights, such as "bfloat16".
    """

    def __init__(
        self, config: ModelConfig, modules: Mapping[str, Module], mapped: tuple[Stamp, ...], compute: str
    ) -> None:
        self.source, self.mapped = config.source, mapped
        self._config, self._modules, self._compute = config, modules, compute

    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        tensors = families.of(self._config).tensors(self._config)
        return {tensor.name: tuple(self._held(tensor).shape) for tensor in tensors}

    def stored(self, tensor: TensorSpec) -> str:
        return tensor.name

    def unused(self, config: ModelConfig) -> frozenset[str]:
        return frozenset()

    def matrix(self, tensor: TensorSpec) -> FrozenWeight:
        weight = self._held(tensor)
        assert isinstance(weight, FrozenWeight)
        return weight.with_compute("float32" if weight.dtype == "float64" else self._compute)

    def vector(self, tensor: TensorSpec) -> Array:
        return np.asarray(self._held(tensor))

    def _held(self, tensor: TensorSpec) -> Any:
        """The parameter (a weight or bias of an existing module) that holds the values of `tensor`."""
        name, _, attribute = tensor.name.rpartition(".")
        return getattr(self._modules[name], attribute)
