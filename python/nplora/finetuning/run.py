"""Fine-tuning a language model on a file of text.

The model knows no trainer and the trainer no model; they meet here.
"""

from __future__ import annotations

import contextlib
import errno
import os
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from nplora import _check
from nplora.adapters import Adapter, rollback_on_error, save_adapter
from nplora.finetuning.baseline import Before, answers_of
from nplora.finetuning.data import Dataset
from nplora.finetuning.load import batches_of, checks_of, continued, opened_all
from nplora.finetuning.options import FinetuneOptions
from nplora.finetuning.planned import adapters_of, fixed_compute, planned, resumed, warning_of
from nplora.finetuning.planning import Candidate, Wishes
from nplora.finetuning.report import FinetuneReport, Sample
from nplora.finetuning.token_loss import TokenLoss
from nplora.finetuning.token_progress import TokenProgress, speaker, speaks
from nplora.formats import files, model_directory, peft_adapter, run_files
from nplora.formats.errors import FormatError
from nplora.formats.files import StrPath
from nplora.formats.run_files import holds_run
from nplora.lm import LanguageModel, load_model
from nplora.models import KeptPrefix
from nplora.nn import LoRALinear
from nplora.nn.losses import NonFiniteLossError
from nplora.nn.module import layer_stream
from nplora.nn.optim import AdamW
from nplora.trainer import Trainer
from nplora.trainer.fingerprint import factors
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
    checkpoints and `log.jsonl`, from which an interrupted run goes on (`resume=True`), to the bit as if it
    had not been stopped. Ctrl-C ends the run after what it has learned: that is saved, and returned. After an
    error the run is saved too, and a note on the error says so. After a loss that is not finite, the adapter
    is saved as of the last checkpoint before the step that led there, if something was learned by then; the
    model then holds that adapter too.

    Args:
        model: what `load_model` reads, or a model without an adapter.
        data: a .jsonl, .csv or .txt file as `nplora.data.read_dataset` has it, or a directory with
            train.jsonl and, if it is to be evaluated, valid.jsonl.
        valid: the file to evaluate on, before and after every epoch.
        progress: print what happens to stderr; None: if that is a terminal.
        options: as `FinetuneOptions` has them; `compute` only for a model that is loaded here.
    Raises:
        DataError: a line of the data is not what it should be.
        ValueError, TypeError: an option is out of range or does not fit the model; or a file that the run
            would write to is the model, the data or the adapter to continue from.
        FormatError: that adapter does not fit the model, or is of another one.
        NotADirectoryError: the output is something else.
        FileExistsError: the output directory holds a run, and neither `resume` nor `overwrite` is set, or an
            adapter without a run, and `overwrite` is not set; or a file that is neither a run's nor an
            adapter's has the name of one. UnsafeError: a link has.
        NonFiniteLossError, CorruptError, OSError: as `Trainer.fit`.
    Warns:
        UserWarning: without `memory`, more is needed than is available, and steps are left to be made; or a
            run that was evaluated goes on with other validation data, or with none.
            Others as `Trainer.fit`.
    """
    files.require_named("finetune", output=output)
    files.require_directory(output)
    given, output = output, files.absolute(output)
    chosen, pieces, done = resumed(
        _check.options("finetune", FinetuneOptions, options), output, isinstance(model, LanguageModel)
    )
    say = speaker(progress)
    lm, train, held_out = opened_all("finetune", model, data, valid, chosen)
    start = continued("finetune", lm, chosen)
    _require_not_read(output, lm, train, held_out, chosen.adapter)
    way = Candidate(lm.compute, chosen.checkpoint_blocks, None if pieces is None else pieces[0])
    adapters = adapters_of("finetune", lm, chosen, start)
    if chosen.memory is not None:
        compute, again = fixed_compute(model, chosen), chosen.checkpoint_blocks
        wishes = Wishes(compute, again, pieces, goes_on=pieces is not None)
        fitting = planned(lm, adapters, train, held_out, chosen, wishes)
        say(str(fitting))
        way = fitting.chosen
    elif short := warning_of(lm, adapters, train, held_out, chosen, way, done):
        warnings.warn(short, stacklevel=2)
    if way.compute != lm.compute:
        assert not isinstance(model, LanguageModel)
        del lm  # before the file is mapped again
        lm = load_model(model, way.compute, check=False)  # it was checked above
    for dataset in (train, held_out):
        if dataset is not None:
            say(str(dataset.report))
    batches = batches_of(train, chosen)
    checks = None if held_out is None else checks_of(held_out)
    with rollback_on_error(lm):
        _put_on(lm, start, chosen)
        _require_free(output, chosen)
        prefix = _new_prefix(lm, [d for d in (train, held_out) if d is not None], output, chosen.keep_prefix)
    lm.model.checkpoint_blocks = way.checkpoint_blocks
    with files.Directory(output) as directory, _keeping(lm, prefix):
        before = Before(lm, checks, chosen.sample, say)
        if not (chosen.resume and holds_run(directory)):  # else when it is known to go on
            if chosen.resume:
                say(f"{files.name(given)}: no run to go on with, a new one starts")
            before.look()
        trainer = Trainer(
            lm,
            TokenLoss(way.micro_tokens),
            AdamW(chosen.lr, weight_decay=chosen.weight_decay),
            schedule=chosen.schedule,
            warmup_steps=chosen.warmup,
            accumulate=chosen.accumulate,
            clip_norm=chosen.max_grad_norm,
            seed=chosen.seed,
            callbacks=[before, *([TokenProgress()] if speaks(progress) else [])],
            progress=False,
        )
        base = None if isinstance(model, LanguageModel) else os.fspath(model)
        try:
            history = trainer.fit(
                batches,
                epochs=chosen.epochs,
                steps=chosen.steps,
                validation=checks,
                checkpoint_dir=directory,
                checkpoint_every=chosen.save_every,
                save_minutes=chosen.save_minutes,
                resume=chosen.resume,
                overwrite=chosen.overwrite,
            )
        except NonFiniteLossError as error:
            if error.good_step:
                error.add_note(_saved_as_of(lm, directory, base, error.good_step))
            raise
        try:
            save_adapter(lm, directory, base)
        except OSError as error:
            error.add_note("the run is saved, its adapter is not: --resume (resume=True) writes it")
            raise
        place = directory.seen_from(given)
    last = history.epochs[-1].val_loss if history.epochs and not history.interrupted else None
    after = [""] * len(chosen.sample) if history.interrupted else answers_of(lm, chosen.sample)
    return FinetuneReport(
        output=place,
        train=train.report,
        valid=None if held_out is None else held_out.report,
        loss_before=before.loss,
        loss_after=last,
        samples=tuple(map(Sample, chosen.sample, before.answers, after)),
        history=history,
        trained=lm.num_trainable,
        parameters=lm.num_parameters,
        was_finished=before.was_finished,
    )


def _put_on(lm: LanguageModel, start: Adapter | None, options: FinetuneOptions) -> None:
    """The adapter that is trained: a new one, or the one that the run continues from."""
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


def _saved_as_of(lm: LanguageModel, output: StrPath, base: str | None, step: int) -> str:
    """Save the adapter of this step, which a checkpoint holds; return words for what was done."""
    try:
        with RunDirectory(output) as directory:
            good = directory.before(step + 1)
        if good is None:
            return "the adapter is not saved: its checkpoint is gone"
        for name, array in factors(lm).items():
            array[...] = good.parameters[name]
        save_adapter(lm, output, base)
    except (OSError, FormatError) as error:
        return f"the adapter could not be saved: {error}"
    return f"{files.name(output)} holds the adapter as of step {step}"


def _require_not_read(
    output: StrPath, lm: LanguageModel, train: Dataset, held_out: Dataset | None, adapter: StrPath | None
) -> None:
    """Refuse an output directory in which a file to be written is one that the run reads."""
    names = (*run_files.NAMES, peft_adapter.CONFIG, peft_adapter.TENSORS)
    inputs = [("model", path) for path in model_directory.files_of(lm.config.source)]
    inputs.append(("training data", Path(train.report.source)))
    if adapter is not None:
        inputs += [("adapter", path) for path in peft_adapter.files_of(adapter)]
    if held_out is not None:
        inputs.append(("validation data", Path(held_out.report.source)))
    files.require_not_read("finetune", [Path(output, name) for name in names], inputs)


def _require_free(output: StrPath, options: FinetuneOptions) -> None:
    """Refuse a directory with a model, a run or an adapter, or one in use, before what takes time."""
    model_directory.require_no_model(output)
    if peft_adapter.lies_in(output) and not (holds_run(output) or options.overwrite):
        raise FileExistsError(
            errno.EEXIST,
            "the directory holds an adapter and no run: --overwrite (overwrite=True) replaces it",
            os.fspath(output),
        )
    peft_adapter.require_ours(output, options.overwrite)
    if holds_run(output) and not (options.resume or options.overwrite):
        raise FileExistsError(
            errno.EEXIST,
            "the directory holds a run: --resume (resume=True) continues it, --overwrite drops it",
            os.fspath(output),
        )
    with RunDirectory(output):  # it can be locked and written
        pass


def _new_prefix(lm: LanguageModel, datasets: list[Dataset], output: StrPath, where: str) -> KeptPrefix | None:
    """Room for what the blocks below the adapters make of these examples, if it is to be kept."""
    if where == "off":
        return None
    tokens = sum(dataset.report.tokens for dataset in datasets)
    directory = output if where == "disk" else None
    return KeptPrefix(lm.model.first_adapted(), tokens, lm.config.hidden_size, directory)


@contextlib.contextmanager
def _keeping(lm: LanguageModel, prefix: KeptPrefix | None) -> Iterator[None]:
    lm.model.prefix = prefix
    try:
        yield
    finally:
        lm.model.prefix = None
        if prefix is not None:
            prefix.close()
