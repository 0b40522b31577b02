"""The core's inference layer of a layer, kept from one token to the next."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

from nplora import _core


class Prepared:
    """Keeps the argument for `_core.infer`, until the layer changes."""

    _prepared: tuple[tuple[Hashable, ...], _core.InferenceLayer | None] | None = None

    def inference_layer(self) -> _core.InferenceLayer | None:
        """The argument for `_core.infer`, which reads the arrays when it runs. None: use `forward`."""
        kept, state = self._prepared, self._inference_state()
        if kept is not None and kept[0] == state:
            return kept[1]
        made = self._inference_layer()
        if self._inference_state() == state:  # otherwise another thread changed the layer meanwhile
            self._prepared = state, made
        return made

    def forget_prepared(self) -> None:
        """Release the arrays that it holds."""
        vars(self).pop("_prepared", None)

    def _inference_state(self) -> tuple[Hashable, ...]:
        """The parts of the layer that `_inference_layer` reads, to see whether they have changed.

        Arrays compare by element, so their id is used. The core's layer keeps the arrays, so no other array
        can get the same id. It keeps only the packed part of a FrozenWeight, so a FrozenWeight is compared as
        an object, not by id.
        """
        raise NotImplementedError

    def _inference_layer(self) -> _core.InferenceLayer | None:
        raise NotImplementedError

    def __getstate__(self) -> dict[str, Any]:
        """The state for copies and pickles, without the prepared objects: a copy makes its own."""
        return {name: value for name, value in vars(self).items() if name != "_prepared"}
