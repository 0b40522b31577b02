"""The loss of a language model over a file."""

from __future__ import annotations

from typing import Any

from nplora.finetuning.attach import Adapters, attach_adapter
from nplora.finetuning.data import TokenBatches, find_evaluated, read_dataset
from nplora.finetuning.load import evaluation_batches, opened, require_vocabulary
from nplora.finetuning.token_progress import speaker
from nplora.formats import files
from nplora.formats.files import StrPath
from nplora.lm import LanguageModel

_TOLD = ("source", "examples", "truncated", "emptied", "skipped")


def evaluate(
    model: StrPath | LanguageModel,
    data: StrPath,
    *,
    adapter: Adapters | None = None,
    compute: str | None = None,
    max_length: int | None = None,
    learn: str = "completion",
    skip_bad: bool = False,
    any_base: bool = False,
    strict: bool = False,
    progress: bool | None = None,
) -> dict[str, Any]:
    """The mean loss of a model over a file, per learned token: {"loss": ..., "tokens": ..., ...}.

    Beside these two: "source", the file, and its "examples", "truncated", "emptied" and "skipped", as
    `DataReport` has them.

    Args:
        data: as in `finetune`; of a directory, its valid.jsonl, or its train.jsonl where there is none.
        adapter: what is put on the model, as in `attach_adapter`.
        max_length: longer examples are cut; None: to the model's context.
        compute: as in `FinetuneOptions`, of a model that is loaded here; None: "float32".
        learn, skip_bad, strict: as in `FinetuneOptions`.
        any_base: as in `load_adapter`.
        progress: tell on stderr what was read; None: if that is a terminal.
    Raises: as `finetune` and `load_adapter`.
    """
    files.require_named("evaluate", data=data)
    path = find_evaluated(data)
    lm = opened("evaluate", model, compute)
    if adapter is not None:
        attach_adapter(lm, adapter, any_base)
    dataset = read_dataset(
        path,
        lm.tokenizer,
        max_length=lm.config.max_position_embeddings if max_length is None else max_length,
        learn=learn,
        skip_bad=skip_bad,
        strict=strict,
    )
    require_vocabulary(lm, dataset)
    speaker(progress)(str(dataset.report))
    told = {name: getattr(dataset.report, name) for name in _TOLD}
    return evaluate_batches(lm, evaluation_batches(dataset)) | told


def evaluate_batches(lm: LanguageModel, batches: TokenBatches) -> dict[str, Any]:
    """The mean loss over all targets of all batches, and their number."""
    total, tokens = 0.0, 0
    for batch, _ in batches.epoch(0):
        total += lm.loss_packed(batch) * batch.num_targets
        tokens += batch.num_targets
    return {"loss": total / max(1, tokens), "tokens": tokens}
