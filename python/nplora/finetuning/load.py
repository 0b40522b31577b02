"""The model and the text of a run, and the batches that it learns from."""

from __future__ import annotations

from pathlib import Path

from nplora.adapters import Adapter, read_for
from nplora.finetuning.data import EVALUATION_TOKENS, Dataset, TokenBatches, find_splits, read_dataset
from nplora.finetuning.options import DEFAULT_EXAMPLES, FinetuneOptions
from nplora.formats import files
from nplora.formats.errors import FormatError, brief, counted
from nplora.formats.files import StrPath
from nplora.lm import LanguageModel, load_model
from nplora.lm.generation import prompt_ids
from nplora.weights import COMPUTES


def opened_all(
    op: str,
    model: StrPath | LanguageModel,
    data: StrPath,
    valid: StrPath | None,
    options: FinetuneOptions,
    check: bool = True,
) -> tuple[LanguageModel, Dataset, Dataset | None]:
    """The model, what it learns from and what it is evaluated on. The samples fit the model.

    `check` is as in `load_model`.
    """
    files.require_named(op, data=data, valid=valid)
    train_path, found = find_splits(data)
    valid_path = found if valid is None else Path(valid)
    lm = opened(op, model, options.compute, check)
    if lm.compute not in COMPUTES:
        raise ValueError(
            f"{op}: compute={lm.compute!r} is for inference; load the model with {' or '.join(COMPUTES)}"
        )
    if lm.adapter_layers():
        on = counted(len(lm.adapter_layers()), "layer")
        raise ValueError(f"{op}: the model has an adapter already, on {on}")
    for prompt in options.sample:
        prompt_ids(f"{op}: sample {brief(prompt)}", lm, prompt)
    train = read(lm, train_path, options)
    return lm, train, None if valid_path is None else read(lm, valid_path, options)


def continued(op: str, lm: LanguageModel, options: FinetuneOptions) -> Adapter | None:
    """The adapter that a run continues from, if there is one. Raises as `attach_adapter`."""
    if options.adapter is None:
        return None
    files.require_named(op, adapter=options.adapter)
    return read_for(lm, options.adapter, lm.source)


def opened(op: str, model: StrPath | LanguageModel, compute: str | None, check: bool = True) -> LanguageModel:
    if not isinstance(model, LanguageModel):
        return load_model(model, compute or COMPUTES[0], check=check)
    if compute is not None:
        raise ValueError(f"{op}: compute={compute!r} is for a file; this model was loaded with its own")
    return model


def read(lm: LanguageModel, path: Path, options: FinetuneOptions) -> Dataset:
    dataset = read_dataset(
        path,
        lm.tokenizer,
        max_length=min(options.max_length, lm.config.max_position_embeddings),
        learn=options.learn,
        skip_bad=options.skip_bad,
        strict=options.strict,
    )
    require_vocabulary(lm, dataset)
    return dataset


def require_vocabulary(lm: LanguageModel, dataset: Dataset) -> None:
    if dataset.largest_id >= lm.config.vocab_size:
        raise FormatError(
            f"{dataset.report.source}: its text has token {dataset.largest_id} of {lm.tokenizer}, "
            f"the model's vocabulary ends with {lm.config.vocab_size - 1}"
        )


def batches_of(dataset: Dataset, options: FinetuneOptions) -> TokenBatches:
    examples = options.batch_examples
    if examples is None and options.batch_tokens is None:
        examples = DEFAULT_EXAMPLES
    return TokenBatches(
        dataset, batch_tokens=options.batch_tokens, batch_examples=examples, seed=options.seed
    )


def checks_of(dataset: Dataset) -> TokenBatches:
    """The batches of an evaluation."""
    return TokenBatches(dataset, batch_tokens=EVALUATION_TOKENS, shuffle=False)
