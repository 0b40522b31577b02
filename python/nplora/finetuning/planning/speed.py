"""Measure the speed of a model on this machine, in about a second, on one block and the head."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt

from nplora.finetuning.planning.memory import Adapters, MicroBatch, ProductMethod
from nplora.lm import LanguageModel
from nplora.models.decoder import frozen_weights
from nplora.models.positions import packed_positions
from nplora.nn.int8 import arithmetic_of_inference
from nplora.runtime.giving_way import give_way
from nplora.weights import FrozenWeight, buffers, keeping_int8

Array = npt.NDArray[Any]

_HEAD_ROWS = 64  # rows in the longer timing of the head; more logits may need more memory than a plan has
_FEW, _MANY = 32, 256  # tokens in two timings, to separate the cost of a call from the cost of a token
_ATTENTION = 4, 10  # operations per score and element of a head: two products forward, five backward
_LOW_RANK = 2.0  # products with the factors run at about half the rate of the frozen products


@dataclass(frozen=True)
class Cost:
    """The time of a computation for n tokens: `call` + n * `token` seconds."""

    call: float
    token: float

    def seconds(self, tokens: int) -> float:
        return self.call + self.token * tokens

    def plus(self, more: float) -> Cost:
        """The cost if each token takes `more` additional seconds."""
        return Cost(self.call, self.token + more)


@dataclass(frozen=True)
class Speed:
    """The speed of a model with one product method.

    Attributes:
        forward, backward: the costs of a block's passes.
        head_forward, head_backward: the costs of the head's passes.
        operations: floating-point operations per second in the products of a block.
    """

    forward: Cost
    backward: Cost
    head_forward: Cost
    head_backward: Cost
    operations: float

    def step(
        self, lm: LanguageModel, adapters: Adapters, one: MicroBatch, recompute: bool, inference: Speed
    ) -> float:
        """The predicted seconds of the forward and backward passes of a micro-batch.

        Args:
            inference: the speed with the product method of inference, which the blocks before the first
                adapted block use.
        """
        blocks = lm.config.num_hidden_layers
        trained = blocks - adapters.first_block(blocks)
        trained_forwards = 2 * trained if recompute else trained
        forwards = blocks - trained + trained_forwards
        products = trained_forwards * self.forward.seconds(one.tokens)
        products += (blocks - trained) * inference.forward.seconds(one.tokens)
        products += trained * self.backward.seconds(one.tokens)
        longer = one.tokens * max(0, one.longest - _MANY) / 2 * lm.config.num_attention_heads
        scores = longer * lm.config.head_dim * (forwards * _ATTENTION[0] + trained * _ATTENTION[1])
        factors = sum(adapters.rank_of(name) * sum(shape) for name, shape in adapters.shapes.items())
        low = (6.0 * factors - 2.0 * adapters.frozen) * one.tokens * _LOW_RANK  # a frozen B has no gradient
        whole = 2.0 * max(adapters.rows.values(), default=0) * one.targets  # the gradient of a trained head
        head = self.head_forward.seconds(one.targets) + self.head_backward.seconds(one.targets)
        return products + (scores + low + whole) / self.operations + head

    def forward_pass(self, lm: LanguageModel, tokens: int, targets: int) -> float:
        """The predicted seconds of a forward pass of the whole model."""
        return lm.config.num_hidden_layers * self.forward.seconds(tokens) + self.head_forward.seconds(targets)


def measured(
    lm: LanguageModel, methods: tuple[ProductMethod, ...], int8_head: str = "forward"
) -> dict[ProductMethod, Speed]:
    """Measure the speed with each method, and with the current number of threads.

    Args:
        int8_head: the arithmetic of the head in plans in int8: "off", "forward" or "on".
    Returns:
        the speed with each of these methods, with its method of inference, and with the model's own method.
    """
    block = lm.model.layers[0]
    config = lm.config
    x = np.random.default_rng(0).standard_normal((_MANY, config.hidden_size), np.float32)
    positions = packed_positions(np.array([0, _MANY]))

    def whole_forward() -> Any:
        return block.run(x, positions)[1]

    def whole() -> None:
        block.run_backward(x.copy(), whole_forward(), positions, need_dx=True)

    forward_seconds, whole_seconds = seconds(whole_forward), seconds(whole)
    linears = list(frozen_weights([block]))
    own = ProductMethod(lm.compute)
    needed = dict.fromkeys((*methods, *(method.of_inference for method in methods), own))
    products = {method: _products(lm, linears, method, int8_head) for method in needed}
    rest = max(0.0, forward_seconds - products[own].forward.seconds(_MANY)) / _MANY
    rest_backward = max(0.0, whole_seconds - forward_seconds - products[own].backward.seconds(_MANY)) / _MANY
    buffers.release()
    return {
        method: dataclasses.replace(
            speed, forward=speed.forward.plus(rest), backward=speed.backward.plus(rest_backward)
        )
        for method, speed in products.items()
    }


def _products(lm: LanguageModel, linears: list[FrozenWeight], method: ProductMethod, int8_head: str) -> Speed:
    """Measure the speed of the products with frozen weights, without the other work of a block."""
    compute = method.compute
    weights = [weight.with_compute(compute) for weight in linears]
    with keeping_int8(weights if method.keep_int8 else []):
        forward = _cost(weights, FrozenWeight.matmul, 1, (_FEW, _MANY))
        backward = _cost(weights, FrozenWeight.matmul_t, 0, (_FEW, _MANY))
    forward_of_head = arithmetic_of_inference(compute) if int8_head == "off" else compute
    backward_of_head = compute if int8_head == "on" else arithmetic_of_inference(compute)
    head, head_rows = list(frozen_weights([lm.lm_head])), (_HEAD_ROWS // 4, _HEAD_ROWS)
    there = [weight.with_compute(forward_of_head) for weight in head]
    to = _cost(there, FrozenWeight.matmul, 1, head_rows)
    back = _cost([w.with_compute(backward_of_head) for w in there], FrozenWeight.matmul_t, 0, head_rows)
    operations = 2.0 * sum(weight.size for weight in weights) / forward.token
    return Speed(forward, backward, to, back, operations)


def _cost(
    weights: list[FrozenWeight], product: Callable[..., Array], axis: int, sizes: tuple[int, int]
) -> Cost:
    """Measure the cost of one product with each of the weights: once with few tokens, and once with many."""
    few, many = (seconds(partial(_multiply, weights, product, axis, rows)) for rows in sizes)
    token = max((many - few) / (sizes[1] - sizes[0]), 0.5 * many / sizes[1])
    return Cost(max(0.0, many - token * sizes[1]), token)


def _multiply(weights: list[FrozenWeight], product: Callable[..., Array], axis: int, rows: int) -> None:
    for weight in weights:
        x = buffers.empty((rows, weight.shape[axis]), np.float32)
        x.fill(1)
        product(weight, x, buffers.empty((rows, weight.shape[1 - axis]), np.float32))


def seconds(run: Callable[[], Any]) -> float:
    """Call the function three times, and return the shorter time of the last two calls."""
    times = []
    for _ in range(3):
        give_way()
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return min(times[1:])
