"""What the program that started this process, such as mpirun, says about its ranks."""

import os
from collections.abc import Mapping

# The variables in which launchers give the number of ranks: Open MPI, MPICH and Intel MPI, MVAPICH, srun.
# A launcher of MPI may run inside a step of Slurm, so the first variable that is set counts.
_SIZES = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE", "SLURM_STEP_NUM_TASKS")


def launched_ranks(environment: Mapping[str, str] = os.environ) -> int:
    """The number of ranks that the launcher has started; 1 without a launcher.

    >>> from nplora.distributed.launch import launched_ranks
    >>> launched_ranks({"PMI_SIZE": "4"})
    4
    """
    sizes = [environment.get(name, "") for name in _SIZES]
    return max(1, next((int(size) for size in sizes if size.isdigit()), 1))


def require_one_process(op: str) -> None:
    """Refuse a run of this process alone if a launcher has started several.

    Raises:
        ValueError: a launcher started several ranks.
    """
    ranks = launched_ranks()
    if ranks > 1:
        raise ValueError(
            f"{op}: mpirun started {ranks} ranks, and each of them would make the whole run: "
            "distributed='mpi' (--distributed mpi) makes them train together; 'off' makes separate runs"
        )
