"""Decide how a run computes its steps: from its options, from its memory limit, or from an earlier run."""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from nplora import _check
from nplora.adapters import Adapter
from nplora.adapters.trained_rows import HEAD
from nplora.distributed.communicator import Alone, Communicator
from nplora.finetuning.data import Data
from nplora.finetuning.data.batches import TokenBatches
from nplora.finetuning.data.stored import Examples
from nplora.finetuning.earlier_run import EarlierRun
from nplora.finetuning.load import (
    RunInputs,
    arithmetic_of_head,
    evaluation_batches,
    read_inputs,
    training_batches,
)
from nplora.finetuning.options import FinetuneOptions, from_arguments
from nplora.finetuning.planning import (
    Adapters,
    BudgetError,
    ExecutionPlan,
    MemoryPlan,
    PlanConstraints,
    Work,
    available_memory,
    choose,
    needed,
    parse_bytes,
    preferred,
    resident_memory,
    shortage,
)
from nplora.formats.errors import brief
from nplora.formats.files import StrPath
from nplora.lm import LanguageModel, activated
from nplora.lm.adapting import parse_pattern
from nplora.lm.trained_rows import new_tokens
from nplora.lm.trained_rows import wanted as wanted_rows
from nplora.runtime.user_warning import warn_user
from nplora.trainer.training_setup import adds_in_order

# A plan lists the batches of the first epochs, up to about this many examples in total.
_MOST_EXAMPLES = 1_000_000


@_check.keywords
def plan(
    model: StrPath | LanguageModel,
    data: Data,
    *,
    valid: Data | None = None,
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
) -> MemoryPlan:
    """Predict the memory and the time that `finetune` would need with the same arguments.

    Nothing is trained or written. If `memory` is set, `finetune` chooses an execution plan that stays below
    this limit, and `plan` returns this execution plan. A loaded model keeps its arithmetic.

    Args:
        model, data, valid and all options: see `finetune`.
    Returns:
        the execution plan, with its predicted memory and time; `print` shows them.
    Raises:
        BudgetError: no plan fits into `memory`. The message says how much memory is needed, and which options
            would fit.
        Other errors: see `finetune`.

    >>> plan = nplora.plan("model.gguf", "train.jsonl", batch_examples=4, memory="2G")
    >>> plan.memory.total < 2e9
    True
    >>> plan.chosen.compute
    'float32'
    """
    chosen = from_arguments("plan", FinetuneOptions, locals())
    inputs = read_inputs("plan", model, data, valid, chosen, check=False)
    constraints = PlanConstraints(fixed_compute(model, chosen), chosen.recompute, keep_int8=chosen.keep_int8)
    return _planned("plan", inputs, adapters_of("plan", inputs, chosen), chosen, constraints)


def choose_execution(
    model: StrPath | LanguageModel,
    inputs: RunInputs,
    options: FinetuneOptions,
    earlier: EarlierRun | None,
    say: Callable[[str], None],
    ranks: Communicator | None = None,
) -> ExecutionPlan:
    """Decide how `finetune` computes its steps. If `memory` is set, choose a plan that fits, and print it.

    If the plan's arithmetic differs from that of the model in `inputs`, the model is loaded again.

    Args:
        earlier: the run to resume, whose micro-batch size is kept. None: this is a new run.
        say: function that prints a text.
        ranks: the processes that train together. Each rank predicts the memory of each plan. All ranks use
            the same plan, which fits into the memory of every rank.
    Raises:
        BudgetError: no plan fits into `memory`, or no plan fits on every rank.
        ValueError: the options do not fit the model.
    Warns:
        UserWarning: `memory` is not set, and the run needs more memory than is available.
    """
    adapters, ranks = adapters_of("finetune", inputs, options), ranks or Alone()
    if ranks.size > 1 and options.dropout and "lm_head" in adapters.shapes:
        raise ValueError(
            "finetune: several ranks cannot train an adapter on lm_head with dropout, because the head draws "
            "several dropout masks for a batch: leave lm_head out of the targets, or set the dropout to 0"
        )
    if options.memory is None:
        micro_tokens = None if earlier is None else earlier.micro_tokens
        execution = ExecutionPlan(inputs.lm.compute, options.recompute, micro_tokens, options.keep_int8)
        done = 0 if earlier is None else earlier.step
        short = ranks.gather(_shortage(inputs, adapters, options, execution, done), "the memory of the run")
        for rank, problem in enumerate(short):
            if problem and problem not in short[:rank]:
                warn_user(f"finetune: {f'rank {rank}: ' if rank else ''}{problem}")
        return execution
    constraints = PlanConstraints(
        fixed_compute(model, options),
        options.recompute,
        micro_tokens=None if earlier is None else (earlier.micro_tokens,),
        resuming=earlier is not None,
        keep_int8=options.keep_int8,
    )
    own = _planned("finetune", inputs, adapters, options, constraints)
    execution = fitting_all(ranks.gather(own, "the choice of an execution plan"))
    is_own = execution == own.chosen
    say(str(own) if is_own else f"{own.compared()[execution]}; this plan fits on every rank")
    if execution.compute != inputs.lm.compute:
        assert not isinstance(model, LanguageModel), "the arithmetic of a loaded model cannot change"
        inputs.reload(model, execution.compute)
    return execution


