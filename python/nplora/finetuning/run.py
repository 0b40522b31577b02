"""Fine-tuning a language model on a file of text.

The packages `nplora.lm` and `nplora.trainer` do not import each other; this module connects them.
"""

import contextlib
import dataclasses
import functools
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from nplora import _check
from nplora.adapters import Adapter, rollback_on_error, save_adapter
from nplora.distributed.communicator import Communicator
from nplora.distributed.opening import (
    heard_by_all_ranks,
    opened_communicator,
    or_none_if_alone,
    say_if_alone,
)
from nplora.finetuning import int8_sample
from nplora.finetuning.agreement import require_same_data, require_same_options
from nplora.finetuning.baseline import Baseline, answers_of
from nplora.finetuning.data import Data, TokenBatches
from nplora.finetuning.data.stored import shared_words
from nplora.finetuning.earlier_run import find_earlier_run, words_of_kept
from nplora.finetuning.execution import choose_execution, fixed_compute, steps_of
from nplora.finetuning.filter_check import FilterCheck
from nplora.finetuning.int8_check import Int8Check
from nplora.finetuning.load import (
    RunInputs,
    arithmetic_of_head,
    evaluation_batches,
    read_inputs,
    training_batches,
)
from nplora.finetuning.milestones import Milestones
from nplora.finetuning.objectives import PackedLoss
from nplora.finetuning.options import FinetuneOptions, default_lr, from_arguments
from nplora.finetuning.output import REPORTS, opened_output, require_free, require_not_read
from nplora.finetuning.planning import ExecutionPlan
from nplora.finetuning.preparation import Preparation
from nplora.finetuning.report import FinetuneReport, Sample
from nplora.finetuning.step_profile import StepProfile, StepProfiler
from nplora.finetuning.token_progress import TokenProgress, speaker, speaks
from nplora.formats import files
from nplora.formats.errors import FormatError
from nplora.formats.files import StrPath
from nplora.formats.run_files import holds_run
from nplora.lm import LanguageModel
from nplora.models import PrefixCache, WordFilter
from nplora.nn import LoRALinear, TrainedHead
from nplora.nn.losses import NonFiniteLossError
from nplora.nn.module import layer_stream
from nplora.nn.optim import AdamW
from nplora.runtime.error_text import message_of
from nplora.trainer import Callback, History, Trainer
from nplora.trainer.callbacks import checked_callbacks
from nplora.trainer.fingerprint import set_factors
from nplora.trainer.interrupts import Interrupts
from nplora.trainer.reporters import reporting, require_reporters
from nplora.trainer.run_directory import RunDirectory
from nplora.weights import keeping_int8


