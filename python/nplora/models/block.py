"""A block of the decoder: h = x + attention(norm(x)), y = h + mlp(norm(h)), forward, backward and cached."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import numpy.typing as npt

from nplora.models.attention import Attention, AttentionSaved
from nplora.models.kept import keeps_bits, narrowed, widened
from nplora.models.mlp import MLP, MLPSaved
from nplora.models.norms import norm_backward, norm_forward
from nplora.models.places import CachePlaces, Places
from nplora.nn import RMSNorm
from nplora.nn.module import Gradient, Module, Saved, inferring

Array = npt.NDArray[Any]


@dataclasses.dataclass(frozen=True, slots=True)
class BlockSaved(Saved):
    """What backward needs: what the halves kept, and the residual stream before each, perhaps as bits."""

    x: Array
    h: Array
    attention: AttentionSaved
    mlp: MLPSaved


class DecoderBlock(Module):
    """Attention and MLP, each reading a norm of the residual stream (n, d) and adding to it."""

    def __init__(
        self, input_layernorm: RMSNorm, self_attn: Attention, post_attention_layernorm: RMSNorm, mlp: MLP
    ) -> None:
        self.input_layernorm = input_layernorm
        self.self_attn = self_attn
        self.post_attention_layernorm = post_attention_layernorm
        self.mlp = mlp
        self._narrow = keeps_bits(mlp.gate_proj)

    def run(self, x: Array, places: Places) -> tuple[Array, BlockSaved]:
        """y (n, d), and what `run_backward` needs."""
        attended, attention = self.self_attn.run(norm_forward(self.input_layernorm, x), places)
        h = np.add(attended, x, out=attended)
        y, mlp = self.mlp.run(norm_forward(self.post_attention_layernorm, h))
        y += h
        if self._narrow and not inferring():
            x, h = narrowed(x), narrowed(h)
        return y, BlockSaved(x, h, attention, mlp)

    def run_backward(self, dy: Array, saved: BlockSaved, places: Places, need_dx: bool) -> Gradient:
        """Add to the gradients of the factors; dx in dy's place, or None where need_dx is False.

        The norms' outputs are computed again, where a factor's gradient needs them.
        """
        need_dh = need_dx or bool(self.self_attn.parameters())
        h = widened(saved.h) if self._narrow else saved.h
        normed = norm_forward(self.post_attention_layernorm, h) if self.mlp.reads_x else None
        dnormed = self.mlp.run_backward(dy, saved.mlp, normed, need_dh)
        if not need_dh:
            return None
        norm_backward(self.post_attention_layernorm, dnormed, h, dy, accumulate=True)

        x = widened(saved.x) if self._narrow else saved.x
        normed = norm_forward(self.input_layernorm, x) if self.self_attn.reads_x else None
        dnormed = self.self_attn.run_backward(dy, saved.attention, normed, places, need_dx)
        if not need_dx:
            return None
        norm_backward(self.input_layernorm, dnormed, x, dy, accumulate=True)
        return dy

    def run_cached(self, x: Array, places: CachePlaces, keys: Array, values: Array) -> Array:
        """y (m, d) of the newest tokens, in x's place."""
        x += self.self_attn.run_cached(norm_forward(self.input_layernorm, x), places, keys, values)
        x += self.mlp.infer(norm_forward(self.post_attention_layernorm, x))
        return x