def fitting_all(plans: Sequence[MemoryPlan]) -> ExecutionPlan:
    """Choose one of the plans that fit on every rank: the fastest one in the most exact arithmetic.

    The ranks may have different memory limits and different numbers of threads, and each thread needs memory.
    The time of a step is the time that the slowest rank needs for it.

    Args:
        plans: for each rank, the plan that the rank would choose alone, and the other plans that it compared.
    Raises:
        BudgetError: no plan fits on every rank.
        ValueError: the ranks have compared different plans.
    """
    compared = [plan.compared() for plan in plans]
    for rank, own in enumerate(compared):
        if own.keys() != compared[0].keys():
            raise ValueError(
                f"finetune: the ranks differ: rank {rank} and rank 0 have compared different memory plans; "
                "give all ranks the same model, data and options"
            )
    # For each plan: the largest excess over a rank's limit, in bytes (at most 0 if the plan fits on all
    # ranks), and the rank that has this excess.
    excess = {
        plan: max((own[plan].size - plans[rank].limit, rank) for rank, own in enumerate(compared))
        for plan in compared[0]
    }
    if fitting := [plan for plan, (over, _) in excess.items() if over <= 0]:
        return preferred(fitting, lambda plan: max(own[plan].seconds for own in compared))
    nearest = min(excess, key=lambda plan: excess[plan])
    rank = excess[nearest][1]
    least, most = math.ceil(compared[rank][nearest].size / 1e6), math.floor(plans[rank].limit / 1e6)
    raise BudgetError(
        f"finetune: no plan fits on every rank: the plan that comes closest ({nearest}) needs {least} MB "
        f"on rank {rank}, whose limit is {most} MB: give rank {rank} a larger --memory"
    )


def predicted(
    op: str, inputs: RunInputs, adapters: Adapters, options: FinetuneOptions, execution: ExecutionPlan
) -> MemoryPlan:
    """The predicted memory and time of a run with this execution plan."""
    fixed = PlanConstraints(
        execution.compute, execution.recompute, (execution.micro_tokens,), keep_int8=execution.keep_int8
    )
    return _planned(op, inputs, adapters, dataclasses.replace(options, memory=None), fixed)


def fixed_compute(model: StrPath | LanguageModel, options: FinetuneOptions) -> str | None:
    """The arithmetic that the run must use: that of a loaded model, otherwise the option `compute`."""
    return model.compute if isinstance(model, LanguageModel) else options.compute


