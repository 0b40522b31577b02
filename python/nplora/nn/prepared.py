"""A layer as the core's `infer` takes it, kept from one token to the next."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

from nplora import _core


class Prepared:
    """Keeps what `_core.infer` was last given, as long as it was made from what the layer is now."""

    _prepared: tuple[tuple[Hashable, ...], _core.InferenceLayer | None] | None = None

    def inference_layer(self) -> _core.InferenceLayer | None:
        """This layer for `_core.infer`, which reads its arrays as they are then; None: it computes more."""
        kept, state = self._prepared, self._inference_state()
        if kept is not None and kept[0] == state:
            return kept[1]
        made = self._inference_layer()
        if self._inference_state() == state:  # else another thread has changed the layer meanwhile
            self._prepared = state, made
        return made

    def forget_prepared(self) -> None:
        """Let go of the arrays that it holds."""
        vars(self).pop("_prepared", None)

    def _inference_state(self) -> tuple[Hashable, ...]:
        """What `_inference_layer` reads.

        Arrays, which compare by element, by their id: the core's layer keeps them, so it stays theirs. Of a
        FrozenWeight that layer keeps the packed part alone, so the object itself is here.
        """
        raise NotImplementedError

    def _inference_layer(self) -> _core.InferenceLayer | None:
        raise NotImplementedError

    def __getstate__(self) -> dict[str, Any]:
        """For copies and pickles, which prepare their own."""
        return {name: value for name, value in vars(self).items() if name != "_prepared"}
