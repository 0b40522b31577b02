"""Decodes the next tokens of several sequences together. Each sequence has its own slot and adapter.

A "piece" is an array of the next tokens of one sequence. In matrix products, each token is a row. Several
sequences are computed in one batch, so that the frozen weights are read only once for the whole batch. The
results have the same bits as if each sequence were computed alone. Matrix products with up to 8 rows are
rounded differently from products with more rows. So a batch contains either short pieces (up to 8 tokens
each), with at most 8 tokens in total, or only longer pieces.
"""

from __future__ import annotations

import itertools
from collections.abc import Collection, Hashable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Protocol, Self, cast

import numpy as np
import numpy.typing as npt

from nplora import _check, _core
from nplora.models.cache import KVCache
from nplora.models.decoder import Decoder
from nplora.models.head import AnyHead
from nplora.nn import TrainedEmbedding
from nplora.nn.module import AdapterLayer, Module
from nplora.nn.prepared import Prepared
from nplora.nn.row_groups import GroupedLayer, RowGroup, grouped_rows

Array = npt.NDArray[Any]


class SlotModel(Protocol):
    """The members of a LanguageModel that decoding uses."""

    model: Decoder
    lm_head: AnyHead

    def adapter_layers(self) -> dict[str, AdapterLayer]: ...
    def named_modules(self) -> Iterator[tuple[str, Module]]: ...
    def copied(self, replaced: Mapping[int, Module]) -> Self: ...


_FEW = _core.constants.small_batch  # the maximum number of rows of a short piece
_MANY = 512  # the maximum number of rows in a batch of several long pieces, to limit the memory


def pieces_of(token_ids: npt.ArrayLike) -> list[Array]:
    """Split the `token_ids` of `LanguageModel.decode` into an int64 array (count,) for each sequence."""
    op, name = "decode", "token_ids"
    if isinstance(token_ids, list | tuple) and all(np.ndim(piece) == 1 for piece in token_ids):
        pieces = [_check.integers(op, name, piece) for piece in token_ids]
    else:
        ids = _check.integers(op, name, token_ids)
        if ids.ndim not in (1, 2):
            raise ValueError(
                f"{op}: {name} has shape {ids.shape}, expected (m,) or (m, count) for m sequences"
            )
        pieces = list(ids.reshape(len(ids), -1))
    if not pieces:
        raise ValueError(f"{op}: {name} has no sequences, expected at least one")
    if not all(piece.size for piece in pieces):
        raise ValueError(f"{op}: {name} has a sequence without tokens, expected at least one token")
    return pieces


def decode(lm: SlotModel, pieces: Sequence[Array], slots: Array, cache: KVCache) -> Array:
    """Store the next tokens of m sequences in the cache.

    Return logits (m, vocab), which predict the token after the last new token of each sequence.

    The cache's `lengths` do not change. Call this function in `with inference()`.

    Args:
        lm: the model for slots without an adapter, if the cache has no owner.
        pieces: for each slot, an array (count,) of the next token ids.
    Raises:
        ValueError: an id is out of range. This error leaves the cache unchanged.
    """
    models: list[Any] = [cache.adapters.model(slot) or lm for slot in slots.tolist()]
    _check_ids(models, pieces)
    cache.find_invocation(slots, pieces)
    batches = list(_batches(models, [len(piece) for piece in pieces]))
    if len(batches) == 1:  # the usual case: no copy of the logits
        return _decode_together(models, pieces, slots, cache)
    logits = np.empty((len(slots), 0), np.float32)
    for some in batches:
        few = _decode_together([models[i] for i in some], [pieces[i] for i in some], slots[some], cache)
        logits = _filled(logits, some, few)
    return logits


def _batches(models: Sequence[SlotModel], counts: Sequence[int]) -> Iterator[list[int]]:
    """For each batch, yield the indices of its sequences. Sequences with the same model follow each other."""
    number = {id(model): index for index, model in enumerate(models)}  # a number for each model, to sort by
    order = sorted(range(len(counts)), key=lambda i: (counts[i] > _FEW, number[id(models[i])]))
    some: list[int] = []
    for i in order:
        is_long = counts[i] > _FEW
        rows = sum(counts[j] for j in some) + counts[i]
        alike = some and (counts[some[0]] > _FEW) == is_long
        # The head computes one row for each sequence, so a batch has at most _FEW sequences.
        if some and (not alike or len(some) == _FEW or rows > (_MANY if is_long else _FEW)):
            yield some
            some = []
        some.append(i)
    yield some


