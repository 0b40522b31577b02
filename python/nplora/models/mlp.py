"""The gated feed-forward network of a block: down(act(gate(x)) ∘ up(x))      (Shazeer 2020)"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
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
class MLPSaved(Saved):
    """The arrays that the backward pass needs, besides the layer's input `x`.

    `gate` and `up` (n, f) are float32, or uint16 with the bits of bfloat16 numbers.
    """

    gate: Array
    up: Array
    inputs: StackSaved
    down: StackSaved


class MLP(Module):
    """A SwiGLU or GeGLU layer. One call computes both `gate_proj` and `up_proj`.

    Some models have a single layer `gate_up_proj` instead, whose weight has the rows of `gate_proj`, followed
    by the rows of `up_proj`. The backward pass computes act(gate) ∘ up again. If matrix products are computed
    in bfloat16, gate and up are also stored in bfloat16, because these two arrays take most of the memory.

    Args:
        act: the activation of the gate, named as in `ModelConfig.hidden_act`.
        modules: a dict from names to the projections.
    """

    def __init__(self, act: str, modules: Mapping[str, Module]) -> None:
        for name, module in modules.items():
            setattr(self, name, module)
        self.down_proj: AnyLinear
        self.reading: tuple[str, ...] = (
            ("gate_up_proj",) if "gate_up_proj" in modules else ("gate_proj", "up_proj")
        )
        self._act = act
        self._narrow = keeps_bits(self.down_proj)

    @property
    def reads_x(self) -> bool:
        """Whether the backward pass needs the input `x` for the gradients of LoRA factors."""
        return any(layer.reads_x for layer in self._inputs)

    @property
    def _inputs(self) -> tuple[AnyLinear, ...]:
        return tuple(getattr(self, name) for name in self.reading)

    def run(self, x: Array, positions: object = None) -> tuple[Array, MLPSaved]:
        """Compute the output y (n, d) from the input x (n, d)."""
        outputs, inputs = stack_forward(self._inputs, x)
        gate, up = _split(outputs)
        del outputs
        if self._narrow and not inferring():
            hidden, gate, up = self._gated_narrow(gate, up)
        else:
            hidden = self._gated(gate, up)
        (y,), down = stack_forward((self.down_proj,), hidden)
        return y, MLPSaved(gate, up, inputs.with_x(None), down.with_x(None))

    def run_cached(self, x: Array, *state: object) -> Array:
        """Compute the output y, and store nothing for a backward pass."""
        gate, up = _split(stack_infer(self._inputs, x))
        _core.gated(self._act, gate, up, gate)  # in place
        return stack_infer((self.down_proj,), gate)[0]

    def run_backward(
        self, dy: Array, saved: MLPSaved, x: Array | None, positions: object, need_dx: bool
    ) -> Gradient:
        """Accumulate the gradients of the LoRA factors. Return dx (n, d), or None if `need_dx` is False.

        The float32 arrays in `saved` are overwritten.
        """
        deeper = need_dx or any(layer.local_parameters() for layer in self._inputs)
        gate, up = saved.gate, saved.up
        hidden = self._gated(gate, up) if self.down_proj.reads_x else None
        dhidden = stack_backward((self.down_proj,), [dy], saved.down.with_x(hidden), deeper)
        if not deeper:
            return None
        assert dhidden is not None
        del hidden
        dgate, dup = (buffers.empty_like(dhidden) for _ in range(2)) if self._narrow else (gate, up)
        _core.gated_backward(self._act, dhidden, gate, up, dgate, dup)
        gradients = [dgate, dup] if len(self.reading) == 2 else [np.concatenate((dgate, dup), axis=1)]
        return stack_backward(self._inputs, gradients, saved.inputs.with_x(x), need_dx)

    def footprint(self, adapted: Adapted, narrow: bool) -> Footprint:
        """The bytes of memory that the forward and backward passes need per token.

        Args:
            narrow: whether matrix products are computed in bfloat16.
        """
        d, f = self.down_proj.weight.shape
        joint = 2 * f if len(self.reading) == 1 else 0
        low = adapted.saved((*self.reading, "down_proj"))
        saved = stored(narrow) * 2 * f
        # At its peak, the forward pass holds x, gate, up, hidden, and either y or the bits of gate and up.
        forward = low + FLOAT * (d + 3 * f + joint) + (BITS * 2 * f if narrow else FLOAT * d)
        backward = FLOAT * (f + d + joint)  # the gradients of hidden and x
        backward += FLOAT * d if adapted.read_inputs(self.reading) else 0  # x
        backward += FLOAT * f if adapted.read_inputs(("down_proj",)) and not narrow else 0  # hidden
        backward += FLOAT * (d + 2 * f) if narrow else 0  # x, and the gradients of gate and up
        backward += FLOAT * 2 * f if adapted.use_dora and adapted.outputs else 0
        return Footprint(saved + low, forward, backward)

    def _gated(self, gate: Array, up: Array) -> Array:
        out = buffers.empty(gate.shape, np.float32)
        _core.gated(self._act, gate, up, out)
        return out

    def _gated_narrow(self, gate: Array, up: Array) -> tuple[Array, Array, Array]:
        """Return three arrays: act(gate) ∘ up in float32, and gate and up as bits of bfloat16 numbers."""
        out, gate_bits, up_bits = (buffers.empty(gate.shape, t) for t in (np.float32, np.uint16, np.uint16))
        _core.gated_narrow(self._act, gate, up, out, gate_bits, up_bits)
        return out, gate_bits, up_bits


def _split(outputs: Sequence[Array]) -> Sequence[Array]:
    """Return gate and up. If `outputs` holds only the output of `gate_up_proj`, split this output."""
    if len(outputs) == 2:
        return outputs
    return [np.ascontiguousarray(part) for part in np.split(outputs[0], 2, axis=1)]
