"""Merge an adapter into a model's file, if the loss on held-out data hardly rises."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from nplora import _check, adapters
from nplora.adapters import Adapter, ModelMerge
from nplora.adapters.content import AdapterContent
from nplora.adapters.merge_gate import TOLERANCE, Check
from nplora.adapters.sources import Source
from nplora.finetuning.data import Data
from nplora.finetuning.evaluation import evaluate
from nplora.finetuning.options import EvaluateOptions
from nplora.formats.files import StrPath
from nplora.nn.module import Module

# The options of `evaluate` that say how held-out data are read.
READING = ("format", "columns", "chat", "max_length", "learn", "skip_bad")


@_check.keywords
def merge_adapter(
    base: StrPath,
    adapter: Source,
    output: StrPath,
    dtype: str = "same",
    any_base: bool = False,
    overwrite: bool = False,
    lossy: bool = False,
    *,
    check: Data | None = None,
    tolerance: float = TOLERANCE,
    progress: bool | None = None,
    format: str | None = None,
    columns: Mapping[str, str] | str | None = None,
    chat: bool = False,
    max_length: int | None = None,
    learn: str = "completion",
    skip_bad: bool = False,
) -> ModelMerge:
    """Write a model with an adapter merged into it, after a check on held-out data.

    The new model is first written to a temporary file and loaded. Its loss is compared with that of the base
    model with the adapter attached. The file gets its name `output` only if the loss rises by at most the
    tolerance. Otherwise it is removed, and an existing output stays. The error then names the smallest larger
    storage type that keeps enough, if there is one; its loss is measured too. While the file is written, only
    a block of rows of one weight is in memory.

    Args:
        base, adapter, output, dtype, any_base, overwrite: see `nplora.adapters.merge_adapter`.
        lossy: accept a model that keeps less than 90 % of the adapter's ΔW. If `check` is given too, only the
            loss decides.
        check: rows to measure the loss on, as for `evaluate`; None: the loss is not measured.
        tolerance: the largest accepted rise of the loss, in nats per token. 0.02 raises the perplexity by 2
            %.
        progress: print a report of the data on stderr; None: only on a terminal or in a notebook.
        format, columns, chat, max_length, learn, skip_bad: how `check` is read, as in `evaluate`.
    Returns:
        a summary of the written model: the losses, and how much of each weight's ΔW is left after rounding.
    Raises:
        ValueError: the loss would rise by more than `tolerance`; or rounding would keep less than 90 % of ΔW,
            and `lossy` is not set.
        Other errors: see `nplora.adapters.merge_adapter` and `evaluate`.

    >>> merged = nplora.merge_adapter("model.gguf", "adapter", "merged.gguf", check="valid.jsonl")
    >>> merged.delta_kept > 0.99, merged.loss.is_kept
    (True, True)
    >>> print(merged)
    held-out loss unaffected: ...
    merged.gguf: ... bytes, 14 tensors merged (float32), ... copied
    ...
    """
    reading = {
        "format": format, "columns": columns, "chat": chat, "max_length": max_length, "learn": learn,
        "skip_bad": skip_bad,
    }  # fmt: skip
    EvaluateOptions(**reading, op="merge")  # type: ignore[arg-type]
    measure = None if check is None else _loss_on(check, any_base, progress, reading)
    return adapters.merge_adapter(
        base, adapter, output, dtype, any_base, overwrite, lossy, measure, tolerance
    )


def _loss_on(data: Data, any_base: bool, progress: bool | None, reading: dict[str, Any]) -> Check:
    """A function that returns the loss of a model on these data. It reports the data only once."""
    rows = list(data) if isinstance(data, Iterator) else data
    reported = list[bool]()

    def loss(model: StrPath, adapter: Source | None) -> float:
        shown = progress if not reported else False
        reported.append(True)
        given = _attachable(adapter)
        return evaluate(model, rows, adapter=given, any_base=any_base, progress=shown, **reading)["loss"]

    return loss


def _attachable(adapter: Source | None) -> StrPath | Adapter | None:
    """The adapter as `evaluate` takes it: a path or an `Adapter`."""
    return adapters.read_adapter(adapter) if isinstance(adapter, Module | AdapterContent) else adapter
