"""The memory that blocks need for each token. The layers compute it themselves, for plans before training."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

FLOAT, BITS = 4, 2  # bytes of float32 and of bfloat16


@dataclass(frozen=True)
class Adapted:
    """The layers of a block that have or will have an adapter.

    Attributes:
        rank: the rank of the layers that are not in `ranks`.
        outputs: d_out of each such layer, by the last part of its name: "q_proj".
        ranks: the other ranks, by these names.
    """

    rank: int
    use_dora: bool
    outputs: Mapping[str, int]
    ranks: Mapping[str, int] = dataclasses.field(default_factory=dict)

    def any_of(self, names: Iterable[str]) -> bool:
        """Whether one of these layers has an adapter."""
        return not self.outputs.keys().isdisjoint(names)

    def saved(self, names: Iterable[str]) -> int:
        """Bytes per token that these layers' adapters keep: z, and with DoRA the outputs before rescaling."""
        found = {name: self.outputs[name] for name in names if name in self.outputs}
        ranks = sum(self.ranks.get(name, self.rank) for name in found)
        return FLOAT * (ranks + (sum(found.values()) if self.use_dora else 0))


NOT_ADAPTED = Adapted(1, False, {})


@dataclass(frozen=True)
class Footprint:
    """Bytes per token.

    Attributes:
        saved: kept for the backward pass.
        forward: the peak in the forward pass, including `saved`.
        backward: the peak in the backward pass, besides `saved` and the gradients of input and output.
    """

    saved: int
    forward: int
    backward: int


def stored(narrow: bool) -> int:
    """Bytes of a kept value, as in `activation_storage`."""
    return BITS if narrow else FLOAT
