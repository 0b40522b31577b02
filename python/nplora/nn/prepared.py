"""Prepared: builds and keeps the object with which the C++ core runs a layer in inference."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

from nplora import _core


class Prepared:
    """Base class of layers: stores the object that `_core.infer` needs to run the layer."""

    _prepared: tuple[tuple[Hashable, ...], _core.InferenceLayer | None] | None = None

    def inference_layer(self) -> _core.InferenceLayer | None:
        """Return the layer's argument for `_core.infer`, or None if `_core.infer` cannot run this layer.

        The argument shares the layer's arrays, so it stays valid when values in the arrays change.
        """
        kept, state = self._prepared, self._inference_state()
        if kept is not None and kept[0] == state:
            return kept[1]
        made = self._inference_layer()
        if self._inference_state() == state:  # if not, another thread changed the layer meanwhile
            self._prepared = state, made
        return made

    def forget_prepared(self) -> None:
        """Release the stored argument and its references to the layer's arrays."""
        vars(self).pop("_prepared", None)

    def _inference_state(self) -> tuple[Hashable, ...]:
        """Return the values on which the stored argument depends.

        If one of these values has changed, `inference_layer` builds the argument again.

        For an array, the result contains the array's Python id, because == would compare the elements. The
        stored argument keeps the array alive, so no new array can get this id. For a FrozenWeight, the result
        contains the object itself, because an id would not suffice: the stored argument keeps only the packed
        part of the weight alive. So the FrozenWeight could be freed, and a new one could get the same id.
        """
        raise NotImplementedError

    def _inference_layer(self) -> _core.InferenceLayer | None:
        raise NotImplementedError

    def __getstate__(self) -> dict[str, Any]:
        """Return the state for copies and pickles. The stored argument is left out: a copy builds its own."""
        state = vars(self).copy()  # another thread may set `_prepared` meanwhile
        state.pop("_prepared", None)
        return state
