"""Self-attention with rotary position embeddings and grouped-query heads, forward and backward."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from nplora import _core
from nplora.models.activation_storage import keeps_bits, narrowed, widened
from nplora.models.footprint import BITS, FLOAT, Adapted, Footprint, stored
from nplora.models.norms import piecewise_norm_backward, piecewise_norm_forward
from nplora.models.positions import CachePositions, PackedPositions, scattered
from nplora.models.relative_bias import RelativeBias
from nplora.models.rope import Rope
from nplora.nn import Linear, LoRALinear, RMSNorm, stack_backward, stack_forward
from nplora.nn.module import Gradient, Module, Saved, inferring
from nplora.nn.stack import StackSaved, stack_infer
from nplora.weights import buffers

Array = npt.NDArray[Any]
AnyLinear = Linear | LoRALinear


@dataclasses.dataclass(frozen=True, slots=True)
class AttentionSaved(Saved):
    """The arrays that the backward pass needs in addition to the layer's input `x` (n, d).

    Row i of `q`, `k`, `v` and `out` holds the values of token i in all heads, one head after another. In a
    layer without norms of q and k, `q` and `k` are stored after the rotation. In a layer with these norms,
    `q` and `k` are stored before the norms, and the backward pass computes norms and rotation again. `lse` is
    the log-sum-exp of the scores. `q` and `k` are always float32, so that the backward pass computes exactly
    the scores from which `lse` was computed. `out` may be bfloat16 bits.
    """

    q: Array
    k: Array
    v: Array
    out: Array
    lse: Array
    qkv: StackSaved
    o: StackSaved


class AttentionConfig(Protocol):
    """The settings that attention reads from the configuration of a decoder or an encoder."""

    @property
    def num_attention_heads(self) -> int: ...
    @property
    def num_key_value_heads(self) -> int: ...
    @property
    def heads_width(self) -> int: ...
    @property
    def key_value_width(self) -> int: ...
    @property
    def attention_scale(self) -> float: ...
    @property
    def sliding_windows(self) -> tuple[int, ...]: ...
    @property
    def causal(self) -> bool: ...


class Attention(Module):
    """Computes softmax(q kᵀ · scale) v within each sequence (Vaswani et al. 2017).

    In a causal model, a token attends to itself and earlier tokens. In any other model, a token also attends
    to later tokens. The layers `q_proj`, `k_proj` and `v_proj` are computed in one call. Some models have a
    single layer `qkv_proj` instead, whose weight stacks the rows of the three weights. Each key/value head is
    shared by a group of query heads (grouped-query attention, Ainslie et al. 2023). The optional norms
    `q_norm` and `k_norm` are applied to q and k before the rotation. If a norm's weight is as long as one
    head, each head is normalised separately. If the weight is as long as all heads together, all heads are
    normalised together.

    Args:
        layer: the index of this layer in the model.
        rope: the rotation of q and k, or None for no rotation.
        modules: a dict from names to the projections and the norms.
        bias: the numbers that are added to attention scores, depending on the distance between query and key;
            or None.
    """

    def __init__(
        self,
        config: AttentionConfig,
        layer: int,
        rope: Rope | None,
        modules: Mapping[str, Module],
        bias: RelativeBias | None = None,
    ) -> None:
        for name, module in modules.items():
            setattr(self, name, module)
        self.o_proj: AnyLinear
        self.q_norm: RMSNorm | None = modules.get("q_norm")  # type: ignore[assignment]
        self.k_norm: RMSNorm | None = modules.get("k_norm")  # type: ignore[assignment]
        self.reading: tuple[str, ...] = (
            ("qkv_proj",) if "qkv_proj" in modules else ("q_proj", "k_proj", "v_proj")
        )
        self._rope, self._bias, self._causal = rope, bias, config.causal
        self._heads = (config.num_attention_heads, config.num_key_value_heads)
        self._widths = (config.heads_width, config.key_value_width)
        self._narrow = keeps_bits(self.o_proj)
        self._scale, self._window = config.attention_scale, config.sliding_windows[layer]

    @property
    def reads_x(self) -> bool:
        """Whether the backward pass needs the input `x` for the gradients of LoRA factors."""
        return any(layer.reads_x for layer in self._inputs)

    @property
    def _inputs(self) -> tuple[AnyLinear, ...]:
        return tuple(getattr(self, name) for name in self.reading)

    def run(
        self, x: Array, positions: PackedPositions, rows: Array | None = None
    ) -> tuple[Array, AttentionSaved]:
        """Compute the output y (n, d) from the input x (n, d).

        Args:
            rows: int64 (m,), indices of tokens, each at most once. If given, y (m, d) has the outputs
                of only these tokens.
        """
        outputs, qkv = stack_forward(self._inputs, x)
        q, k, v = self._split(outputs)
        rotated_q, rotated_k = self._rotated(q, k, positions)
        out, lse = buffers.empty_like(q), np.empty((len(q), self._heads[0]), np.float32)
        _core.attention(
            rotated_q, rotated_k, v, positions.starts, *self._heads, self._scale, self._window, out, lse,
            self._narrow, self._causal, self._bias_for(positions),
        )  # fmt: skip
        (y,), o = stack_forward((self.o_proj,), out if rows is None else out[rows])
        if self._narrow and not inferring():
            out = narrowed(out)
        return y, AttentionSaved(q, k, v, out, lse, qkv.with_x(None), o.with_x(None))

    def run_backward(
        self,
        dy: Array,
        saved: AttentionSaved,
        x: Array | None,
        positions: PackedPositions,
        need_dx: bool,
        rows: Array | None = None,
    ) -> Gradient:
        """Accumulate the gradients of the LoRA factors. Return dx (n, d), or None if `need_dx` is False.

        Args:
            rows: the same as in the call of `run`.
        """
        deeper = need_dx or any(layer.local_parameters() for layer in self._inputs)
        out = widened(saved.out) if self._narrow else saved.out
        read = out if rows is None else out[rows]
        dout = stack_backward((self.o_proj,), [dy], saved.o.with_x(read), deeper)
        if not deeper:
            return None
        if rows is not None:
            assert dout is not None
            dout = scattered(dout, rows, len(out))
        q, k = (saved.q, saved.k) if self.q_norm is None else self._rotated(saved.q, saved.k, positions)
        dq, dk, dv = buffers.empty_like(q), buffers.empty_like(k), buffers.empty_like(saved.v)
        _core.attention_backward(
            dout, q, k, saved.v, out, saved.lse, positions.starts, *self._heads, self._scale, self._window,
            dq, dk, dv, self._narrow, self._causal, self._bias_for(positions),
        )  # fmt: skip
        dq, dk = self._rotated_backward(dq, dk, saved, positions)
        return stack_backward(self._inputs, self._joined(dq, dk, dv), saved.qkv.with_x(x), need_dx)

    def run_cached(self, x: Array, positions: CachePositions, keys: Array, values: Array) -> Array:
        """Store the keys and values of the m newest tokens in the cache, and compute the output y (m, d)."""
        q, k, v = self._split(stack_infer(self._inputs, x))
        q, k = self._rotated(q, k, positions)
        keys[positions.cells], values[positions.cells] = k, v
        out = buffers.empty_like(q)
        _core.attention_cached(
            q, keys, values, positions.pages, positions.slots, positions.lengths,
            *self._heads, self._scale, self._window, out,
        )  # fmt: skip
        return stack_infer((self.o_proj,), out)[0]

    def footprint(self, adapted: Adapted, narrow: bool) -> Footprint:
        """The memory that the forward and backward passes need per token.

        Args:
            narrow: whether matrix products are computed in bfloat16.
        """
        d, (q, kv) = self.o_proj.weight.shape[0], self._widths
        lse, joint = self._heads[0], (q + 2 * kv if len(self.reading) == 1 else 0)
        normed = q + kv if self.q_norm is not None else 0
        low = adapted.saved((*self.reading, "o_proj"))
        saved = FLOAT * (q + 2 * kv + lse) + stored(narrow) * q
        forward = saved + low + FLOAT * (2 * d + normed + joint) + (FLOAT * q if narrow else 0)
        backward = FLOAT * (q + q + 2 * kv + d + 2 * normed + joint)
        backward += FLOAT * d if adapted.read_inputs(self.reading) else 0  # x
        backward += FLOAT * (d + q) if narrow else 0  # x, and out
        pairs = 4 * BITS * kv if narrow else 0  # keys and values as bfloat16 pairs, each in two orders
        return Footprint(saved + low, forward, backward, pairs)

    def _bias_for(self, positions: PackedPositions) -> Array | None:
        return None if self._bias is None else self._bias.table(positions.longest)

    def _split(self, outputs: Sequence[Array]) -> Sequence[Array]:
        """Return q, k and v. If `outputs` holds only the output of `qkv_proj`, split this output."""
        if len(outputs) == 3:
            return outputs
        q, kv = self._widths
        return [np.ascontiguousarray(part) for part in np.split(outputs[0], [q, q + kv], axis=1)]

    def _joined(self, *parts: Array) -> Sequence[Array]:
        """The inverse of `_split`: join three arrays into one if the layer has a `qkv_proj`."""
        return parts if len(self.reading) == 3 else [np.concatenate(parts, axis=1)]

    def _rotated(
        self, q: Array, k: Array, positions: PackedPositions | CachePositions
    ) -> tuple[Array, Array]:
        """Normalise q and k if the layer has norms, then rotate q and k by the tokens' positions.

        Without norms, `q` and `k` are overwritten.
        """
        if self.q_norm is not None and self.k_norm is not None:
            q, k = piecewise_norm_forward(self.q_norm, q), piecewise_norm_forward(self.k_norm, k)
        if self._rope is not None:
            for rows in (q, k):
                self._rope.rotate(rows, positions)
        return q, k

    def _rotated_backward(
        self, dq: Array, dk: Array, saved: AttentionSaved, positions: PackedPositions
    ) -> tuple[Array, Array]:
        """Return the gradients of the outputs of the q and k projections.

        `dq` and `dk` are the gradients of q and k as attention reads them, after norms and rotation.
        """
        if self._rope is not None:
            for rows in (dq, dk):
                self._rope.rotate(rows, positions, inverse=True)
        if self.q_norm is not None and self.k_norm is not None:
            dq = piecewise_norm_backward(self.q_norm, dq, saved.q)
            dk = piecewise_norm_backward(self.k_norm, dk, saved.k)
        return dq, dk
