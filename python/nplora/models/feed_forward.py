"""The feed-forward network of an encoder's block: down(act(up(x)))      (Vaswani et al. 2017)"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from nplora import _core
from nplora.models.activation_storage import keeps_bits
from nplora.models.footprint import BITS, FLOAT, Adapted, Footprint, stored
from nplora.nn import Linear, LoRALinear, stack_backward, stack_forward
from nplora.nn.module import Gradient, Module, Saved, inferring
from nplora.nn.stack import StackSaved, stack_infer
from nplora.weights import buffers

Array = npt.NDArray[Any]
AnyLinear = Linear | LoRALinear


@dataclasses.dataclass(frozen=True, slots=True)
class FeedForwardSaved(Saved):
    """The arrays that the backward pass needs, besides the layer's input `x`.

    `up` (n, f) is the input of the activation, as float32 or as bits of bfloat16 numbers.
    """

    up: Array
    input: StackSaved
    down: StackSaved


class FeedForward(Module):
    """Two linear layers with an activation between them. The backward pass computes act(up(x)) again.

    Args:
        act: the activation, named as in `ModelConfig.hidden_act`.
        modules: the layers `up_proj` and `down_proj`.
    """

    reading: tuple[str, ...] = ("up_proj",)

    def __init__(self, act: str, modules: Mapping[str, Module]) -> None:
        self.up_proj: AnyLinear = modules["up_proj"]  # type: ignore[assignment]
        self.down_proj: AnyLinear = modules["down_proj"]  # type: ignore[assignment]
        self._act = act
        self._narrow = keeps_bits(self.down_proj)

    @property
    def reads_x(self) -> bool:
        """Whether the backward pass needs the input `x` for the gradients of LoRA factors."""
        return self.up_proj.reads_x

    def run(self, x: Array, positions: object = None) -> tuple[Array, FeedForwardSaved]:
        """Compute the output y (n, d) from the input x (n, d)."""
        (up,), entry = stack_forward((self.up_proj,), x)
        hidden = up
        if inferring():
            _core.activated(self._act, up, hidden)
        elif self._narrow:
            up = buffers.empty(hidden.shape, np.uint16)
            _core.activated_narrow(self._act, hidden, hidden, up)
        else:
            hidden = buffers.empty_like(up)
            _core.activated(self._act, up, hidden)
        (y,), down = stack_forward((self.down_proj,), hidden)
        return y, FeedForwardSaved(up, entry.with_x(None), down.with_x(None))

    def run_cached(self, x: Array, *state: object) -> Array:
        """Compute the output y, and store nothing for a backward pass."""
        (hidden,) = stack_infer((self.up_proj,), x)
        _core.activated(self._act, hidden, hidden)
        return stack_infer((self.down_proj,), hidden)[0]

    def run_backward(
        self, dy: Array, saved: FeedForwardSaved, x: Array | None, positions: object, need_dx: bool
    ) -> Gradient:
        """Accumulate the gradients of the LoRA factors. Return dx (n, d), or None if `need_dx` is False."""
        deeper = need_dx or bool(self.up_proj.local_parameters())
        up, hidden = saved.up, None
        if self.down_proj.reads_x:
            hidden = buffers.empty(up.shape, np.float32)
            _core.activated(self._act, up, hidden)
        dhidden = stack_backward((self.down_proj,), [dy], saved.down.with_x(hidden), deeper)
        if not deeper:
            return None
        del hidden
        _core.activated_backward(self._act, dhidden, up, dhidden)  # in place
        return stack_backward((self.up_proj,), [dhidden], saved.input.with_x(x), need_dx)

    def footprint(self, adapted: Adapted, narrow: bool) -> Footprint:
        """The memory that the forward and backward passes need per token.

        Args:
            narrow: whether matrix products are computed in bfloat16.
        """
        d, f = self.down_proj.weight.shape
        low = adapted.saved(("up_proj", "down_proj"))
        saved = stored(narrow) * f
        # At its peak, the forward pass holds y and hidden, and up in float32 or in bfloat16.
        forward = low + FLOAT * (f + d) + (BITS if narrow else FLOAT) * f
        reads_hidden = adapted.read_inputs(("down_proj",))
        # The backward pass always holds the gradient of hidden. It also holds hidden itself at first, and the
        # gradient of x later.
        backward = FLOAT * (f + (max(d, f) if reads_hidden else d))
        backward += FLOAT * d if narrow else 0  # x
        backward += FLOAT * f if adapted.use_dora and adapted.outputs else 0
        return Footprint(saved + low, forward, backward)
