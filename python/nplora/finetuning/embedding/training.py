"""Training of a LoRA adapter for embeddings, from files of pairs to a PEFT directory."""

from __future__ import annotations

import contextlib
import functools
import inspect
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nplora import _check
from nplora.adapters import rollback_on_error, save_adapter
from nplora.distributed.communicator import Communicator
from nplora.distributed.opening import (
    DISTRIBUTED,
    heard_by_all_ranks,
    opened_communicator,
    or_none_if_alone,
    say_if_alone,
)
from nplora.finetuning.agreement import require_same_data
from nplora.finetuning.data.sources import Data, sources_of, splits_of
from nplora.finetuning.earlier_run import compute_for
from nplora.finetuning.embedding.batches import ExampleBatches
from nplora.finetuning.embedding.examples import TextReport, read_sources
from nplora.finetuning.embedding.loss import MICRO_TOKENS, EmbeddingLoss
from nplora.finetuning.int8_callbacks import int8_callbacks
from nplora.finetuning.int8_check import warn_of_slow_int8
from nplora.finetuning.options import default_lr, require_int8
from nplora.finetuning.output import opened_output, require_free_directory, require_inputs_kept
from nplora.finetuning.token_progress import speaker, speaks
from nplora.formats import files
from nplora.formats.errors import counted
from nplora.formats.files import StrPath
from nplora.lm import Encoder, load_encoder
from nplora.nn.embedding_losses import EmbeddingFunction
from nplora.nn.optim import AdamW
from nplora.trainer import Callback, History, RankRecord, Trainer
from nplora.trainer.interrupts import Interrupts


@dataclass(frozen=True)
class EmbeddingTraining:
    """The result of `train`; `print` describes it.

    Attributes:
        encoder: the encoder with the trained adapter.
        output: the directory of the adapter.
        train, valid: summaries of the examples for training and validation; `valid` is None without
            validation.
        history: the records of the run.
        ranks: the speed and the waiting time of each process; empty if only one process has trained.

    >>> import nplora
    >>> rows = [{"anchor": "a cat", "positive": "the cat"}, {"anchor": "a dog", "positive": "the dog"}]
    >>> print(nplora.embedding.train("encoder-model", rows, "trained", steps=2))
    trained: 2 steps, training loss ... -> ...
    """

    encoder: Encoder
    output: Path
    train: TextReport
    valid: TextReport | None
    history: History
    ranks: tuple[RankRecord, ...] = ()

    def __str__(self) -> str:
        words = f"{self.output}: {counted(len(self.history.steps), 'step')}"
        if self.history.loss:
            words += f", training loss {self.history.loss[0]:.4f} -> {self.history.loss[-1]:.4f}"
        if self.history.best_loss is not None:
            words += f", validation loss {self.history.best_loss:.4f}"
        return "\n".join([words, *(record.in_words("examples") for record in self.ranks)])


