"""Finds the first layer of a model whose output is NaN or infinite."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from nplora.lm import LanguageModel
from nplora.models.decoder import Decoder
from nplora.models.head import chunks
from nplora.models.packing import IGNORED, PackedBatch
from nplora.nn.module import quiet


def first_nonfinite_layer(lm: LanguageModel, batch: PackedBatch) -> str:
    """The name of the first layer whose output for the batch is not finite; "" if all outputs are finite."""
    prefix, lm.model.prefix = lm.model.prefix, None
    try:
        with quiet(), watched_blocks(lm.model, "model.layers.{}".format) as found:
            hidden = lm.residual_stream(batch)
            return (found or [_in_head(lm, hidden, batch)])[0]
    finally:
        lm.model.prefix = prefix


@contextlib.contextmanager
def watched_blocks(model: Decoder, name: Callable[[int], str]) -> Iterator[list[str]]:
    """Yield an empty list. In the `with` block, when a block of the model returns an output that is not
    finite, the name of this block is added to the list.

    Args:
        name: a function that returns the name of a block, given its index.
    """
    found: list[str] = []
    for index, block in enumerate(model.layers):
        vars(block)["run"] = _watched(block.run, name(index), found)
    try:
        yield found
    finally:
        for block in model.layers:
            del vars(block)["run"]


def _in_head(lm: LanguageModel, hidden: Any, batch: PackedBatch) -> str:
    for rows in chunks(np.flatnonzero(batch.targets != IGNORED), lm.config.vocab_size):
        if not np.isfinite(lm.model.norm(hidden[rows])).all():
            return "model.norm"
        if not np.isfinite(lm.logits_of(hidden[rows])).all():
            return "lm_head"
    return ""


def _watched(run: Callable[..., Any], name: str, found: list[str]) -> Callable[..., Any]:
    def watching(*arguments: Any, **named: Any) -> Any:
        result = run(*arguments, **named)
        if not np.isfinite(result[0]).all():
            found.append(name)
        return result

    return watching
