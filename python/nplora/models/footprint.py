"""How much memory a pass takes in a block, as the layers that take it say: for plans before training."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

FLOAT, BITS = 4, 2  # bytes of float32 and of bfloat16


@dataclass(frozen=True)
class Adapted:
    """The layers of a block that have an adapter, or will have one.

    Attributes:
        outputs: d_out of each, by the last part of its name: "q_proj".
    """

    rank: int
    use_dora: bool
    outputs: Mapping[str, int]

    def any_of(self, names: Iterable[str]) -> bool:
        """Whether one of these layers has an adapter."""
        return not self.outputs.keys().isdisjoint(names)

    def saved(self, names: Iterable[str]) -> int:
        """Bytes a token that their adapters keep: z, and DoRA's outputs before they are rescaled."""
        found = [self.outputs[name] for name in names if name in self.outputs]
        return FLOAT * (self.rank * len(found) + (sum(found) if self.use_dora else 0))


NOT_ADAPTED = Adapted(1, False, {})


@dataclass(frozen=True)
class Footprint:
    """Bytes for each token of a pass.

    Attributes:
        saved: what is kept for the backward pass.
        forward: the most in the forward pass, with what is kept.
        backward: the most in the backward pass, beside what was kept and the gradients of input and output.
    """

    saved: int
    forward: int
    backward: int


def stored(narrow: bool) -> int:
    """Bytes of a value that is kept as `activation_storage` does it."""
    return BITS if narrow else FLOAT