@_check.keywords
def finetune(
    model: StrPath | LanguageModel,
    data: Data,
    output: StrPath,
    *,
    valid: Data | None = None,
    progress: bool | None = None,
    callbacks: Sequence[Callback] = (),
    rank: int = 8,
    alpha: float = 16.0,
    rank_pattern: Mapping[str, int] | str | None = None,
    alpha_pattern: Mapping[str, float] | str | None = None,
    targets: str | Sequence[str] = ("all-linear",),
    layers: str | None = None,
    dropout: float = 0.0,
    use_rslora: bool = False,
    use_dora: bool = False,
    freeze_B: bool = False,
    init: str = "zero",
    trainable_tokens: str | Sequence[str | int] | None = None,
    modules_to_save: str | Sequence[str] | None = None,
    invocation: str | Sequence[int] | None = None,
    add_tokens: str | Sequence[str] | None = None,
    adapter: StrPath | Adapter | None = None,
    any_base: bool = False,
    objective: str = "sft",
    beta: float = 0.1,
    loss_type: str | None = None,
    label_smoothing: float = 0.0,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
    teacher: StrPath | LanguageModel | None = None,
    kl: str = "forward",
    temperature: float | None = None,
    kd_ratio: float = 0.5,
    lr: float | None = None,
    lora_plus_ratio: float = 1.0,
    schedule: str = "cosine",
    warmup: int = 0,
    weight_decay: float = 0.01,
    max_grad_norm: float = 1.0,
    epochs: int | None = None,
    steps: int | None = None,
    seed: int = 0,
    batch_examples: int | None = None,
    batch_tokens: int | None = None,
    accumulate: int = 1,
    format: str | None = None,
    columns: Mapping[str, str] | str | None = None,
    chat: bool = False,
    valid_split: float | None = None,
    max_length: int = 1024,
    learn: str = "completion",
    skip_bad: bool = False,
    strict: bool = False,
    eval_every: int | None = None,
    patience: int | None = None,
    keep: str = "best",
    compute: str | None = None,
    int8_head: str = "auto",
    keep_int8: bool = False,
    recompute: bool = False,
    filter_vocabulary: float = 0.0,
    memory: str | int | None = None,
    keep_prefix: str = "off",
    save_every: int = 100,
    save_minutes: float = 5.0,
    report_to: str | Sequence[str] = (),
    profile: bool = False,
    resume: bool = False,
    change_compute: bool = False,
    overwrite: bool = False,
    sample: Sequence[str] = (),
    distributed: str | None = None,
    communication_dtype: str = "float32",
    local_steps: int | None = None,
    outer_lr: float = 0.7,
    outer_momentum: float = 0.5,
    checkpoint_blocks: bool = False,
) -> FinetuneReport:
    """Fine-tune a language model with LoRA on a file of text, and save the adapter in PEFT's format.

    The output directory also holds checkpoints and `log.jsonl`. Ctrl-C ends the run and saves the current
    adapter, even if an earlier adapter had a lower validation loss. `resume=True` continues the run; the
    results are bit for bit those of a run without a stop. Nothing is written before all input is read and
    checked.

    If a step raises an error, the run is saved, and a note on the error says so. If a loss is not finite, the
    model and the output directory get the adapter of the last checkpoint before the failed step, unless that
    is the checkpoint of step 0. If a callback or a report fails or is interrupted after the last step, the
    adapter is saved.

    A loaded model keeps the adapter after the call. If the call ends with an error before its first step, the
    model is as it was before.

    Args:
        model: a GGUF file or a Hugging Face directory, as for `load_model`; or a loaded model without an
            adapter.
        data: rows to train on, as for `nplora.data.read_dataset`; or a directory with train.jsonl and perhaps
            valid.jsonl.
        output: directory for the adapter, the checkpoints and the log.
        valid: rows to evaluate on, before training and after every epoch. `valid` takes the same kinds of
            rows as `data`. The adapter with the lowest loss is saved; see `keep`.
        progress: print progress on stderr; None: only on a terminal or in a notebook.
        callbacks: your `Callback`s; `run.model` is the language model.
        rank: rank of the LoRA factors.
        alpha: LoRA alpha: the update is scaled by alpha / rank.
        rank_pattern: separate ranks for layers whose names contain a given part, as in
            q_proj=16,layers.3.mlp=4.
        alpha_pattern: separate alphas for layers whose names contain a given part, as in
            q_proj=32,layers.3.mlp=8.
        targets: layers that get an adapter: all-linear, or a list of names such as q_proj,v_proj.
        layers: blocks that get an adapter: last:N or first:N (default: all).
        dropout: LoRA dropout probability.
        use_rslora: scale the update by alpha / sqrt(rank) (rsLoRA).
        use_dora: also train the magnitude of each row of the weights (DoRA).
        freeze_B: train only A (LoRA-FA), and keep B at its initial values; saves memory and time.
        init: initial factors: zero (the model is unchanged at first), gaussian (both factors are random, so
            that the model changes at once), pissa or olora (the principal part of each weight; unquantised
            weights only).
        trainable_tokens: tokens whose rows of the embedding and the head are trained too: ids or texts, as in
            <|im_start|>,<|im_end|>.
        modules_to_save: layers to train as a whole, in float32: embed_tokens, lm_head or both.
        invocation: activated LoRA (aLoRA): the adapter acts from the last occurrence of this
            text onwards.
        add_tokens: new tokens to add to the vocabulary and to train, as in <tool>,</tool>.
        adapter: adapter to continue from: PEFT directory or llama.cpp file; its layers, ranks and alphas are
            kept.
        any_base: accept an `adapter` that was trained on another model with the same shapes.
        objective: goal of the training: sft (learn the answers), dpo or orpo (prefer chosen answers to
            rejected ones), kto (prefer good answers to bad ones) or distill (learn the predictions of a
            `teacher`).
        beta: strength of the preference. For dpo and kto, larger values keep the outputs closer to those of
            the model without the adapter. For orpo, weight of the loss term that compares the two answers.
        loss_type: variant of the loss; for dpo: sigmoid (the default), hinge, ipo, robust or sigmoid_norm;
            for kto: kto (the default) or apo_zero_unpaired.
        label_smoothing: assumed share of pairs in which the chosen and the rejected answer are swapped; for
            dpo with sigmoid, sigmoid_norm or robust.
        desirable_weight: weight of the good answers in the loss of kto.
        undesirable_weight: weight of the bad answers in the loss of kto.
        teacher: teacher for distill: a model with the same vocabulary, or a file that nplora teach made.
        kl: divergence for distill: forward (learn everything that the teacher may say) or reverse (say only
            what the teacher would say).
        temperature: softmax temperature of teacher and student in distill (default: 1, or the temperature of
            a stored `teacher`).
        kd_ratio: weight of the divergence in the loss of distill, at most 1; the weight of the loss of sft
            is 1 minus this weight.
        lr: peak learning rate (default: 0.8 / hidden size of the model, at most 2e-3; for dpo and kto
            three tenths of this).
        lora_plus_ratio: learning rate of A divided by that of B (LoRA+); 16 is usual.
        schedule: learning rate schedule: cosine, linear or constant.
        warmup: warm-up steps, in which the learning rate rises to its peak.
        weight_decay: weight decay of AdamW.
        max_grad_norm: maximum norm of the gradients; larger gradients are scaled down to this norm.
        epochs: passes over the data (default: 1, unless `steps` is given).
        steps: optimiser steps, instead of `epochs`.
        seed: random seed of the initial factors, the dropout and the order of the data.
        batch_examples: examples in a batch (default: 8, unless `batch_tokens` is given).
        batch_tokens: maximum tokens in a batch; a batch holds as many examples as fit, at least one.
        accumulate: batches in one step (gradient accumulation).
        format: format of the rows: messages, sharegpt, alpaca, completion, text, preference or kto (default:
            the names of the fields decide).
        columns: names of fields in the data, as in prompt=question,completion=answer.
        chat: write prompts and completions with the model's chat template.
        valid_split: share of the examples to hold out for validation; a hash of each
            example's text decides which.
        max_length: maximum tokens of an example; longer examples are cut.
        learn: tokens to train on: completion (completions and assistant turns) or all.
        skip_bad: skip bad lines of the data, and count them.
        strict: refuse examples that are longer than `max_length`.
        eval_every: number of steps between two evaluations of the validation data; the run also evaluates
            after every epoch.
        patience: end the run after this number of evaluations in a row without a lower validation loss (early
            stopping).
        keep: adapter to save if there are validation data: best (with the lowest validation loss) or last.
        compute: arithmetic of the products with frozen weights: float32, bfloat16 or int8 (default: float32,
            unless `memory` is too small for float32).
        int8_head: arithmetic of the head if `compute` is int8: off (bfloat16), forward (int8 in the forward
            pass, bfloat16 in the backward pass), on (int8 in both, with stochastic rounding in the backward
            pass), or auto (forward if the processor has instructions for bfloat16, otherwise on).
        keep_int8: keep weights in memory as 8-bit integers too, with compute int8, so that they are converted
            only once; this takes one byte for each weight of the first adapted block and of all later blocks;
            steps become faster, above all with few tokens or with weights in 16 or 32 bits (default: only
            with a memory limit, if there is room and steps become faster).
        recompute: gradient checkpointing: recompute activations in the backward pass; slower, but saves
            memory.
        filter_vocabulary: probability such as 1e-6: the gradient of the output layer leaves out all tokens of
            the vocabulary that are less likely; makes steps faster, with a small error (default: 0, no token
            is left out).
        memory: memory limit of the whole process, such as 600M or 1.5G; the fastest plan that fits is used.
        keep_prefix: where to cache the outputs of the frozen blocks below the lowest adapter, so that later
            epochs skip these blocks: off, memory, or disk (in the output directory, during the run); each
            token takes 4 x hidden size bytes.
        save_every: steps between checkpoints.
        save_minutes: maximum minutes between checkpoints; 0: no limit.
        report_to: where to report metrics: csv, tensorboard, wandb, mlflow; csv and tensorboard write into
            reports/ in the output directory.
        profile: print how long each kind of work in a step takes, and what share of the processor's top speed
            it reaches.
        resume: continue the run in the output directory; the results are bit for bit the same as without a
            stop.
        change_compute: with `resume`: continue the run even if `compute` or `int8_head` has changed.
        overwrite: delete the run and the adapter in the output directory.
        sample: prompt that the model answers before and after training; sent as a chat if the training data
            are chats.
        distributed: how several processes train: mpi (all processes of one mpirun train one adapter
            together, each with some batches of every step) or off (each process makes a separate run).
        communication_dtype: precision in which ranks send gradients: float32, or bfloat16, which halves the
            number of bytes; a run in one process rounds its gradients in the same way.
        local_steps: number of steps that every rank makes alone before the ranks average their changes
            (DiLoCo), for slow networks (default: the ranks exchange gradients in every step).
        outer_lr: learning rate of the outer step, which updates the trained values with the average change
            after every `local_steps` steps.
        outer_momentum: Nesterov momentum of the outer step.
        checkpoint_blocks: the old name of `recompute`.
    Returns:
        the losses, the sample texts and the history of the run; `print` shows them.
    Raises:
        DataError: a line of the data is wrong.
        ValueError, TypeError: an option is out of range or does not fit the model, `compute` is given for a
            model that is loaded already, or the run would write to one of the files that it reads.
        FormatError: a file is invalid, or `adapter` does not fit the model or was trained on another model.
        BudgetError: no plan fits into `memory`. The message says which options would fit.
        NotADirectoryError: the output is not a directory.
        FileExistsError: the output directory holds a run, and neither `resume` nor `overwrite` is set. Or it
            holds an adapter without a run, and `overwrite` is not set. Or it holds a file that nplora has not
            made, with the name of one of the run's files.
        UnsafeError: a file with the name of one of the run's files is a link.
        NonFiniteLossError, CorruptError, OSError, RankError: see `Trainer.fit`.
        ModuleNotFoundError, ImportError: `distributed` is "mpi", and mpi4py or an MPI library is missing.
    Warns:
        UserWarning: `memory` is not set, and the remaining steps need more memory than is available; or the
            validation data of a resumed run are missing or have changed.
        Other warnings: see `Trainer.fit`.

    >>> report = nplora.finetune("model.gguf", "train.jsonl", "out", valid="valid.jsonl", lr=1e-2, epochs=4)
    >>> report.loss_after < report.loss_before
    True
    >>> lm = nplora.finetuning.load_with_adapter("model.gguf", "out")
    """
    arguments = locals()
    with heard_by_all_ranks(distributed):
        chosen = from_arguments("finetune", FinetuneOptions, arguments)
        checked = checked_callbacks("finetune", callbacks)
    undo = rollback_on_error(model) if isinstance(model, LanguageModel) else contextlib.nullcontext()
    with opened_communicator("finetune", chosen.distributed) as ranks, undo as keep_layers:
        return _finetune(
            model, data, output, valid, progress, checked, chosen, Milestones(keep_layers), ranks
        )


