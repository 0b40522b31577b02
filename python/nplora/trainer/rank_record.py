"""RankRecord: how one rank of a distributed run has spent its time."""

from dataclasses import dataclass

from nplora.distributed.communicator import Communicator
from nplora.platform.host import host_name
from nplora.platform.memory import peak_memory
from nplora.runtime import get_num_threads


@dataclass(frozen=True)
class RankRecord:
    """How one rank of a distributed run has spent its time.

    Attributes:
        rank: the number of the rank.
        host: the name of the rank's machine.
        threads: the number of the rank's threads.
        items: the number of rows or trained tokens that the rank has processed.
        seconds: the time of the run.
        computed: the seconds that the rank spent in forward and backward passes.
        waited: the seconds that the rank waited for slower ranks.
        exchanged: the seconds in which the rank only sent and received gradients, without computing.
        peak_memory: the peak memory of the rank's process, in bytes.

    >>> import nplora
    >>> record = nplora.trainer.RankRecord(1, "node7", 8, items=300, seconds=5.0, computed=3.0, waited=1.0,
    ...                                    exchanged=0.1, peak_memory=200_000_000)
    >>> print(record)
    rank 1 on node7, 8 threads: 100 items/s, waited 20 % and exchanged 2 % of the time, 200 MB
    """

    rank: int
    host: str
    threads: int
    items: int
    seconds: float
    computed: float
    waited: float
    exchanged: float
    peak_memory: int

    def in_words(self, unit: str) -> str:
        """A line about this rank. `unit` is the name of the items."""
        threads = "1 thread" if self.threads == 1 else f"{self.threads} threads"
        waited, exchanged = (each / max(1e-9, self.seconds) for each in (self.waited, self.exchanged))
        rate = self.items / max(1e-9, self.computed)
        return (
            f"rank {self.rank} on {self.host}, {threads}: {rate:.0f} {unit}/s, "
            f"waited {waited:.0%} and exchanged {exchanged:.0%} of the time, {self.peak_memory / 1e6:.0f} MB"
        ).replace("%", " %")

    def __str__(self) -> str:
        return self.in_words("items")


@dataclass
class Stopwatch:
    """Measures the time that a rank spends in a run."""

    communicator: Communicator
    started: float
    waited: float
    exchanged: float

    @classmethod
    def start(cls, communicator: Communicator, now: float) -> "Stopwatch":
        return cls(communicator, now, communicator.waited, communicator.exchanged)

    def record(self, now: float, items: int, computed: float) -> RankRecord:
        """The record of the run so far."""
        ranks = self.communicator
        return RankRecord(
            ranks.rank, host_name(), get_num_threads(), items, now - self.started, computed,
            ranks.waited - self.waited, ranks.exchanged - self.exchanged, peak_memory(),
        )  # fmt: skip
