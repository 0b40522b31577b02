"""LoraDelta: the change that an adapter makes to one weight."""

import dataclasses
import math
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from nplora import _core

Array = NDArray[Any]


@dataclass(frozen=True, eq=False)
class LoraDelta:
    """The change that an adapter makes to one weight: ΔW = scale · A·B with A (d_out, r) and B (r, d_in).

    Attributes:
        m: DoRA's magnitudes (d_out,), or None without DoRA. Row i of W + scale · A·B is rescaled, so that the
            norm of the row becomes m[i] (Liu et al. 2024, eq. 5).
        embedding: whether W is an embedding table (vocab, dim). PEFT stores the A and B of an embedding in a
            different layout from those of a linear layer.
        kernel: the shape (c_in, height, width) of a convolution's kernel, or None. For a convolution, W is
            the kernel reshaped to (d_out, c_in · height · width). PEFT stores A and B of a convolution with
            four axes.
        alpha, use_rslora: the settings from which `scale` was computed. These settings are needed to save the
            adapter again. If `alpha` is None, the adapter is saved with alpha = rank · scale.
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
    kernel: tuple[int, int, int] | None = None

    def rounded(self, dtype: str) -> Self:
        """Return a copy whose A and B are rounded to `dtype` ("bfloat16" or "float16") and stored as float32.

        >>> delta = LoraDelta(np.full((2, 1), 0.1, np.float32), np.ones((1, 2), np.float32), 1.0)
        >>> float(delta.rounded("bfloat16").A[0, 0])
        0.10009765625
        """

        def round_array(values: Array) -> Array:
            exact = np.ascontiguousarray(values, np.float32)
            bits, rounded = np.empty(exact.shape, np.uint16), np.empty_like(exact)
            _core.narrow(exact, dtype, bits)
            _core.widen(bits, dtype, rounded)
            return rounded

        return dataclasses.replace(self, A=round_array(self.A), B=round_array(self.B))

    def __post_init__(self) -> None:
        a, b = self.A.shape, self.B.shape
        if len(a) != 2 or len(b) != 2 or a[1] != b[0]:
            raise ValueError(f"LoraDelta: A has shape {a}, B has {b}, expected (d_out, r) and (r, d_in)")
        if self.m is not None and self.m.shape != a[:1]:
            raise ValueError(f"LoraDelta: m has shape {self.m.shape}, expected {a[:1]}")

    @classmethod
    def of_alpha(
        cls,
        a: Array,
        b: Array,
        alpha: float,
        use_rslora: bool,
        m: Array | None,
        embedding: bool,
        kernel: tuple[int, int, int] | None = None,
    ) -> "LoraDelta":
        """Return a LoraDelta with scale alpha / rank, or alpha / sqrt(rank) with rsLoRA.

        >>> a, b = np.ones((4, 2), np.float32), np.ones((2, 3), np.float32)
        >>> LoraDelta.of_alpha(a, b, alpha=16, use_rslora=False, m=None, embedding=False).scale
        8.0
        """
        scale = alpha / (math.sqrt(len(b)) if use_rslora else len(b))
        return cls(a, b, scale, m, embedding, float(alpha), use_rslora, kernel)

    @property
    def stated_alpha(self) -> float:
        """The value of alpha to write into an adapter configuration. `use_rslora` must be written too."""
        return self.scale * self.rank if self.alpha is None else self.alpha

    def rows(self, order: Array | None) -> "LoraDelta":
        """Return the change of W[order], the matrix with the rows order[0], order[1], ... of W.

        If `order` is None, return self.

        >>> a, b = np.array([[1.0], [2.0], [3.0]], np.float32), np.ones((1, 3), np.float32)
        >>> LoraDelta(a, b, 1.0).rows(np.array([2, 0])).A
        array([[3.],
               [1.]], dtype=float32)
        """
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
        """Whether ΔW is certainly 0. If so, a merge can only change the storage format of the weight."""
        if self.m is not None or not all(np.isfinite(factor).all() for factor in (self.A, self.B)):
            return False
        return self.scale == 0 or not (self.A.any() and self.B.any())

    def apply(self, rows: Array, first: int) -> Array:
        """Apply the change to `rows`, which are consecutive rows of W. Return the result as a new array.

        Args:
            first: the index in W of the first row in `rows`.

        >>> a, b = np.array([[1.0], [2.0], [3.0]], np.float32), np.ones((1, 3), np.float32)
        >>> LoraDelta(a, b, 0.5).apply(np.zeros((2, 3), np.float32), first=1)  # the second and the third row
        array([[1. , 1. , 1. ],
               [1.5, 1.5, 1.5]], dtype=float32)
        """
        merged = rows.copy()
        part = slice(first, first + len(rows))
        a, b = (np.ascontiguousarray(factor, rows.dtype) for factor in (self.A[part], self.B))
        _core.merge_lora(merged, a, b, self.scale, merged.dtype.name)
        return merged if self.m is None else (merged * self._gain(merged, part)).astype(rows.dtype)

    def delta(self, rows: Array, first: int) -> Array:
        """Return the change of `rows`, computed in float64. `rows` and `first` are as in `apply`.

        >>> a, b = np.array([[1.0], [2.0], [3.0]], np.float32), np.ones((1, 3), np.float32)
        >>> LoraDelta(a, b, 0.5).delta(np.zeros((1, 3), np.float32), first=2)
        array([[1.5, 1.5, 1.5]])
        """
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