def _finetune(
    model: StrPath | LanguageModel,
    data: Data,
    output: StrPath,
    valid: Data | None,
    progress: bool | None,
    own: list[Callback],
    chosen: FinetuneOptions,
    reached: Milestones,
    ranks: Communicator,
) -> FinetuneReport:
    is_first = ranks.rank == 0  # this rank writes the output and prints
    files.require_named("finetune", output=output)
    require_same_options(ranks, chosen)
    place, speaking = Path(files.absolute(output)), is_first and speaks(progress)
    say = speaker(speaking)
    say_if_alone(ranks, chosen.distributed, progress)
    earlier = None
    if is_first:
        files.require_directory(output)
        require_reporters("finetune", chosen.report_to)
        earlier = find_earlier_run(place) if chosen.resume else None
    earlier = ranks.broadcast(earlier, "the search for an earlier run")
    given = chosen
    if earlier is not None and not isinstance(model, LanguageModel):
        chosen = earlier.keep_compute(chosen)
    if earlier is not None:
        chosen = earlier.keep_int8_head(chosen, fixed_compute(model, chosen))
        if kept := words_of_kept(given, chosen):
            say(f"{files.name(output)}: {kept}")

    inputs = read_inputs("finetune", model, data, valid, chosen)
    require_same_data(ranks, inputs.train, inputs.held_out)
    if chosen.lr is None:
        chosen = dataclasses.replace(chosen, lr=default_lr(inputs.lm.config.hidden_size, chosen.objective))
    if is_first:
        require_not_read(place, inputs, chosen.adapter)
    execution = choose_execution(model, inputs, chosen, earlier, say, ranks)
    for dataset in inputs.datasets:
        say(str(dataset.report))
    if is_first and speaks(progress) and inputs.held_out is not None and (shared := inputs.count_shared()):
        say(shared_words(shared, len(inputs.held_out)))

    lm = inputs.lm
    batches = training_batches(inputs.train, chosen)
    if earlier is not None and earlier.step >= steps_of(batches, chosen):
        execution = dataclasses.replace(execution, keep_int8=False)  # nothing is left to train
    validation = None if inputs.held_out is None else evaluation_batches(inputs.held_out)
    plain = lm.with_tokens(inputs.added_tokens)  # shares the frozen weights, and stays without an adapter
    put_on_adapter(lm, inputs.start, chosen)
    if is_first:
        require_free(place, chosen, bool(inputs.added_tokens))
    prefix = _new_prefix(inputs, place, chosen.keep_prefix)
    int8_head = arithmetic_of_head(lm, chosen, isinstance(lm.lm_head, TrainedHead))
    word_filter = WordFilter(chosen.filter_vocabulary) if chosen.filter_vocabulary else None

    with (
        opened_output(place, ranks) as directory,
        contextlib.nullcontext() if prefix is None else contextlib.closing(prefix),
        computing(lm, execution, prefix, word_filter, int8_head),
    ):
        read = [batches, *([validation] if validation else [])]
        prepared = Preparation(inputs.objective, plain, read, directory, say, ranks)
        del plain
        loss = inputs.objective.loss(execution.micro_tokens)
        loss.word_filter = word_filter
        loss.int8_head = int8_head if lm.compute == "int8" else None
        baseline = Baseline(lm, loss, validation, inputs.prompts(chosen.sample), say, ranks)
        is_new = directory is not None and not (chosen.resume and holds_run(directory))
        is_new = ranks.broadcast(is_new, "the choice between a new run and an earlier one")
        if is_new:
            if chosen.resume:
                say(f"{files.name(output)}: there is no run to resume, so a new run starts")
            prepared.compute()
            baseline.measure()
        base = os.fspath(model.source if isinstance(model, LanguageModel) else model)
        save = functools.partial(save_adapter, chat_template=inputs.train.report.chat)
        with contextlib.ExitStack() as stack:
            profiler = StepProfiler() if chosen.profile else None
            callbacks = [reached, prepared, baseline, *own]
            if profiler is not None:
                stack.callback(profiler.cancel)
                callbacks.insert(0, profiler)
            if directory is not None:
                reports, shown = Path(directory, REPORTS), _shown(chosen, execution, inputs, batches)
                callbacks += stack.enter_context(
                    reporting(chosen.report_to, reports, shown, lambda: loss.tokens)
                )
                stack.enter_context(_saved_after_an_error(lm, directory, base, save, reached))
            callbacks += [TokenProgress(loss=loss)] if speaking else []
            if speaking and word_filter is not None and word_filter.applies(lm.lm_head):
                callbacks.append(FilterCheck(lm.lm_head, word_filter, say))
            if lm.compute == "int8":
                own_loss = inputs.objective.loss(None)
                sample = int8_sample.of_tokens(lm, own_loss, batches, execution.micro_tokens)
                callbacks.append(stack.enter_context(Int8Check(lm, sample, say)))
            trainer = new_trainer(lm, loss, chosen, callbacks, or_none_if_alone(ranks))
            history = _train(trainer, batches, validation, chosen, directory)
        found_at = place
        if directory is not None:
            _save(lm, directory, base, save)
            found_at = directory.seen_from(output)
    profile = None if profiler is None else profiler.result()
    return _report(found_at, inputs, chosen, baseline, history, trainer, profile)


