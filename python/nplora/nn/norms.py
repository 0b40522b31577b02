"""LayerNorm and RMSNorm over the last axis, with frozen or trainable weights."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np
import numpy.typing as npt

from nplora import _check
from nplora.nn.module import Gradient, Module, Parameter, Saved, inferring, quiet
from nplora.weights import FrozenWeight, dtype_name

Array = npt.NDArray[Any]


@dataclasses.dataclass(frozen=True, slots=True)
class NormSaved(Saved):
    """The values that `backward` needs: the normalised rows (n, d), and their scaling factors (n, 1)."""

    lead: tuple[int, ...]
    normalised: Array | None = None
    factor: Array | None = None


class _Norm(Module):
    """Base class of the two norms: y = weight ∘ normalised(x) [+ bias]."""

    def __init__(
        self,
        weight: npt.ArrayLike,
        bias: npt.ArrayLike | None,
        eps: float,
        trainable: bool,
        dtype: npt.DTypeLike | None,
    ) -> None:
        op = type(self).__name__
        dtype = _check.choice(op, "dtype", dtype_name(op, dtype), ("float32", "float64"))
        self.weight = _check.vector(op, "weight", weight, dtype)
        self.bias = None if bias is None else _check.shaped(op, "bias", bias, self.weight.shape, dtype).copy()
        self.eps = _check.at_least(op, "eps", eps, 0)
        self.trainable = bool(trainable)
        self.dweight = np.zeros_like(self.weight) if trainable else None
        self.dbias = np.zeros_like(self.weight) if trainable and self.bias is not None else None

    def local_parameters(self) -> list[Parameter]:
        triples = (("weight", self.weight, self.dweight), ("bias", self.bias, self.dbias))
        return [Parameter(n, v, g) for n, v, g in triples if v is not None and g is not None]

    def local_frozen(self) -> list[FrozenWeight | Array]:
        return [] if self.trainable else [a for a in (self.weight, self.bias) if a is not None]

    def forward(self, x: npt.ArrayLike) -> tuple[Array, NormSaved]:
        """Return y with the shape of x (..., d), and the values that `backward` needs.

            >>> import nplora, numpy as np
            >>> y, saved = nplora.RMSNorm(np.ones(2), eps=0).forward([3, 3])
            >>> y
            array([1., 1.], dtype=float32)

        Raises:
            ValueError: the last axis of x is not d.
        """
        op = f"{type(self).__name__}.forward"
        rows, lead = _check.rows(op, "x", x, len(self.weight), "d", self.weight.dtype)
        with quiet():
            normalised, factor = self._normalise(rows)
            y = normalised * self.weight
            if self.bias is not None:
                y += self.bias
        saved = NormSaved(lead, layer=self)
        if not inferring():
            saved = NormSaved(lead, normalised, factor, layer=self)
        return y.reshape(*lead, len(self.weight)), saved

    def backward(self, dy: npt.ArrayLike, saved: NormSaved, need_dx: bool = True) -> Gradient:
        """Return dx, or None if need_dx is False.

        If the weights are trained, also add their gradients to dweight and dbias.

            >>> import nplora, numpy as np
            >>> norm = nplora.RMSNorm(np.ones(2), eps=0, trainable=True)
            >>> y, saved = norm.forward([3, 3])
            >>> norm.backward([1, -1], saved).round(3), norm.dweight
            (array([ 0.333, -0.333], dtype=float32), array([ 1., -1.], dtype=float32))

        Raises:
            ValueError: dy does not have the shape of y, or `saved` is from a pass of another layer.
            TypeError: `saved` is from another kind of layer.
            RuntimeError: the forward pass ran in inference mode.
        """
        op, d = f"{type(self).__name__}.backward", len(self.weight)
        _check.saved(op, saved, NormSaved)
        if saved.normalised is None or saved.factor is None:
            raise RuntimeError(f"{op}: this forward pass ran in inference mode and saved nothing")
        n = math.prod(saved.lead)
        _check.kept(op, "normalised x", saved.normalised, (n, d), self.weight.dtype)
        rows = _check.shaped(op, "dy", dy, (*saved.lead, d), self.weight.dtype).reshape(n, d)
        _check.own(op, saved, self)
        with quiet():
            if self.dweight is not None:
                self.dweight += (rows * saved.normalised).sum(axis=0)
            if self.dbias is not None:
                self.dbias += rows.sum(axis=0)
            if not need_dx:
                return None
            dx = self._differentiate(rows * self.weight, saved.normalised, saved.factor)
        return dx.reshape(*saved.lead, d)

    def _normalise(self, x: Array) -> tuple[Array, Array]:
        """Return two arrays: the normalised rows (n, d), and their scaling factors (n, 1)."""
        raise NotImplementedError

    def _differentiate(self, dn: Array, normalised: Array, factor: Array) -> Array:
        """Return dx, given `dn`, the gradient with respect to the normalised rows."""
        raise NotImplementedError

    def _factor(self, x: Array) -> Array:
        """Return 1 / sqrt(mean x² + eps) for each row of x."""
        return np.asarray(1 / np.sqrt(_mean(x * x) + x.dtype.type(self.eps)))

    def __repr__(self) -> str:
        return f"{type(self).__name__}({len(self.weight)}, eps={self.eps:g}, trainable={self.trainable})"


class LayerNorm(_Norm):
    """y = weight ∘ (x - mean) / sqrt(variance + eps) [+ bias]      (Ba et al. 2016)

        >>> import nplora, numpy as np
        >>> nplora.LayerNorm(np.ones(2), eps=0)([[1, 3]])
        array([[-1.,  1.]], dtype=float32)

    Args:
        weight, bias: arrays (d,), which are copied; bias may be None.
        eps: a constant that is added to the variance. The variance is the sum of squared deviations from the
            mean, divided by d.
        trainable: whether weight and bias are trained, as the parameters "weight" and "bias".
        dtype: the dtype of weight, bias and output: "float32" (also for None) or "float64".
    """

    def __init__(
        self,
        weight: npt.ArrayLike,
        bias: npt.ArrayLike | None = None,
        eps: float = 1e-5,
        trainable: bool = False,
        dtype: npt.DTypeLike | None = None,
    ) -> None:
        super().__init__(weight, bias, eps, trainable, dtype)

    def _normalise(self, x: Array) -> tuple[Array, Array]:
        centred = x - _mean(x)
        factor = self._factor(centred)
        return centred * factor, factor

    def _differentiate(self, dn: Array, normalised: Array, factor: Array) -> Array:
        return np.asarray(factor * (dn - _mean(dn) - normalised * _mean(dn * normalised)))


class RMSNorm(_Norm):
    """y = weight ∘ x / sqrt(mean x² + eps)      (Zhang & Sennrich 2019)

        >>> import nplora, numpy as np
        >>> nplora.RMSNorm(np.ones(2), eps=0)([[3, 3]])
        array([[1., 1.]], dtype=float32)

    Args:
        weight: array (d,), which is copied.
        eps, trainable, dtype: as in LayerNorm.
    """

    def __init__(
        self,
        weight: npt.ArrayLike,
        eps: float = 1e-5,
        trainable: bool = False,
        dtype: npt.DTypeLike | None = None,
    ) -> None:
        super().__init__(weight, None, eps, trainable, dtype)

    def _normalise(self, x: Array) -> tuple[Array, Array]:
        factor = self._factor(x)
        return x * factor, factor

    def _differentiate(self, dn: Array, normalised: Array, factor: Array) -> Array:
        return np.asarray(factor * (dn - normalised * _mean(dn * normalised)))


def _mean(x: Array) -> Array:
    """Return an array (n, 1): the mean of each row. If the rows are empty, the means are 0, without a
    warning."""
    return np.asarray(x.sum(axis=-1, keepdims=True) / max(1, x.shape[-1]), dtype=x.dtype)
