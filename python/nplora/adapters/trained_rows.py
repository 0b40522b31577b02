"""Makes layers that train rows of a language model's embedding and head."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nplora.formats.tokenizer_json import AddedToken
from nplora.nn import Embedding, Linear, TrainedEmbedding, TrainedHead, TrainedRows, TrainedRowsLayer
from nplora.nn.module import Module
from nplora.weights import FrozenWeight

Array = NDArray[Any]
Ids = Array | None  # the indices of the trained rows, or None for all rows

EMBEDDING, HEAD = "model.embed_tokens", "lm_head"


@dataclass(frozen=True, eq=False)
class TokenRows:
    """The trained rows of an embedding or a head.

    Attributes:
        ids: array (k,) of the ids of k tokens. A token's id is also the index of its row in the weight.
        values: array (k, dim) with the trained row of each token.

    >>> rows = nplora.adapters.TokenRows(np.array([7, 2]), np.zeros((2, 16), np.float32))
    >>> len(rows.ids), rows.values.shape
    (2, (2, 16))
    """

    ids: Array
    values: Array


def rows_to_train(model: Module, tokens: Ids, modules: tuple[str, ...]) -> dict[str, Ids]:
    """Return the rows that a new training run trains: a dict from layer names to the indices of the rows.

    Args:
        tokens: the tokens to train in the embedding and in the head, or None for no tokens.
        modules: layers to train as a whole: EMBEDDING, HEAD or both.
    """
    both = (EMBEDDING,) if model.ties_head else (EMBEDDING, HEAD)
    wanted: dict[str, Ids] = {} if tokens is None else dict.fromkeys(both, tokens)
    if modules and model.ties_head:
        modules = (EMBEDDING,)
    return {**wanted, **dict.fromkeys(modules)}


def trained_layers(
    model: Module,
    wanted: Mapping[str, Ids],
    tie_whole: bool,
    tokens: Sequence[AddedToken] = (),
    size: int | None = None,
) -> dict[str, TrainedRowsLayer]:
    """Make layers that train some rows of a model's weights, and freeze the other rows.

    The model itself does not change.

    A head that shares the embedding's weight also shares the embedding's trained rows, unless `wanted` has an
    entry for the head. If `size` exceeds the number of rows of the frozen weights, the embedding and the head
    both get the additional rows, even if `wanted` has an entry for only one of them.

    Args:
        wanted: the rows to train in each layer.
        tie_whole: whether a head that shares the embedding's weight also shares its trained rows. This
            argument matters only if all rows are trained.
        tokens: the new tokens, whose rows start as the mean of all rows of the frozen weight.
        size: the number of rows of the embedding and the head. None: the result of `rows_needed`.
    Raises:
        ValueError: an id is not the index of a row, or occurs twice.
    """
    modules: dict[str, Any] = dict(model.named_modules())
    stored = modules[EMBEDDING].weight.shape[0] if wanted or tokens else 0
    size = size or rows_needed(stored, wanted, tokens)
    made = dict[str, TrainedRowsLayer]()
    for name, ids in with_rows_beyond(model.ties_head, wanted, stored, size).items():
        layer = modules[name]
        made[name] = _layer(layer, TrainedRows(layer.weight, ids, size, tokens), False)
    shared = made.get(EMBEDDING)
    if model.ties_head and shared is not None and HEAD not in made and (tie_whole or not shared.is_whole):
        made[HEAD] = _layer(modules[HEAD], shared.rows, True)
    if size > stored and HEAD not in made:  # the embedding is trained as a whole, and the head shares no rows
        rows = TrainedRows(modules[HEAD].weight, np.arange(stored, size), size, tokens)
        made[HEAD] = _layer(modules[HEAD], rows, False)
    return made


def rows_needed(stored: int, wanted: Mapping[str, Ids], tokens: Sequence[AddedToken]) -> int:
    """Return the number of rows that an embedding needs to hold its old rows, `wanted` and `tokens`.

    Args:
        stored: the number of rows of the frozen weight.
    """
    trained = [int(ids.max()) for ids in wanted.values() if ids is not None and ids.size]
    return max(stored, *(1 + token.id for token in tokens), *(1 + id_ for id_ in trained), 0)


def with_rows_beyond(ties_head: bool, wanted: Mapping[str, Ids], stored: int, size: int) -> dict[str, Ids]:
    """Add all rows beyond the end of the frozen weights to `wanted`, the rows to train in each layer.

    Args:
        stored: the number of rows of the frozen weights.
        size: the number of rows, including the rows beyond the end of the weights.
    """
    if size == stored:
        return dict(wanted)
    beyond = np.arange(stored, size)
    both = (EMBEDDING,) if ties_head else (EMBEDDING, HEAD)
    return dict.fromkeys(both, beyond) | {
        name: None if ids is None else np.concatenate([ids, np.setdiff1d(beyond, ids)])
        for name, ids in wanted.items()
    }


def _layer(layer: Any, rows: TrainedRows, is_tied: bool) -> TrainedRowsLayer:
    weight: FrozenWeight = layer.weight
    if isinstance(layer, Embedding | TrainedEmbedding):
        return TrainedEmbedding(weight, rows, is_tied)
    assert isinstance(layer, Linear | TrainedHead)
    return TrainedHead(weight, rows, is_tied, layer.bias)
