"""The inputs of a run: the model, the data, and the adapter to continue from."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from nplora.adapters import Adapter, read_for
from nplora.finetuning.data import (
    EVALUATION_TOKENS,
    Data,
    TokenBatches,
)
from nplora.finetuning.data.sources import Source, sources_of, splits_of
from nplora.finetuning.data.split import Division
from nplora.finetuning.data.stored import Examples
from nplora.finetuning.int8_check import warn_of_slow_int8
from nplora.finetuning.objectives import Objective, objective_of
from nplora.finetuning.options import DEFAULT_EXAMPLES, FinetuneOptions
from nplora.formats import files
from nplora.formats.errors import FormatError, brief, counted
from nplora.formats.files import StrPath
from nplora.formats.tokenizer_json import AddedToken
from nplora.lm import LanguageModel, load_model
from nplora.lm.generation import Prompt, prompt_ids
from nplora.lm.trained_rows import new_tokens
from nplora.models.decoder import frozen_weights
from nplora.runtime.user_warning import warn_user
from nplora.weights import COMPUTES


@dataclass
class RunInputs:
    """The inputs of a run.

    Attributes:
        lm: the model, without an adapter.
        train: the examples to train on.
        held_out: the examples to evaluate on, or None.
        start: the adapter to continue from, or None.
        paths: a tuple for each input file: what the file holds, such as "training data", and its path.
        objective: the objective that the run minimises.
        added_tokens: the tokens that the adapter adds to the model.
    """

    lm: LanguageModel
    train: Examples
    held_out: Examples | None
    start: Adapter | None
    paths: list[tuple[str, Path]]
    objective: Objective
    added_tokens: tuple[AddedToken, ...] = ()

    @property
    def datasets(self) -> list[Examples]:
        return [dataset for dataset in (self.train, self.held_out) if dataset is not None]

    @property
    def tokens(self) -> int:
        """The number of tokens in all forward passes of one epoch and one evaluation together."""
        passes = 1 + self.objective.extra_passes  # an extra pass reads other sequences of the same length
        return passes * sum(dataset.report.tokens for dataset in self.datasets)

    def count_shared(self) -> int:
        """The number of examples to evaluate on that are training examples too."""
        held_out = [] if self.held_out is None else self.held_out.digests()
        wanted = set(held_out)
        trained = {digest for digest in self.train.digests() if digest in wanted} if wanted else set()
        return sum(digest in trained for digest in held_out)

    def prompts(self, texts: Sequence[str]) -> list[Prompt]:
        """Turn texts into prompts.

        If all training examples were formatted with the chat template, each prompt is a chat, in which the
        text is a message of the user.
        """
        if not self.train.report.chat:
            return list(texts)
        return [[{"role": "user", "content": text}] for text in texts]

    @property
    def teacher_model(self) -> LanguageModel | None:
        """The teacher model of a distillation, if it is in memory; otherwise None."""
        return None if self.objective.teacher is None else self.objective.teacher.model

    def reload(self, model: StrPath, compute: str) -> None:
        """Free the memory of the model, and load the model again with another arithmetic."""
        del self.lm
        self.lm = load_model(model, compute, check=False)  # it was checked before
        self.objective.reload(compute)


def read_inputs(
    op: str,
    model: StrPath | LanguageModel,
    data: Data,
    valid: Data | None,
    options: FinetuneOptions,
    check: bool = True,
) -> RunInputs:
    """Read all inputs of a run with these options, and check that they fit together.

    Args:
        check: whether `load_model` looks for NaN and infinities in the weights.
    """
    sources, found = splits_of(op, data)
    held_out_sources = found if valid is None else sources_of(op, valid)
    share = options.valid_split
    if share is not None and held_out_sources is not None:
        raise ValueError(f"{op}: valid_split is {share}, but there are validation data already")
    lm = opened(op, model, options.compute, check)
    options.require_fitting(op, lm.compute)
    warn_of_slow_int8(op, lm)
    require_plain(op, lm)
    lm.require_trainable(op)  # fails if a named adapter is selected
    start = _start(op, lm, options)
    tokens = _added_tokens(op, lm, start, options)
    reader = lm.with_tokens(tokens) if tokens else lm  # reads the data with the new tokens
    reading = options.reading(options.max_length, op)
    objective = objective_of(options)
    division = None if share is None else Division(op, sources, share, reading, objective.require)
    require_validation(op, options, held_out_sources is not None or division is not None)
    objective.open(op, lm, check)
    # A division itself checks the names in `columns`, over training and held-out rows together.
    train_sources, any_names = (sources, False) if division is None else (division.train, True)
    train = _read(op, reader, objective, train_sources, options, any_names)
    _warn_of_unused(op, tokens, train)
    if division is not None:
        held_out_sources = division.held_out()
    held_out = None
    if held_out_sources is not None:
        held_out = _read(op, reader, objective, held_out_sources, options, any_names=True)
    read = {"training data": sources, "validation data": held_out_sources or []}
    paths = [(what, source.path) for what, given in read.items() for source in given if source.path]
    paths += [("teacher", path) for path in (objective.teacher.paths if objective.teacher else [])]
    inputs = RunInputs(lm, train, held_out, start, paths, objective, tokens)
    for text, prompt in zip(options.sample, inputs.prompts(options.sample), strict=True):
        prompt_ids(f"{op}: sample {brief(text)}", reader, prompt)
    return inputs


def _added_tokens(
    op: str, lm: LanguageModel, start: Adapter | None, options: FinetuneOptions
) -> tuple[AddedToken, ...]:
    """The tokens that the run's adapter adds to the model.

    Raises:
        ValueError: a distillation adds tokens, which its teacher would lack.
    Warns:
        UserWarning: the model already has one of the tokens.
    """
    if start is not None:
        tokens = lm.new_tokens(start.added_tokens)
    else:
        new = new_tokens(lm, op, options.add_tokens or ())
        tokens = new.added
        for text, id_ in new.known.items():
            warn_user(
                f"{op}: the model already has {brief(text)} (token {id_}), so the token is not added, but "
                "its rows of the embedding and the head are trained"
            )
    if tokens and options.objective == "distill":
        shown = ", ".join(brief(token.text) for token in tokens)
        raise ValueError(
            f"{op}: objective='distill' cannot train added tokens ({shown}), because the teacher lacks them"
        )
    return tokens


def _warn_of_unused(op: str, tokens: Sequence[AddedToken], train: Examples) -> None:
    """Warn about new tokens that do not occur in the training data, and so would learn no meaning."""
    if missing := [brief(token.text) for token in tokens if not train.has(token.id)]:
        warn_user(
            f"{op}: {train.report.source}: no example has any of these new tokens: {', '.join(missing)}"
        )


def require_validation(op: str, options: FinetuneOptions, given: bool) -> None:
    """Raise a ValueError if an option needs validation data, and there are none."""
    for name in ("eval_every", "patience"):
        if (value := getattr(options, name)) is not None and not given:
            raise ValueError(
                f"{op}: {name}={value} needs validation data: give --valid (valid=...) or --valid-split "
                "(valid_split=...)"
            )


def require_plain(op: str, lm: LanguageModel) -> None:
    """Raise a ValueError if the model has an adapter."""
    if layers := lm.adapter_layers():
        on = counted(len(layers), "layer")
        raise ValueError(f"{op}: the model already has an adapter, on {on}; expected a model without one")


def opened(
    op: str, model: StrPath | LanguageModel, compute: str | None, check: bool = True, to_decode: bool = False
) -> LanguageModel:
    """Return the model. If `model` is a path, load the model.

    Args:
        to_decode: whether the model will generate text; if so, warn if it is loaded for int8, but decoding
            cannot use int8.
    """
    if not isinstance(model, LanguageModel):
        load = partial(loaded, op) if to_decode else load_model
        return load(model, compute or COMPUTES[0], check=check)
    if compute is not None:
        raise ValueError(
            f"{op}: compute={compute!r} is given, but the model is loaded already, with {model.compute!r}"
        )
    return model


def loaded(op: str, path: StrPath, compute: str, check: bool = True) -> LanguageModel:
    """Load a model as `load_model` does. Warn if `compute` is "int8" and decoding cannot use int8."""
    lm = load_model(path, compute, check=check)
    if compute == "int8" and not any(weight.meets_int8 for weight in frozen_weights([lm])):
        warn_user(
            f"{op}: with compute='int8', products with few tokens use int8 only if the weights have one of "
            f"GGUF's quantised formats. {files.name(path)} has no such weights, so decoding computes in "
            "float32"
        )
    return lm


def _read(
    op: str,
    lm: LanguageModel,
    objective: Objective,
    sources: list[Source],
    options: FinetuneOptions,
    any_names: bool = False,
) -> Examples:
    reading = options.reading(min(options.max_length, lm.config.max_position_embeddings), op)
    reading = dataclasses.replace(reading, any_names=any_names)
    dataset = objective.read(op, sources, lm.tokenizer, reading)
    require_vocabulary(lm, dataset.report.source, dataset.largest_id)
    return dataset


def require_vocabulary(lm: LanguageModel, source: str, largest_id: int) -> None:
    """Raise a FormatError if a token of a text is not in the model's vocabulary.

    Args:
        source: the name of the file or other source of the text, for the message.
        largest_id: the largest token id in the text.
    """
    if largest_id >= lm.vocab_size:
        raise FormatError(
            f"{source}: the text has token {largest_id} of {lm.tokenizer}, but the model's vocabulary ends "
            f"with {lm.vocab_size - 1}"
        )


def _start(op: str, lm: LanguageModel, options: FinetuneOptions) -> Adapter | None:
    """The adapter that the run continues from, if any."""
    if options.adapter is None:
        return None
    if isinstance(options.adapter, Adapter):
        return options.adapter
    files.require_named(op, adapter=options.adapter)
    return read_for(lm, options.adapter, lm.source, options.any_base)


def arithmetic_of_head(lm: LanguageModel, options: FinetuneOptions, trains_head: bool) -> str:
    """The arithmetic of the head in a run in int8: "off", "forward" or "on", as in the option `int8_head`.

    "auto" becomes the choice that is set in the model. But it never becomes "on" if the model does not use
    int8, if `filter_vocabulary` is set, or if rows of the head are trained.

    Args:
        trains_head: whether rows of the head are trained directly, not through a low-rank adapter.
    """
    if options.int8_head != "auto":
        return options.int8_head
    if not lm.lm_head.int8:
        return "off"
    can_be_on = lm.compute == "int8" and not options.filter_vocabulary and not trains_head
    return "on" if can_be_on and lm.model.int8_head else "forward"


def training_batches(dataset: Examples, options: FinetuneOptions) -> TokenBatches:
    examples = options.batch_examples
    if examples is None and options.batch_tokens is None:
        examples = DEFAULT_EXAMPLES
    return TokenBatches(
        dataset, batch_tokens=options.batch_tokens, batch_examples=examples, seed=options.seed
    )


def evaluation_batches(dataset: Examples) -> TokenBatches:
    return TokenBatches(dataset, batch_tokens=EVALUATION_TOKENS, shuffle=False)
