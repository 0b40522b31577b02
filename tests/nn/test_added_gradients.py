"""A backward pass adds to each gradient once, so that several processes get the bits of one process."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import nplora

ROWS = 300  # more than the depth of a block of a sum


def weight(*shape: int) -> Any:
    return np.random.default_rng(0).normal(size=shape)


LAYERS: dict[str, Callable[[], nplora.Module]] = {
    "lora": lambda: nplora.LoRALinear(weight(24, 16), rank=3, rng=0, init="gaussian"),
    "dora": lambda: nplora.LoRALinear(weight(24, 16), rank=3, rng=0, init="gaussian", use_dora=True),
    "bfloat16": lambda: nplora.LoRALinear(weight(24, 16), rank=3, rng=0, init="gaussian", compute="bfloat16"),
    "float64": lambda: nplora.LoRALinear(weight(24, 16), rank=3, rng=0, init="gaussian", dtype="float64"),
    "linear": lambda: nplora.Linear(weight(24, 16), trainable=True),
    "lora embedding": lambda: nplora.LoRAEmbedding(weight(9, 16), rank=3, rng=0, init="gaussian"),
    "embedding": lambda: nplora.Embedding(weight(9, 16), trainable=True),
    "layer norm": lambda: nplora.LayerNorm(weight(16), weight(16), trainable=True),
    "rms norm": lambda: nplora.RMSNorm(weight(16), trainable=True),
}


@pytest.mark.parametrize("name", LAYERS)
def test_two_passes_give_the_sum_of_their_gradients_bit_for_bit(name: str) -> None:
    rng = np.random.default_rng(1)

    def one_pass(layer: nplora.Module) -> None:
        x = (
            rng.integers(0, 9, ROWS)
            if "embedding" in name
            else rng.normal(size=(ROWS, 16)).astype(np.float32)
        )
        y, saved = layer.forward(x)
        layer.backward(rng.normal(size=y.shape).astype(y.dtype), saved)

    together, apart = LAYERS[name](), [LAYERS[name](), LAYERS[name]()]
    for _ in range(2):
        one_pass(together)
    rng = np.random.default_rng(1)
    for layer in apart:
        one_pass(layer)
    found = {p.name: p.grad for p in together.parameters()}
    parts = [{p.name: p.grad for p in layer.parameters()} for layer in apart]
    assert found
    for parameter, grad in found.items():
        assert parts[0][parameter].any(), parameter
        np.testing.assert_array_equal(grad, parts[0][parameter] + parts[1][parameter])
