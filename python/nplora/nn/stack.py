"""Runs several layers (such as q, k and v, or gate and up) on the same input in one call."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from nplora import _check, _core
from nplora.nn.active_rows import active_rows
from nplora.nn.conv import Conv2d, LoRAConv2d
from nplora.nn.int8 import in_int8
from nplora.nn.linear import Linear
from nplora.nn.lora_linear import LoRALinear
from nplora.nn.low_rank import UnloadedLayer
from nplora.nn.module import Gradient, Module, Saved, inference
from nplora.nn.prepared import Prepared
from nplora.nn.row_groups import GroupedLayer, RowGroup, grouped_rows, joined, one_group, row_groups, slices
from nplora.weights import FrozenWeight, buffers

Array = npt.NDArray[Any]
Stackable: TypeAlias = LoRALinear | Linear


@dataclasses.dataclass(frozen=True, slots=True)
class StackSaved(Saved):
    """The saved values of each layer, in order."""

    items: tuple[Any, ...]

    def with_x(self, x: Array | None) -> StackSaved:
        """Return the same saved values with x replaced by another array, or by None to release x."""
        return StackSaved(tuple(dataclasses.replace(item, x=x) for item in self.items))


def stack_forward(layers: Sequence[Stackable], x: npt.ArrayLike) -> tuple[list[Array], StackSaved]:
    """Return the outputs of several layers for the same x.

    One call for several layers is faster than one call for each, because x is packed only once.
    Each output equals the output of the layer's own `forward`, up to rounding.

        >>> import nplora, numpy as np
        >>> q, k, v = (nplora.LoRALinear(np.ones((n, 16)), rank=2) for n in (16, 8, 8))
        >>> ys, saved = nplora.stack_forward([q, k, v], np.ones((5, 16)))
        >>> [y.shape for y in ys]
        [(5, 16), (5, 8), (5, 8)]
        >>> nplora.stack_backward([q, k, v], ys, saved).shape     # in real use, dys come from a loss
        (5, 16)

    Args:
        layers: one or more LoRALinear or Linear, whose weights have the same d_in and arithmetic.
        x: array (..., d_in).
    Returns:
        the arrays (..., d_out) in the order of the layers, and the values that `stack_backward` needs.
    Raises:
        ValueError: `layers` is empty, the weights differ in d_in or in arithmetic, or the last axis of x does
            not have the length d_in.
        TypeError: a layer is neither a LoRALinear nor a Linear.
    """
    op = "stack_forward"
    d_in, dtype = _common(op, layers)
    rows, lead = _check.rows(op, "x", x, d_in, "d_in", dtype)
    return _forward(layers, rows, lead)


def _forward(
    layers: Sequence[Stackable], rows: Array, lead: tuple[int, ...], batch: int | None = None
) -> tuple[list[Array], StackSaved]:
    parts, ys, kept = zip(*(layer.forward_part(rows, lead) for layer in layers), strict=True)
    _core.lora_forward(rows, list(parts), batch, in_int8(*layers))
    done = [layer.finish_forward(y, saved) for layer, y, saved in zip(layers, ys, kept, strict=True)]
    return [y for y, _ in done], StackSaved(tuple(saved for _, saved in done))


def stack_infer(layers: Sequence[Stackable], x: Array, batch: int | None = None) -> list[Array]:
    """Return the same outputs (n, d_out) as `stack_forward`, up to rounding.

    Call this function only in inference. Decoding calls it for each token. The bits of an output row do not
    depend on the other rows of x, but may depend on whether the whole batch has more than
    `_core.constants.small_batch` rows.

    Args:
        layers: one or more LoRALinear or Linear, whose weights have the same d_in and arithmetic.
        x: contiguous array (n, d_in) in the layers' dtype; the core refuses other arrays.
        batch: the number of rows of the whole batch, if x is only a part of the batch.
    """
    batch = len(x) if batch is None else batch
    if (groups := row_groups()) is not None:
        return _infer_groups(layers, x, groups)
    if active_rows() is None:
        parts = [part for layer in layers if (part := layer.inference_layer()) is not None]
        if len(parts) == len(layers):
            return _core.infer(x, parts, batch)
    with inference():
        return _forward(layers, x, (len(x),), batch)[0]


def _infer_groups(
    layers: Sequence[Stackable | GroupedLayer], x: Array, groups: tuple[RowGroup, ...]
) -> list[Array]:
    """Compute the outputs for each group of rows with the layers of the group's model.

    If possible, run all groups in one call of the core.
    """
    first = next((layer for layer in layers if isinstance(layer, GroupedLayer)), None)
    if first is None:  # all groups have the same layers
        with grouped_rows(None):
            return stack_infer(layers, x)  # type: ignore[arg-type]
    parts = first.parts_of_stack(layers, groups, _part)
    if parts is not None:
        return _core.infer_groups(x, parts, [group.rows for group in groups])
    outputs = []
    for group, rows in zip(groups, slices(groups), strict=True):
        own = [layer.of(group) if isinstance(layer, GroupedLayer) else layer for layer in layers]
        with one_group(group):
            outputs.append(stack_infer(own, x[rows], len(x)))  # type: ignore[arg-type]
    return [joined(ys) for ys in zip(*outputs, strict=True)]


def _part(layer: Module, group: RowGroup) -> _core.InferenceLayer | None:
    if isinstance(layer, GroupedLayer):
        return layer.part(group)
    return layer.inference_layer() if isinstance(layer, Prepared) else None


def stack_backward(
    layers: Sequence[Stackable],
    dys: Sequence[npt.ArrayLike],
    saved: StackSaved,
    need_dx: bool = True,
    int8: bool = True,
    dither_key: int | None = None,
) -> Gradient:
    """Add to the layers' gradients; return the sum of all dx (..., d_in), or None if need_dx is False.

        >>> import nplora, numpy as np
        >>> gate, up = (nplora.LoRALinear(np.ones((8, 4)), rank=2) for _ in range(2))
        >>> ys, saved = nplora.stack_forward([gate, up], np.ones((3, 4)))
        >>> dx = nplora.stack_backward([gate, up], [np.ones((3, 8))] * 2, saved)
        >>> dx.shape, bool(gate.dA.any())
        ((3, 4), True)

    Args:
        layers: the layers of the forward pass.
        dys: the gradients dy (..., d_out) of the layers' outputs, in the order of `layers`.
        need_dx: compute dx.
        int8: if False, dx is computed in bfloat16, even if the weights have compute="int8". For a model's
            head, pass False or a `dither_key`. Most elements of a gradient of logits are so small that
            rounding to the nearest int8 number would make them 0.
        dither_key: an integer below 2^64. With a key, int8 products round dys stochastically: the expected
            value of a rounded element is the element itself, so small elements are not lost. The random bits
            depend on the key and on the element's position. None: round to nearest.
    Raises:
        ValueError: a dy does not have the shape of the layer's output, the numbers of dys and layers differ,
            or `saved` is from a pass of other layers.
        TypeError, RuntimeError: as in `LoRALinear.backward`.
    """
    op = "stack_backward"
    d_in, dtype = _common(op, layers)
    _check.saved(op, saved, StackSaved)
    if not len(layers) == len(dys) == len(saved.items):
        raise ValueError(
            f"{op}: {len(layers)} layers, {len(dys)} dys, {len(saved.items)} saved passes, "
            "expected equal numbers"
        )
    items = saved.items
    rows = [
        layer.backward_rows(f"{op}: layer {i}", dy, item)
        for i, (layer, dy, item) in enumerate(zip(layers, dys, items, strict=True))
    ]
    if any(item.lead != items[0].lead for item in items):
        raise ValueError(f"{op}: the entries of saved come from batches of different shapes")
    for i, (layer, item) in enumerate(zip(layers, items, strict=True)):
        _check.own(f"{op}: layer {i}", item, layer)
    parts = [layer.backward_part(du, item) for layer, du, item in zip(layers, rows, items, strict=True)]
    dx = buffers.empty((len(rows[0]), d_in), dtype) if need_dx else None
    x = next((item.x for item in items if item.x is not None), None)
    _core.lora_backward(x, dx, parts, int8 and in_int8(*layers), dither_key)
    for layer, du, item in zip(layers, rows, items, strict=True):
        if isinstance(layer, LoRALinear):
            layer.finish_backward(du, item, dx)
    return None if dx is None else dx.reshape(*items[0].lead, d_in)


def _common(op: str, layers: Sequence[Stackable]) -> tuple[int, np.dtype[Any]]:
    """Check that the layers have the same d_in and arithmetic. Return this d_in, and the dtype for x."""
    if not isinstance(layers, Sequence):
        raise TypeError(
            f"{op}: layers is of type {type(layers).__name__}, expected a list of LoRALinear or Linear"
        )
    if not layers:
        raise ValueError(f"{op}: no layers")
    for i, layer in enumerate(layers):
        if isinstance(layer, Conv2d | LoRAConv2d) or not isinstance(
            layer, LoRALinear | Linear | UnloadedLayer
        ):
            raise TypeError(
                f"{op}: layer {i} is of type {type(layer).__name__}, expected LoRALinear or Linear"
            )
    first = _kind(layers[0].weight)
    for layer in layers[1:]:
        if _kind(layer.weight) != first:
            raise ValueError(f"{op}: the layers differ: {', '.join(sorted(set(map(_title, layers))))}")
    return first[0], first[2]


def _kind(weight: FrozenWeight | Array) -> tuple[int, str, np.dtype[Any]]:
    """Return a weight's d_in, the arithmetic of products with the weight, and the dtype for x."""
    if isinstance(weight, FrozenWeight):
        return weight.shape[1], weight.packed.compute, weight.compute_dtype
    return weight.shape[1], "float", weight.dtype


def _title(layer: Stackable) -> str:
    weight = layer.weight
    compute = weight.compute if isinstance(weight, FrozenWeight) else weight.dtype.name
    return f"d_in={weight.shape[1]} in {compute}"
