"""int8_callbacks: the callbacks of a run that computes in int8."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

from nplora.finetuning.int8_check import AddGradient, Int8Check, computes_in_int8
from nplora.models.decoder import Decoder
from nplora.nn.module import Module
from nplora.trainer import Callback, Run
from nplora.weights import keeping_int8


@contextlib.contextmanager
def int8_callbacks(
    model: Module,
    decoder: Decoder,
    sample: Callable[[], AddGradient],
    keep_int8: bool,
    say: Callable[[str], None],
) -> Iterator[list[Callback]]:
    """Yield the callbacks of a run that computes in int8; an empty list if the run does not.

    At the end of the `with` block, no weights are kept in int8, and all parts can compute in int8 again.

    Args:
        decoder: the blocks of `model`.
        sample: makes the argument `add_gradient` of `Int8Check`.
        keep_int8: keep the weights of `Decoder.int8_weights` in memory as 8-bit integers.
        say: prints a line.
    """
    with contextlib.ExitStack() as stack:
        made = list[Callback]()
        if keep_int8:
            made.append(_KeptInt8(decoder, stack))
        if computes_in_int8(model):
            made.append(stack.enter_context(Int8Check(model, sample(), say)))
        yield made


class _KeptInt8(Callback):
    """When the run starts, converts the weights. If a resumed run is already finished, converts nothing."""

    def __init__(self, decoder: Decoder, stack: contextlib.ExitStack) -> None:
        self._decoder, self._stack = decoder, stack

    def on_fit_start(self, run: Run) -> None:
        if not run.was_finished:
            self._stack.enter_context(keeping_int8(self._decoder.int8_weights()))
