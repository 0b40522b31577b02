"""Fine-tuning a language model on a file of text.

The model does not know the trainer, nor the trainer the model; they meet here.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from nplora import _check
from nplora.adapters import Adapter, rollback_on_error, save_adapter
from nplora.finetuning.baseline import Baseline, answers_of
from nplora.finetuning.data import TokenBatches
from nplora.finetuning.earlier_run import find_earlier_run
from nplora.finetuning.execution import choose_execution
from nplora.finetuning.load import RunInputs, evaluation_batches, read_inputs, training_batches
from nplora.finetuning.options import FinetuneOptions
from nplora.finetuning.output import require_free, require_not_read
from nplora.finetuning.report import FinetuneReport, Sample
from nplora.finetuning.token_loss import TokenLoss
from nplora.finetuning.token_progress import TokenProgress, speaker, speaks
from nplora.formats import files
from nplora.formats.errors import FormatError
from nplora.formats.files import StrPath
from nplora.formats.run_files import holds_run
from nplora.lm import LanguageModel
from nplora.models import PrefixCache
from nplora.nn import LoRALinear
from nplora.nn.losses import NonFiniteLossError
from nplora.nn.module import layer_stream
from nplora.nn.optim import AdamW
from nplora.trainer import Callback, History, Trainer
from nplora.trainer.fingerprint import set_factors
from nplora.trainer.run_directory import RunDirectory


def finetune(
    model: StrPath | LanguageModel,
    data: StrPath,
    output: StrPath,
    *,
    valid: StrPath | None = None,
    progress: bool | None = None,
    **options: Any,
) -> FinetuneReport:
    """Train a LoRA adapter for a language model on a file of text, and save it as a PEFT adapter directory.

    Everything is checked and read before the first file is written. The output directory also holds
    checkpoints and `log.jsonl`. With `resume=True` an interrupted run continues from them, to the same bits
    as if it had not been stopped. Ctrl-C ends the run; what was trained so far is saved and returned. After
    an error the run is saved too, and a note on the error says so. After a loss that is not finite, the
    adapter is saved as of the last checkpoint before the step that led there, unless that is the first
    checkpoint, and the model then holds this adapter.

    Args:
        model: what `load_model` reads, or a model without an adapter.
        data: a .jsonl, .csv or .txt file, as `nplora.data.read_dataset` reads it; or a directory with
            train.jsonl and, if the model is to be evaluated, valid.jsonl.
        valid: the file to evaluate on, before training and after every epoch.
        progress: print on stderr what happens; None: if that is a terminal.
        options: the fields of `FinetuneOptions`; `compute` only for a model that is loaded here.
    Raises:
        DataError: a line of the data is wrong.
        ValueError, TypeError: an option is out of range or does not fit the model; or a file that the run
            would write to is the model, the data or the adapter to continue from.
        FormatError: that adapter does not fit the model, or is of another model.
        NotADirectoryError: the output is not a directory.
        FileExistsError: the output directory holds a run, and neither `resume` nor `overwrite` is set, or an
            adapter without a run, and `overwrite` is not set; or a file that nplora did not make has the
            name of one of the run's files. UnsafeError: a link has.
        NonFiniteLossError, CorruptError, OSError: as `Trainer.fit`.
    Warns:
        UserWarning: without `memory`, the remaining steps need more memory than is available; or a run that
            was evaluated continues with other validation data, or without any.
            Others as `Trainer.fit`.
    """
    files.require_named("finetune", output=output)
    files.require_directory(output)
    place, say = files.absolute(output), speaker(progress)
    chosen = _check.options("finetune", FinetuneOptions, options)
    earlier = find_earlier_run(place) if chosen.resume else None
    if earlier is not None and not isinstance(model, LanguageModel):
        chosen = earlier.keep_compute(chosen)

    inputs = read_inputs("finetune", model, data, valid, chosen)
    require_not_read(place, inputs, chosen.adapter)
    execution = choose_execution(model, inputs, chosen, earlier, say)
    for dataset in inputs.datasets:
        say(str(dataset.report))

    lm = inputs.lm
    batches = training_batches(inputs.train, chosen)
    validation = None if inputs.held_out is None else evaluation_batches(inputs.held_out)
    with rollback_on_error(lm):
        _put_on_adapter(lm, inputs.start, chosen)
        require_free(place, chosen)
        prefix = _new_prefix(inputs, place, chosen.keep_prefix)
    lm.model.recompute = execution.recompute

    with files.Directory(place) as directory, _prefix_in_use(lm, prefix):
        baseline = Baseline(lm, validation, chosen.sample, say)
        if not (chosen.resume and holds_run(directory)):
            if chosen.resume:
                say(f"{files.name(output)}: no run to resume, a new one starts")
            baseline.measure()
        loss = TokenLoss(execution.micro_tokens)
        callbacks = [baseline, *([TokenProgress(loss=loss)] if speaks(progress) else [])]
        base = None if isinstance(model, LanguageModel) else os.fspath(model)
        with _saved_as_of_a_good_step(lm, directory, base):
            history = _train(_trainer(lm, loss, chosen, callbacks), batches, validation, chosen, directory)
        _save(lm, directory, base)
        found_at = directory.seen_from(output)
    return _report(found_at, inputs, chosen, baseline, history)


def _put_on_adapter(lm: LanguageModel, start: Adapter | None, options: FinetuneOptions) -> None:
    """Put on the adapter that is trained: a new one, or the one that the run continues from."""
    if start is None:
        lm.add_lora(
            options.rank, options.alpha, options.targets, options.layers, options.dropout, options.use_rslora,
            options.use_dora, options.seed, options.init,
        )  # fmt: skip
        return
    start.attach(lm)
    for name, layer in lm.adapter_layers().items():
        layer.restart_dropout(layer_stream(options.seed, name))
        if isinstance(layer, LoRALinear):
            layer.dropout = options.dropout


def _new_prefix(inputs: RunInputs, output: StrPath, where: str) -> PrefixCache | None:
    """Room for the output of the blocks below the adapters for all examples, if it is to be kept."""
    if where == "off":
        return None
    lm, directory = inputs.lm, output if where == "disk" else None
    return PrefixCache(lm.model.first_adapted(), inputs.tokens, lm.config.hidden_size, directory)


@contextlib.contextmanager
def _prefix_in_use(lm: LanguageModel, prefix: PrefixCache | None) -> Iterator[None]:
    lm.model.prefix = prefix
    try:
        yield
    finally:
        lm.model.prefix = None
        if prefix is not None:
            prefix.close()


def _trainer(
    lm: LanguageModel, loss: TokenLoss, options: FinetuneOptions, callbacks: list[Callback]
) -> Trainer:
    return Trainer(
        lm,
        loss,
        AdamW(options.lr, weight_decay=options.weight_decay),
        schedule=options.schedule,
        warmup_steps=options.warmup,
        accumulate=options.accumulate,
        clip_norm=options.max_grad_norm,
        seed=options.seed,
        callbacks=callbacks,
        progress=False,
    )


def _train(
    trainer: Trainer,
    batches: TokenBatches,
    validation: TokenBatches | None,
    options: FinetuneOptions,
    directory: files.Directory,
) -> History:
    return trainer.fit(
        batches,
        epochs=options.epochs,
        steps=options.steps,
        validation=validation,
        checkpoint_dir=directory,
        checkpoint_every=options.save_every,
        save_minutes=options.save_minutes,
        resume=options.resume,
        overwrite=options.overwrite,
    )


@contextlib.contextmanager
def _saved_as_of_a_good_step(lm: LanguageModel, output: StrPath, base: str | None) -> Iterator[None]:
    """After a loss that is not finite, save the adapter as it was before, if it had been trained by then."""
    try:
        yield
    except NonFiniteLossError as error:
        if error.good_step:
            error.add_note(_save_as_of(lm, output, base, error.good_step))
        raise


def _save_as_of(lm: LanguageModel, output: StrPath, base: str | None, step: int) -> str:
    """Save the adapter of this step, which a checkpoint holds; return words for what was done."""
    try:
        with RunDirectory(output) as directory:
            good = directory.before(step + 1)
        if good is None:
            return "the adapter is not saved: its checkpoint is gone"
        set_factors(lm, good.parameters)
        save_adapter(lm, output, base)
    except (OSError, FormatError) as error:
        return f"the adapter could not be saved: {error}"
    return f"{files.name(output)} holds the adapter as of step {step}"


def _save(lm: LanguageModel, output: StrPath, base: str | None) -> None:
    try:
        save_adapter(lm, output, base)
    except OSError as error:
        error.add_note("the run is saved, its adapter is not: --resume (resume=True) writes it")
        raise


def _report(
    output: Path, inputs: RunInputs, options: FinetuneOptions, baseline: Baseline, history: History
) -> FinetuneReport:
    lm, stopped = inputs.lm, history.interrupted
    after = [""] * len(options.sample) if stopped else answers_of(lm, options.sample)
    return FinetuneReport(
        output=output,
        train=inputs.train.report,
        valid=None if inputs.held_out is None else inputs.held_out.report,
        loss_before=baseline.loss,
        loss_after=history.epochs[-1].val_loss if history.epochs and not stopped else None,
        samples=tuple(map(Sample, options.sample, baseline.answers, after)),
        history=history,
        trained=lm.num_trainable,
        parameters=lm.num_parameters,
        was_finished=baseline.was_finished,
    )