def _filled(logits: Array, rows: list[int], few: Array) -> Array:
    """Set logits[rows[i]] to few[i] for each i, and return `logits`.

    If `few` has more columns than `logits`, return a copy of `logits` with more columns. In all rows except
    `rows`, the added columns are -inf.
    """
    if few.shape[1] > logits.shape[1]:
        wider = np.full((len(logits), few.shape[1]), -np.inf, few.dtype)
        wider[:, : logits.shape[1]] = logits
        logits = wider
    logits[rows, : few.shape[1]] = few
    return logits


def vocab_of(model: SlotModel) -> int:
    """The number of rows of the model's embedding, including the rows of added tokens."""
    embedding = model.model.embed_tokens
    return int(embedding.rows.size if isinstance(embedding, TrainedEmbedding) else embedding.weight.shape[0])


def _check_ids(models: Sequence[SlotModel], pieces: Sequence[Array]) -> None:
    vocabs = {id(model): vocab_of(model) for model in models}
    if len(set(vocabs.values())) == 1:
        _check.in_range("decode", "token_ids", np.concatenate(pieces), vocabs[id(models[0])])
        return
    for model, piece in zip(models, pieces, strict=True):
        _check.in_range("decode", "token_ids", piece, vocabs[id(model)])


def _decode_together(
    models: Sequence[SlotModel], pieces: Sequence[Array], slots: Array, cache: KVCache
) -> Array:
    """Like `decode`, for the sequences of one batch."""
    counts = np.array([len(piece) for piece in pieces])
    acts = cache.acts(cache.next_positions(slots, counts))
    if acts.all() and all(model is models[0] for model in models):
        return _logits(models[0], pieces, slots, cache)
    joint = _joint_of(cache, models)
    numbers = np.array([joint.number(model) for model in models])
    acting = np.split(acts, np.cumsum(counts)[:-1])  # for each sequence
    order = sorted(range(len(models)), key=lambda i: (numbers[i], acting[i][0]))
    rows = [(int(numbers[i]), bool(does)) for i in order for does in acting[i]]
    last = [(int(numbers[i]), True) for i in order]
    sorted_pieces = [pieces[i] for i in order]
    logits = _logits(joint.lm, sorted_pieces, slots[order], cache, _grouped(rows), _grouped(last))
    return np.asarray(logits[np.argsort(order)])


def _grouped(rows: Iterable[tuple[int, bool]]) -> tuple[RowGroup, ...]:
    """Combine neighbouring rows into a RowGroup if their entries in `rows` are equal.

    Args:
        rows: for each row, a tuple: the joint model's number for the row's model, and whether this model's
            adapter acts on the row.
    """
    return tuple(
        RowGroup(model, sum(1 for _ in some), acts) for (model, acts), some in itertools.groupby(rows)
    )


def _logits(
    lm: SlotModel,
    pieces: Sequence[Array],
    slots: Array,
    cache: KVCache,
    groups: tuple[RowGroup, ...] | None = None,
    ends: tuple[RowGroup, ...] | None = None,
) -> Array:
    """Compute the logits of each sequence's next token, with a model or a joint model.

    Args:
        groups: for a joint model, the RowGroups of all rows.
        ends: for a joint model, the RowGroups of the last row of each sequence.
    """
    counts = np.array([len(piece) for piece in pieces])
    positions = cache.next_positions(slots, counts)
    with grouped_rows(groups):
        x = lm.model.run_cached(np.concatenate(pieces), positions, cache)
    with grouped_rows(ends):
        return lm.lm_head.forward(lm.model.read_out(x[np.cumsum(counts) - 1]))[0]


# ---- several models as one ----


