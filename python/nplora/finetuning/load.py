"""What a run reads: the model, the text, and the adapter that it continues from."""

from __future__ import annotations

from dataclasses import dataclass
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


@dataclass
class RunInputs:
    """What a run reads.

    Attributes:
        lm: the model, without an adapter.
        train, held_out: the examples to train on, and those to evaluate on, if any.
        start: the adapter to continue from, if any.
    """

    lm: LanguageModel
    train: Dataset
    held_out: Dataset | None
    start: Adapter | None

    @property
    def datasets(self) -> list[Dataset]:
        return [dataset for dataset in (self.train, self.held_out) if dataset is not None]

    @property
    def tokens(self) -> int:
        """The tokens of all examples."""
        return sum(dataset.report.tokens for dataset in self.datasets)

    def reload(self, model: StrPath, compute: str) -> None:
        """Load the model again with another arithmetic; the memory of the old one is released first."""
        del self.lm
        self.lm = load_model(model, compute, check=False)  # it was checked before


def read_inputs(
    op: str,
    model: StrPath | LanguageModel,
    data: StrPath,
    valid: StrPath | None,
    options: FinetuneOptions,
    check: bool = True,
) -> RunInputs:
    """Read all that a run with these options needs, and check that it fits together.

    Args:
        check: as in `load_model`.
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
    lm.require_trainable(op)  # it is not while a named adapter is selected
    for prompt in options.sample:
        prompt_ids(f"{op}: sample {brief(prompt)}", lm, prompt)
    train = _read(lm, train_path, options)
    held_out = None if valid_path is None else _read(lm, valid_path, options)
    return RunInputs(lm, train, held_out, _start(op, lm, options))


def opened(op: str, model: StrPath | LanguageModel, compute: str | None, check: bool = True) -> LanguageModel:
    """The model, loaded unless it is one already."""
    if not isinstance(model, LanguageModel):
        return load_model(model, compute or COMPUTES[0], check=check)
    if compute is not None:
        raise ValueError(f"{op}: compute={compute!r} is for a file; this model was loaded with its own")
    return model


def _read(lm: LanguageModel, path: Path, options: FinetuneOptions) -> Dataset:
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
    """Refuse a text with a token that the model does not have."""
    if dataset.largest_id >= lm.config.vocab_size:
        raise FormatError(
            f"{dataset.report.source}: its text has token {dataset.largest_id} of {lm.tokenizer}, "
            f"the model's vocabulary ends with {lm.config.vocab_size - 1}"
        )


def _start(op: str, lm: LanguageModel, options: FinetuneOptions) -> Adapter | None:
    """The adapter that the run continues from, if any."""
    if options.adapter is None:
        return None
    files.require_named(op, adapter=options.adapter)
    return read_for(lm, options.adapter, lm.source)


def training_batches(dataset: Dataset, options: FinetuneOptions) -> TokenBatches:
    examples = options.batch_examples
    if examples is None and options.batch_tokens is None:
        examples = DEFAULT_EXAMPLES
    return TokenBatches(
        dataset, batch_tokens=options.batch_tokens, batch_examples=examples, seed=options.seed
    )


def evaluation_batches(dataset: Dataset) -> TokenBatches:
    return TokenBatches(dataset, batch_tokens=EVALUATION_TOKENS, shuffle=False)