def put_on_adapter(lm: LanguageModel, start: Adapter | None, options: FinetuneOptions) -> None:
    """Attach the adapter to train: a new adapter, or the adapter that the run continues from."""
    if start is None:
        lm.add_lora(
            options.rank, options.alpha, options.targets, options.layers, options.dropout, options.use_rslora,
            options.use_dora, options.seed, options.init, options.rank_pattern, options.alpha_pattern,
            options.trainable_tokens or (), options.modules_to_save or (), options.invocation,
            options.add_tokens or (), options.freeze_B,
        )  # fmt: skip
        return
    start.attach(lm, options.any_base, freeze_B=options.freeze_B)
    for name, layer in lm.adapter_layers().items():
        layer.restart_dropout(layer_stream(options.seed, name))
        if isinstance(layer, LoRALinear):
            layer.dropout = options.dropout


def _new_prefix(inputs: RunInputs, output: StrPath, where: str) -> PrefixCache | None:
    """Make a cache for the outputs of the blocks below the adapters, large enough for all examples.

    Args:
        where: the option `keep_prefix`. If it is "off", the result is None.
    """
    if where == "off":
        return None
    lm, directory = inputs.lm, output if where == "disk" else None
    return PrefixCache(lm.model.first_adapted(), inputs.tokens, lm.config.hidden_size, directory)


