"""Layers that train rows of a language model's embedding and head, made for an adapter or a new run."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nplora.formats.errors import FormatError, brief
from nplora.nn import Embedding, Linear, TrainedEmbedding, TrainedHead, TrainedRows, TrainedRowsLayer
from nplora.nn.module import Module
from nplora.weights import FrozenWeight

Array = NDArray[Any]
Ids = Array | None  # the numbers of the trained rows, or None for all rows

EMBEDDING, HEAD = "model.embed_tokens", "lm_head"


@dataclass(frozen=True, eq=False)
class TokenRows:
    """The trained rows of an embedding or a head.

    Attributes:
        ids: the tokens, which are the numbers of the rows (k,).
        values: the rows (k, dim).

    >>> rows = nplora.adapters.TokenRows(np.array([7, 2]), np.zeros((2, 16), np.float32))
    >>> len(rows.ids), rows.values.shape
    (2, (2, 16))
    """

    ids: Array
    values: Array


def rows_to_train(model: Module, tokens: Ids, modules: tuple[str, ...]) -> dict[str, Ids]:
    """The layers whose rows a new run trains.

    Args:
        tokens: the tokens to train in the embedding and in the head, or None for no tokens.
        modules: layers to train as a whole: EMBEDDING, HEAD or both.
    """
    both = (EMBEDDING,) if model.ties_head else (EMBEDDING, HEAD)
    wanted: dict[str, Ids] = {} if tokens is None else dict.fromkeys(both, tokens)
    if modules and model.ties_head:
        modules = (EMBEDDING,)
    return {**wanted, **dict.fromkeys(modules)}


def trained_layers(model: Module, wanted: Mapping[str, Ids], tie_whole: bool) -> dict[str, TrainedRowsLayer]:
    """Make layers that train rows over the frozen weights of a model. The model itself does not change.

    A head with the embedding's weight shares the trained rows of the embedding, unless it has its own.

    Args:
        wanted: the rows to train in each layer.
        tie_whole: share the rows with the head also if all rows are trained.
    Raises:
        ValueError: an id is not a row, or occurs twice.
    """
    modules: dict[str, Any] = dict(model.named_modules())
    made = dict[str, TrainedRowsLayer]()
    for name, ids in wanted.items():
        layer = modules[name]
        rows = TrainedRows(layer.weight, ids)
        made[name] = _layer(layer, rows, False)
    shared = made.get(EMBEDDING)
    if model.ties_head and shared is not None and HEAD not in made and (tie_whole or not shared.is_whole):
        made[HEAD] = _layer(modules[HEAD], shared.rows, True)
    return made


def _layer(layer: Any, rows: TrainedRows, is_tied: bool) -> TrainedRowsLayer:
    weight: FrozenWeight = layer.weight
    if isinstance(layer, Embedding | TrainedEmbedding):
        return TrainedEmbedding(weight, rows, is_tied)
    assert isinstance(layer, Linear | TrainedHead)
    return TrainedHead(weight, rows, is_tied, layer.bias)


def require_distinct(where: str, ids: Array) -> None:
    """Raise FormatError if a token occurs twice in an adapter."""
    values, counts = np.unique(ids, return_counts=True)
    if (counts > 1).any():
        raise FormatError(f"{brief(where)}: token {values[counts > 1][0]} occurs twice in the trained tokens")
