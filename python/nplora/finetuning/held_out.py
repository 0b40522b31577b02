"""Measures the loss on held-out data before and after a merge, to see how much quality the merge lost."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from nplora import _check, adapters
from nplora.adapters import Adapter
from nplora.adapters.content import AdapterContent
from nplora.adapters.merge_gate import Check
from nplora.adapters.sources import Source
from nplora.finetuning.attach import warn_of_form, with_adapters
from nplora.finetuning.data import Data
from nplora.finetuning.evaluation import TEXT_AND_REMEDY, judge_for, sources_to_judge
from nplora.finetuning.judging.judge import Judge
from nplora.finetuning.load import opened
from nplora.finetuning.options import EvaluateOptions
from nplora.finetuning.token_progress import speaker
from nplora.formats.files import StrPath
from nplora.nn.module import Module

# The options of `evaluate` that say how the data are read.
READING = ("format", "columns", "chat", "max_length", "learn", "skip_bad")
_OP = "evaluate"  # what messages begin with


def held_out_loss(data: Data, *, progress: bool | None = None, **reading: Any) -> Check:
    """Return a function that measures the loss of a model on held-out data, for `merge_adapter(check=…)`.

    Args:
        data: rows to measure the loss on, as for `evaluate`.
        progress: print a report of the data on stderr; None: only on a terminal or in a notebook.
        reading: the options `format`, `columns`, `chat`, `max_length`, `learn` and `skip_bad` of `evaluate`.
    Returns:
        a function that takes the path of a model and an adapter (or None), and returns the mean loss. Each
        call loads the model. The first call reads the data and prints the report. A later call uses the data
        of an earlier call if the earlier model has the same tokenizer, vocabulary size and context length;
        otherwise, it reads the data again. The function raises the errors of `evaluate`.
    Raises:
        ValueError, TypeError: an option is unknown or out of range.

    >>> check = nplora.finetuning.held_out_loss("valid.jsonl")
    >>> check("model.gguf", "adapter") < check("model.gguf", None)
    True
    >>> merged = nplora.merge_adapter("model.gguf", "adapter", "checked.gguf", check=check)
    >>> print(merged.loss)
    held-out loss unaffected: ...
    """
    for name in reading:
        if name not in READING:
            raise TypeError(f"held_out_loss: unexpected keyword {name!r}{_check.suggestion(name, READING)}")
    options = EvaluateOptions(**reading, op="merge")
    rows = list(data) if isinstance(data, Iterator) else data
    judges = dict[object, Judge]()  # the keys hold what decides how rows are encoded

    def loss(model: StrPath, adapter: Source | None) -> float:
        lm = opened(_OP, model, None)
        attached = _attachable(adapter)
        if attached is not None:
            # The merge has checked that the adapter belongs to the model, unless its caller allows any model.
            lm = with_adapters(_OP, lm, attached, any_base=True)
        key = lm.tokenizer.digest(), lm.vocab_size, lm.config.max_position_embeddings
        if key not in judges:
            judges[key] = judge_for(_OP, lm, sources_to_judge(_OP, rows), options, [])
            if len(judges) == 1:
                speaker(progress)(str(judges[key].report))
        if attached is not None:
            warn_of_form(_OP, attached, judges[key].report.chat, *TEXT_AND_REMEDY)
        return judges[key].measure(lm)[0].value

    return loss


def _attachable(adapter: Source | None) -> StrPath | Adapter | None:
    """Return the adapter as a path or an `Adapter`, which `evaluate` accepts."""
    return adapters.read_adapter(adapter) if isinstance(adapter, Module | AdapterContent) else adapter
