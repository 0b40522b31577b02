"""Opens the communicator that an option names."""

import contextlib
import sys
import warnings
from collections.abc import Iterator

from nplora.distributed.communicator import Alone, Communicator, require_communicator
from nplora.distributed.launch import launched_ranks, require_one_process
from nplora.distributed.mpi import MPICommunicator

DISTRIBUTED = ("mpi", "off")


@contextlib.contextmanager
def opened_communicator(
    op: str, distributed: str | None, given: Communicator | None = None
) -> Iterator[Communicator]:
    """The communicator of a run. Only rank 0 shows warnings.

    Args:
        op: name of the calling function in messages.
        distributed: "mpi", "off" or None; the caller has checked the value. "mpi": the ranks of an MPI
            launcher. "off": this process alone. None: this process alone; it is an error if a launcher has
            started several ranks.
        given: a communicator that the caller has opened. If it is given, `distributed` must be None.
    Raises:
        ValueError: `distributed` is None, and a launcher has started several ranks; or `distributed` and
            `given` are both given.
        TypeError: `given` is not a `Communicator`.
        ModuleNotFoundError, ImportError, ValueError: see `MPICommunicator`.
    """
    if given is not None:
        if distributed is not None:
            raise ValueError(f"{op}: communicator and distributed are both given, expected only one of them")
        require_communicator(op, given)
        yield given
        return
    if distributed != "mpi":
        if distributed is None:
            require_one_process(op, can_train_together=True)
        yield Alone()
        return
    with MPICommunicator() as ranks, warnings.catch_warnings():
        if ranks.rank:
            warnings.simplefilter("ignore")
        yield ranks


def or_none_if_alone(ranks: Communicator) -> Communicator | None:
    """The communicator for a `Trainer`: None for a process that trains alone.

    With a communicator, the trainer stores the gradients of all batches of a step, and then adds them in a
    fixed order. A single process can add each batch's gradients at once.

    >>> from nplora.distributed import Alone
    >>> from nplora.distributed.opening import or_none_if_alone
    >>> or_none_if_alone(Alone()) is None
    True
    """
    return None if type(ranks) is Alone else ranks  # a subclass of Alone may do more, so it is returned


def say_if_alone(ranks: Communicator, distributed: str | None, progress: bool | None) -> None:
    """Print a notice on stderr if `distributed` is "mpi" but this process is not a rank of a launcher.

    If the launcher and mpi4py belong to different MPI libraries, each process may train alone, without an
    error. So with `progress=None`, the notice appears even if stderr is a file, where progress is not shown.
    Only `progress=False` turns the notice off.

    >>> from nplora.distributed import Alone
    >>> from nplora.distributed.opening import say_if_alone
    >>> say_if_alone(Alone(), None, progress=None)
    """
    if distributed == "mpi" and ranks.size == 1 and launched_ranks() != 1 and progress is not False:
        how = "start it with `mpiexec -n N` to use N processes"
        print(f"--distributed mpi: this process trains alone; {how}", file=sys.stderr, flush=True)


def require_choice(op: str, distributed: str | None) -> None:
    """Raise an error if a launcher has started several ranks, and `distributed` is not given on this rank.

    The option may be given on other ranks, which would then wait for this rank. So the error is reported to
    all ranks.

    Raises:
        ValueError: `distributed` is None, and a launcher has started several ranks.

    >>> from nplora.distributed.opening import require_choice
    >>> require_choice("finetune", None)  # without a launcher
    """
    if distributed is None:
        with heard_by_all_ranks("mpi"):
            require_one_process(op, can_train_together=True)


@contextlib.contextmanager
def heard_by_all_ranks(distributed: str | None) -> Iterator[None]:
    """If the `with` body raises an error, report this error to the other ranks.

    Use this function for code that runs before `opened_communicator`.

    Other ranks that have reached `opened_communicator` wait, without a timeout, until this rank opens a
    communicator too. So after an error, this rank opens a communicator, and reports the error through it.

    Args:
        distributed: as in `opened_communicator`.

    >>> from nplora.distributed.opening import heard_by_all_ranks
    >>> with heard_by_all_ranks("mpi"):  # without a launcher, nobody waits
    ...     raise ValueError("wrong")
    Traceback (most recent call last):
    ValueError: wrong
    """
    try:
        yield
    except BaseException:
        if distributed == "mpi" and launched_ranks() > 1:
            with contextlib.suppress(ImportError, ValueError), MPICommunicator(share_cores=False):
                raise
        raise
