"""How a run computes its steps: as its options say, as fits into memory, or as the run that it resumes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from nplora import _check
from nplora.finetuning.data import Dataset
from nplora.finetuning.earlier_run import EarlierRun
from nplora.finetuning.load import RunInputs, evaluation_batches, read_inputs, training_batches
from nplora.finetuning.options import FinetuneOptions
from nplora.finetuning.planning import (
    Adapters,
    ExecutionPlan,
    MemoryPlan,
    PlanConstraints,
    Work,
    available_memory,
    choose,
    needed,
    parse_bytes,
    resident_memory,
    shortage,
)
from nplora.formats.files import StrPath
from nplora.lm import LanguageModel
from nplora.runtime.user_warning import warn_user

_MOST_EXAMPLES = 1_000_000  # a plan counts the batches of as many epochs as have this many examples


def plan(
    model: StrPath | LanguageModel, data: StrPath, *, valid: StrPath | None = None, **options: Any
) -> MemoryPlan:
    """Predict the memory and the time of `finetune` with the same arguments; nothing is trained or written.

    With `memory`, find how `finetune` would compute its steps to stay below it.

    Returns:
        the execution plan, its bytes and its seconds; its `str` is what the command prints.
    Raises:
        BudgetError: nothing fits into `memory`; the message says what is needed, and what would fit.
        Others as `finetune`.
    """
    chosen = _check.options("plan", FinetuneOptions, options)
    inputs = read_inputs("plan", model, data, valid, chosen, check=False)
    constraints = PlanConstraints(fixed_compute(model, chosen), chosen.recompute)
    return _planned(inputs, adapters_of("plan", inputs, chosen), chosen, constraints)


def choose_execution(
    model: StrPath | LanguageModel,
    inputs: RunInputs,
    options: FinetuneOptions,
    earlier: EarlierRun | None,
    say: Callable[[str], None],
) -> ExecutionPlan:
    """How `finetune` computes its steps. With `memory`, that is chosen to fit, and the plan is printed.

    The model of the inputs is loaded again if the plan has another arithmetic than it was loaded with.

    Args:
        earlier: the run that is resumed; its micro-batches stay.
        say: prints a text.
    Raises:
        BudgetError: nothing fits into `memory`. ValueError: the options do not fit the model.
    Warns:
        UserWarning: without `memory`, more is needed than is available.
    """
    adapters = adapters_of("finetune", inputs, options)
    if options.memory is None:
        micro_tokens = None if earlier is None else earlier.micro_tokens
        execution = ExecutionPlan(inputs.lm.compute, options.recompute, micro_tokens)
        _warn_if_short(inputs, adapters, options, execution, 0 if earlier is None else earlier.step)
        return execution
    constraints = PlanConstraints(
        fixed_compute(model, options),
        options.recompute,
        micro_tokens=None if earlier is None else (earlier.micro_tokens,),
        resuming=earlier is not None,
    )
    found = _planned(inputs, adapters, options, constraints)
    say(str(found))
    if found.chosen.compute != inputs.lm.compute:
        assert not isinstance(model, LanguageModel), "the arithmetic of a loaded model stays"
        inputs.reload(model, found.chosen.compute)
    return found.chosen


def fixed_compute(model: StrPath | LanguageModel, options: FinetuneOptions) -> str | None:
    """The arithmetic of the options or of a loaded model; None if it is to be chosen."""
    return model.compute if isinstance(model, LanguageModel) else options.compute


def adapters_of(op: str, inputs: RunInputs, options: FinetuneOptions) -> Adapters:
    """The adapted layers of a run. Those of an adapter to continue from all count with its largest rank.

    Raises:
        ValueError: they do not fit the model, or they leave no block whose output `keep_prefix` could keep.
    """
    lm, start = inputs.lm, inputs.start
    if start is None:
        adapters = Adapters.of(
            lm, options.rank, options.targets, options.layers, options.use_dora, options.init, op
        )
    else:
        shapes = {name: delta.shape for name, delta in start.items()}
        adapters = Adapters(shapes, max(delta.rank for delta in start.values()), start.use_dora)
    if options.keep_prefix != "off" and not adapters.first_block(lm.config.num_hidden_layers):
        raise ValueError(
            f"{op}: keep_prefix: no frozen block lies below the adapters; layers='last:4' leaves some"
        )
    return adapters


def _planned(
    inputs: RunInputs, adapters: Adapters, options: FinetuneOptions, constraints: PlanConstraints
) -> MemoryPlan:
    budget = None if options.memory is None else parse_bytes(options.memory)
    resident = resident_memory(inputs.lm)  # before the batches are listed, which takes memory too
    return choose(inputs.lm, adapters, _work_of(inputs, options), constraints, resident, budget)


def _warn_if_short(
    inputs: RunInputs, adapters: Adapters, options: FinetuneOptions, execution: ExecutionPlan, done: int
) -> None:
    """Warn if the rest of a run, judged by its first epoch, needs more memory than is available.

    Args:
        done: the steps that the run has made.
    """
    resident, work = resident_memory(inputs.lm), _work_of(inputs, options, most_epochs=1)
    if done >= work.steps:
        return
    short = shortage(needed(inputs.lm, adapters, work, execution, resident), available_memory())
    if short:
        warn_user(short)


def _work_of(inputs: RunInputs, options: FinetuneOptions, most_epochs: int | None = None) -> Work:
    """What a run with these options computes.

    Args:
        most_epochs: the epochs whose batches are counted; None: nearly all, `_MOST_EXAMPLES` in total.
    """
    train, held_out = inputs.train, inputs.held_out
    batches = training_batches(train, options)
    steps = options.steps or (options.epochs or 1) * -(-batches.length // options.accumulate)
    most = 1 + _MOST_EXAMPLES // len(train) if most_epochs is None else most_epochs
    epochs = min(-(-steps * options.accumulate // batches.length), most)
    lengths, targets = train.lengths, train.targets
    return Work(
        [(lengths[batch], targets[batch]) for epoch in range(epochs) for batch in batches.members(epoch)],
        steps,
        options.accumulate,
        evaluated=0 if held_out is None else _largest_evaluation(held_out),
        prefix_tokens=inputs.tokens if options.keep_prefix == "memory" else 0,
    )


def _largest_evaluation(held_out: Dataset) -> int:
    """The tokens of the largest batch of an evaluation."""
    batches = evaluation_batches(held_out).members(0)
    return max(int(held_out.lengths[batch].sum()) for batch in batches)