@contextlib.contextmanager
def computing(
    lm: LanguageModel,
    execution: ExecutionPlan,
    prefix: PrefixCache | None,
    word_filter: WordFilter | None,
    int8_head: str,
) -> Iterator[None]:
    """In the `with` block, let the model compute as the plan says. Afterwards, undo this."""
    before, head = (lm.model.recompute, lm.model.int8_head, lm.lm_head.int8), lm.lm_head
    try:
        lm.model.recompute, lm.model.prefix, lm.model.word_filter = execution.recompute, prefix, word_filter
        lm.model.int8_head, head.int8 = int8_head == "on", int8_head != "off"
        with keeping_int8(lm.model.int8_weights() if execution.keep_int8 else []):
            yield
    finally:
        lm.model.recompute, lm.model.int8_head, head.int8 = before
        lm.model.prefix = lm.model.word_filter = None


def _shown(
    options: FinetuneOptions, execution: ExecutionPlan, inputs: RunInputs, batches: TokenBatches
) -> dict[str, Any]:
    """Return the hyper-parameters that reports show: the inputs, and the options with their final values."""
    lm, held_out, summary = inputs.lm, inputs.held_out, batches.log_summary()
    chosen = {field.name: getattr(options, field.name) for field in dataclasses.fields(options)}
    planned = {"recompute": execution.recompute, "keep_int8": execution.keep_int8}
    used = {name: summary[name] for name in ("batch_examples", "batch_tokens") if name in summary}
    int8_head = options.int8_head
    if lm.compute == "int8":
        int8_head = arithmetic_of_head(lm, options, isinstance(lm.lm_head, TrainedHead))
    return {
        "model": lm.source,
        "data": summary["source"],
        "examples": summary["examples"],
        "valid": None if held_out is None else held_out.report.source,
        "trained_values": lm.num_trainable,
    } | (chosen | used | planned | {"compute": lm.compute, "int8_head": int8_head})


