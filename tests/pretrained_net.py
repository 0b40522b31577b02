"""Small tasks and a pretrained network for the tests of the estimators."""

from pathlib import Path
from typing import Any

import numpy as np

import nplora
from nplora.formats import safetensors

D_IN, WIDTH = 6, 24


def blobs(rng: np.random.Generator, rows: int = 240, classes: int = 3, spread: float = 0.7) -> Any:
    """Rows around one centre for each class, and the classes' numbers."""
    centres = np.random.default_rng(5).normal(0, 2, (classes, D_IN))
    labels = rng.integers(0, classes, rows)
    return centres[labels] + rng.normal(0, spread, (rows, D_IN)), labels


def weights() -> dict[str, Any]:
    """The arrays of a network of three layers with 10 outputs, in float32."""
    rng = np.random.default_rng(7)
    shapes = [(WIDTH, D_IN), (WIDTH, WIDTH), (10, WIDTH)]
    arrays = {}
    for number, shape in enumerate(shapes):
        arrays[f"{2 * number}.weight"] = rng.normal(0, shape[1] ** -0.5, shape).astype(np.float32)
        arrays[f"{2 * number}.bias"] = rng.normal(0, 0.1, shape[0]).astype(np.float32)
    return arrays


def network() -> nplora.Sequential:
    arrays = weights()
    layers = [nplora.Linear(arrays[f"{i}.weight"], arrays[f"{i}.bias"]) for i in (0, 2, 4)]
    return nplora.Sequential(layers[0], nplora.ReLU(), layers[1], nplora.ReLU(), layers[2])


def saved(directory: Path) -> Path:
    """The file of the network."""
    path = directory / "network.safetensors"
    safetensors.save(path, weights())
    return path


def parameters(estimator: Any) -> dict[str, Any]:
    return {p.name: p.value.copy() for p in estimator.model_.parameters()}


def frozen(estimator: Any) -> dict[str, nplora.FrozenWeight]:
    return {name: layer.weight for name, layer in estimator.model_.adapter_layers().items()}
