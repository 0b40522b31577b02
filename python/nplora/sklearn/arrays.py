"""ArrayEstimator: the base class of the estimators for arrays and NumPy networks."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from sklearn.utils.validation import validate_data

from nplora import _check
from nplora.formats import files
from nplora.formats.errors import FormatError
from nplora.nn.module import Module
from nplora.sklearn.base import LoRAEstimator
from nplora.sklearn.networks import ACTIVATIONS, HEADS, Adaptation, adapted, random_features, read_network
from nplora.trainer.fingerprint import base_fingerprint, factors, set_factors

Array = npt.NDArray[Any]

_DTYPES = [np.float64, np.float32]


@dataclass(frozen=True)
class FileModel:
    """A fitted model as it is pickled if its network was read from a file: without the frozen weights.

    Attributes:
        path, activation, adaptation, probe: the arguments with which `read_network` and `adapted` rebuild the
            model.
        values: a dict from names to trained arrays.
        streams: a dict from the name of each layer to the state of its random number generator for dropout.
        base: the fingerprint of the frozen weights, with which `restored` detects that the file has changed.
    """

    path: str
    activation: str
    adaptation: Adaptation
    probe: Array
    values: dict[str, Array]
    streams: dict[str, list[int]]
    base: str

    def restored(self) -> Module:
        """Read the network again and return the model.

        Raises:
            FormatError: the file now holds a different network. OSError: the file cannot be read.
        """
        model = adapted(read_network(self.path, self.activation), self.adaptation, self.probe)
        if base_fingerprint(model, whole=True) != self.base:
            raise FormatError(
                f"{self.path}: the file does not hold the network that the estimator was fitted with"
            )
        set_factors(model, self.values)
        model.set_random_state(self.streams)
        return model


class ArrayEstimator(LoRAEstimator):
    """Base class of the estimators that take arrays as X and train a NumPy network."""

    def _features(self, X: Any, reset: bool) -> Array:
        array: Array = validate_data(self, X, reset=reset, **self._array_options())
        return array

    def _features_and_targets(self, X: Any, y: Any, reset: bool, numeric: bool) -> tuple[Array, Array]:
        options = {"multi_output": True, "y_numeric": True} if numeric else {}
        x, targets = validate_data(self, X, y, reset=reset, **self._array_options(), **options)
        return x, targets

    def _array_options(self) -> dict[str, Any]:
        return {"dtype": _DTYPES, "allow_nd": self.network is not None}

    def _build(self, x: Array, outputs: int, seed: int) -> Module:
        op = type(self).__name__
        _check.choice(op, "head", self.head, HEADS)
        _check.choice(op, "activation", self.activation, ACTIVATIONS)
        targets = None if self.targets is None else _check.texts(op, "targets", self.targets)
        network, head = self.network, self.head
        if network is None:
            features = _check.integer(op, "random_features", self.random_features, least=1)
            network = random_features(x.shape[1], features, self.activation, x.dtype, seed)
            head = "append"
        elif isinstance(network, str | os.PathLike):
            network = read_network(network, self.activation)
        elif not isinstance(network, Module):
            raise TypeError(
                f"{op}: network is {_check.kind(network)}, expected a Module, a path to its weights, or None"
            )
        adaptation = Adaptation(self.rank, self.alpha, self.dropout, targets, head, outputs, seed)
        model = adapted(network, adaptation, x[:1])
        self._source = None
        if isinstance(self.network, str | os.PathLike):
            self._source = files.name(self.network), self.activation, adaptation, x[:1].copy()
        return model

    def __getstate__(self) -> dict[str, Any]:
        state: dict[str, Any] = super().__getstate__()
        if (source := state.get("_source")) is not None:
            model = state["model_"]
            values = {name: value.copy() for name, value in factors(model).items()}
            base = base_fingerprint(model, whole=True)
            path, activation, adaptation, probe = source
            stored = FileModel(path, activation, adaptation, probe, values, model.random_state(), base)
            state = {**state, "model_": stored}
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        if isinstance(stored := state.get("model_"), FileModel):
            state = {**state, "model_": stored.restored()}
        super().__setstate__(state)
