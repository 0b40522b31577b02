"""MemoryPlan: how a run computes its steps, with the predicted memory and time."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field

from nplora import _check
from nplora.distributed.network import Network
from nplora.distributed.ordered_sum import COMMUNICATION_DTYPES
from nplora.finetuning.planning.memory import ExecutionPlan, Memory
from nplora.finetuning.planning.nodes import BatchTime, NodesPlan
from nplora.formats.errors import counted


@dataclass(frozen=True)
class Alternative:
    """An execution plan that was not chosen, with its peak memory in bytes and its seconds per step.

    >>> planning = nplora.finetuning.planning
    >>> plan = planning.ExecutionPlan("float32", recompute=True)
    >>> print(planning.Alternative(plan, size=300_000_000, seconds=1.5))
    float32, activations recomputed: 300 MB, 1.50 s per step
    """

    plan: ExecutionPlan
    size: int
    seconds: float

    def __str__(self) -> str:
        return f"{self.plan}: {need(self.size)}, {self.seconds:.2f} s per step"


@dataclass(frozen=True)
class MemoryPlan:
    """How a step is computed, and the predicted memory and time; `print` shows them.

    Attributes:
        chosen: the execution plan.
        memory: peak memory of the process in bytes, term by term.
        seconds: the time of an average step.
        steps: the number of steps of the run.
        others: the plans that were not chosen, because they do not fit, are slower, or are less exact.
        limit: the largest number of bytes that a plan may need: the memory limit minus a reserve; infinite
            without a memory limit.
        available: bytes that the process may use on this machine and in its container; None: unknown.
        before: the seconds that DPO and KTO take before the first step to compute their reference.
        accumulate: the number of batches in a step.
        times: for each of the first steps of the run, a tuple: the predicted times of the step's batches.
        gradients: bytes of the gradients of the trained values.

    >>> plan = nplora.plan("model.gguf", "train.jsonl", batch_examples=4)
    >>> print(plan)
    float32, activations kept: ... MB at most, ... s per step, 4 steps in 0 s
    ...
    """

    chosen: ExecutionPlan
    memory: Memory
    seconds: float
    steps: int
    others: tuple[Alternative, ...] = ()
    limit: float = math.inf
    available: int | None = None
    before: float = 0.0
    accumulate: int = 1
    times: tuple[tuple[BatchTime, ...], ...] = field(default=(), repr=False)
    gradients: int = 0

    def compared(self) -> dict[ExecutionPlan, Alternative]:
        """The memory and the time of each plan that was compared. The first is the chosen plan.

        >>> plan = nplora.plan("model.gguf", "train.jsonl", batch_examples=4)
        >>> plan.compared()[plan.chosen].size == plan.memory.total
        True
        """
        own = Alternative(self.chosen, self.memory.total, self.seconds)
        return {one.plan: one for one in (own, *self.others)}

    def on_nodes(
        self,
        nodes: int,
        network: str,
        latency: str = "50us",
        communication_dtype: str = COMMUNICATION_DTYPES[0],
        local_steps: int | None = None,
    ) -> NodesPlan:
        """Predict the time of a step of several machines that train together. Each machine runs one rank.

        The time of a step includes the forward and backward passes and adding up the gradients over the
        network, but no evaluations or checkpoints. The prediction assumes that every machine is as fast as
        this one, and that the network carries the full rate in both directions.

        Args:
            nodes: the number of machines.
            network: the rate of a machine's connection, such as "1Gb", "2.5Gb" or "125MB" per second.
            latency: the time of a message from one machine to another, such as "50us" or "1ms".
            communication_dtype: precision in which gradients are sent, as in `finetune`.
            local_steps: steps of each machine between two outer steps, as in `finetune`.
        Returns:
            the predicted time and efficiency; `print` shows them.
        Raises:
            ValueError: there are more machines than batches in a step, or `network` or `latency` has a wrong
                form.

        >>> plan = nplora.plan("model.gguf", "train.jsonl", batch_examples=2, accumulate=4)
        >>> print(plan.on_nodes(4, network="1Gb"))
        4 nodes, 1 Gb/s, 50 µs: ... s per step, efficiency ... %
        ...
        """
        _check.choice("plan", "communication_dtype", communication_dtype, COMMUNICATION_DTYPES)
        if local_steps is not None:
            _check.integer("plan", "local_steps", local_steps, least=1)
        sent = self.gradients // (1 if communication_dtype == COMMUNICATION_DTYPES[0] else 2)
        parsed = Network.parse(network, latency, "plan")
        return NodesPlan.of(
            self.times, sent, nodes, parsed, accumulate=self.accumulate, local_steps=local_steps
        )

    def __str__(self) -> str:
        nearest = self._nearest()
        lines, rest = self._lines(nearest), len(self.others) - len(nearest)
        if rest:
            lines.append(f"and {counted(rest, 'other plan')}: nplora plan --verbose lists all")
        return "\n".join(lines)

    def table(self) -> str:
        """The text that `print` shows, but with a line for every alternative."""
        return "\n".join(self._lines(self.others))

    def _lines(self, others: Iterable[Alternative]) -> list[str]:
        return [
            f"{self.chosen}: {need(self.memory.total)} at most, {self.seconds:.2f} s per step, "
            f"{counted(self.steps, 'step')} in {_time(self.steps * self.seconds)}"
            + (f", after {_time(self.before)} for the reference" if self.before else ""),
            str(self.memory),
            *filter(None, [shortage(self.memory, self.available)]),
            *(f"{'too large' if other.size > self.limit else 'or'}: {other}" for other in others),
        ]

    def _nearest(self) -> list[Alternative]:
        """Up to two alternatives to the chosen plan, one of them faster and the other one smaller.

        The first needs the least memory of all plans that are faster than the chosen plan. The second is the
        fastest of the plans that need less memory than the chosen plan, but are not faster.
        """
        faster = [other for other in self.others if other.seconds < self.seconds]
        smaller = [other for other in self.others if other.size < self.memory.total and other not in faster]
        return [
            *([min(faster, key=lambda other: other.size)] if faster else []),
            *([min(smaller, key=lambda other: other.seconds)] if smaller else []),
        ]


def need(size: int) -> str:
    """Write a number of needed bytes in MB, rounded up.

    The function `room` writes limits, and rounds down. So if a need is above the limit, the printed need is
    above the printed limit.
    """
    return f"{math.ceil(size / 1e6)} MB"


def room(size: int) -> str:
    """Write a number of available bytes in MB, rounded down."""
    return f"{size // 10**6} MB"


def shortage(memory: Memory, available: int | None) -> str:
    """If a run needs more memory than is available, return a message; otherwise an empty text.

    >>> memory = nplora.plan("model.gguf", "train.jsonl").memory
    >>> nplora.finetuning.planning.shortage(memory, available=1_000_000)
    'the run needs ... MB of memory, and 1 MB are available: --memory 1M looks for a plan that fits'
    """
    if available is None or memory.total <= available:
        return ""
    return (
        f"the run needs {need(memory.total)} of memory, and {room(available)} are available: "
        f"--memory {available // 1_000_000}M looks for a plan that fits"
    )


def _time(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.1f} minutes" if seconds < 6000 else f"{seconds / 3600:.1f} hours"
