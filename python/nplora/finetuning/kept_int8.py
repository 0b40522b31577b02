"""KeptInt8: a callback that keeps the weights of a model in memory as 8-bit integers while a run trains."""

from __future__ import annotations

import contextlib
from types import TracebackType
from typing import Self

from nplora.models.decoder import Decoder
from nplora.trainer import Callback, Run
from nplora.weights import keeping_int8


class KeptInt8(Callback):
    """Keeps the weights of `Decoder.int8_weights` from the start of a run until the `with` block ends.

    If a resumed run is already finished, no weight is converted.
    """

    def __init__(self, model: Decoder) -> None:
        self._model, self._kept = model, contextlib.ExitStack()

    def on_fit_start(self, run: Run) -> None:
        if not run.was_finished:
            self._kept.enter_context(keeping_int8(self._model.int8_weights()))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._kept.close()
