"""ProductErrors: the errors of the int8 products in a pass of a model."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import nplora
from nplora import Conv2d, Linear, LoRAConv2d, LoRALinear, Sequential
from nplora.models.packing import pack
from nplora.nn.int8 import without_int8
from nplora.nn.product_errors import ProductErrors
from nplora.nn.stack import stack_forward
from small_llama import save_small_llama

Array = np.ndarray[Any, Any]


def normal(*shape: int, seed: int = 0) -> Array:
    return np.random.default_rng(seed).standard_normal(shape, np.float32)


class Net(nplora.Module):
    """The layers q and k read x in a stack; the layers `out` and `head` follow."""

    def __init__(self) -> None:
        self.q = LoRALinear(normal(64, 64), rank=2, compute="int8")
        self.k = Linear(normal(64, 64, seed=1), compute="int8")
        self.out = LoRALinear(normal(64, 64, seed=2), rank=2, compute="int8")
        self.head = Linear(normal(64, 64, seed=3), compute="int8")
        self.plain = LoRALinear(normal(64, 64, seed=4), rank=2)

    def forward(self, x: Array) -> tuple[Array, None]:
        (q, k), _ = stack_forward([self.q, self.k], x)
        y = self.head.forward(self.out.forward(q + k)[0])[0]
        return self.plain.forward(y)[0], None


def test_the_errors_are_those_of_the_layers_inputs() -> None:
    net, x = Net(), normal(16, 64, seed=5)
    errors = ProductErrors(net)
    plain, _ = net.forward(x)
    y, _ = errors.sampled(lambda: net.forward(x))()
    assert np.array_equal(y, plain)
    assert errors.found.keys() == {"q", "k", "out", "head"}
    (q, k), _ = stack_forward([net.q, net.k], x)
    wanted = {
        "q": net.q.int8_error(x),
        "k": net.k.weight.int8_error(x),
        "out": net.out.int8_error(q + k),
        "head": net.head.weight.int8_error(net.out.forward(q + k)[0]),
    }
    for name, error in errors.found.items():
        assert error.measured == wanted[name].measured
        assert error.bound == wanted[name].bound
        assert 0 < error.measured < error.bound
    for layer in (net.q, net.k, net.out, net.head):
        assert not {"forward", "forward_part"} & vars(layer).keys()  # nothing is left behind


def test_the_worst_layer_is_the_one_whose_weight_has_an_outlier() -> None:
    """A large column of W makes all codes of its rows coarse, and a small column of x hides it in y."""
    net, x, W = Net(), normal(16, 64, seed=5), normal(64, 64)
    W[:, 7] *= 1000
    x[:, 7] *= 1e-4
    net.q = LoRALinear(W, rank=2, compute="int8")
    errors = ProductErrors(net)
    errors.sampled(lambda: net.forward(x))()
    found = errors.found["q"]
    assert found.measured > 0.1
    assert all(error.measured < 0.03 for name, error in errors.found.items() if name != "q")
    wanted = {"worst_product": "q", "product_error": found.measured, "product_bound": found.bound}
    assert errors.worst() == wanted
    assert errors.worst() == {"worst_product": None, "product_error": None, "product_bound": None}


def test_only_products_in_int8_are_measured() -> None:
    net, x = Net(), normal(16, 64, seed=5)
    errors = ProductErrors(net)
    with without_int8():
        errors.sampled(lambda: net.forward(x))()
    errors.sampled(lambda: net(x))()  # inference
    errors.sampled(lambda: net.forward(x[:8]))()  # few rows
    assert not errors.found
    net.q.int8 = False
    errors.sampled(lambda: net.forward(x))()
    assert errors.found.keys() == {"k", "out", "head"}


def test_convolutions_are_measured_by_their_windows() -> None:
    first = LoRAConv2d(normal(8, 4, 3, 3), rank=2, compute="int8")
    model = Sequential(first, Conv2d(normal(8, 8, 3, 3), compute="int8"))
    images = normal(2, 4, 8, 8)
    errors = ProductErrors(model)
    y, _ = errors.sampled(lambda: model.forward(images))()
    assert np.array_equal(y, model.forward(images)[0])
    assert errors.found.keys() == {"0"}
    assert errors.seen == ["0", "1"]


def test_only_the_frozen_rows_of_a_trained_head_are_a_product_in_int8(tmp_path: Path) -> None:
    path, ids = save_small_llama(tmp_path / "model.gguf", "q8_0"), np.arange(1, 40)
    for options, is_seen in (({"modules_to_save": "lm_head"}, False), ({"trainable_tokens": (5, 6)}, True)):
        lm = nplora.load_model(path, compute="int8")
        lm.add_lora(rank=4, **options)  # type: ignore[arg-type]
        errors = ProductErrors(lm)
        errors.sampled(lambda lm=lm: lm.forward_backward(pack([(ids, ids)]), 1.0))()  # type: ignore[misc]
        assert ("lm_head" in errors.found) == is_seen


def test_a_pass_that_fails_leaves_the_layers_as_they_were() -> None:
    net = Net()
    with pytest.raises(ValueError, match="last axis"):
        ProductErrors(net).sampled(lambda: net.forward(normal(16, 63)))()
    assert "forward_part" not in vars(net.q)
    assert "forward" not in vars(net.head)


def test_all_layers_of_a_model_are_measured(tmp_path: Path) -> None:
    lm = nplora.load_model(save_small_llama(tmp_path / "model.gguf", "q8_0"), compute="int8")
    lm.add_lora(rank=4, seed=1)
    ids = np.random.default_rng(0).integers(1, 250, (4, 40))
    batch = pack([(row, row) for row in ids])
    errors = ProductErrors(lm)
    errors.sampled(lambda: lm.forward_backward(batch, 1.0))()
    wanted = {name for name, module in lm.named_modules() if isinstance(module, LoRALinear | Linear)}
    assert errors.found.keys() == wanted
