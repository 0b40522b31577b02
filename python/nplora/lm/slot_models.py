"""Decodes the next tokens of several sequences of a cache together, each with the adapter of its slot.

A small batch reads the frozen weights once for all its rows, and gives each row the same bits as alone. A
longer piece of a prompt is computed alone.
"""

from __future__ import annotations

import itertools
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Protocol, Self

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


_SMALL = _core.constants.small_batch


def decode(lm: SlotModel, ids: Array, slots: Array, cache: KVCache) -> Array:
    """The logits (m, vocab) after the tokens `ids` (m, count), which are stored in the cache.

    The cache's lengths stay as they are. Call this function in `with inference()`.

    Args:
        lm: the model for a cache without an owner.
    Raises:
        ValueError: an id is out of range. The cache is not changed.
    """
    models: list[Any] = [cache.adapters.model(slot) or lm for slot in slots.tolist()]
    _check_ids(models, ids)
    cache.find_invocation(slots, ids)
    together = max(1, _SMALL // ids.shape[1])
    if len(slots) <= together:
        return _decode_few(models, ids, slots, cache)
    number = {id(model): index for index, model in enumerate(models)}  # one for each model
    order = np.argsort([number[id(model)] for model in models], kind="stable")
    logits = np.empty((len(slots), 0), np.float32)
    for first in range(0, len(slots), together):
        some = order[first : first + together]
        few = _decode_few([models[row] for row in some], ids[some], slots[some], cache)
        logits = _filled(logits, some, few)
    return logits


def _filled(logits: Array, rows: Array, few: Array) -> Array:
    """Store some rows in the logits, which are made wider for the first ones. Shorter rows end with -inf."""
    if few.shape[1] > logits.shape[1]:
        wider = np.full((len(logits), few.shape[1]), -np.inf, few.dtype)
        wider[:, : logits.shape[1]] = logits
        logits = wider
    logits[rows, : few.shape[1]] = few
    return logits


def vocab_of(model: SlotModel) -> int:
    """The number of rows of the model's own embedding, with those for added tokens."""
    embedding = model.model.embed_tokens
    return int(embedding.rows.size if isinstance(embedding, TrainedEmbedding) else embedding.weight.shape[0])


def _check_ids(models: Sequence[SlotModel], ids: Array) -> None:
    vocabs = {id(model): vocab_of(model) for model in models}
    if len(set(vocabs.values())) == 1:
        _check.in_range("decode", "token_ids", ids, vocabs[id(models[0])])
        return
    for model, row in zip(models, ids, strict=True):
        _check.in_range("decode", "token_ids", row, vocabs[id(model)])


def _decode_few(models: Sequence[SlotModel], ids: Array, slots: Array, cache: KVCache) -> Array:
    """`decode` for as many sequences as are computed together."""
    count = ids.shape[1]
    acts = cache.acts(slots, cache.lengths[slots], count)
    if acts.all() and all(model is models[0] for model in models):
        return _logits(models[0], ids, slots, cache)
    joint = _joint_of(cache, models)
    numbers = np.array([joint.number(model) for model in models])
    order = np.lexsort((acts[:, 0], numbers))
    rows = zip(np.repeat(numbers[order], count).tolist(), acts[order].reshape(-1).tolist(), strict=True)
    last = ((number, True) for number in numbers[order].tolist())
    logits = _logits(joint.lm, ids[order], slots[order], cache, _grouped(rows), _grouped(last))
    return np.asarray(logits[np.argsort(order)])


def _grouped(rows: Iterable[tuple[int, bool]]) -> tuple[RowGroup, ...]:
    """Join neighbouring rows with the same model whose adapter acts, or does not act, on all of them."""
    return tuple(
        RowGroup(model, sum(1 for _ in some), acts) for (model, acts), some in itertools.groupby(rows)
    )


def _logits(
    lm: SlotModel,
    ids: Array,
    slots: Array,
    cache: KVCache,
    groups: tuple[RowGroup, ...] | None = None,
    ends: tuple[RowGroup, ...] | None = None,
) -> Array:
    """Args: groups, ends: the groups of all rows, and of the last row of each sequence."""
    count = ids.shape[1]
    positions = cache.next_positions(slots, count)
    with grouped_rows(groups):
        x = lm.model.run_cached(ids.reshape(-1), positions, cache)
    with grouped_rows(ends):
        return lm.lm_head.forward(lm.model.read_out(x[count - 1 :: count].copy()))[0]


# ---- several models as one ----


class JointModel:
    """Several models that share the frozen weights, as one model with a GroupedLayer in each adapted place.

    Attributes:
        lm: the joint model. It computes inside `grouped_rows` only.

    Args:
        models: the models.
        owner: the model whose layers may change. The others are copies that nobody else has.
        most: the most models. A further one takes the place of the one that was used least recently.
    """

    def __init__(self, models: Sequence[SlotModel], owner: object, most: int) -> None:
        self._models = list(models)
        self._owner, self._most = owner, most
        self._numbers = {id(model): number for number, model in enumerate(models)}  # the last used one last
        adapted = [model.adapter_layers() for model in models]
        places = [dict(model.named_modules()) for model in models]
        self._grouped = {
            name: GroupedLayer([found[name] for found in places])
            for name in dict.fromkeys(itertools.chain(*adapted))
        }
        self.lm = models[0].copied({id(places[0][name]): layer for name, layer in self._grouped.items()})
        self._watch_owner()

    def number(self, model: SlotModel) -> int:
        """The number of one of the models."""
        return self._numbers[id(model)]

    def join(self, models: Sequence[SlotModel], in_slots: Sequence[SlotModel]) -> bool:
        """Join models that are not joined yet. They do not take the places of the models of the slots.

        Return False if this is not possible: a model has an adapter in a place where no other model has one,
        or the owner has changed, by merging for example.
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

    def _free_number(self, in_slots: Sequence[SlotModel]) -> int:
        """The next number, or that of the model that was used least recently and is in no slot."""
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


def _joint_of(cache: KVCache, models: Sequence[SlotModel]) -> JointModel:
    """A joint model of these models, which the cache keeps. A new one also joins those of the other slots."""
    joint = cache.joint
    others = (cache.adapters.model(slot) for slot in range(cache.slots))
    in_slots: dict[int, Any] = {id(model): model for model in (*others, *models) if model is not None}
    if not isinstance(joint, JointModel) or not joint.join(models, list(in_slots.values())):
        joint = cache.joint = JointModel(list(in_slots.values()), cache.owner, cache.slots + 1)
    return joint
