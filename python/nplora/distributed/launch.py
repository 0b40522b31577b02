"""The number of ranks that a launcher such as mpirun has started."""

import os
from collections.abc import Mapping

# The environment variables with the number of ranks that Open MPI, MPICH and Intel MPI, MVAPICH and srun set.
# An MPI launcher may run inside a Slurm step, so the first of these variables that is set counts.
_SIZES = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE", "SLURM_STEP_NUM_TASKS")


def launched_ranks(environment: Mapping[str, str] = os.environ) -> int:
    """The number of ranks that the launcher has started; 0 without a launcher.

    >>> from nplora.distributed.launch import launched_ranks
    >>> launched_ranks({"PMI_SIZE": "4"}), launched_ranks({})
    (4, 0)
    """
    sizes = [environment.get(name, "") for name in _SIZES]
    return next((max(1, int(size)) for size in sizes if size.isdigit()), 0)


def require_one_process(op: str, can_train_together: bool = False) -> None:
    """Raise an error if a launcher has started several ranks, because every rank would do all of the work.

    Args:
        op: the name of the calling function or command in messages.
        can_train_together: whether this function or command has the option `distributed`.
    Raises:
        ValueError: a launcher started several ranks.

    >>> from nplora.distributed.launch import require_one_process
    >>> require_one_process("tune")
    """
    ranks = launched_ranks()
    if ranks <= 1:
        return
    started = f"{op}: mpirun started {ranks} ranks, and each of them would"
    if can_train_together:
        raise ValueError(
            f"{started} train alone: distributed='mpi' makes them train together; "
            "distributed='off' makes separate runs"
        )
    names = " ".join(f"-u {name}" for name in _SIZES if name in os.environ)
    raise ValueError(
        f"{started} do the same work and write the same output: start it without mpirun; for separate runs, "
        f"let mpirun start `env {names} nplora {op}`, each rank with its own output"
    )
