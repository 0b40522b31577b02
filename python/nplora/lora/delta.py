"""LoraDelta: the change that an adapter makes to one weight."""

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nplora import _core

Array = NDArray[Any]


@dataclass(frozen=True, eq=False)
class LoraDelta:
    """The change that an adapter makes to one weight: ΔW = scale · A·B with A (d_out, r) and B (r, d_in).

    Attributes:
        m: DoRA's magnitudes (d_out,), or None. They become the norms of the rows of W + scale · A·B (Liu et
            al. 2024, eq. 5).
        embedding: whether W is an embedding table (vocab, dim), which PEFT stores in its own way.
        alpha, use_rslora: the scale as a file or layer states it, for saving the adapter again. alpha None
            stands for rank · scale.
    Raises:
        ValueError: the shapes do not fit together.

    >>> delta = LoraDelta(A=np.ones((3, 1)), B=np.ones((1, 2)), scale=0.5)
    >>> delta.rank, delta.shape, delta.stated_alpha
    (1, (3, 2), 0.5)
    """

    A: Array
    B: Array
    scale: float
    m: Array | None = None
    embedding: bool = False
    alpha: float | None = None
    use_rslora: bool = False

    def __post_init__(self) -> None:
        a, b = self.A.shape, self.B.shape
        if len(a) != 2 or len(b) != 2 or a[1] != b[0]:
            raise ValueError(f"LoraDelta: A has shape {a}, B {b}, expected (d_out, r) and (r, d_in)")
        if self.m is not None and self.m.shape != a[:1]:
            raise ValueError(f"LoraDelta: m has shape {self.m.shape}, expected {a[:1]}")

    @classmethod
    def of_alpha(
        cls, a: Array, b: Array, alpha: float, use_rslora: bool, m: Array | None, embedding: bool
    ) -> "LoraDelta":
        """A LoraDelta with scale alpha / rank, or alpha / sqrt(rank) with rsLoRA."""
        scale = alpha / (math.sqrt(len(b)) if use_rslora else len(b))
        return cls(a, b, scale, m, embedding, float(alpha), use_rslora)

    @property
    def stated_alpha(self) -> float:
        """The alpha that a configuration states, together with `use_rslora`."""
        return self.scale * self.rank if self.alpha is None else self.alpha

    def rows(self, order: Array | None) -> "LoraDelta":
        """The change of rows order[0], order[1], ... of W. None: all rows in their order."""
        if order is None:
            return self
        return dataclasses.replace(self, A=self.A[order], m=None if self.m is None else self.m[order])

    @property
    def use_dora(self) -> bool:
        return self.m is not None

    @property
    def rank(self) -> int:
        return len(self.B)

    @property
    def shape(self) -> tuple[int, int]:
        """The shape of W: (d_out, d_in)."""
        return len(self.A), self.B.shape[1]

    @property
    def is_zero(self) -> bool:
        """Whether ΔW is 0. A weight that keeps its storage is then left alone instead of rounded again."""
        if self.m is not None or not all(np.isfinite(factor).all() for factor in (self.A, self.B)):
            return False
        return self.scale == 0 or not (self.A.any() and self.B.any())

    def apply(self, rows: Array, first: int) -> Array:
        """A new array of the updated W, for `rows`, which are W's rows from `first` on, in their dtype."""
        merged = rows.copy()
        part = slice(first, first + len(rows))
        a, b = (np.ascontiguousarray(factor, rows.dtype) for factor in (self.A[part], self.B))
        _core.merge_lora(merged, a, b, self.scale, merged.dtype.name)
        return merged if self.m is None else (merged * self._gain(merged, part)).astype(rows.dtype)

    def delta(self, rows: Array, first: int) -> Array:
        """The exact change of these rows, float64."""
        part, w = slice(first, first + len(rows)), rows.astype(np.float64)
        if self.scale == 0:
            delta = np.zeros_like(w)
        else:
            delta = self.scale * (self.A[part].astype(np.float64) @ self.B.astype(np.float64))
        return delta if self.m is None else (w + delta) * self._gain(w + delta, part) - w

    def _gain(self, merged: Array, part: slice) -> Array:
        assert self.m is not None
        norms: Array = np.sqrt(np.einsum("oi,oi->o", merged, merged, dtype=np.float64))
        gain: Array = np.divide(self.m[part], norms, out=np.zeros_like(norms), where=norms != 0)
        return gain[:, None]
