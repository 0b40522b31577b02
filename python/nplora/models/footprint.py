"""The memory that a block needs per token, for memory plans before training.

Attention and MLP have a method `footprint`, which computes the memory that they need.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

FLOAT, BITS = 4, 2  # bytes of float32 and of bfloat16


@dataclass(frozen=True)
class Adapted:
    """The layers of a block that have an adapter, or will get one.

    Attributes:
        rank: the rank of each adapter whose layer is not in `ranks`.
        outputs: a dict from the last part of each layer's name, such as "q_proj", to the layer's output width
            d_out.
        ranks: a dict from the last part of a layer's name to the rank of the layer's adapter, for layers with
            a rank other than `rank`.
        freeze_B: whether the adapters train only A. If so, the backward pass does not need the inputs of the
            layers.
    """

    rank: int
    use_dora: bool
    outputs: Mapping[str, int]
    ranks: Mapping[str, int] = dataclasses.field(default_factory=dict)
    freeze_B: bool = False  # noqa: N815

    def read_inputs(self, names: Iterable[str]) -> bool:
        """Whether the adapter of one of the layers `names` needs the layer's input in the backward pass."""
        return not self.freeze_B and not self.outputs.keys().isdisjoint(names)

    def saved(self, names: Iterable[str]) -> int:
        """The number of bytes per token that the adapters of the layers `names` store for the backward pass.

        An adapter of rank r stores r values per token: x Bᵀ. With DoRA, an adapter also stores the layer's
        outputs before rescaling.
        """
        found = {name: self.outputs[name] for name in names if name in self.outputs}
        ranks = sum(self.ranks.get(name, self.rank) for name in found)
        return FLOAT * (ranks + (sum(found.values()) if self.use_dora else 0))


NOT_ADAPTED = Adapted(1, False, {})


@dataclass(frozen=True)
class Footprint:
    """The memory that a block or mixer needs, in bytes per token.

    Attributes:
        saved: the memory that the forward pass stores for the backward pass.
        forward: the peak memory in the forward pass, including `saved`.
        backward: the peak memory in the backward pass, not counting `saved` and the gradients of the block's
            input and output.
        scratch: memory that the core allocates once and does not free after a pass. All blocks share this
            memory.
    """

    saved: int
    forward: int
    backward: int
    scratch: int = 0


def stored(narrow: bool) -> int:
    """Bytes of one activation stored for the backward pass: 2 if `narrow` (bfloat16), else 4."""
    return BITS if narrow else FLOAT
