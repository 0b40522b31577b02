"""MPICommunicator: ranks that an MPI launcher has started. The package mpi4py is imported when it is used."""

import contextlib
import os
import sys
import time
from collections.abc import Callable, Collection, Sequence
from types import TracebackType
from typing import Any, Self, TypeVar

import numpy.typing as npt

from nplora.distributed.communicator import RankError, mark_reported
from nplora.distributed.cores import cores_of_this_process, fair_threads
from nplora.distributed.launch import launched_ranks
from nplora.runtime import set_num_threads
from nplora.runtime.stderr import stderr
from nplora.runtime.user_warning import warn_user

Array = npt.NDArray[Any]
T = TypeVar("T")

_OP = "MPICommunicator"
_TIMEOUT = "NPLORA_RANK_TIMEOUT"  # the environment variable with the seconds
_DEFAULT_TIMEOUT = 600.0
_QUIET = 5.0  # seconds for which a rank that has failed waits before it says so
_FORWARDING = 0.3  # seconds in which the launcher prints what a rank has written, before the rank ends all
_LAST_VALUES = 0.1  # seconds in which the last values of a rank that has left arrive
_SPIN, _PAUSE = 2e-4, 5e-4  # seconds of testing without a pause; the pause after that

_VALUE, _ROW, _NOTICE = 1, 2, 3  # tags of messages
_HEARD, _LEAVES = "heard", "leaves"  # kinds of notices


def _mpi() -> Any:
    """The module mpi4py.MPI, which starts MPI when it is imported.

    Raises:
        ModuleNotFoundError: mpi4py is not installed. ImportError: it finds no MPI library.
    """
    try:
        import mpi4py
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"{_OP}: MPI needs mpi4py: pip install 'nplora[mpi]', and an MPI library: pip install mpich, or "
            "the system's MPICH or Open MPI",
            name="mpi4py",
        ) from error
    try:
        from mpi4py import MPI
    except (ImportError, RuntimeError, OSError) as error:
        raise ImportError(
            f"{_OP}: mpi4py {mpi4py.__version__} cannot load an MPI library: pip install mpich, or install "
            f"the system's MPICH or Open MPI ({' '.join(str(error).split())})"
        ) from error
    return MPI


