"""Causal self-attention with rotary positions and shared heads of keys and values, by hand both ways."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import numpy.typing as npt

from nplora import _core
from nplora.models.config import ModelConfig
from nplora.models.kept import keeps_bits, narrowed, widened
from nplora.models.norms import head_norm_backward, head_norm_forward
from nplora.models.places import CachePlaces, Places
from nplora.models.rope import Rope
from nplora.nn import Linear, LoRALinear, RMSNorm, stack_backward, stack_forward
from nplora.nn.module import Gradient, Module, Saved, inferring
from nplora.nn.stack import StackSaved, stack_infer
from nplora.weights import buffers

Array = npt.NDArray[Any]
AnyLinear = Linear | LoRALinear


@dataclasses.dataclass(frozen=True, slots=True)
class AttentionSaved(Saved):
    """What backward needs beside x (n, d), which it gets again: n tokens, heads side by side in each row.

    q and k are rotated; where heads are normalised, they are as before the norm, and both are computed again.
    They stay float32, for lse belongs to them as they are; out may be bfloat16 bits.
    """

    q: Array
    k: Array
    v: Array
    out: Array
    lse: Array
    qkv: StackSaved
    o: StackSaved


class Attention(Module):
    """softmax(q kᵀ / sqrt(head_dim)) v over the tokens up to each one      (Vaswani et al. 2017)

    q_proj, k_proj and v_proj read x in one call. Each of the `num_key_value_heads` heads of k and v serves a
    group of heads of q (Ainslie et al. 2023).
    """

    def __init__(
        self,
        config: ModelConfig,
        layer: int,
        rope: Rope,
        projections: dict[str, Linear],
        norms: dict[str, RMSNorm],
    ) -> None:
        self.q_proj: AnyLinear = projections["q_proj"]
        self.k_proj: AnyLinear = projections["k_proj"]
        self.v_proj: AnyLinear = projections["v_proj"]
        self.o_proj: AnyLinear = projections["o_proj"]
        self.q_norm, self.k_norm = norms.get("q_norm"), norms.get("k_norm")
        self._rope = rope
        self._heads = (config.num_attention_heads, config.num_key_value_heads)
        self._narrow = keeps_bits(self.o_proj)
        self._scale, self._window = config.attention_scale, config.sliding_windows[layer]

    @property
    def reads_x(self) -> bool:
        """Whether a trained factor's gradient needs x."""
        return any(layer.local_parameters() for layer in self._inputs)

    @property
    def _inputs(self) -> tuple[AnyLinear, AnyLinear, AnyLinear]:
        return self.q_proj, self.k_proj, self.v_proj

    def run(self, x: Array, places: Places) -> tuple[Array, AttentionSaved]:
        """y (n, d) for the normalised x (n, d)."""
        (q, k, v), qkv = stack_forward(self._inputs, x)
        rotated_q, rotated_k = self._rotated(q, k, places)
        out, lse = buffers.empty_like(q), np.empty((len(q), self._heads[0]), np.float32)
        _core.attention(
            rotated_q, rotated_k, v, places.starts, *self._heads, self._scale, self._window, out, lse
        )
        (y,), o = stack_forward((self.o_proj,), out)
        if self._narrow and not inferring():
            out = narrowed(out)
        return y, AttentionSaved(q, k, v, out, lse, qkv.with_x(None), o.with_x(None))

    def run_backward(
        self, dy: Array, saved: AttentionSaved, x: Array | None, places: Places, need_dx: bool
    ) -> Gradient:
        """Add to the gradients of the factors; dx (n, d), or None where need_dx is False."""
        deeper = need_dx or self.reads_x
        out = widened(saved.out) if self._narrow else saved.out
        dout = stack_backward((self.o_proj,), [dy], saved.o.with_x(out), deeper)
        if not deeper:
            return None
        q, k = (saved.q, saved.k) if self.q_norm is None else self._rotated(saved.q, saved.k, places)
        dq, dk, dv = buffers.empty_like(q), buffers.empty_like(k), buffers.empty_like(saved.v)
        _core.attention_backward(
            dout, q, k, saved.v, out, saved.lse, places.starts, *self._heads, self._scale, self._window,
            dq, dk, dv,
        )  # fmt: skip
        dq, dk = self._rotated_backward(dq, dk, saved, places)
        return stack_backward(self._inputs, [dq, dk, dv], saved.qkv.with_x(x), need_dx)

    def run_cached(self, x: Array, places: CachePlaces, keys: Array, values: Array) -> Array:
        """y (m, d) for the newest m tokens, whose keys and values are put in the cache first."""
        q, k, v = stack_infer(self._inputs, x)
        q, k = self._rotated(q, k, places)
        keys[places.cells], values[places.cells] = k, v
        out = buffers.empty_like(q)
        _core.attention_cached(
            q, keys, values, places.slots, places.lengths, *self._heads, self._scale, self._window, out
        )
        return stack_infer((self.o_proj,), out)[0]

    def _rotated(self, q: Array, k: Array, places: Places | CachePlaces) -> tuple[Array, Array]:
        """q and k turned by their positions: in place, unless their heads are normalised first."""
        if self.q_norm is not None and self.k_norm is not None:
            q, k = head_norm_forward(self.q_norm, q), head_norm_forward(self.k_norm, k)
        for rows in (q, k):
            self._rope.rotate(rows, places.positions, places.table)
        return q, k

    def _rotated_backward(
        self, dq: Array, dk: Array, saved: AttentionSaved, places: Places
    ) -> tuple[Array, Array]:
        """The gradients before the rotation, and before the norm of the heads."""
        for rows in (dq, dk):
            self._rope.rotate(rows, places.positions, places.table, inverse=True)
        if self.q_norm is not None and self.k_norm is not None:
            dq = head_norm_backward(self.q_norm, dq, saved.q)
            dk = head_norm_backward(self.k_norm, dk, saved.k)
        return dq, dk