class JointModel:
    """Combines several models with the same frozen weights into one model.

    In the joint model, each adapted layer is a GroupedLayer, which computes each row with the layer of the
    row's own model.

    Attributes:
        lm: the joint model, which can only compute inside `grouped_rows`.

    Args:
        models: the models.
        owner: the model whose layers may change. The layers of all other models do not change.
        most: the maximum number of models. A further model replaces the least recently used one.
    """

    def __init__(self, models: Sequence[SlotModel], owner: object, most: int) -> None:
        self._models = list(models)
        self._owner, self._most = owner, most
        self._free = list[int]()  # the numbers of removed models, for new models
        self._numbers = {id(model): number for number, model in enumerate(models)}  # ordered by last use
        adapted = [model.adapter_layers() for model in models]
        places = [dict(model.named_modules()) for model in models]
        self._grouped = {
            name: GroupedLayer([found[name] for found in places])
            for name in dict.fromkeys(itertools.chain(*adapted))
        }
        self.lm = models[0].copied({id(places[0][name]): layer for name, layer in self._grouped.items()})
        self._watch_owner()

    def number(self, model: SlotModel) -> int:
        """The number that this joint model and its layers use for `model`."""
        return self._numbers[id(model)]

    def join(self, models: Sequence[SlotModel], in_slots: Sequence[SlotModel]) -> bool:
        """Add models that are not in this joint model yet. New models do not replace models that a slot uses.

        Return False in two cases. First, the owner's layers have changed, for example by a merge. Second, a
        new model adapts a layer for which this joint model has no GroupedLayer.
        """
        if self._state != self._owner_state():
            return False
        for model in models:
            if id(model) not in self._numbers and not self._add(model, in_slots):
                return False
            self._numbers[id(model)] = self._numbers.pop(id(model))
        return True

    def _add(self, model: SlotModel, in_slots: Sequence[SlotModel]) -> bool:
        if not model.adapter_layers().keys() <= self._grouped.keys():
            return False
        number = self._free_number(in_slots)
        self._models[number : number + 1] = [model]
        self._numbers[id(model)] = number
        places = dict(model.named_modules())
        for name, layer in self._grouped.items():
            layer.put(number, places[name])
        self._watch_owner()
        return True

    def keep(self, models: Collection[SlotModel]) -> bool:
        """Remove all models except `models` and the owner.

        If no model would be left, remove nothing and return False.
        """
        needed = {id(self._owner), *map(id, models)}
        unused = [one for one in self._numbers if one not in needed]
        if len(unused) in (0, len(self._numbers)):
            return not unused
        self._free += [self._numbers.pop(one) for one in unused]
        stand_in = self._models[next(iter(self._numbers.values()))]
        places = dict(stand_in.named_modules())
        for number in self._free:
            self._models[number] = stand_in
            for name, layer in self._grouped.items():
                layer.put(number, places[name])
        return True

    def _free_number(self, in_slots: Sequence[SlotModel]) -> int:
        """Choose the number of a new model.

        If a model was removed, the new model gets the removed model's number. If not, the new model gets the
        next higher number in two cases: fewer than `most` numbers are in use, or slots use all models. In all
        other cases, the new model replaces the least recently used model that no slot uses.
        """
        if self._free:
            return self._free.pop()
        needed = {id(model) for model in in_slots}
        unused = [one for one in self._numbers if one not in needed]
        if len(self._models) < self._most or not unused:
            return len(self._models)
        return self._numbers.pop(unused[0])

    def _watch_owner(self) -> None:
        owned = [model for model in self._models if model is self._owner]
        self._layers = [layer for model in owned for layer in model.adapter_layers().values()]
        self._state = self._owner_state()

    def _owner_state(self) -> list[Hashable]:
        return [
            layer._inference_state() if isinstance(layer, Prepared) else (layer.merged, layer.adapter_enabled)
            for layer in self._layers
        ]


def forget(cache: KVCache, named: Iterable[SlotModel]) -> None:
    """Remove all models from the cache's joint model, except models that a slot uses and models in `named`.

    `named` holds the models whose adapters have a name. The adapters of all other models were deleted, so
    these models are not needed again.
    """
    if isinstance(cache.joint, JointModel):
        in_slots = (cache.adapters.model(slot) for slot in range(cache.slots))
        slot_models = [cast(SlotModel, model) for model in in_slots if model is not None]
        if not cache.joint.keep([*named, *slot_models]):
            cache.joint = None


def _joint_of(cache: KVCache, models: Sequence[SlotModel]) -> JointModel:
    """Return a joint model that contains `models`. The cache stores this joint model for later calls.

    If a new joint model is created, it also contains the models of all slots.
    """
    joint = cache.joint
    others = (cache.adapters.model(slot) for slot in range(cache.slots))
    in_slots: dict[int, Any] = {id(model): model for model in (*others, *models) if model is not None}
    if not isinstance(joint, JointModel) or not joint.join(models, list(in_slots.values())):
        joint = cache.joint = JointModel(list(in_slots.values()), cache.owner, cache.slots + 1)
    return joint