class MPICommunicator:
    """The ranks that `mpirun`, `mpiexec` or `srun` has started, in a `with` block around a `Trainer`'s run.

    If an exception leaves the block on one rank, the other ranks raise `RankError` in their next exchange, so
    that rank 0 can still save its run. They may compute a batch before, so the rank that has failed waits for
    them up to the timeout; then the whole job is aborted. A rank that does not answer within the timeout is
    named in the error of the others.

        >>> import nplora, numpy as np
        >>> x, y = np.eye(4), np.ones((4, 4))
        >>> with nplora.distributed.MPICommunicator() as ranks:  # the same program on every rank
        ...     layer = nplora.LoRALinear(np.eye(4), rank=1, rng=0)
        ...     trainer = nplora.Trainer(layer, "mse", accumulate=2, communicator=ranks)
        ...     history = trainer.fit(x, y, batch_size=2)

    Args:
        timeout: the seconds after which a rank that does not answer is given up. None: the environment
            variable NPLORA_RANK_TIMEOUT, or 600.
        share_cores: limit the threads of this process to its share of the machine's cores, unless
            OMP_NUM_THREADS is set.
    Attributes:
        rank, size, waited, exchanged: see `Communicator`.
    Raises:
        ModuleNotFoundError, ImportError: mpi4py or an MPI library is missing; the message says what to
            install.
        RuntimeError: the launcher belongs to another MPI library than the one that mpi4py uses.
        ValueError: NPLORA_RANK_TIMEOUT is not a number above 0.
    Warns:
        UserWarning: a machine has more ranks than cores, or the launcher has bound a rank to one core.
    """

    def __init__(self, timeout: float | None = None, share_cores: bool = True) -> None:
        self._mpi = _mpi()
        world = self._mpi.COMM_WORLD
        if world.size == 1 < launched_ranks():
            library = self._mpi.Get_library_version().split("\n")[0].split(",")[0]
            raise RuntimeError(
                f"{_OP}: the launcher has started {launched_ranks()} ranks, but mpi4py uses {library}, which "
                "sees only one: start the ranks with the mpirun of that library"
            )
        self._comm = world.Dup()
        self.rank, self.size = int(self._comm.rank), int(self._comm.size)
        self.waited = self.exchanged = 0.0
        self._failure: RankError | None = None
        self._heard_at = 0.0  # the time at which this rank heard of the failure
        self._noticed_at = 0.0  # the time of the last notice of another rank
        self._hung: set[int] = set()  # ranks that do not answer
        self._gone: set[int] = set()  # ranks that have left after a failure
        self._sent: list[Any] = []  # notices on their way
        self._timeout = _DEFAULT_TIMEOUT if timeout is None else timeout
        try:
            if timeout is None:
                self._timeout = _timeout()
            if share_cores and self.size > 1:
                self._share_cores()
        except BaseException as error:
            if self.size > 1:
                self._leave(error)
            raise

    def _share_cores(self) -> None:
        ranks = self.gather(cores_of_this_process())
        if "OMP_NUM_THREADS" in os.environ:
            return
        threads, crowded = fair_threads(ranks, self.rank)
        set_num_threads(threads)
        if self.rank == 0 and crowded:
            warn_user(f"{_OP}: the machine of rank 0 has more ranks than cores, so they wait for each other")
        own, all_cores = ranks[self.rank].cores, os.cpu_count() or 1
        if self.rank == 0 and "OMPI_COMM_WORLD_SIZE" in os.environ and len(own) == 1 and all_cores >= 4:
            warn_user(f"{_OP}: Open MPI has bound each rank to one core: mpirun --bind-to none lifts this")

    # ---- the methods of Communicator ----

    def gather(self, value: T) -> list[T]:
        started = time.perf_counter()
        others = self._others()
        sent = [self._comm.isend(value, dest=rank, tag=_VALUE) for rank in others]
        found: dict[int, T] = {self.rank: value}
        receives: dict[int, Any] = {}

        def is_done() -> bool:
            for rank in others:
                if rank not in found and rank not in receives:
                    message = self._comm.improbe(source=rank, tag=_VALUE)
                    if message is not None:
                        receives[rank] = message.irecv()
            for rank, request in list(receives.items()):
                ready, received = request.test()
                if ready:
                    found[rank] = received
                    del receives[rank]
            return len(found) == self.size and all(request.test()[0] for request in sent)

        self._wait(is_done, lambda: [rank for rank in others if rank not in found])
        self.waited += time.perf_counter() - started
        return [found[rank] for rank in range(self.size)]

    def broadcast(self, value: T) -> T:
        started = time.perf_counter()
        result = value
        if self.rank == 0:
            sent = [self._comm.isend(value, dest=rank, tag=_VALUE) for rank in self._others()]
            self._wait(
                lambda: all(request.test()[0] for request in sent),
                lambda: [rank for rank, one in zip(self._others(), sent, strict=True) if not one.test()[0]],
            )
        else:
            receives: list[Any] = []

            def is_done() -> bool:
                nonlocal result
                if not receives:
                    message = self._comm.improbe(source=0, tag=_VALUE)
                    if message is not None:
                        receives.append(message.irecv())
                    return False
                ready, received = receives[0].test()
                if ready:
                    result = received
                return bool(ready)

            self._wait(is_done, lambda: [0])
        self.waited += time.perf_counter() - started
        return result

    def exchange(self, parts: Array, out: Array, senders: Sequence[int]) -> None:
        sends = self.rank in senders
        if sends:
            out[self.rank] = parts[self.rank]
        self._transfer(lambda rank: parts[rank] if sends else None, out, senders)

    def join(self, part: Array, out: Array) -> None:
        out[self.rank] = part
        self._transfer(lambda rank: part, out, range(self.size))

    def abort(self) -> None:
        self._mpi.COMM_WORLD.Abort(1)

    def _transfer(self, row_for: Callable[[int], Array | None], out: Array, senders: Sequence[int]) -> None:
        """Send rows to the other ranks, and receive the rows of `out` from the senders."""
        started = time.perf_counter()
        receives = {
            rank: self._comm.Irecv(out[rank], source=rank, tag=_ROW) for rank in senders if rank != self.rank
        }
        rows = {rank: row_for(rank) for rank in self._others()}
        sent = {
            rank: self._comm.Isend(row, dest=rank, tag=_ROW) for rank, row in rows.items() if row is not None
        }

        def missing() -> list[int]:
            return [rank for each in (receives, sent) for rank, request in each.items() if not request.Test()]

        try:
            self._wait(lambda: not missing(), missing)
        except BaseException:
            for request in receives.values():
                request.Cancel()
            raise
        self.exchanged += time.perf_counter() - started

    def _others(self) -> list[int]:
        """The other ranks, each rank beginning with the next one, so that not all send to rank 0 first."""
        return [(self.rank + step) % self.size for step in range(1, self.size)]

    # ---- waiting ----

    def _wait(self, is_done: Callable[[], bool], missing: Callable[[], list[int]]) -> None:
        """Wait, but not for a rank that has failed or stopped.

        Raises:
            RankError: another rank has failed, or does not answer within the timeout.
        """
        if self._failure is not None:
            raise self._failure
        started = time.monotonic()
        while not is_done():
            self._listen()
            # A rank that has left may have sent its values before, and the cause may be known here soon.
            is_late = time.monotonic() - self._heard_at > _LAST_VALUES
            if self._failure is not None and is_late and self._gone.intersection(missing()):
                raise self._failure
            waited = time.monotonic() - started
            if waited > self._timeout:
                raise self._no_answer(missing())
            if waited > _SPIN:
                time.sleep(_PAUSE)

    def _no_answer(self, missing: list[int]) -> RankError:
        self._hung.update(missing)
        names = ", ".join(map(str, sorted(set(missing))))
        more = f" (nor do other ranks: {names})" if len(set(missing)) > 1 else ""
        return RankError(
            min(missing, default=0), f"no answer for {self._timeout:g} s{more}: it hangs or is stopped"
        )

    def _listen(self) -> None:
        """Read the notices of other ranks."""
        while (message := self._comm.improbe(tag=_NOTICE)) is not None:
            sender, kind, rank, reason = message.recv()
            self._noticed_at = time.monotonic()
            if kind == _HEARD:
                continue
            self._gone.add(sender)
            if reason and self._failure is None:
                self._failure, self._heard_at = RankError(rank, reason), time.monotonic()
                self._notify(_HEARD)

    def _notify(self, kind: str, rank: int = 0, reason: str = "") -> None:
        """Send a notice to all other ranks.

        Args:
            kind: _HEARD: this rank knows that a rank has failed, and ends its run. _LEAVES: this rank leaves.
            rank, reason: the rank that has failed, and why, if this rank was the first to know.
        """
        notice = self.rank, kind, rank, reason
        self._sent += [self._comm.isend(notice, dest=other, tag=_NOTICE) for other in self._others()]

    # ---- the with block ----

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.size == 1:
            return
        if error is not None:
            self._leave(error)
            return
        try:
            self.gather(None)  # the other ranks may still fail, for example when rank 0 saves its results
        except BaseException as late:
            self._leave(late)
            raise
        self._comm.Free()

    def _leave(self, error: BaseException) -> None:
        """Tell the other ranks about an error, and wait until they have ended their runs too."""
        if isinstance(error, RankError):
            self._notify(_LEAVES, error.rank, "" if error is self._failure else error.reason)
        else:
            self._notify(_LEAVES, self.rank, in_words(error))
        try:
            self._wait_for_the_end_of_others(error)
        except KeyboardInterrupt:
            if self.rank == 0:  # else rank 0 may still be saving the run
                self._abort_beside(error, set(self._others()) - self._gone)
            raise
        if self.rank:
            mark_reported(error)

    def _wait_for_the_end_of_others(self, error: BaseException) -> None:
        """Wait until the other ranks have left. They may first compute a batch, or save the run."""
        started = self._noticed_at = time.monotonic()
        is_told = not isinstance(error, Exception) or isinstance(error, RankError)
        while silent := set(self._others()) - self._gone:
            limit = 0.0 if silent <= self._hung else self._timeout
            now = time.monotonic()
            if now - self._noticed_at > limit:
                self._abort_beside(error, silent)
            if now - started > _QUIET and not is_told:
                is_told = True
                print(
                    f"nplora: rank {self.rank} has failed ({in_words(error)}) and waits for {_named(silent)} "
                    f"to compute a batch or to save the run, for {self._timeout:g} s at most",
                    file=stderr,
                )
            self._listen()
            for request in self._sent:
                request.test()
            time.sleep(_PAUSE)

    def _abort_beside(self, error: BaseException, silent: Collection[int]) -> None:
        """Print the error and end all ranks, because some of them do not react."""
        names = _named(silent)
        text = str(error) if isinstance(error, RankError) else f"rank {self.rank}: {in_words(error)}"
        notes = "".join(f"; {note}" for note in getattr(error, "__notes__", ()))
        print(f"nplora: error: {text}{notes}; {names} did not react, so all ranks are ended", file=stderr)
        with contextlib.suppress(OSError, ValueError, AttributeError):
            sys.stdout.flush()
            sys.stderr.flush()
        time.sleep(_FORWARDING)
        self.abort()


def _named(ranks: Collection[int]) -> str:
    return f"rank{'s' if len(ranks) > 1 else ''} {', '.join(map(str, sorted(ranks)))}"


def in_words(error: BaseException) -> str:
    """The kind of an error and its message."""
    text = str(error)
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def _timeout() -> float:
    given = os.environ.get(_TIMEOUT, "")
    if not given:
        return _DEFAULT_TIMEOUT
    try:
        seconds = float(given)
    except ValueError:
        seconds = 0.0
    if not seconds > 0:
        raise ValueError(f"{_OP}: {_TIMEOUT} is {given!r}, expected a number of seconds above 0")
    return seconds