def adapters_of(op: str, inputs: RunInputs, options: FinetuneOptions) -> Adapters:
    """Find out what a run trains: the layers with an adapter and their ranks, and whole rows of the embedding
    and the head.

    Raises:
        ValueError: the layers do not fit the model; or `keep_prefix` is set and the lowest block is adapted;
            or `int8_head` is "on" and rows of the head are trained; or no example has the invocation tokens.
    """
    lm, start = inputs.lm, inputs.start
    if start is None:
        adapters = Adapters.of(
            lm, options.rank, options.targets, options.layers, options.use_dora, options.init, op,
            parse_pattern(op, "rank_pattern", options.rank_pattern), options.freeze_B,
        )  # fmt: skip
        tokens, modules = options.trainable_tokens or (), options.modules_to_save or ()
        added = options.add_tokens or ()
        new = new_tokens(lm, op, added)
        rows = wanted_rows(lm, op, tokens, modules, adapters.shapes, new)
        adapters = adapters.with_rows(lm, rows, inputs.added_tokens)
        invocation = activated.invocation_tokens(lm, op, options.invocation)
        rest: tuple[Any, ...] = options.use_dora, options.dropout, options.init, tokens, modules, added
    else:
        shapes = {name: delta.shape for name, delta in start.items()}
        widths = {name: delta.rank for name, delta in start.items()}
        adapters = Adapters(
            shapes, max(widths.values()), start.use_dora, ranks=widths, freeze_B=options.freeze_B
        )
        rows = start.trained_rows
        adapters = adapters.with_rows(lm, rows, inputs.added_tokens, start.rows, start.is_tied)
        invocation = start.invocation_tokens
        rest = start.use_dora, options.dropout, "", start.trained_rows, (), ()
    options.require_int8_for_head(op, adapters.trains_head)
    if options.filter_vocabulary:
        _require_filtered_head(op, adapters)
    if invocation is not None:
        activated.require_plain(op, adapters.shapes, *rest)
        for dataset in inputs.datasets:
            _require_invocation(op, lm, dataset, invocation, start is None)
    if options.keep_prefix != "off" and not adapters.first_block(lm.config.num_hidden_layers):
        raise ValueError(
            f"{op}: keep_prefix={options.keep_prefix!r}, but there is no frozen block below the adapters; "
            "to have a frozen block there, adapt only the last blocks, for example with layers='last:4'"
        )
    return adapters


def _require_filtered_head(op: str, adapters: Adapters) -> None:
    """Raise a ValueError if a `WordFilter` would not apply to the head with its adapter."""
    if HEAD in adapters.shapes:
        problem = "lm_head has a low-rank adapter: leave lm_head out of the targets"
    elif adapters.trains_head and not adapters.trains_whole_head:
        problem = (
            "only some of its rows are trained: by trainable_tokens, by add_tokens, or by the adapter to "
            "continue from"
        )
    else:
        return
    raise ValueError(
        f"{op}: filter_vocabulary needs an output layer that is frozen or trained as a whole, but {problem}"
    )


def _require_invocation(
    op: str, lm: LanguageModel, dataset: Examples, invocation: tuple[int, ...], is_new: bool
) -> None:
    """Check that trained tokens follow the invocation, before which an activated LoRA has no effect.

    Args:
        is_new: whether the adapter is new; if so, an error message says how to choose an invocation.
    Raises:
        ValueError: no example has the invocation tokens, or no trained token follows them.
    Warns:
        UserWarning: some examples do not have the invocation tokens, or trained tokens come before them.
    """
    without = int((~dataset.contains(invocation)).sum())
    where = f"{op}: {dataset.report.source}: {without} of {len(dataset)} examples"
    text = lm.tokenizer.decode(invocation)
    words = (
        f"{where} do not have the invocation tokens {list(invocation)} (the text {brief(text)}), so the "
        "adapter has no effect on these examples"
    )
    if without == len(dataset):
        raise ValueError(words + (_invocation_advice(lm, dataset) if is_new else ""))
    if without:
        warn_user(words)
    reached, early, total = dataset.reached(invocation)
    if early:
        words = (
            f"{op}: {dataset.report.source}: {early:,} of {total:,} trained tokens come before the last "
            f"invocation of their example, so the adapter has no effect on these tokens"
        )
        if not reached:
            raise ValueError(words)
        warn_user(words)


def _invocation_advice(lm: LanguageModel, dataset: Examples) -> str:
    """The end of an error message, which says how to choose a good invocation."""
    advice = (
        "; set --invocation (invocation=) to a text that stands just before the answers and has the same "
        "tokens in each example"
    )
    if not dataset.report.chat:
        return advice
    asked = [lm.tokenizer.apply_chat_template([{"role": "user", "content": "a"}], b) for b in (False, True)]
    head = asked[1].removeprefix(asked[0]).strip()
    return f"{advice}; this chat template writes {brief(head)} before each answer" if head else advice