def new_trainer(
    lm: LanguageModel,
    loss: PackedLoss,
    options: FinetuneOptions,
    callbacks: list[Callback],
    communicator: Communicator | None = None,
) -> Trainer:
    """Make the trainer of a run. `options.lr` must be set."""
    assert options.lr is not None
    return Trainer(
        lm,
        loss,
        AdamW(options.lr, weight_decay=options.weight_decay, lr_ratio=options.lora_plus_ratio),
        schedule=options.schedule,
        warmup_steps=options.warmup,
        accumulate=options.accumulate,
        clip_norm=options.max_grad_norm,
        seed=options.seed,
        callbacks=callbacks,
        progress=False,
        communicator=communicator,
        communication_dtype=options.communication_dtype,
        local_steps=options.local_steps,
        outer_lr=options.outer_lr,
        outer_momentum=options.outer_momentum,
    )


def _train(
    trainer: Trainer,
    batches: TokenBatches,
    validation: TokenBatches | None,
    options: FinetuneOptions,
    directory: files.Directory | None,
) -> History:
    return trainer.fit(
        batches,
        epochs=options.epochs,
        steps=options.steps,
        validation=validation,
        eval_every=options.eval_every,
        patience=options.patience,
        keep=options.keep,
        checkpoint_dir=directory,
        checkpoint_every=options.save_every,
        save_minutes=options.save_minutes,
        resume=options.resume,
        change_compute=options.change_compute,
        overwrite=options.overwrite,
    )


