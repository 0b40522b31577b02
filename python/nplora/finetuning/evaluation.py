"""The loss of a language model over a file."""

from collections.abc import Mapping
from typing import TypedDict

from nplora import _check
from nplora.finetuning.attach import Adapters, warn_of_form, with_adapters
from nplora.finetuning.data import Data, TokenBatches
from nplora.finetuning.data.dataset import read_sources
from nplora.finetuning.data.sources import sources_of
from nplora.finetuning.load import evaluation_batches, opened, require_vocabulary
from nplora.finetuning.options import EvaluateOptions, from_arguments
from nplora.finetuning.token_progress import speaker
from nplora.formats.files import StrPath
from nplora.lm import LanguageModel


class MeanLoss(TypedDict):
    """A mean loss, and the number of tokens in the mean.

    >>> nplora.finetuning.MeanLoss(loss=2.5, tokens=100)
    {'loss': 2.5, 'tokens': 100}
    """

    loss: float
    tokens: int


class Evaluation(MeanLoss):
    """The dict that `evaluate` returns.

    Keys:
        loss, tokens: the mean loss, and the number of tokens in the mean.
        source: the name of the file.
        examples, truncated, emptied, skipped: counts of examples and rows, see `DataReport`.

    >>> result: nplora.finetuning.Evaluation = nplora.evaluate("model.gguf", "valid.jsonl")
    >>> result["tokens"], result["examples"]
    (12, 4)
    """

    source: str
    examples: int
    truncated: int
    emptied: int
    skipped: int


@_check.keywords
def evaluate(
    model: StrPath | LanguageModel,
    data: Data,
    *,
    adapter: Adapters | None = None,
    any_base: bool = False,
    progress: bool | None = None,
    format: str | None = None,
    columns: Mapping[str, str] | str | None = None,
    chat: bool = False,
    max_length: int | None = None,
    learn: str = "completion",
    skip_bad: bool = False,
    strict: bool = False,
    compute: str | None = None,
) -> Evaluation:
    """Compute the mean loss of a language model over a file of text.

    Args:
        model: a GGUF file or a Hugging Face directory, as for `load_model`; or a loaded model.
        data: rows to evaluate on: a file, an iterable of dictionaries, a data frame, or several files, as for
            `nplora.data.read_dataset`; or a directory. In a directory, valid.jsonl is read, or train.jsonl if
            there is no valid.jsonl.
        adapter: adapter to evaluate the model with: a PEFT directory, a llama.cpp file or an `Adapter`; or a
            pair (one of these, weight); or a list, whose adapters add up. The adapter does not change a
            loaded model.
        any_base: accept an adapter that was trained on another model with the same shapes.
        progress: print a report of the data on stderr; None: only on a terminal or in a notebook.
        format: format of the rows: messages, sharegpt, alpaca, completion, text, preference or kto (default:
            the names of the fields decide).
        columns: names of fields in the data, as in prompt=question,completion=answer.
        chat: write prompts and completions with the model's chat template.
        max_length: maximum tokens of an example; longer examples are cut (default: the model's context).
        learn: tokens in the loss: completion (completions and assistant turns) or all.
        skip_bad: skip bad lines of the data, and count them.
        strict: refuse examples that are longer than `max_length`.
        compute: arithmetic of the products with frozen weights: float32, bfloat16, or int8 for quantised
            weights and few tokens (default: float32).
    Returns:
        the mean loss, the number of tokens in the mean, and a report of the data.
    Raises:
        DataError: a line of the data is wrong.
        ValueError, TypeError: an option is out of range, `compute` is given for a model that is loaded
            already, or `adapter` is given for a model that already has an adapter.
        FormatError: a file is invalid, or the adapter does not fit the model or was trained on another model.
        OSError: a file cannot be read.
    Warns:
        UserWarning: `compute` is "int8", but no weight can use int8; or the adapter was trained with the chat
            template and these rows do not go through it, or the other way round.
        Other warnings: see `attach_adapter`.

    >>> result = nplora.evaluate("model.gguf", "valid.jsonl", adapter="adapter")
    >>> result["loss"] > 0
    True
    """
    chosen = from_arguments("evaluate", EvaluateOptions, locals())
    sources = sources_of("evaluate", data)
    lm = opened("evaluate", model, chosen.compute)
    if adapter is not None:
        lm = with_adapters("evaluate", lm, adapter, any_base)
    reading = chosen.reading(chosen.max_length or lm.config.max_position_embeddings)
    dataset = read_sources("evaluate", sources, lm.tokenizer, reading)
    require_vocabulary(lm, dataset)
    report = dataset.report
    if adapter is not None:
        warn_of_form("evaluate", adapter, report.chat, "this text", "chat=True (--chat) does that")
    speaker(progress)(str(report))
    return Evaluation(
        **evaluate_batches(lm, evaluation_batches(dataset)),
        source=report.source,
        examples=report.examples,
        truncated=report.truncated,
        emptied=report.emptied,
        skipped=report.skipped,
    )


def evaluate_batches(lm: LanguageModel, batches: TokenBatches) -> MeanLoss:
    """Compute the mean loss over the trained tokens of all batches.

    >>> lm = nplora.load_model("model.gguf")
    >>> dataset = nplora.data.read_dataset("valid.jsonl", lm.tokenizer)
    >>> batches = nplora.data.TokenBatches(dataset, batch_examples=2)
    >>> nplora.finetuning.evaluate_batches(lm, batches)["tokens"]
    12
    """
    total, tokens = 0.0, 0
    for batch, _ in batches.epoch(0):
        total += lm.loss_packed(batch) * batch.num_targets
        tokens += batch.num_targets
    return MeanLoss(loss=total / max(1, tokens), tokens=tokens)
