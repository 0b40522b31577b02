"""Groups of rows of one batch.

Each group may belong to a different model. All models share the frozen weights.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar
from typing import Any, NamedTuple, TypeAlias, cast

import numpy as np
import numpy.typing as npt

from nplora import _core
from nplora.nn.active_rows import only_active
from nplora.nn.lora_linear import LoRALinear
from nplora.nn.module import Module
from nplora.nn.prepared import Prepared

Array = npt.NDArray[Any]
Parts: TypeAlias = list[list[_core.InferenceLayer]]  # for each group, the layers of a stack


class RowGroup(NamedTuple):
    """Consecutive rows of a batch that are the input of the same model.

    Attributes:
        model: the index of the model that gets these rows as input.
        rows: the number of rows.
        acts: whether the model's adapter acts on these rows. An activated LoRA does not act before its
            invocation tokens.
    """

    model: int
    rows: int
    acts: bool = True


PartOf: TypeAlias = Callable[[Module, RowGroup], _core.InferenceLayer | None]

_KEPT = 16  # the maximum number of stacks whose arguments are kept for the next tokens

_groups: ContextVar[tuple[RowGroup, ...] | None] = ContextVar("nplora_row_groups", default=None)


def row_groups() -> tuple[RowGroup, ...] | None:
    """The groups into which the current pass divides its rows; None if one model gets all rows."""
    return _groups.get()


@contextlib.contextmanager
def grouped_rows(groups: tuple[RowGroup, ...] | None) -> Iterator[None]:
    """Inside `with grouped_rows(groups):` the layers of a group's model run on the rows of this group."""
    token = _groups.set(groups)
    try:
        yield
    finally:
        _groups.reset(token)


@contextlib.contextmanager
def one_group(group: RowGroup) -> Iterator[None]:
    """A context in which the input of every layer has only the rows of `group`."""
    with grouped_rows(None), only_active(None if group.acts else np.empty(0, np.int64)):
        yield


def slices(groups: Sequence[RowGroup]) -> list[slice]:
    """For each group, the slice of its rows in the batch."""
    ends = np.cumsum([group.rows for group in groups]).tolist()
    return [slice(end - group.rows, end) for group, end in zip(groups, ends, strict=True)]


class GroupedLayer(Module):
    """Holds the layers that have the same name in several models.

    The layer of a group's model runs on the rows of this group.

    Only `put` may replace a layer. The values in a layer's arrays may change at any time.

        >>> import nplora, numpy as np
        >>> from nplora.nn.row_groups import GroupedLayer, RowGroup, grouped_rows
        >>> double, triple = (nplora.Linear(np.eye(2) * factor) for factor in (2, 3))
        >>> layer = GroupedLayer([double, triple])
        >>> with grouped_rows((RowGroup(0, 1), RowGroup(1, 2))):
        ...     layer(np.ones((3, 2)))
        array([[2., 2.],
               [3., 3.],
               [3., 3.]], dtype=float32)

    Args:
        layers: the layer of each model.
    """

    def __init__(self, layers: Sequence[Module]) -> None:
        self._layers = tuple(layers)
        self._parts: dict[tuple[int, bool], _core.InferenceLayer | None] = {}
        self._stacks: dict[tuple[tuple[int, ...], tuple[RowGroup, ...]], Parts | None] = {}

    def put(self, model: int, layer: Module) -> None:
        """Replace the layer of the model that has the index `model`, or append the layer of a new model."""
        self._layers = (*self._layers[:model], layer, *self._layers[model + 1 :])
        self._parts = {key: part for key, part in self._parts.items() if key[0] != model}
        self._stacks.clear()  # a stack's other layers may also be new

    def forward(self, x: npt.ArrayLike) -> tuple[Array, None]:
        """Return the outputs for all rows of x; pad shorter rows of outputs with -inf."""
        groups, rows, ys = row_groups(), np.asarray(x), []
        assert groups is not None
        for group, some in zip(groups, slices(groups), strict=True):
            with one_group(group):
                ys.append(self._layers[group.model].forward(rows[some])[0])
        return joined(ys), None

    def parts_of_stack(
        self, layers: Sequence[Module], groups: tuple[RowGroup, ...], part_of: PartOf
    ) -> Parts | None:
        """The arguments of `_core.infer_groups` for `layers`, which must contain `self`.

        The result is None if the core cannot run one of the layers. The result is stored, because decoding
        needs the same arguments again for the next token.
        """
        key = tuple(map(id, layers)), groups
        if key not in self._stacks:
            parts = [[part_of(layer, group) for layer in layers] for group in groups]
            whole = all(part is not None for group in parts for part in group)
            if len(self._stacks) == _KEPT:
                del self._stacks[next(iter(self._stacks))]
            self._stacks[key] = cast(Parts, parts) if whole else None
        return self._stacks[key]

    def of(self, group: RowGroup) -> Module:
        """The layer that runs on the rows of a group."""
        return self._layers[group.model]

    def part(self, group: RowGroup) -> _core.InferenceLayer | None:
        """The argument with which `_core.infer_groups` runs a group's layer; None if the core cannot run the
        layer."""
        key = group.model, group.acts
        if key not in self._parts:
            layer = self._layers[group.model]
            if isinstance(layer, LoRALinear) and not group.acts:
                self._parts[key] = layer.frozen_part()
            else:
                self._parts[key] = layer.inference_layer() if isinstance(layer, Prepared) else None
        return self._parts[key]


def joined(ys: Sequence[Array]) -> Array:
    """Join arrays of rows. Rows that are shorter than the longest row are padded with -inf."""
    width = max(y.shape[1] for y in ys)
    if all(y.shape[1] == width for y in ys):
        return np.concatenate(ys)
    return np.concatenate([np.pad(y, ((0, 0), (0, width - y.shape[1])), constant_values=-np.inf) for y in ys])
