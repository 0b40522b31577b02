"""Choose an execution plan that fits into memory. If no plan fits, the error suggests other options."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial

from nplora.finetuning.planning.memory import (
    NOTHING,
    Adapters,
    ExecutionPlan,
    Memory,
    MicroBatch,
    ProductMethod,
    predicted,
    with_filter,
)
from nplora.finetuning.planning.memory_plan import Alternative, MemoryPlan, need, room
from nplora.finetuning.planning.nodes import BatchTime
from nplora.finetuning.planning.resident import unread
from nplora.finetuning.planning.speed import Speed, measured
from nplora.finetuning.planning.work import Array, Work
from nplora.lm import LanguageModel
from nplora.platform.memory import available_memory, current_memory, peak_memory
from nplora.runtime import get_num_threads
from nplora.weights import COMPUTES

_LEAST_MICRO_BATCH = 32  # tokens: smaller micro-batches save little memory and lose speed
# A new plan must fit into the limit divided by this margin. A resumed run may use the whole limit, because
# its process may need a little more memory than the first one did. Error messages take account of the margin.
_MARGIN = 1.02
_LEAST_GAIN = 1.02  # a plan that keeps weights in int8 must be faster than the others by this factor
_TIMED_BATCHES = 1024  # a plan holds the times of about this many batches
_FLOAT = 4


class BudgetError(ValueError):
    """No execution plan fits into the memory limit. The message says which options would fit.

    >>> nplora.plan("model.gguf", "train.jsonl", memory="2M")
    Traceback (most recent call last):
    nplora.finetuning.planning.choice.BudgetError: plan: no plan fits into 2 MB: ...
    """


@dataclass(frozen=True)
class PlanConstraints:
    """The settings that are fixed before a plan is chosen.

    Attributes:
        compute: arithmetic of the products with frozen weights; None: not fixed.
        recompute: whether plans must recompute activations in the backward pass. If False, plans may also
            store the activations.
        micro_tokens: sizes of micro-batches to choose from; None: any size.
        resuming: whether the run is resumed. A resumed run may use the whole memory limit. A new run leaves a
            margin.
        keep_int8: whether plans must keep weights in memory as 8-bit integers. If False, plans in int8 may do
            so, but only if there is a memory limit.

    >>> constraints = nplora.finetuning.planning.PlanConstraints(compute="bfloat16")
    >>> constraints.recompute, constraints.micro_tokens
    (False, None)
    """

    compute: str | None = None
    recompute: bool = False
    micro_tokens: tuple[int | None, ...] | None = None
    resuming: bool = False
    keep_int8: bool = False


def resident_memory(lm: LanguageModel, teacher: LanguageModel | None = None) -> tuple[int, int]:
    """Return two sizes in bytes: the memory of this process now, and the weights that are not read yet.

    Args:
        teacher: a second model, whose weights count too.

    >>> lm = nplora.load_model("model.gguf")
    >>> current, unread = nplora.finetuning.planning.resident_memory(lm)
    >>> current > 1e6, unread >= 0
    (True, True)
    """
    sources = {lm.config.source, *([] if teacher is None else [teacher.config.source])}
    return current_memory(), sum(map(unread, sorted(sources)))


def needed(
    lm: LanguageModel, adapters: Adapters, work: Work, plan: ExecutionPlan, resident: tuple[int, int]
) -> Memory:
    """Predict the peak memory of the process with this plan.

    Args:
        resident: what `resident_memory` returned before `work` was made.

    >>> planning = nplora.finetuning.planning
    >>> lm = nplora.load_model("model.gguf")
    >>> adapters = planning.Adapters.of(lm, rank=2, targets="all-linear", layers=None)
    >>> work = planning.Work([(np.array([8, 5]), np.array([3, 2]))], steps=10)
    >>> kept = planning.ExecutionPlan("float32", recompute=False)
    >>> recomputed = planning.ExecutionPlan("float32", recompute=True)
    >>> resident = planning.resident_memory(lm)
    >>> memory = planning.needed(lm, adapters, work, kept, resident)
    >>> memory.kept > planning.needed(lm, adapters, work, recomputed, resident).kept
    True
    """
    largest, threads = work.largest(plan.micro_tokens), get_num_threads()
    extra = NOTHING
    if work.teaching is not None:
        targets = (one.targets for one in work.micro_batches(plan.micro_tokens))
        extra = work.teaching.extra(largest, targets, work.evaluated)
    if work.filters:
        extra = with_filter(extra, lm.config, largest.targets)
    memory = predicted(
        lm, adapters, largest, work.evaluated, plan, threads, resident, work.prefix_tokens, extra,
        work.keeps_best,
    )  # fmt: skip
    gradients = _FLOAT * adapters.numbers * work.gradient_copies(plan.micro_tokens)
    return dataclasses.replace(memory, gradients=gradients)


def choose(
    lm: LanguageModel,
    adapters: Adapters,
    work: Work,
    constraints: PlanConstraints,
    resident: tuple[int, int],
    budget: int | None = None,
    op: str = "plan",
) -> MemoryPlan:
    """Choose the fastest plan that fits. If the arithmetic is not fixed, prefer float32 plans to bfloat16.

    Args:
        resident: the result of `resident_memory`, as in `needed`.
        budget: memory limit of the process in bytes. If None, there is no limit, and the settings that
            `constraints` leaves open get their defaults.
        op: name of the public function that the user called. Error messages begin with this name.
    Raises:
        BudgetError: no plan fits.

    >>> planning = nplora.finetuning.planning
    >>> lm = nplora.load_model("model.gguf")
    >>> adapters = planning.Adapters.of(lm, rank=2, targets="all-linear", layers=None)
    >>> work = planning.Work([(np.array([8, 5]), np.array([3, 2]))], steps=10)
    >>> resident = planning.resident_memory(lm)
    >>> constraints = planning.PlanConstraints(recompute=True)
    >>> plan = planning.choose(lm, adapters, work, constraints, resident)
    >>> print(plan.chosen)
    float32, activations recomputed
    """
    reached = peak_memory()
    limit = math.inf if budget is None else budget if constraints.resuming else budget / _MARGIN

    def memory(plan: ExecutionPlan, work: Work = work) -> Memory:
        return needed(lm, adapters, work, plan, resident)

    plans = list(_plans(lm, work, constraints, budget is not None))
    sizes = {plan: memory(plan).total for plan in plans}
    fitting = [plan for plan in plans if sizes[plan] <= limit]
    if budget is not None and not fitting:
        smallest = min(plans, key=lambda plan: sizes[plan])
        converting = memory(dataclasses.replace(smallest, keep_int8=False)).total
        if smallest.keep_int8 and converting <= limit:
            advice = f"; without --keep-int8 it needs {need(converting)}"
        else:
            advice = _shorter(work, smallest, limit, lambda *changed: memory(*changed).total)
        raise BudgetError(f"{op}: {_too_little(smallest, sizes[smallest], budget, constraints, advice)}")
    if budget is not None and budget < reached:
        raise BudgetError(
            f"{op}: the peak memory of this process is {need(reached)} already, and the limit is "
            f"{room(budget)}: plan and train in a new process"
        )
    speeds = measured(lm, tuple(dict.fromkeys(plan.method for plan in plans)), work.int8_head)
    taught = _teaching_times(work, dict.fromkeys(plan.compute for plan in plans))
    seconds = {plan: _seconds(lm, adapters, work, plan, speeds, taught[plan.compute]) for plan in plans}
    chosen = preferred(fitting, seconds.__getitem__)
    others = tuple(Alternative(plan, sizes[plan], seconds[plan]) for plan in plans if plan != chosen)
    before = sum(speeds[chosen.method.of_inference].forward_pass(lm, *one) for one in work.reference)
    most = max(1, _TIMED_BATCHES // work.accumulate)
    times = tuple(
        tuple(_batch_times(lm, adapters, work, step, chosen, speeds, taught[chosen.compute]))
        for step in itertools.islice(work.batches_of_steps(), most)
    )
    return MemoryPlan(
        chosen, memory(chosen), seconds[chosen], work.steps, others, limit, available_memory(), before,
        work.accumulate, times, _FLOAT * adapters.numbers,
    )  # fmt: skip


def preferred(plans: Iterable[ExecutionPlan], seconds: Callable[[ExecutionPlan], float]) -> ExecutionPlan:
    """Choose the most exact arithmetic of the plans. Return the fastest plan with this arithmetic.

    `seconds` returns the time of a plan's step. A plan that keeps weights in int8 is preferred only if it is
    at least 2 % faster than the plans that do not, because measured times vary.

    >>> planning = nplora.finetuning.planning
    >>> plans = [planning.ExecutionPlan("bfloat16", False), planning.ExecutionPlan("float32", True)]
    >>> print(planning.preferred(plans, {plans[0]: 1.0, plans[1]: 2.0}.__getitem__))
    float32, activations recomputed
    """

    def rank(plan: ExecutionPlan) -> tuple[int, float]:
        return COMPUTES.index(plan.compute), seconds(plan) * (_LEAST_GAIN if plan.keep_int8 else 1)

    return min(plans, key=rank)


def _plans(
    lm: LanguageModel, work: Work, constraints: PlanConstraints, free: bool
) -> Iterator[ExecutionPlan]:
    """The plans that the constraints allow. Plans in float32 come first.

    Args:
        free: whether to vary the settings that the constraints leave open; if False, they get defaults.
    """
    computes, policies = [constraints.compute or lm.compute], [constraints.recompute]
    if free and constraints.compute is None and lm.compute == "float32":
        computes.append("bfloat16")
    if free and not constraints.recompute:
        policies.append(True)
    sizes = constraints.micro_tokens
    if sizes is None:
        sizes = (None, *_halves(work)) if free else (None,)
    for compute, recompute, size in itertools.product(computes, policies, sizes):
        yield ExecutionPlan(compute, recompute, size, constraints.keep_int8)
        if free and compute == "int8" and not constraints.keep_int8:
            yield ExecutionPlan(compute, recompute, size, True)


def _halves(work: Work) -> Iterator[int]:
    """Possible sizes of micro-batches in tokens: half of the largest batch, a quarter of it, and so on.

    The last size is that of the longest example, but at least `_LEAST_MICRO_BATCH`.
    """
    size, least = work.batch_tokens, max(work.longest, _LEAST_MICRO_BATCH)
    while size > least:
        size = max(-(-size // 2), least)
        yield size


def _teaching_times(work: Work, computes: Iterable[str]) -> dict[str, Callable[[MicroBatch], float]]:
    """Return a dict: arithmetic -> function that predicts the seconds of the teacher for a micro-batch."""
    teaching = work.teaching
    if teaching is None:
        return dict.fromkeys(computes, lambda one: 0.0)
    row = teaching.measured_row()
    if teaching.model is None:
        return dict.fromkeys(computes, partial(teaching.step, None, row))
    methods = {compute: ProductMethod(compute).of_inference for compute in computes}
    speeds = measured(teaching.model, tuple(dict.fromkeys(methods.values())))
    return {compute: partial(teaching.step, speeds[method], row) for compute, method in methods.items()}


def _seconds(
    lm: LanguageModel,
    adapters: Adapters,
    work: Work,
    plan: ExecutionPlan,
    speeds: Mapping[ProductMethod, Speed],
    taught: Callable[[MicroBatch], float],
) -> float:
    """The predicted seconds of an average step; see `_batch_times`."""
    steps = list(work.batches_of_steps())
    times = _batch_times(lm, adapters, work, itertools.chain(*steps), plan, speeds, taught)
    return sum(one.seconds for one in times) / len(steps)


def _batch_times(
    lm: LanguageModel,
    adapters: Adapters,
    work: Work,
    batches: Iterable[tuple[Array, Array]],
    plan: ExecutionPlan,
    speeds: Mapping[ProductMethod, Speed],
    taught: Callable[[MicroBatch], float],
) -> Iterator[BatchTime]:
    """Yield the predicted time of each batch in `batches`.

    Args:
        taught: a function that predicts the seconds of the teacher for a micro-batch.
    """
    inference = speeds[plan.method.of_inference]
    for batch in batches:
        times = [
            speeds[plan.method].step(lm, adapters, one, plan.recompute, inference)
            + work.extra_passes * inference.forward_pass(lm, one.tokens, one.targets)
            + taught(one)
            for one in work.cut(batch, plan.micro_tokens)
        ]
        yield BatchTime(sum(times), len(times))


def _too_little(
    plan: ExecutionPlan, size: int, budget: int, constraints: PlanConstraints, advice: str
) -> str:
    """The error message for a budget that is too small for every plan.

    Args:
        plan, size: the plan that needs the least memory, and the bytes that it needs.
        advice: the part of the message that names another option, with which a plan may fit.
    """
    reserve = "" if constraints.resuming else f" plus {_MARGIN - 1:.0%} in reserve"
    enough = size * (_MARGIN if constraints.resuming else _MARGIN**2)
    return (
        f"no plan fits into {room(budget)}: the smallest ({plan}) needs {need(size)}{reserve}{advice}; "
        f"--memory {math.ceil(enough / 1e6)}M is enough"
    )


def _shorter(
    work: Work, plan: ExecutionPlan, limit: float, size: Callable[[ExecutionPlan, Work], int]
) -> str:
    """The end of an error message: a smaller --max-length with which the plan fits.

    This is the largest power of two that fits and leaves out no example. If there is none, it is the smallest
    length that leaves out no example, provided that it fits.
    """

    def needed(length: int) -> int:
        tokens = max(work.sequences * length, _LEAST_MICRO_BATCH)
        return size(dataclasses.replace(plan, micro_tokens=tokens), work.shortened(length))

    longest, least = -(-work.longest // work.sequences), max(work.least_length, 1)
    powers = [1 << n for n in reversed(range((longest - 1).bit_length()))]
    for length in (*powers, least):
        if least <= length < longest and (found := needed(length)) <= limit:
            return f"; with --max-length {length} it needs {need(found)}"
    if needed(1) <= limit:
        return "; a --max-length that fits would leave out examples, because their answers are cut off"
    return "; a smaller --max-length does not help"
