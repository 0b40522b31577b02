"""How the ranks of one machine share its cores."""

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from nplora.platform import host
from nplora.runtime import get_num_threads


@dataclass(frozen=True)
class Cores:
    """The cores that a rank may use.

    Attributes:
        machine: a text that is different on every machine.
        cores: the numbers of the cores.
        threads: the number of threads that the rank would use if it were the only rank on its machine.
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


def fair_threads(ranks: Sequence[Cores], rank: int) -> int:
    """The number of threads of a rank that shares cores with other ranks of its machine.

    >>> from nplora.distributed.cores import Cores, fair_threads
    >>> fair_threads([Cores("a", frozenset(range(8)), 8)] * 2, rank=0)
    4
    """
    own = ranks[rank]
    neighbours = [other for other in ranks if other.machine == own.machine]
    share = sum(1 / sum(core in other.cores for other in neighbours) for core in own.cores)
    return max(1, min(own.threads, math.floor(share + 1e-9)))


def crowded_machines(ranks: Sequence[Cores], used: Sequence[tuple[str, int]]) -> dict[str, tuple[int, int]]:
    """Find the machines whose ranks together have more threads than cores.

    Args:
        used: for each rank, the name of its machine and its number of threads.
    Returns:
        a dict from the name of each such machine to a pair (threads, cores).

    >>> from nplora.distributed.cores import Cores, crowded_machines
    >>> crowded_machines([Cores("a", frozenset(range(2)), 2)] * 4, [("node1", 1)] * 4)
    {'node1': (4, 2)}
    """
    found = {}
    for machine in dict.fromkeys(rank.machine for rank in ranks):
        here = [number for number, rank in enumerate(ranks) if rank.machine == machine]
        threads = sum(used[number][1] for number in here)
        cores = len(frozenset().union(*(ranks[number].cores for number in here)))
        if threads > cores:
            found[used[here[0]][0]] = threads, cores
    return found


def is_bound(own: Cores, environment: Mapping[str, str], all_cores: int | None = os.cpu_count()) -> bool:
    """Whether Open MPI has bound this rank to a single core, although the machine has more.

    This is the default of Open MPI.

    >>> from nplora.distributed.cores import Cores, is_bound
    >>> is_bound(Cores("a", frozenset({3}), 1), {"OMPI_COMM_WORLD_SIZE": "2"}, all_cores=8)
    True
    """
    return "OMPI_COMM_WORLD_SIZE" in environment and len(own.cores) == 1 and (all_cores or 1) >= 4
