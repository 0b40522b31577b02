"""How the ranks of one machine share its cores."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from nplora.platform import host
from nplora.runtime import get_num_threads


@dataclass(frozen=True)
class Cores:
    """The cores that a rank may use.

    Attributes:
        machine: a text that is different on every machine.
        cores: the numbers of the cores.
        threads: the number of threads that the rank would use if it were alone.
    """

    machine: str
    cores: frozenset[int]
    threads: int


def cores_of_this_process() -> Cores:
    """The cores that this process may use.

    >>> from nplora.distributed.cores import cores_of_this_process
    >>> len(cores_of_this_process().cores) >= 1
    True
    """
    return Cores(host.machine_id(), host.usable_cores(), get_num_threads())


def fair_threads(ranks: Sequence[Cores], rank: int) -> tuple[int, bool]:
    """The number of threads of a rank that shares cores with other ranks of its machine.

    >>> from nplora.distributed.cores import Cores, fair_threads
    >>> fair_threads([Cores("a", frozenset(range(8)), 8)] * 2, rank=0)
    (4, False)

    Returns:
        the number of threads; and whether the machine has more ranks than cores.
    """
    own = ranks[rank]
    neighbours = [other for other in ranks if other.machine == own.machine]
    share = sum(1 / sum(core in other.cores for other in neighbours) for core in own.cores)
    return max(1, min(own.threads, math.floor(share + 1e-9))), share < 1 - 1e-9
