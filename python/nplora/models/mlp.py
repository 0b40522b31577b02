"""The gated feed-forward network of a block: down(act(gate(x)) ∘ up(x))      (Shazeer 2020)"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy.typing as npt

from nplora import _core
from nplora.models.kept import keeps_bits, narrowed, widened
from nplora.nn import Linear, LoRALinear, stack_backward, stack_forward
from nplora.nn.module import Gradient, Module, Saved, inferring
from nplora.nn.stack import StackSaved, stack_infer
from nplora.weights import buffers

Array = npt.NDArray[Any]
AnyLinear = Linear | LoRALinear


@dataclasses.dataclass(frozen=True, slots=True)
class MLPSaved(Saved):
    """What backward needs beside x, which it gets again: gate and up (n, f), perhaps as bfloat16 bits."""

    gate: Array
    up: Array
    inputs: StackSaved
    down: StackSaved


class MLP(Module):
    """SwiGLU or GeGLU. gate_proj and up_proj read x in one call; backward computes act(gate) ∘ up again.

    Where the products run in bfloat16, gate and up are kept in bfloat16 too: they are most of what is kept.
    """

    def __init__(self, act: str, projections: dict[str, Linear]) -> None:
        self.gate_proj: AnyLinear = projections["gate_proj"]
        self.up_proj: AnyLinear = projections["up_proj"]
        self.down_proj: AnyLinear = projections["down_proj"]
        self._act = act
        self._narrow = keeps_bits(self.gate_proj)

    @property
    def reads_x(self) -> bool:
        """Whether a trained factor's gradient needs x."""
        return any(layer.local_parameters() for layer in self._inputs)

    @property
    def _inputs(self) -> tuple[AnyLinear, AnyLinear]:
        return self.gate_proj, self.up_proj

    def run(self, x: Array) -> tuple[Array, MLPSaved]:
        """y (n, d) for the normalised x (n, d)."""
        (gate, up), inputs = stack_forward(self._inputs, x)
        (y,), down = stack_forward((self.down_proj,), self._gated(gate, up))
        if self._narrow and not inferring():
            gate, up = narrowed(gate), narrowed(up)
        return y, MLPSaved(gate, up, inputs.with_x(None), down.with_x(None))

    def infer(self, x: Array) -> Array:
        """The same, keeping nothing."""
        gate, up = stack_infer(self._inputs, x)
        _core.gated(self._act, gate, up, gate)  # in place
        return stack_infer((self.down_proj,), gate)[0]

    def run_backward(self, dy: Array, saved: MLPSaved, x: Array | None, need_dx: bool) -> Gradient:
        """Add to the gradients of the factors; dx (n, d), or None where need_dx is False. Uses up `saved`."""
        deeper = need_dx or self.reads_x
        gate, up = (widened(saved.gate), widened(saved.up)) if self._narrow else (saved.gate, saved.up)
        hidden = self._gated(gate, up) if self.down_proj.local_parameters() else None
        dhidden = stack_backward((self.down_proj,), [dy], saved.down.with_x(hidden), deeper)
        if not deeper:
            return None
        _core.gated_backward(self._act, dhidden, gate, up, gate, up)  # in place
        return stack_backward(self._inputs, [gate, up], saved.inputs.with_x(x), need_dx)

    def _gated(self, gate: Array, up: Array) -> Array:
        out = buffers.empty_like(gate)
        _core.gated(self._act, gate, up, out)
        return out
