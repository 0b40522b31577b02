"""NodesPlan: the predicted time of a step that several machines compute together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from nplora import _check
from nplora.distributed.network import Network


class BatchTime(NamedTuple):
    """The time of a batch's forward and backward passes on one machine.

    Attributes:
        seconds: the time of both passes.
        parts: the number of the batch's micro-batches.

    >>> nplora.finetuning.planning.BatchTime(1.5, parts=2)
    BatchTime(seconds=1.5, parts=2)
    """

    seconds: float
    parts: int = 1


@dataclass(frozen=True)
class NodesPlan:
    """The predicted time of an average step on several machines (nodes), each of which runs one rank.

    Attributes:
        nodes: the number of machines.
        network: the network between the machines.
        batches: the number of batches in a step; the last step of an epoch may have fewer.
        alone: seconds of the step on one machine.
        waiting: seconds that a machine waits for the slowest machine, on average. Machines wait because
            batches differ in length, or because the last round of a step has fewer batches than machines.
        sums: seconds per step that the machines wait for their gradients to be added up. (With outer steps,
            the changes of the trained values are added up instead.) Sending gradients while the
            next batches are computed does not count.
        size: bytes of the gradients.
        local_steps: steps of each machine between two outer steps; None: there are no outer steps.
        most: the number of batches in the largest step. This is less than `batches` if an epoch has fewer
            than `batches` batches.

    >>> planning = nplora.finetuning.planning
    >>> step = [planning.BatchTime(seconds) for seconds in (10.0, 9.0, 10.0)]
    >>> network = nplora.distributed.Network.parse("1Gb", latency="50us")
    >>> print(planning.NodesPlan.of([step], 10_000_000, 2, network))
    2 nodes, 1 Gb/s, 50 µs: 20.09 s per step, efficiency 72 %
       14.50 s  forward and backward passes, which take one machine 29.00 s
        5.50 s  waiting for the slowest machine
        0.09 s  adding up 10.0 MB of gradients
    2 nodes cannot share the 3 batches of a step equally: --accumulate 4 keeps all nodes busy
    """

    nodes: int
    network: Network
    batches: int
    alone: float
    waiting: float
    sums: float
    size: int
    local_steps: int | None = None
    most: int | None = None

    @classmethod
    def of(
        cls,
        steps: Sequence[Sequence[BatchTime]],
        size: int,
        nodes: int,
        network: Network,
        op: str = "plan",
        accumulate: int | None = None,
        local_steps: int | None = None,
    ) -> NodesPlan:
        """Predict the average time of the steps in `steps`. Each step is a list of batches.

        The batches of a step are computed in rounds, one batch on each node. A round takes as long as its
        slowest batch.

        Args:
            size: bytes of the gradients of the trained values.
            op: name of the public function that the user called. Error messages begin with this name.
            accumulate: the number of batches in a step; the last step of an epoch may have fewer. None: the
                number of batches in the largest step.
            local_steps: steps of each machine between two outer steps, as in `finetune`.
        Raises:
            ValueError: there are more nodes than batches in a step.
        """
        nodes = _check.integer(op, "nodes", nodes, least=1)
        most = max(len(step) for step in steps)
        batches = accumulate or most
        if nodes > batches:
            raise ValueError(
                f"{op}: nodes is {nodes}, expected at most {batches}, the number of batches in a step: "
                f"accumulate={nodes} makes larger steps"
            )
        alone = slowest = sums = 0.0
        for step in steps:
            rounds = [step[first : first + nodes] for first in range(0, len(step), nodes)]
            alone += sum(batch.seconds for batch in step)
            seconds = [max(batch.seconds for batch in one) for one in rounds]
            slowest += sum(seconds)
            if local_steps is None:
                terms = [max(batch.parts for batch in one) for one in rounds]
                sums += network.sums(size, nodes, list(zip(terms, seconds, strict=True)))
            else:
                sums += network.local_sums(size, nodes, local_steps, len(rounds))
        alone, slowest, sums = (each / len(steps) for each in (alone, slowest, sums))
        return cls(nodes, network, batches, alone, slowest - alone / nodes, sums, size, local_steps, most)

    @property
    def seconds(self) -> float:
        """The time of an average step."""
        return self.alone / self.nodes + self.waiting + self.sums

    @property
    def efficiency(self) -> float:
        """The speed-up of a step by several machines, divided by the number of machines."""
        return self.alone / (self.nodes * self.seconds)

    def _summed(self) -> str:
        size = f"{self.size / 1e6:.1f} MB"
        if self.local_steps is None:
            return f"adding up {size} of gradients"
        return f"1/{self.local_steps} of an outer step, which adds up three arrays of {size}"

    def __str__(self) -> str:
        nodes = "1 node" if self.nodes == 1 else f"{self.nodes:,} nodes"
        share, efficiency = self.alone / self.nodes, 100 * self.efficiency
        lines = [
            f"{nodes}, {self.network}: {self.seconds:.2f} s per step, efficiency {efficiency:.0f} %",
            f"  {share:6.2f} s  forward and backward passes, which take one machine {self.alone:.2f} s",
            f"  {self.waiting:6.2f} s  waiting for the slowest machine",
            f"  {self.sums:6.2f} s  {self._summed()}",
        ]
        if self.most is not None and self.most < self.nodes:
            lines.append(
                f"a step has {self.batches} batches, but an epoch has only {self.most}, so some nodes have "
                "nothing to do: use smaller batches (--batch-examples, --batch-tokens) or fewer nodes"
            )
        elif idle := -self.batches % self.nodes:
            lines.append(
                f"{nodes} cannot share the {self.batches} batches of a step equally: "
                f"--accumulate {self.batches + idle} keeps all nodes busy"
            )
        return "\n".join(lines)
