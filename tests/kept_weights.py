"""A callback for tests of `keep_int8`."""

from typing import Any

from nplora.models.decoder import frozen_weights
from nplora.trainer import Callback, Run


class KeptWeights(Callback):
    """Records after each step how many bytes of weights are kept in memory as 8-bit integers."""

    def __init__(self) -> None:
        self.nbytes = list[int]()

    def on_step_end(self, run: Run, record: Any) -> None:
        del record
        kept = (weight.int8_nbytes for weight in frozen_weights([run.model]) if weight.keeps_int8)
        self.nbytes.append(sum(kept))
