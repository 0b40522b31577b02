"""A block of a decoder or an encoder: its forward and backward pass, and a forward pass with a cache.

A block consists of half-blocks. Each half-block is attention or an MLP, with optional norms before and after
it, and adds its output to the residual stream. A further norm may follow the addition, as in BERT.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from nplora.models.activation_storage import keeps_bits, narrowed, widened
from nplora.models.footprint import FLOAT, Adapted, Footprint, stored
from nplora.models.norms import Norm, add_norm_forward, norm_backward, norm_forward
from nplora.models.positions import CachePositions, PackedPositions, scattered
from nplora.nn import Linear
from nplora.nn.module import Gradient, Module, Saved, inferring
from nplora.weights import buffers

Array = npt.NDArray[Any]


class Mixer(Protocol):
    """The layer between the norms of a half-block: attention, an MLP, or another layer.

    Attributes:
        reading: the names of the linear layers that multiply `x`. These layers are computed in one call.
        reads_x: whether `run_backward` needs the input `x`.
    """

    reading: tuple[str, ...]

    @property
    def reads_x(self) -> bool: ...

    def run(self, x: Array, positions: PackedPositions) -> tuple[Array, Any]:
        """Return the output y (n, d), and the values that `run_backward` needs besides the input `x`."""

    def run_backward(
        self, dy: Array, saved: Any, x: Array | None, positions: PackedPositions, need_dx: bool
    ) -> Gradient:
        """Accumulate the gradients of the LoRA factors. Return dx (n, d), or None if `need_dx` is False."""

    def run_cached(self, x: Array, positions: CachePositions, keys: Array, values: Array) -> Array:
        """Compute the output y (m, d) for m new tokens. `keys` and `values` are arrays of the cache."""

    def footprint(self, adapted: Adapted, narrow: bool) -> Footprint:
        """The memory that the forward and backward passes need per token.

        Args:
            narrow: whether matrix products are computed in bfloat16.
        """


class AttentionMixer(Mixer, Protocol):
    """The attention of a block. Attention can also compute the outputs of only some tokens."""

    def run(self, x: Array, positions: PackedPositions, rows: Array | None = None) -> tuple[Array, Any]:
        """Like `Mixer.run`. If `rows` (m,) is given, compute only the outputs y (m, d) of these tokens."""

    def run_backward(
        self,
        dy: Array,
        saved: Any,
        x: Array | None,
        positions: PackedPositions,
        need_dx: bool,
        rows: Array | None = None,
    ) -> Gradient:
        """Like `Mixer.run_backward`, with the same `rows` as in the call of `run`."""


@dataclasses.dataclass(frozen=True, slots=True)
class Half:
    """A half-block, which computes outer(x + scale · after(mixer(before(x)))).

    `mixer`, `before`, `after` and `outer` are names of modules of the block. `before`, `after` and `outer`
    are norms; the name is None if there is no such norm. Models with a norm `outer` have no norm `after`.
    """

    mixer: str
    before: str | None = None
    after: str | None = None
    scale: float = 1.0
    outer: str | None = None


@dataclasses.dataclass(frozen=True, slots=True)
class HalfSaved(Saved):
    """The values of a half-block that the backward pass needs.

    Attributes:
        x: the residual stream before the half-block, possibly as bfloat16 bits.
        y: the input of the norm `after` or `outer`, possibly as bfloat16 bits; None if there is no such norm.
        mixer: the values that the mixer's backward pass needs.
    """

    x: Array
    y: Array | None
    mixer: Any


@dataclasses.dataclass(frozen=True, slots=True)
class BlockSaved(Saved):
    """The values of each half-block that the backward pass needs."""

    halves: tuple[HalfSaved, ...]


class DecoderBlock(Module):
    """Half-blocks in sequence. Each half-block adds its output to the residual stream (n, d).

    Args:
        halves: the half-blocks.
        modules: a dict from names to the block's mixers and norms. The names are those in the fields of
            `halves`.
        narrow: whether activations are stored as bfloat16 for the backward pass.
    """

    def __init__(self, halves: Sequence[Half], modules: Mapping[str, Module], narrow: bool) -> None:
        for name, module in modules.items():
            setattr(self, name, module)
        self._halves, self._narrow = tuple(halves), narrow

    def run(
        self, x: Array, positions: PackedPositions, rows: Array | None = None
    ) -> tuple[Array, BlockSaved]:
        """Return the output y (n, d), and the values that `run_backward` needs.

        Args:
            rows: int64 (m,), indices of tokens, each at most once. If given, y (m, d) has the outputs
                of only these tokens. Attention still reads the keys and values of all tokens, but the MLP
                reads only the rows of these tokens.
        """
        saved = list[HalfSaved]()
        keep = narrowed if self._narrow and not inferring() else _unchanged
        for index, half in enumerate(self._halves):
            read, before = self._read(half, x), keep(x)
            if index == 0 and rows is not None:
                y, mixed = self._attention.run(read, positions, rows)
                x = x[rows]
            else:
                y, mixed = self._mixer(half).run(read, positions)
            normed = None if half.after is None else keep(y)
            if half.outer is None:
                x = self._added(half, y, x)
            else:
                x = self._outer(half, y, x)
                normed = keep(y)
            saved.append(HalfSaved(before, normed, mixed))
        return x, BlockSaved(tuple(saved))

    def run_backward(
        self,
        dy: Array,
        saved: BlockSaved,
        positions: PackedPositions,
        need_dx: bool,
        rows: Array | None = None,
    ) -> Gradient:
        """Accumulate the gradients of the LoRA factors. Return dx, or None if `need_dx` is False.

        `dy` is overwritten. If `rows` is None, `dx` is written to the memory of `dy`. The forward pass does
        not store the outputs of norms. If a gradient needs the output of a norm, the backward pass
        computes the norm again.

        Args:
            rows: the same as in the call of `run`.
        """
        for index in reversed(range(len(self._halves))):
            half, kept = self._halves[index], saved.halves[index]
            lower = (self._mixer(other) for other in self._halves[:index])
            need = need_dx or any(bool(mixer.parameters()) for mixer in lower)  # type: ignore[attr-defined]
            dy = self._half_backward(half, dy, kept, positions, need, rows if index == 0 else None)
            if not need:
                return None
        return dy

    def _half_backward(
        self,
        half: Half,
        dy: Array,
        kept: HalfSaved,
        positions: PackedPositions,
        need_dx: bool,
        rows: Array | None,
    ) -> Array:
        """Accumulate the gradients of the LoRA factors. If `need_dx` is True, return the input's gradient.

        If `rows` is None, the input's gradient overwrites `dy`.
        """
        widen = widened if self._narrow else _unchanged
        mixer, before, x = self._mixer(half), self._norm(half.before), widen(kept.x)
        normed = None if kept.y is None else widen(kept.y)
        outer = self._norm(half.outer)
        if outer is not None:
            assert normed is not None
            norm_backward(outer, dy, normed, dy)
        dmixed = self._added_backward(half, dy, normed)
        read = self._read(half, x) if mixer.reads_x else None
        if rows is None:
            dread = mixer.run_backward(dmixed, kept.mixer, read, positions, need_dx)
        else:
            dread = self._attention.run_backward(dmixed, kept.mixer, read, positions, need_dx, rows)
        if not need_dx:
            return dy
        assert dread is not None
        if rows is not None:
            dy = scattered(dy, rows, len(dread))
        if before is None:
            np.add(dy, dread, out=dy)
        else:
            norm_backward(before, dread, x, dy, accumulate=True)
        return dy

    def run_cached(self, x: Array, positions: CachePositions, keys: Array, values: Array) -> Array:
        """Compute the output y (m, d) for the m newest tokens."""
        for half in self._halves:
            y = self._mixer(half).run_cached(self._read(half, x), positions, keys, values)
            x = self._added(half, y, x) if half.outer is None else self._outer(half, y, x)
        return x

    def footprint(self, adapted: Adapted, narrow: bool) -> Footprint:
        """The memory that the forward and backward passes need per token.

        Args:
            narrow: whether matrix products are computed in bfloat16.
        """
        saved = forward = backward = scratch = 0
        for half in self._halves:
            mixer, stream = self._mixer(half).footprint(adapted, narrow), FLOAT * self._width
            normed = FLOAT * self._width if half.after or half.outer else 0
            forward = max(forward, saved + stream + normed + mixer.forward)
            backward = max(backward, mixer.backward + 2 * normed + (stream if half.scale != 1 else 0))
            scratch = max(scratch, mixer.scratch)
            saved += mixer.saved + stored(narrow) * self._width * (2 if half.after or half.outer else 1)
        return Footprint(saved, forward, backward, scratch)

    @property
    def mixers(self) -> dict[str, Mixer]:
        """The mixers (attention and MLP) of the block, by name."""
        return {half.mixer: self._mixer(half) for half in self._halves}

    @property
    def _width(self) -> int:
        norms = (self._norm(half.before or half.after or half.outer) for half in self._halves)
        return next(len(norm.weight) for norm in norms if norm is not None)

    @property
    def _attention(self) -> AttentionMixer:
        attention: AttentionMixer = getattr(self, self._halves[0].mixer)
        return attention

    def _mixer(self, half: Half) -> Mixer:
        mixer: Mixer = getattr(self, half.mixer)
        return mixer

    def _norm(self, name: str | None) -> Norm | None:
        return None if name is None else getattr(self, name)

    def _outer(self, half: Half, y: Array, x: Array) -> Array:
        """The output outer(x + scale · y) of a half-block. `y` is overwritten with the sum x + scale · y."""
        norm = self._norm(half.outer)
        assert norm is not None
        if half.scale != 1:
            np.multiply(y, np.float32(half.scale), out=y)
        return add_norm_forward(norm, x, y)

    def _read(self, half: Half, x: Array) -> Array:
        """The mixer's input: the residual stream `x`, normalised if the half-block has a norm `before`."""
        norm = self._norm(half.before)
        return x if norm is None else norm_forward(norm, x)

    def _added(self, half: Half, y: Array, x: Array) -> Array:
        """The output x + scale · after(y) of a half-block. Without a norm `after`, `y` is overwritten."""
        norm = self._norm(half.after)
        y = y if norm is None else norm_forward(norm, y)
        if half.scale != 1:
            np.multiply(y, np.float32(half.scale), out=y)
        return np.add(y, x, out=y)

    def _added_backward(self, half: Half, dy: Array, y: Array | None) -> Array:
        """The gradient of the mixer's output `y`, given the gradient `dy` of the half-block's output."""
        norm = self._norm(half.after)
        if half.scale != 1:
            dy = dy * np.float32(half.scale)
        if norm is None:
            return dy
        assert y is not None
        dmixed = buffers.empty_like(y)
        norm_backward(norm, dy, y, dmixed)
        return dmixed


def assemble(
    halves: Sequence[Half],
    mixer: Callable[[str, Mapping[str, Module]], Mixer],
    modules: Mapping[str, Linear | Norm],
) -> DecoderBlock:
    """Build a block from its layers and norms.

    Args:
        halves: the half-blocks.
        mixer: a function that makes a mixer from the mixer's name and a dict of the mixer's layers and norms.
        modules: a dict from names within the block to the block's layers and norms.
    """
    parts: dict[str, Module] = {}
    for half in halves:
        prefix = f"{half.mixer}."
        own = {name.removeprefix(prefix): m for name, m in modules.items() if name.startswith(prefix)}
        named: dict[str | None, Any] = {
            half.before: modules.get(half.before or ""),
            half.mixer: mixer(half.mixer, own),
            half.after: modules.get(half.after or ""),
            half.outer: modules.get(half.outer or ""),
        }
        parts |= {name: module for name, module in named.items() if name is not None}
    narrow = keeps_bits(next(module for module in modules.values() if isinstance(module, Linear)))
    return DecoderBlock(halves, parts, narrow)


def _unchanged(array: Array) -> Array:
    return array