def _planned(
    op: str, inputs: RunInputs, adapters: Adapters, options: FinetuneOptions, constraints: PlanConstraints
) -> MemoryPlan:
    budget = None if options.memory is None else parse_bytes(options.memory, op)
    # Measured now, because the list of batches takes memory too.
    resident = resident_memory(inputs.lm, inputs.teacher_model)
    return choose(inputs.lm, adapters, _work_of(inputs, adapters, options), constraints, resident, budget, op)


def _shortage(
    inputs: RunInputs, adapters: Adapters, options: FinetuneOptions, execution: ExecutionPlan, done: int
) -> str:
    """A message if the remaining steps need more memory than is available; otherwise an empty text.

    The prediction is for the batches of the first epoch. All other epochs need about the same memory.

    Args:
        done: the number of steps that the run has made already.
    """
    resident = resident_memory(inputs.lm, inputs.teacher_model)
    work = _work_of(inputs, adapters, options, most_epochs=1)
    if done >= work.steps:
        return ""
    return shortage(needed(inputs.lm, adapters, work, execution, resident), available_memory())


def steps_of(batches: TokenBatches, options: FinetuneOptions) -> int:
    """The number of steps of a run."""
    return options.steps or (options.epochs or 1) * _steps_of_epoch(batches, options)


def _steps_of_epoch(batches: TokenBatches, options: FinetuneOptions) -> int:
    return -(-batches.length // options.accumulate)


def _work_of(
    inputs: RunInputs, adapters: Adapters, options: FinetuneOptions, most_epochs: int | None = None
) -> Work:
    """Describe the batches of a run with these options.

    Args:
        most_epochs: describe the batches of at most this number of epochs; None: enough epochs for about
            `_MOST_EXAMPLES` examples.
    """
    train, held_out, objective = inputs.train, inputs.held_out, inputs.objective
    is_local = options.local_steps is not None
    read_before = inputs.datasets if objective.has_reference else []
    batches = training_batches(train, options)
    steps_of_epoch, steps = _steps_of_epoch(batches, options), steps_of(batches, options)
    most = 1 + _MOST_EXAMPLES // len(train) if most_epochs is None else most_epochs
    epochs = min(-(-steps * options.accumulate // batches.length), most)
    lengths, targets = train.lengths, train.targets
    evaluated = [_largest_evaluation(one) for one in (held_out, *read_before) if one is not None]
    return Work(
        [(lengths[batch], targets[batch]) for epoch in range(epochs) for batch in batches.members(epoch)],
        steps,
        options.accumulate,
        batches.length,
        evaluated=max(evaluated, default=0),
        # If the only evaluation is at the end of the run, the best factors need no copy.
        keeps_best=held_out is not None
        and options.keep == "best"
        and min(steps_of_epoch, options.eval_every or steps_of_epoch) < steps,
        prefix_tokens=inputs.tokens if options.keep_prefix == "memory" else 0,
        sequences=train.sequences,
        least_length=max(one.least_length for one in inputs.datasets),
        extra_passes=objective.extra_passes,
        teaching=objective.teaching(inputs.lm),
        adds_in_order=adds_in_order(
            options.distributed == "mpi", options.communication_dtype, options.local_steps
        ),
        is_local=is_local,
        filters=options.filter_vocabulary > 0,
        int8_head=arithmetic_of_head(inputs.lm, options, adapters.trains_head),
        reference=[
            size for one in read_before for size in _sizes(one) for _ in range(1 + objective.extra_passes)
        ],
    )


def _largest_evaluation(held_out: Examples) -> int:
    """The number of tokens in the largest batch of an evaluation."""
    return max(tokens for tokens, _ in _sizes(held_out))


def _sizes(dataset: Examples) -> list[tuple[int, int]]:
    """A tuple for each batch of an evaluation: its number of tokens, and its number of trained tokens."""
    batches, lengths, targets = evaluation_batches(dataset).members(0), dataset.lengths, dataset.targets
    return [(int(lengths[batch].sum()), int(targets[batch].sum())) for batch in batches]
