"""Conv2d: a frozen or trained convolution. LoRAConv2d: a frozen convolution with a low-rank update."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

from nplora import _check
from nplora.nn.linear import Linear, describe_weight
from nplora.nn.lora_linear import LoRALinear
from nplora.nn.module import Gradient, Parameter, Saved, SharedWeights, inferring, quiet
from nplora.nn.windows import Windows, pair
from nplora.weights import FrozenWeight

Array = npt.NDArray[Any]

_MOST_VALUES = 1 << 22  # the maximum number of windows' values in memory at once: 16 MB in float32


@dataclasses.dataclass(frozen=True, slots=True)
class ConvSaved(Saved):
    """The values that `backward` of a convolution needs.

    Attributes:
        shape: the shape of x.
        items: for each group of images, the saved values of the matrix product, except its input. `backward`
            computes the input (the windows) again from the images.
        x: the images (n, c_in, height, width), or None if `backward` does not need them.
    """

    shape: tuple[int, ...]
    items: tuple[Any, ...]
    x: Array | None = None


class _Convolution:
    """The base class of `Conv2d` and `LoRAConv2d`: stores the geometry of the convolution."""

    _windows: Windows

    @property
    def kernel(self) -> tuple[int, int, int]:
        return (self._windows.channels, *self._windows.size)

    @property
    def windows(self) -> Windows:
        """The geometry of the convolution."""
        return self._windows


class Conv2d(_Convolution, Linear):
    """A convolution of images (n, c_in, height, width) with torch's conventions, without groups.

    y[:, o] = x ⋆ W[o] [+ bias[o]], where ⋆ is the cross-correlation, summed over the channels. The
    convolution is computed as a product of the windows of x and the kernel's matrix.

        >>> import nplora, numpy as np
        >>> layer = nplora.Conv2d(np.ones((2, 1, 3, 3)), padding=1)
        >>> layer
        Conv2d((2, 1, 3, 3), dtype='float32', padding=1, trainable=False)
        >>> layer(np.ones((1, 1, 4, 4)))[0, 0]
        array([[4., 6., 6., 4.],
               [6., 9., 9., 6.],
               [6., 9., 9., 6.],
               [4., 6., 6., 4.]], dtype=float32)

    Args:
        W: the kernel: an array (c_out, c_in, height, width), of which the layer makes a copy, or a
            FrozenWeight (c_out, c_in · height · width), which the layer uses without a copy.
        bias: array (c_out,) or None.
        stride, padding, dilation: a number, or a pair (vertical, horizontal).
        kernel_size: the height and width of the kernel; needed only if W is a FrozenWeight.
        dtype, compute, trainable: as in Linear. If the kernel is trained, the parameter "weight" is the
            kernel with four axes.
    Attributes:
        kernel: the shape (c_in, height, width) of the windows.
        weight, dweight: the kernel's matrix and its gradient, as in Linear.
    Raises:
        ValueError: W does not have four axes; `kernel_size` does not fit W; `stride`, `padding` or `dilation`
            is too small; or as in Linear.
        TypeError: `stride`, `padding`, `dilation` or `kernel_size` is neither a number nor a pair; or as in
            Linear.
    """

    @_check.keywords
    def __init__(
        self,
        W: npt.ArrayLike | FrozenWeight,
        bias: npt.ArrayLike | None = None,
        stride: int | tuple[int, int] = 1,
        padding: int | tuple[int, int] = 0,
        dilation: int | tuple[int, int] = 1,
        kernel_size: int | tuple[int, int] | None = None,
        dtype: npt.DTypeLike | None = None,
        compute: str | None = None,
        trainable: bool = False,
    ) -> None:
        matrix, self._windows = _matrix("Conv2d", W, kernel_size, stride, padding, dilation)
        super().__init__(matrix, bias, dtype, compute, trainable)
        self._trained: list[Parameter] = []
        if isinstance(self.weight, np.ndarray) and self.dweight is not None:
            views = (array.reshape(-1, *self.kernel) for array in (self.weight, self.dweight))
            self._trained.append(Parameter("weight", *views))

    def local_parameters(self) -> list[Parameter]:
        return [*self._trained, *(p for p in super().local_parameters() if p.name != "weight")]

    def forward(self, x: npt.ArrayLike) -> tuple[Array, ConvSaved]:  # type: ignore[override]
        """Return y (n, c_out, height, width), and the values that `backward` needs.

            >>> import nplora, numpy as np
            >>> y, saved = nplora.Conv2d(np.ones((2, 1, 3, 3)), stride=2).forward(np.ones((5, 1, 9, 9)))
            >>> y.shape
            (5, 2, 4, 4)

        Raises:
            ValueError: x is not (n, c_in, height, width), or an image is smaller than a window.
        """
        images = self._windows.check("Conv2d.forward", x, self._dtype)
        y, items = _forward(self._windows, self.shape[0], images, super().forward)
        keeps = self.reads_x and not inferring()
        return y, ConvSaved(images.shape, items, images if keeps else None, layer=self)

    def backward(self, dy: npt.ArrayLike, saved: ConvSaved, need_dx: bool = True) -> Gradient:  # type: ignore[override]
        """Return dx, or None if need_dx is False. A trained layer also adds to dweight and dbias.

            >>> import nplora, numpy as np
            >>> layer = nplora.Conv2d(np.ones((2, 1, 3, 3)), trainable=True)
            >>> y, saved = layer.forward(np.ones((1, 1, 3, 3)))
            >>> layer.backward(np.ones_like(y), saved).shape
            (1, 1, 3, 3)
            >>> layer.dweight.sum()
            np.float32(18.0)

        Raises:
            ValueError, TypeError, RuntimeError: as in `Linear.backward`.
        """
        op = "Conv2d.backward"
        _check.saved(op, saved, ConvSaved)
        _check.own(op, saved, self)
        if self.trainable and saved.x is None:
            raise RuntimeError(f"{op}: this forward pass ran in inference mode and saved nothing")
        gradient = _gradient(op, self._windows, self.shape[0], dy, saved, self._dtype)
        return _backward(self._windows, gradient, saved, super().backward, need_dx)

    def __repr__(self) -> str:
        parts = [f"{(self.shape[0], *self.kernel)}", *describe_weight(self.weight)]
        return f"Conv2d({', '.join([*parts, *self._windows.describe(), f'trainable={self.trainable}'])})"


class LoRAConv2d(_Convolution, LoRALinear):
    """A frozen convolution with a trainable low-rank update, in PEFT's layout for `torch.nn.Conv2d`.

    The update consists of two convolutions. The first has the kernel B, with r output channels and the height
    and width of the frozen kernel. The second has the kernel A of size 1 × 1. The layer keeps both kernels as
    matrices, A (c_out, r) and B (r, c_in · height · width). PEFT stores the same numbers with four axes. The
    frozen kernel is also stored as a matrix, so all methods of LoRALinear can be used.

        >>> import nplora, numpy as np
        >>> layer = nplora.LoRAConv2d(np.ones((8, 3, 3, 3)), rank=2, padding=1)
        >>> layer
        LoRAConv2d((8, 3, 3, 3), rank=2, alpha=16, dtype='float32', padding=1, num_trainable=70)
        >>> layer(np.ones((5, 3, 10, 10))).shape
        (5, 8, 10, 10)

    Args:
        W, stride, padding, dilation, kernel_size: as in Conv2d.
        rank, alpha, bias, dtype, compute, init, use_rslora, use_dora, freeze_B, rng: as in LoRALinear.
        dropout: the probability that training drops a value of a window from the input of the low-rank
            update. (PEFT drops a value of x from all windows that contain the value.)
    Attributes:
        kernel: the shape (c_in, height, width) of the windows.
    Raises:
        ValueError, TypeError: as in Conv2d and LoRALinear.
    Warns:
        UserWarning: rank is above min(c_out, c_in · height · width).
    """

    @_check.keywords
    def __init__(
        self,
        W: npt.ArrayLike | FrozenWeight,
        rank: int = 8,
        alpha: float = 16,
        bias: npt.ArrayLike | None = None,
        stride: int | tuple[int, int] = 1,
        padding: int | tuple[int, int] = 0,
        dilation: int | tuple[int, int] = 1,
        kernel_size: int | tuple[int, int] | None = None,
        dtype: npt.DTypeLike | None = None,
        compute: str | None = None,
        init: str = "zero",
        dropout: float = 0.0,
        use_rslora: bool = False,
        use_dora: bool = False,
        freeze_B: bool = False,
        rng: np.random.Generator | int | None = None,
    ) -> None:
        matrix, self._windows = _matrix("LoRAConv2d", W, kernel_size, stride, padding, dilation)
        super().__init__(
            matrix, rank, alpha, bias, dtype, compute, init, dropout, use_rslora, use_dora, freeze_B, rng
        )

    def settings(self) -> dict[str, Any]:
        geometry = {name: list(getattr(self._windows, name)) for name in ("stride", "padding", "dilation")}
        return super().settings() | {"kernel": list(self.kernel)} | geometry

    def forward(self, x: npt.ArrayLike) -> tuple[Array, ConvSaved]:  # type: ignore[override]
        """Return y (n, c_out, height, width), and the values that `backward` needs.

            >>> import nplora, numpy as np
            >>> layer = nplora.LoRAConv2d(np.ones((2, 1, 3, 3)), rank=1)
            >>> y, saved = layer.forward(np.ones((5, 1, 4, 4)))
            >>> y.shape
            (5, 2, 2, 2)

        Raises:
            ValueError: x is not (n, c_in, height, width), or an image is smaller than a window.
        """
        images = self._windows.check("LoRAConv2d.forward", x, self.weight.compute_dtype)
        y, items = _forward(self._windows, self.weight.shape[0], images, super().forward)
        keeps = self.reads_x and not inferring()
        return y, ConvSaved(images.shape, items, images if keeps else None, layer=self)

    def backward(self, dy: npt.ArrayLike, saved: ConvSaved, need_dx: bool = True) -> Gradient:  # type: ignore[override]
        """Add to the gradients dA, dB and dm; return dx, or None if need_dx is False.

            >>> import nplora, numpy as np
            >>> layer = nplora.LoRAConv2d(np.ones((2, 1, 3, 3)), rank=1)
            >>> y, saved = layer.forward(np.ones((5, 1, 4, 4)))
            >>> layer.backward(np.ones_like(y), saved).shape
            (5, 1, 4, 4)

        Raises:
            ValueError, TypeError, RuntimeError: as in `LoRALinear.backward`.
        """
        op = "LoRAConv2d.backward"
        self.require_trainable("backward")
        _check.saved(op, saved, ConvSaved)
        _check.own(op, saved, self)
        d_out, dtype = self.weight.shape[0], self.weight.compute_dtype
        gradient = _gradient(op, self._windows, d_out, dy, saved, dtype)
        return _backward(self._windows, gradient, saved, super().backward, need_dx)

    @classmethod
    def over(cls, layer: Conv2d | LoRAConv2d, rank: int, alpha: float, **options: Any) -> LoRAConv2d:
        """Make a layer with the frozen kernel, the bias and the geometry of another layer.

            >>> import nplora, numpy as np
            >>> conv = nplora.Conv2d(np.ones((8, 3, 3, 3)), padding=1)
            >>> nplora.LoRAConv2d.over(conv, rank=2, alpha=4).weight is conv.weight
            True

        Args:
            options: further arguments of the constructor, such as `use_dora`.
        Raises:
            ValueError: the kernel of the layer is trained.
        """
        if not isinstance(layer.weight, FrozenWeight):
            raise ValueError("LoRAConv2d.over: the layer's kernel is trained, expected a frozen one")
        w = layer.windows
        return cls(layer.weight, rank, alpha, layer.bias, w.stride, w.padding, w.dilation, w.size, **options)

    def merged_kernel(self) -> Array:
        """Return the kernel W + scale · A·B as a new array (c_out, c_in, height, width).

        >>> import nplora, numpy as np
        >>> nplora.LoRAConv2d(np.ones((8, 3, 3, 3)), rank=2).merged_kernel().shape
        (8, 3, 3, 3)
        """
        return self.merged_weight().reshape(-1, *self.kernel)

    def frozen(self) -> Conv2d:
        self._require_whole_weight("frozen")
        return self._plain(self.weight)

    def unloaded(self, shared: SharedWeights) -> Conv2d:
        return self._plain(self._merged_frozen())

    def _plain(self, weight: FrozenWeight) -> Conv2d:
        w = self._windows
        return Conv2d(weight, self.bias, w.stride, w.padding, w.dilation, w.size)

    def _describe(self) -> str:
        text = super()._describe().replace(str(self.weight.shape), str((len(self.A), *self.kernel)), 1)
        settings, _, trainable = text.rpartition(", ")
        return ", ".join([settings, *self._windows.describe(), trainable])


def _matrix(
    op: str, W: npt.ArrayLike | FrozenWeight, kernel_size: Any, stride: Any, padding: Any, dilation: Any
) -> tuple[npt.ArrayLike | FrozenWeight, Windows]:
    """Return the kernel's matrix (c_out, c_in · height · width), and the geometry of the convolution."""
    if isinstance(W, FrozenWeight):
        if kernel_size is None:
            raise ValueError(
                f"{op}: W is a FrozenWeight, but kernel_size is missing: pass the kernel's (height, width)"
            )
        windows = Windows.of(op, 1, kernel_size, stride, padding, dilation)
        channels, rest = divmod(W.shape[1], windows.width)
        if rest or not channels:
            raise ValueError(
                f"{op}: W has d_in={W.shape[1]}, expected a multiple of height · width = {windows.width}"
            )
        return W, dataclasses.replace(windows, channels=channels)
    array = _check.as_array(op, "W", W)
    if array.ndim != 4:
        raise ValueError(f"{op}: W has {array.ndim} axes, expected 4 (c_out, c_in, height, width)")
    if kernel_size is not None and pair(op, "kernel_size", kernel_size, 1) != array.shape[2:]:
        raise ValueError(f"{op}: kernel_size is {kernel_size}, but W has shape {array.shape}")
    windows = Windows.of(op, array.shape[1], array.shape[2:], stride, padding, dilation)
    return array.reshape(len(array), -1), windows


