"""ClassifierHead: turns hidden states into logits, forward and backward.

All layers of the head are trained, except those that `frozen` names.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Container, Iterator, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from nplora.lm.pooling import Pooling, PoolingSaved
from nplora.models.families.head_spec import HeadSpec
from nplora.nn import GELU, LayerNorm, Linear, ReLU, SiLU, Tanh
from nplora.nn.module import Module, Saved

Array = npt.NDArray[Any]
Arrays = Mapping[str, Mapping[str, Array]]  # layer -> "weight" or "bias" -> array

_ACTIVATIONS = {"gelu": GELU, "relu": ReLU, "silu": SiLU, "tanh": Tanh}


@dataclasses.dataclass(frozen=True, slots=True)
class HeadSaved(Saved):
    """The values that `ClassifierHead.run_backward` needs from the pooling and from each layer."""

    pooling: PoolingSaved | None
    layers: tuple[Any, ...]


class ClassifierHead(Module):
    """The pooling and the layers that follow an encoder.

    The layers have the names that transformers gives them.

    Args:
        spec: describes the head's layers, which depend on the model's family.
        arrays: a dict: layer -> {"weight": array, "bias": array}. A layer may have no bias.
        eps: the epsilon of the norm.
        frozen: the names of layers that are not trained, such as a dense layer that gets a LoRA adapter.
    """

    def __init__(self, spec: HeadSpec, arrays: Arrays, eps: float, frozen: Container[str] = ()) -> None:
        self.spec = spec
        self.pooling = None if spec.pooling is None else Pooling(spec.pooling)
        self.steps: dict[str, Module] = {}
        if spec.dense is not None:
            self.steps[spec.dense] = _linear(arrays[spec.dense], spec.dense not in frozen)
            self.steps[f"{spec.dense}.activation"] = _ACTIVATIONS[spec.activation]()
        if spec.norm is not None:
            norm = arrays[spec.norm]
            is_trained = spec.norm not in frozen
            self.steps[spec.norm] = LayerNorm(norm["weight"], norm.get("bias"), eps, trainable=is_trained)
        self.out = self.steps[spec.out] = _linear(arrays[spec.out], True)

    def _walk(self, prefix: str, seen: set[int]) -> Iterator[tuple[str, Module]]:
        """Yield the layers with their names in transformers' model. `prefix` is ignored."""
        for name, module in self.steps.items():
            yield from module._walk(name, seen)

    def exchange(self, replaced: Mapping[int, Module]) -> None:
        self.steps = {name: replaced.get(id(module), module) for name, module in self.steps.items()}

    def run(self, states: Array, starts: Array) -> tuple[Array, HeadSaved]:
        """Compute the logits from the hidden states (n, d) of all tokens.

        Also return the values that `run_backward` needs.

        Args:
            starts: int64 (m + 1,), the first row of each text, followed by n.
        Returns: the logits, and the saved values. The logits have shape (m, outputs), or (n, outputs) if each
            token has its own logits.
        """
        y, pooled = (states, None) if self.pooling is None else self.pooling.run(states, starts)
        kept = list[Any]()
        for module in self.steps.values():
            y, saved = module.forward(y)
            kept.append(saved)
        return y, HeadSaved(pooled, tuple(kept))

    def run_backward(self, dy: Array, saved: HeadSaved) -> Array:
        """Accumulate the gradients of the trained layers. Return the gradient of the hidden states (n, d)."""
        for module, kept in reversed(list(zip(self.steps.values(), saved.layers, strict=True))):
            dy = module.backward(dy, kept)
        if self.pooling is None:
            return dy
        assert saved.pooling is not None
        return self.pooling.run_backward(dy, saved.pooling)

    def rescale(self, factor: Array | float, offset: Array | float = 0.0) -> None:
        """Change the last layer so that each logit becomes factor · logit + offset.

        Raises:
            ValueError: there is an offset, but the last layer has no bias.
        """
        factor, weight, bias = np.asarray(factor, np.float64), self.out.weight, self.out.bias
        assert isinstance(weight, np.ndarray)
        if bias is None and np.any(offset):
            raise ValueError("ClassifierHead.rescale: the last layer has no bias, expected offset 0")
        weight[...] = weight * (factor[:, None] if factor.ndim else factor)
        if bias is not None:
            bias[...] = bias * factor + offset


def _linear(arrays: Mapping[str, Array], trainable: bool) -> Linear:
    return Linear(arrays["weight"], arrays.get("bias"), trainable=trainable)


def shapes(spec: HeadSpec, width: int, outputs: int) -> dict[str, dict[str, tuple[int, ...]]]:
    """The shapes of all arrays of a head, as a dictionary: layer -> {"weight" or "bias": shape}."""
    found: dict[str, dict[str, tuple[int, ...]]] = {}
    for name, shape, has_bias in (
        (spec.dense, (width, width), spec.dense_bias),
        (spec.norm, (width,), spec.norm_bias),
        (spec.out, (outputs, width), spec.out_bias),
    ):
        if name is not None:
            found[name] = {"weight": shape} | ({"bias": shape[:1]} if has_bias else {})
    return found
