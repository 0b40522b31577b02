"""Network: predicts how long ranks take to exchange values over a network."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

# An Ethernet packet of 1538 bytes, with its headers and the gap after it, carries 1448 bytes of a message.
_PAYLOAD = 1448 / 1538
# Seconds of CPU time to send one message and to receive one. MPICH over TCP took 6 to 40 µs.
_MESSAGE = 20e-6

_RATE = re.compile(r"(\d+(?:\.\d*)?)\s*([KMGT])(b|bit|B)(?:/s|ps)?")
_TIME = re.compile(r"(\d+(?:\.\d*)?)\s*(us|µs|μs|ms|s)")  # the micro sign, and the Greek letter
_PREFIXES = {"K": 1e3, "M": 1e6, "G": 1e9, "T": 1e12}
_UNITS = {"us": 1e-6, "µs": 1e-6, "μs": 1e-6, "ms": 1e-3, "s": 1.0}


@dataclass(frozen=True)
class Network:
    """The network between the ranks of a run, with one rank on each node.

    The predictions assume that all nodes can send and receive at the full rate at the same time.

    Attributes:
        rate: the bits per second of a node's connection.
        latency: the seconds that a message takes from one node to another.

    >>> import nplora
    >>> network = nplora.distributed.Network.parse("1Gb", latency="50us")
    >>> print(network)
    1 Gb/s, 50 µs
    >>> round(network.exchange(10_000_000, nodes=2), 3)
    0.043
    """

    rate: float
    latency: float

    @classmethod
    def parse(cls, rate: str, latency: str = "50us", op: str = "Network.parse") -> Network:
        """Read a rate such as 1Gb, 2.5Gb (bits) or 100MB (bytes), and a latency such as 50us or 1ms.

        Args:
            op: name of the public function. Error messages begin with this name.
        Raises:
            ValueError: `rate` or `latency` does not have this form, or the rate is 0.

        >>> import nplora
        >>> nplora.distributed.Network.parse("125MB").rate
        1000000000.0
        """
        bits = _RATE.fullmatch(str(rate).strip())
        if bits is None or float(bits[1]) <= 0:
            raise ValueError(
                f"{op}: network is {rate!r}, expected bits per second like 1Gb or 2.5Gb, or bytes per second "
                "like 125MB"
            )
        seconds = _TIME.fullmatch(str(latency).strip())
        if seconds is None:
            raise ValueError(f"{op}: latency is {latency!r}, expected a time like 50us or 1ms")
        of_unit = _PREFIXES[bits[2]] * (8 if bits[3] == "B" else 1)
        return cls(float(bits[1]) * of_unit, float(seconds[1]) * _UNITS[seconds[2]])

    def exchange(self, size: int, nodes: int) -> float:
        """The seconds until each node has sent one slice of its array to every other node.

        Args:
            size: the bytes of the array. The array is cut into one slice for each node.
        """
        if nodes == 1:
            return 0.0
        sent = size / nodes * (nodes - 1)
        return self.latency + _MESSAGE * (nodes - 1) + 8 * sent / (self.rate * _PAYLOAD)

    def gather(self, nodes: int) -> float:
        """The seconds that all nodes take to send each other a small value."""
        return self.exchange(0, nodes)

    def sums(self, size: int, nodes: int, rounds: Sequence[tuple[int, float]]) -> float:
        """The seconds per step for which the ranks wait for the network when they add up their gradients.

        In each round, every rank computes the gradients of one batch, and the ranks exchange small values.
        Every rank adds up its own slice of all gradients. While a rank processes the batch of the next round,
        it receives its slice of the gradients from all other ranks. At the end of the step, every rank sends
        its slice of the sums to all other ranks, and the ranks agree on whether the run is over.

        Args:
            size: the bytes of the gradients.
            rounds: for each round of the step, a pair: the largest number of micro-batches that a rank has,
                and the seconds for which the slowest rank computes. A rank sends gradients of `size` bytes
                for each micro-batch.
        """
        one, waited = self.exchange(size, nodes), 0.0
        for number, (terms, _) in enumerate(rounds, start=1):
            hidden = rounds[number][1] if number < len(rounds) else 0.0
            waited += max(0.0, terms * one - hidden)
        return waited + one + (len(rounds) + 1) * self.gather(nodes)

    def local_sums(self, size: int, nodes: int, local_steps: int, rounds: int) -> float:
        """The mean seconds per step that exchanges take if each rank trains its own copy of the values.

        The ranks exchange small values in every step. After every `local_steps` steps, the ranks add up three
        arrays: the changes of the trained values, AdamW's first moments and AdamW's second moments. Each of
        these sums takes two exchanges of `size` bytes: one for the terms, and one for the sums.

        Args:
            size: the bytes of the trained values.
            local_steps: the number of steps between two outer steps.
            rounds: the number of rounds in a step.
        """
        outer = 3 * 2 * self.exchange(size, nodes) + self.gather(nodes)
        return outer / local_steps + (rounds + 2) * self.gather(nodes)

    def __str__(self) -> str:
        power = min(12, max(3, 3 * math.floor(math.log10(self.rate) / 3)))
        prefix = {3: "K", 6: "M", 9: "G", 12: "T"}[power]
        millis = self.latency >= 1e-3
        latency = f"{self.latency * 1e3:g} ms" if millis else f"{self.latency * 1e6:g} µs"
        return f"{self.rate / 10**power:g} {prefix}b/s, {latency}"