@contextlib.contextmanager
def _saved_after_an_error(
    lm: LanguageModel, output: StrPath, base: str, save: Callable[..., None], reached: Milestones
) -> Iterator[None]:
    """If the `with` block raises an error, save the adapter in two cases, and raise the error again.

    If a callback or a report fails or is interrupted after the end of the training, save the adapter of the
    run. If a loss is not finite, save the adapter of the last checkpoint before the failed step, unless that
    is the checkpoint of step 0.
    """
    try:
        yield
    except BaseException as error:
        step = error.good_step if isinstance(error, NonFiniteLossError) else None
        if reached.has_ended or step:
            error.add_note(_save_as_of(lm, output, base, save, None if reached.has_ended else step))
        raise


def _save_as_of(
    lm: LanguageModel, output: StrPath, base: str, save: Callable[..., None], step: int | None
) -> str:
    """Save the adapter of the checkpoint of `step`. Return a note that says whether the adapter was saved.

    If `step` is None, save the current adapter.
    """
    try:
        if step is not None:
            with RunDirectory(output) as directory:
                good = directory.before(step + 1)
            if good is None:
                return "the adapter is not saved: its checkpoint is gone"
            set_factors(lm, good.parameters)
        _save_undisturbed(lm, output, base, save)
    except (OSError, FormatError) as error:
        return f"the adapter could not be saved: {message_of(error)}"
    return f"{files.name(output)} holds the adapter" + ("" if step is None else f" as of step {step}")


def _save_undisturbed(lm: LanguageModel, output: StrPath, base: str, save: Callable[..., None]) -> None:
    """Save the adapter. Ctrl-C takes effect only after the adapter is on the disk."""
    with Interrupts(terminate=False) as interrupts, interrupts.hold():
        save(lm, output, base)


def _save(lm: LanguageModel, output: StrPath, base: str, save: Callable[..., None]) -> None:
    try:
        _save_undisturbed(lm, output, base, save)
    except OSError as error:
        error.add_note("the run is saved, but its adapter is not: --resume (resume=True) writes it")
        raise


def _report(
    output: Path,
    inputs: RunInputs,
    options: FinetuneOptions,
    baseline: Baseline,
    history: History,
    trainer: Trainer,
    profile: StepProfile | None,
) -> FinetuneReport:
    lm, stopped = inputs.lm, history.interrupted
    process, is_silent = trainer.communicator.rank, stopped or trainer.communicator.rank
    after = [""] * len(options.sample) if is_silent else answers_of(lm, inputs.prompts(options.sample))
    loss_after, metrics_after = (None, dict[str, float]()) if stopped else _validated(history)
    return FinetuneReport(
        output=output,
        train=inputs.train.report,
        valid=None if inputs.held_out is None else inputs.held_out.report,
        loss_before=baseline.loss,
        unit=inputs.objective.loss(None).unit,
        metrics_before=baseline.metrics,
        metrics_after=metrics_after,
        loss_after=loss_after,
        samples=tuple(map(Sample, options.sample, baseline.answers, after)),
        history=history,
        trained=lm.num_trainable,
        parameters=lm.num_parameters,
        was_finished=baseline.was_finished,
        process=process,
        ranks=tuple(trainer.ranks),
        profile=profile,
    )


def _validated(history: History) -> tuple[float | None, dict[str, float]]:
    """Return the validation loss of the saved adapter, and a dict of its validation metrics."""
    if history.best_loss is not None:
        best = [record for record in history.evaluations if record.step == history.best_step]
        return history.best_loss, best[-1].val_metrics if best else {}  # no record: the log is lost
    last = history.epochs[-1:]
    return (last[0].val_loss, last[0].val_metrics) if last else (None, {})
