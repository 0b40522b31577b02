"""Linear: y = x Wᵀ + bias. The weight is frozen, or trained as a whole, for example in a new head."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Hashable
from typing import Any

import numpy as np
import numpy.typing as npt

from nplora import _check, _core
from nplora.nn.int8 import in_int8
from nplora.nn.module import Gradient, Module, Parameter, Saved, inferring, quiet
from nplora.nn.prepared import Prepared
from nplora.weights import FrozenWeight, buffers, freeze

Array = npt.NDArray[Any]


@dataclasses.dataclass(frozen=True, slots=True)
class LinearSaved(Saved):
    """The values that `Linear.backward` needs: the shape of x, and x (n, d_in) if the weight is trained."""

    lead: tuple[int, ...]  # the axes of x before the last
    x: Array | None = None


class Linear(Prepared, Module):
    """y = x Wᵀ [+ bias].

        >>> import nplora, numpy as np
        >>> head = nplora.Linear(np.zeros((2, 3)), bias=[1, 2], trainable=True)
        >>> head([[1, 1, 1]])
        array([[1., 2.]], dtype=float32)
        >>> head
        Linear((2, 3), dtype='float32', trainable=True)

    Args:
        W: the weight (d_out, d_in). A float array is copied. A FrozenWeight is copied only if `trainable`.
        bias: array (d_out,) or None.
        dtype: the storage format of W, as in LoRALinear. A trainable weight must be "float32" or "float64".
        compute: the arithmetic of products with a frozen weight: "float32", "bfloat16" or "int8", as in
            LoRALinear.
        trainable: whether W and `bias` themselves are trained, as the parameters "weight" and "bias".
            Products with a trainable weight are computed in the weight's dtype.
    Attributes:
        weight: a FrozenWeight, or, if `trainable`, the array (d_out, d_in) that optimisers update in place.
        dweight, dbias: the gradients of `weight` and `bias`; None for an array that is not trained.
    Raises:
        ValueError: W does not have two axes; `bias` does not have the shape (d_out,); `dtype` or `compute` is
            unknown, differs from that of a FrozenWeight, or cannot be combined with `trainable`.
        TypeError: W does not hold floats.
    """

    int8 = True  # as in LoRALinear

    def __init__(
        self,
        W: npt.ArrayLike | FrozenWeight,
        bias: npt.ArrayLike | None = None,
        dtype: npt.DTypeLike | None = None,
        compute: str | None = None,
        trainable: bool = False,
    ) -> None:
        frozen = freeze("Linear", W, dtype, compute)
        self.shape = frozen.shape
        self.trainable = bool(trainable)
        if trainable and compute not in (None, "float32"):
            raise ValueError(f"Linear: compute={compute!r} with trainable=True, expected compute='float32'")
        self.weight = trainable_copy("Linear", frozen) if trainable else frozen
        self._dtype = frozen.compute_dtype
        self._factors = no_factors(*self.shape, self._dtype)
        self.bias = None
        if bias is not None:
            self.bias = _check.shaped("Linear", "bias", bias, (frozen.shape[0],), self._dtype).copy()
        self.dweight = np.zeros_like(self.weight) if isinstance(self.weight, np.ndarray) else None
        self.dbias = np.zeros_like(self.bias) if trainable and self.bias is not None else None

    def local_parameters(self) -> list[Parameter]:
        triples = (("weight", self.weight, self.dweight), ("bias", self.bias, self.dbias))
        return [Parameter(n, v, g) for n, v, g in triples if isinstance(v, np.ndarray) and g is not None]

    @property
    def reads_x(self) -> bool:
        """Whether `backward` needs the layer's input x, because the weight is trained.

        >>> import nplora, numpy as np
        >>> nplora.Linear(np.eye(3)).reads_x
        False
        """
        return self.trainable

    def local_frozen(self) -> list[FrozenWeight | Array]:
        return [] if self.trainable else [a for a in (self.weight, self.bias) if a is not None]

    def forward(self, x: npt.ArrayLike) -> tuple[Array, LinearSaved]:
        """Return y (..., d_out) for x (..., d_in), and the values that `backward` needs.

            >>> import nplora, numpy as np
            >>> y, saved = nplora.Linear(np.eye(2, 3)).forward([1, 2, 3])
            >>> y
            array([1., 2.], dtype=float32)

        Raises:
            ValueError: the last axis of x is not d_in.
        """
        d_out, d_in = self.shape
        rows, lead = _check.rows("Linear.forward", "x", x, d_in, "d_in", self._dtype)
        y = buffers.empty((len(rows), d_out), self._dtype)
        _core.matmul(core_weight(self.weight), rows, self.bias, y, in_int8(self))
        keep = self.trainable and not inferring()
        return y.reshape(*lead, d_out), LinearSaved(lead, rows if keep else None, layer=self)

    def backward(self, dy: npt.ArrayLike, saved: LinearSaved, need_dx: bool = True) -> Gradient:
        """Return dx = dy W, or None if need_dx is False. A trained layer also adds gradients:

        dweight += dyᵀ x;  dbias += the sum of the rows of dy

            >>> import nplora, numpy as np
            >>> layer = nplora.Linear(np.eye(2, 3), trainable=True)
            >>> y, saved = layer.forward([1, 2, 3])
            >>> layer.backward([1, 0], saved)
            array([1., 0., 0.], dtype=float32)
            >>> layer.dweight
            array([[1., 2., 3.],
                   [0., 0., 0.]], dtype=float32)

        Raises:
            ValueError: dy does not have the shape of y; `saved` is from a forward pass of another layer; or
                an array in `saved` does not fit the layer's shape or dtype.
            TypeError: `saved` is from another kind of layer.
            RuntimeError: the weight is trained, but the forward pass ran in inference mode.
        """
        rows = self.backward_rows("Linear.backward", dy, saved)
        _check.own("Linear.backward", saved, self)
        self._add_gradients(rows, saved)
        if not need_dx:
            return None
        dx = buffers.empty((len(rows), self.shape[1]), self._dtype)
        _core.matmul_t(core_weight(self.weight), rows, dx)
        return dx.reshape(*saved.lead, dx.shape[1])

    def _add_gradients(self, rows: Array, saved: LinearSaved) -> None:
        """If the layer is trained, add dyᵀ x to dweight and the sum of the rows of dy to dbias."""
        if self.dweight is not None:
            assert saved.x is not None
            _core.add_outer(rows, saved.x, 1.0, self.dweight)
        if self.dbias is not None:
            with quiet():
                self.dbias += rows.sum(axis=0)

    # ---- as a part of a stack ----

    def forward_part(
        self, rows: Array, lead: tuple[int, ...]
    ) -> tuple[_core.ForwardPart, Array, LinearSaved]:
        """Prepare a call of `_core.lora_forward`, which can run several layers on the same input.

        Returns:
            this layer's argument for the call;
            the array y (n, d_out) that will hold this layer's output after the call;
            the values that `backward` needs.
        """
        y = buffers.empty((len(rows), self.shape[0]), self._dtype)
        a, b = self._factors
        part = _core.ForwardPart(
            weight=core_weight(self.weight),
            a=a,
            b=b,
            scale=0.0,
            dropout=0.0,
            key=0,
            bias=self.bias,
            y=y,
            z=None,
        )
        keep = self.trainable and not inferring()
        return part, y, LinearSaved(lead, rows if keep else None, layer=self)

    def finish_forward(self, y: Array, saved: LinearSaved) -> tuple[Array, LinearSaved]:
        """Return the result of `forward`, after `_core.lora_forward` has filled y."""
        return y.reshape(*saved.lead, y.shape[1]), saved

    def _inference_state(self) -> tuple[Hashable, ...]:
        weight = self.weight
        return weight if isinstance(weight, FrozenWeight) else id(weight), id(self.bias)

    def _inference_layer(self) -> _core.InferenceLayer:
        return _core.InferenceLayer(core_weight(self.weight), *self._factors, 0.0, self.bias)

    def backward_rows(self, op: str, dy: npt.ArrayLike, saved: LinearSaved) -> Array:
        """Make all checks of `backward`, and return dy as rows (n, d_out)."""
        _check.saved(op, saved, LinearSaved)
        d_out = self.shape[0]
        rows = _check.shaped(op, "dy", dy, (*saved.lead, d_out), self._dtype)
        if self.dweight is not None:
            if saved.x is None:
                raise RuntimeError(f"{op}: this forward pass ran in inference mode and saved nothing")
            _check.kept(op, "x", saved.x, (math.prod(saved.lead), self.shape[1]), self._dtype)
        return rows.reshape(math.prod(saved.lead), d_out)

    def backward_part(self, rows: Array, saved: LinearSaved) -> _core.BackwardPart:
        """Add to dweight and dbias if the layer is trained. Return the argument for `_core.lora_backward`."""
        self._add_gradients(rows, saved)
        weight, (a, b) = core_weight(self.weight), self._factors
        return _core.BackwardPart(
            weight=weight, a=a, b=b, scale=0.0, dropout=0.0, key=0, dy=rows, z=None, da=None, db=None
        )

    def __repr__(self) -> str:
        parts = [f"{self.shape}", *describe_weight(self.weight), f"trainable={self.trainable}"]
        return f"Linear({', '.join(parts)})"


def describe_weight(weight: FrozenWeight | Array) -> list[str]:
    """The parts of a layer's repr about its weight: `dtype` and, if products are rounded, `compute`."""
    parts = [f"dtype={str(weight.dtype)!r}"]
    if isinstance(weight, FrozenWeight) and weight.rounds:
        parts.append(f"compute={weight.compute!r}")
    return parts


@functools.cache
def no_factors(d_out: int, d_in: int, dtype: np.dtype[Any]) -> tuple[Array, Array]:
    """Return empty factors A and B, of rank 0, which all layers of this shape share."""
    return np.empty((d_out, 0), dtype), np.empty((0, d_in), dtype)


def core_weight(weight: FrozenWeight | Array) -> _core.Weight:
    """Return a weight in the form that the C++ core needs for products."""
    return weight.packed if isinstance(weight, FrozenWeight) else weight


def trainable_copy(op: str, frozen: FrozenWeight) -> Array:
    """Return a copy of a frozen weight as an array that optimisers can update."""
    if frozen.dtype not in ("float32", "float64"):
        raise ValueError(
            f"{op}: dtype={frozen.dtype!r} with trainable=True, expected dtype='float32' or 'float64'"
        )
    return frozen.to_numpy()
