"""Finds the first layer of a language model whose output is NaN or infinite."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from nplora.lm import LanguageModel
from nplora.models.head import chunks
from nplora.models.packing import IGNORED, PackedBatch
from nplora.nn.module import quiet


def first_nonfinite_layer(lm: LanguageModel, batch: PackedBatch) -> str:
    """The name of the first layer whose output for the batch is not finite; "" if all outputs are finite."""
    found: list[str] = []
    prefix, lm.model.prefix = lm.model.prefix, None
    for index, block in enumerate(lm.model.layers):
        vars(block)["run"] = _watched(block.run, f"model.layers.{index}", found)
    try:
        with quiet():
            hidden = lm.residual_stream(batch)
            return (found or [_in_head(lm, hidden, batch)])[0]
    finally:
        for block in lm.model.layers:
            del vars(block)["run"]
        lm.model.prefix = prefix


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