def _groups(windows: Windows, shape: tuple[int, ...]) -> Iterator[slice]:
    """Yield groups of images, as slices of a batch that has the shape `shape`.

    The windows of a group have at most _MOST_VALUES values in total, unless the group is a single image. The
    groups depend only on `windows` and `shape`.
    """
    vertical, horizontal = windows.counts(*shape[2:])
    images = max(1, _MOST_VALUES // (vertical * horizontal * windows.width or 1))
    for start in range(0, shape[0], images):
        yield slice(start, min(start + images, shape[0]))


def _forward(
    windows: Windows, c_out: int, x: Array, product: Callable[[Array], tuple[Array, Any]]
) -> tuple[Array, tuple[Any, ...]]:
    """Return y, and a tuple of what `product` saved for each group, except its input, the windows."""
    y = np.empty((len(x), c_out, *windows.counts(*x.shape[2:])), x.dtype)
    items = []
    for group in _groups(windows, x.shape):
        rows, saved = product(windows.rows(x[group]))
        part = y[group]
        part[...] = rows.reshape(len(part), *y.shape[2:], c_out).transpose(0, 3, 1, 2)
        items.append(dataclasses.replace(saved, x=None))
    return y, tuple(items)


def _gradient(
    op: str, windows: Windows, c_out: int, dy: npt.ArrayLike, saved: ConvSaved, dtype: npt.DTypeLike
) -> Array:
    """Check the shape of dy and return dy as an array."""
    shape = (saved.shape[0], c_out, *windows.counts(*saved.shape[2:]))
    return _check.shaped(op, "dy", dy, shape, dtype)


def _backward(
    windows: Windows,
    dy: Array,
    saved: ConvSaved,
    backward: Callable[[Array, Any, bool], Gradient],
    need_dx: bool,
) -> Gradient:
    """Run the backward pass of each group of images. The rows of windows are computed again for each group.

    First, the gradients of all groups are added up. Then the sum is added to the layer's gradients. So
    gradients of earlier passes do not affect how the sum is rounded. Therefore training in several processes
    can give the same bits as training in one process. If a group fails, the layer's gradients do not change.
    """
    assert saved.layer is not None
    grads = [p.grad for p in saved.layer.local_parameters()] if len(saved.items) > 1 else []
    earlier = [grad.copy() for grad in grads]
    try:
        for grad in grads:
            grad.fill(0)
        dx = _groups_backward(windows, dy, saved, backward, need_dx)
    except BaseException:
        for grad, before in zip(grads, earlier, strict=True):
            grad[...] = before
        raise
    for grad, before in zip(grads, earlier, strict=True):
        with quiet():
            grad += before
    return dx


def _groups_backward(
    windows: Windows,
    dy: Array,
    saved: ConvSaved,
    backward: Callable[[Array, Any, bool], Gradient],
    need_dx: bool,
) -> Gradient:
    dx = np.empty(saved.shape, dy.dtype) if need_dx else None
    for group, item in zip(_groups(windows, saved.shape), saved.items, strict=True):
        rows = dy[group].transpose(0, 2, 3, 1).reshape(-1, dy.shape[1])
        if saved.x is not None:
            item = dataclasses.replace(item, x=windows.rows(saved.x[group]))
        dwindows = backward(rows, item, need_dx)
        if dx is not None:
            dx[group] = windows.images(dwindows, *saved.shape[2:])
    return dx
