"""The loss of a language model over a file."""

from __future__ import annotations

from typing import Any

from nplora import _check
from nplora.finetuning.attach import Adapters, attach_adapter
from nplora.finetuning.data import TokenBatches, find_evaluated, read_dataset
from nplora.finetuning.load import evaluation_batches, opened, require_vocabulary
from nplora.finetuning.options import EvaluateOptions
from nplora.finetuning.token_progress import speaker
from nplora.formats import files
from nplora.formats.files import StrPath
from nplora.lm import LanguageModel

_REPORTED = ("source", "examples", "truncated", "emptied", "skipped")  # of a DataReport


def evaluate(
    model: StrPath | LanguageModel,
    data: StrPath,
    *,
    adapter: Adapters | None = None,
    any_base: bool = False,
    progress: bool | None = None,
    **options: Any,
) -> dict[str, Any]:
    """The mean loss of a model over a file.

    Args:
        data: as in `finetune`; of a directory, its valid.jsonl, or its train.jsonl if it has no valid.jsonl.
        adapter: what is put on the model, as in `attach_adapter`.
        any_base: as in `load_adapter`.
        progress: print on stderr what was read; None: if that is a terminal.
        options: the fields of `EvaluateOptions`; `compute` only for a model that is loaded here.
    Returns:
        "loss", the mean over the tokens that count, and "tokens", their number; also "source", the file, and
        its "examples", "truncated", "emptied" and "skipped", as in `DataReport`.
    Raises: as `finetune` and `load_adapter`.
    """
    files.require_named("evaluate", data=data)
    chosen = _check.options("evaluate", EvaluateOptions, options)
    path = find_evaluated(data)
    lm = opened("evaluate", model, chosen.compute)
    if adapter is not None:
        attach_adapter(lm, adapter, any_base)
    dataset = read_dataset(
        path,
        lm.tokenizer,
        max_length=lm.config.max_position_embeddings if chosen.max_length is None else chosen.max_length,
        learn=chosen.learn,
        skip_bad=chosen.skip_bad,
        strict=chosen.strict,
    )
    require_vocabulary(lm, dataset)
    speaker(progress)(str(dataset.report))
    reported = {name: getattr(dataset.report, name) for name in _REPORTED}
    return evaluate_batches(lm, evaluation_batches(dataset)) | reported


def evaluate_batches(lm: LanguageModel, batches: TokenBatches) -> dict[str, Any]:
    """The mean loss over all targets of all batches, and the number of targets."""
    total, tokens = 0.0, 0
    for batch, _ in batches.epoch(0):
        total += lm.loss_packed(batch) * batch.num_targets
        tokens += batch.num_targets
    return {"loss": total / max(1, tokens), "tokens": tokens}