@_check.keywords
def train(
    model: StrPath | Encoder,
    data: Data,
    output: StrPath,
    *,
    valid: Data | None = None,
    loss: str | EmbeddingFunction = "ranking",
    dims: Sequence[int] | None = None,
    columns: Mapping[str, str] | str | None = None,
    prompts: str | Mapping[str, str] | None = None,
    max_length: int | None = None,
    skip_bad: bool = False,
    rank: int = 8,
    alpha: float = 16.0,
    targets: str | Iterable[str] = "all-linear",
    layers: str | Sequence[int] | None = None,
    dropout: float = 0.0,
    use_rslora: bool = False,
    use_dora: bool = False,
    init: str = "zero",
    lr: float | None = None,
    weight_decay: float = 0.0,
    epochs: int | None = None,
    steps: int | None = None,
    batch_size: int = 64,
    accumulate: int = 1,
    micro_tokens: int = MICRO_TOKENS,
    schedule: str = "linear",
    warmup: int = 0,
    max_grad_norm: float | None = 1.0,
    eval_every: int | None = None,
    patience: int | None = None,
    keep: str = "best",
    compute: str | None = None,
    keep_int8: bool = False,
    save_every: int = 100,
    save_minutes: float = 5.0,
    seed: int = 0,
    callbacks: Sequence[Callback] = (),
    progress: bool | None = None,
    communicator: Communicator | None = None,
    distributed: str | None = None,
    resume: bool = False,
    change_compute: bool = False,
    overwrite: bool = False,
) -> EmbeddingTraining:
    """Train a LoRA adapter on pairs, triplets or scored pairs of texts, and save it for PEFT.

        >>> import nplora
        >>> rows = [{"anchor": "a cat", "positive": "the cat"}, {"anchor": "a dog", "positive": "the dog"}]
        >>> result = nplora.embedding.train("encoder-model", rows, "out", lr=1e-2, epochs=10)
        >>> result.history.loss[-1] < result.history.loss[0]
        True
        >>> encoder = nplora.load_encoder("encoder-model")
        >>> nplora.read_adapter("out").attach(encoder)

    Args:
        model: a directory or GGUF file, as for `load_encoder`, or an encoder. If the encoder has an adapter,
            the run trains this adapter further. Options for a new adapter, such as `rank`, are then refused.
        data: the training examples, as in `read_examples`. If `data` is a directory with train.jsonl, or a
            dictionary of splits, the validation data in `data` are used unless `valid` is given.
        output: the directory for checkpoints and the adapter.
        valid: examples for the validation loss, which is evaluated after every epoch. With the loss
            "ranking", the validation loss depends on `batch_size`.
        loss: "ranking", "triplet", "cosine" or "cosent", or a loss such as `RankingLoss(scale=50)`. With
            "ranking", the negatives of an anchor are all negatives of the batch, and the positives of the
            other anchors.
        dims: widths to which embeddings are cut in training (Matryoshka). Name the full width too.
        columns, prompts, max_length, skip_bad: as in `read_examples`.
        rank, alpha, targets, layers, dropout, use_rslora, use_dora, init: as in `Encoder.add_lora`.
        lr: peak learning rate; None: 0.8 / hidden size of the model, at most 2e-3.
        weight_decay: weight decay of AdamW.
        epochs, steps: the length of the run; by default, one epoch.
        batch_size: number of examples in a batch. With the loss "ranking", an anchor has more negatives in a
            larger batch.
        accumulate: number of batches in a step. With the loss "ranking", the negatives of an anchor come from
            its own batch, not from the other batches of the step.
        micro_tokens: maximum tokens of a micro-batch; smaller values save memory.
        schedule: learning rate schedule after the warm-up: linear, cosine or constant.
        warmup: steps in which the learning rate rises.
        max_grad_norm: maximum norm of the gradients; None: no limit.
        eval_every: steps between two evaluations; the run also evaluates after every epoch.
        patience: end the run after this number of evaluations in a row without a lower validation loss.
        keep: the adapter to save if there are validation data: "best" (with the lowest validation loss) or
            "last".
        compute: arithmetic of the products with frozen weights: "float32", "bfloat16" or "int8"; None:
            float32, or with `resume` the arithmetic of the run. A loaded encoder keeps its arithmetic.
        keep_int8: keep weights in memory as 8-bit integers too, with compute int8, so that they are converted
            only once; steps become faster, but the integers take one byte for each weight of the first
            adapted block and of all later blocks.
        save_every: steps between checkpoints.
        save_minutes: maximum minutes between checkpoints; 0: no limit.
        seed: seed of the initial factors, dropout and the order of the examples.
        callbacks: callbacks of the trainer.
        progress: print progress on stderr; None: only on a terminal or in a notebook.
        communicator: the ranks that train together, as in `Trainer`. The ranks divide the batches of each
            step among themselves, so there may be at most `accumulate` ranks. The trained adapter is bit for
            bit the same for any number of ranks. Every rank makes the same call. Only rank 0 writes to
            `output`.
        distributed: what the processes do if `mpirun` has started several. "mpi": they train one adapter
            together. "off": each of them makes a separate run.
        resume: continue the run in `output`; the results are bit for bit those of a run without a stop.
        change_compute: with `resume`: continue the run even if `compute` has changed.
        overwrite: delete the run and the adapter in `output`.
    Returns:
        the encoder with the adapter, and the history of the run.
    Raises:
        DataError: a row is wrong; the message names the file and the line.
        ValueError, TypeError: an argument has a wrong value or type, the run would write to a file that it
            reads, or the ranks do not have the same data and settings.
        FileExistsError: `output` holds a model; or it holds a run, and neither `resume` nor `overwrite` is
            set; or it holds an adapter without a run, and `overwrite` is not set.
        NonFiniteLossError, CorruptError, OSError: as in `Trainer.fit`.
    """
    op = "train"
    with heard_by_all_ranks(distributed):
        if distributed is not None:
            _check.choice(op, "distributed", distributed, DISTRIBUTED)
        _check.boolean(op, "keep_int8", keep_int8)
        files.require_named(op, output=output)
    with opened_communicator(op, distributed, communicator) as ranks:
        is_first = ranks.rank == 0  # this rank writes the output and prints
        if is_first:
            files.require_directory(output)
        say, place = speaker(is_first and speaks(progress)), Path(files.absolute(output))
        say_if_alone(ranks, distributed, progress)
        compute = compute_for(model, output, compute, resume, ranks, say)
        used = model.compute if isinstance(model, Encoder) else compute or "float32"
        require_int8(op, used, keep_int8=keep_int8)
        function = EmbeddingLoss(loss, dims=dims, micro_tokens=micro_tokens)
        splits = splits_of(op, data)
        held_out = splits.valid if valid is None else sources_of(op, valid)
        encoder = _opened(op, model, compute)
        warn_of_slow_int8(op, encoder)
        paths = [each.path for each in [*splits.train, *(held_out or [])] if each.path is not None]
        if is_first:
            require_inputs_kept(op, output, encoder.config.source, [("data", path) for path in paths])
        read = [
            read_sources(op, sources, encoder, function.function, columns, prompts, max_length, skip_bad)
            for sources in (splits.train, held_out)
            if sources is not None
        ]
        require_same_data(ranks, read[0], read[1] if len(read) > 1 else None, op)
        for examples in read:
            say(str(examples.report))
        batches = [
            ExampleBatches(examples, batch_size, shuffle, seed)
            for examples, shuffle in zip(read, (True, False), strict=False)
        ]
        lora = {
            "rank": rank, "alpha": alpha, "targets": targets, "layers": layers, "dropout": dropout,
            "use_rslora": use_rslora, "use_dora": use_dora, "init": init,
        }  # fmt: skip
        with rollback_on_error(encoder), contextlib.ExitStack() as stack:
            _add_lora(op, encoder, lora, seed, say)
            rate = default_lr(encoder.config.hidden_size) if lr is None else lr
            sample = functools.partial(function.sample_gradient, encoder, read[0])
            checks = stack.enter_context(int8_callbacks(encoder, encoder.model, sample, keep_int8, say))
            trainer = Trainer(
                encoder, function, AdamW(rate, weight_decay=weight_decay), schedule=schedule,
                warmup_steps=warmup, accumulate=accumulate, clip_norm=max_grad_norm, seed=seed,
                callbacks=[*checks, *callbacks], progress=progress, communicator=or_none_if_alone(ranks),
            )  # fmt: skip
            if is_first:
                require_free_directory(place, resume, overwrite)
            found_at = place
            with opened_output(place, ranks) as directory:
                history = trainer.fit(
                    batches[0],
                    epochs=epochs,
                    steps=steps,
                    validation=batches[1] if len(batches) > 1 else None,
                    eval_every=eval_every,
                    patience=patience,
                    keep=keep,
                    checkpoint_dir=directory,
                    checkpoint_every=save_every,
                    save_minutes=save_minutes,
                    resume=resume,
                    change_compute=change_compute,
                    overwrite=overwrite,
                )
                if directory is not None:
                    with Interrupts(terminate=False) as interrupts, interrupts.hold():
                        save_adapter(encoder, directory, os.fspath(encoder.source))
                    found_at = directory.seen_from(output)
        report = read[1].report if len(read) > 1 else None
        return EmbeddingTraining(encoder, found_at, read[0].report, report, history, tuple(trainer.ranks))


def _opened(op: str, model: StrPath | Encoder, compute: str | None) -> Encoder:
    if not isinstance(model, Encoder):
        return load_encoder(model, compute or "float32")
    if compute is not None:
        raise ValueError(f"{op}: compute={compute!r} is given, but the encoder is loaded already")
    return model


def _add_lora(
    op: str, encoder: Encoder, options: Mapping[str, Any], seed: int, say: Callable[[str], None]
) -> None:
    """Add a new adapter, unless the encoder has one."""
    layers = encoder.adapter_layers()
    if not layers:
        encoder.add_lora(**options, seed=seed)
        return
    defaults = inspect.signature(train).parameters
    given = [name for name, value in options.items() if value != defaults[name].default]
    if given:
        raise ValueError(
            f"{op}: {', '.join(given)} can be given only for a new adapter, but the encoder already has an "
            "adapter, which the run trains further"
        )
    say(f"the encoder has an adapter on {counted(len(layers), 'layer')}, which is trained further")
