"""MPICommunicator: connects, with the package mpi4py, the ranks that an MPI launcher has started."""

import contextlib
import os
import time
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any, Self, TypeVar

import numpy.typing as npt

from nplora import _check
from nplora.distributed.communicator import RankError
from nplora.distributed.cores import cores_of_this_process, crowded_machines, fair_threads, is_bound
from nplora.distributed.farewell import PAUSE, Farewell
from nplora.distributed.launch import launched_ranks
from nplora.distributed.messages import Messages, Progress
from nplora.platform import host
from nplora.runtime import get_num_threads, set_num_threads
from nplora.runtime.user_warning import warn_user

Array = npt.NDArray[Any]
T = TypeVar("T")

_OP = "MPICommunicator"
_TIMEOUT = "NPLORA_RANK_TIMEOUT"  # the environment variable with the timeout in seconds
_DEFAULT_TIMEOUT = 600.0
_SPIN = 2e-4  # for this many seconds at the start of a wait, a rank checks for messages without a pause

_VALUE, _ROW = 1, 2  # tags of messages


def _mpi() -> Any:
    """The module mpi4py.MPI, which starts MPI when it is imported.

    Raises:
        ModuleNotFoundError: mpi4py is not installed. ImportError: mpi4py finds no MPI library.
        ValueError: MPI has not been started, or has ended, or allows no calls from this thread.
    """
    try:
        import mpi4py
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"{_OP}: MPI needs mpi4py (pip install 'nplora[mpi]') and an MPI library (pip install mpich, or "
            "install the system's MPICH or Open MPI)",
            name="mpi4py",
        ) from error
    try:
        from mpi4py import MPI
    except (ImportError, RuntimeError, OSError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ImportError(
            f"{_OP}: mpi4py {mpi4py.__version__} cannot load an MPI library: pip install mpich, or install "
            f"the system's MPICH or Open MPI ({reason})"
        ) from error
    if not MPI.Is_initialized() or MPI.Is_finalized():
        raise ValueError(
            f"{_OP}: MPI is not running: do not set mpi4py.rc.initialize to False, and do not finalize MPI "
            "before the run"
        )
    if MPI.Query_thread() < MPI.THREAD_SERIALIZED and not MPI.Is_thread_main():
        raise ValueError(f"{_OP}: this MPI allows calls from the main thread only")
    return MPI


class MPICommunicator:
    """Connects the ranks that `mpirun`, `mpiexec` or `srun` has started, in a `with` block around a run.

    If an exception leaves the block on one rank, the other ranks raise `RankError` in their next exchange, so
    that rank 0 can still save its run. The other ranks may first finish a batch, so the failed rank waits for
    them. If the other ranks do not react within the timeout, the failed rank ends all ranks. If a rank does
    not respond in an exchange within the timeout, the errors of the other ranks name that rank. After an
    error, open no other communicator.

    Only one thread, and so only one run, may use a communicator at a time.

        >>> import nplora, numpy as np
        >>> x, y = np.eye(4), np.ones((4, 4))
        >>> with nplora.distributed.MPICommunicator() as ranks:  # the same program on every rank
        ...     layer = nplora.LoRALinear(np.eye(4), rank=1, rng=0)
        ...     trainer = nplora.Trainer(layer, "mse", accumulate=2, communicator=ranks)
        ...     history = trainer.fit(x, y, batch_size=2)

    Args:
        timeout: the seconds after which a rank that does not respond counts as failed. None: the environment
            variable NPLORA_RANK_TIMEOUT, or 600.
        share_cores: limit the threads of this process to its share of the machine's cores, unless
            OMP_NUM_THREADS is set.
    Attributes:
        rank, size, waited, exchanged: see `Communicator`.
    Raises:
        ModuleNotFoundError, ImportError: mpi4py or an MPI library is missing; the message says what to
            install.
        ValueError: the launcher and mpi4py use different MPI libraries; MPI is not running; or the timeout is
            not a number above 0.
    Warns:
        UserWarning: the ranks of a machine run more threads than the machine has cores, or the launcher has
            bound a rank to one core.
    """

    def __init__(self, timeout: float | None = None, share_cores: bool = True) -> None:
        self._mpi = _mpi()
        world = self._mpi.COMM_WORLD
        if world.size == 1 < launched_ranks():
            library = self._mpi.Get_library_version().split("\n")[0].split(",")[0]
            raise ValueError(
                f"{_OP}: the launcher has started {launched_ranks()} ranks, but mpi4py uses {library}, which "
                "sees only one: start the ranks with the mpirun of that library"
            )
        self._comm = world.Dup()
        self.rank, self.size = int(self._comm.rank), int(self._comm.size)
        self.waited = self.exchanged = 0.0
        self._threads: int | None = None  # the number of threads before `_share_cores` limited it
        self._exchanges = Messages()  # the messages of the exchanges that were started
        # Progress calls MPI in its own thread, and the program may call MPI for other purposes meanwhile.
        self._progress = Progress(
            self._exchanges, is_allowed=self._mpi.Query_thread() >= self._mpi.THREAD_MULTIPLE
        )
        self._farewell = Farewell(self._mpi, self._comm, _DEFAULT_TIMEOUT)
        try:
            self._farewell.timeout = _checked_timeout(timeout)
            if share_cores and self.size > 1:
                self._share_cores()
        except BaseException as error:
            if self._threads is not None:
                set_num_threads(self._threads)
            if self.size > 1:
                self._farewell.leave(error)
            raise

    def _share_cores(self) -> None:
        own, is_fixed = cores_of_this_process(), "OMP_NUM_THREADS" in os.environ
        ranks = self.gather(own, "the start of the ranks")
        if not is_fixed:
            self._threads = get_num_threads()
            set_num_threads(fair_threads(ranks, self.rank))
        used = self.gather((host.host_name(), get_num_threads()), "the threads of the ranks")
        if self.rank == 0:
            for machine, (running, cores) in crowded_machines(ranks, used).items():
                advice = "fewer ranks, or a smaller OMP_NUM_THREADS" if is_fixed else "fewer ranks"
                warn_user(
                    f"{_OP}: the ranks on {machine} run {running} threads on {cores} cores, so they wait for "
                    f"each other: use {advice}"
                )
        if self.rank == 0 and not is_fixed and is_bound(own, os.environ):
            warn_user(
                f"{_OP}: Open MPI has bound each rank to one core: start the ranks with mpirun --bind-to none"
            )

    # ---- the methods of Communicator ----

    def gather(self, value: T, place: str = "") -> list[T]:
        if self.size == 1:
            return [value]
        found = self._values(value, place, self._others(), self._others())
        # Every rank compares all places with that of rank 0, so that all ranks raise the same error.
        at = [place if rank == self.rank else found[rank][0] for rank in range(self.size)]
        for rank, other in enumerate(at):
            if other != at[0]:
                raise _elsewhere(rank, other, at[0])
        return [value if rank == self.rank else found[rank][1] for rank in range(self.size)]

    def broadcast(self, value: T, place: str = "") -> T:
        if self.rank == 0:
            if self.size > 1:
                self._values(value, place, self._others(), ())
            return value
        other, result = self._values(None, place, (), (0,))[0]
        if other != place:
            raise _elsewhere(self.rank, place, other)
        received: T = result
        return received

    def start_exchange(self, parts: Array, out: Array, senders: Sequence[int]) -> None:
        started = time.perf_counter()
        self._progress.stop()
        sends = self.rank in senders
        if sends:
            out[self.rank] = parts[self.rank]
        self._start(list(parts) if sends else [], out, senders)
        self._progress.start()
        self.exchanged += time.perf_counter() - started

    def wait_for_exchanges(self) -> None:
        started = time.perf_counter()
        self._progress.stop()
        self._wait(self._exchanges.unfinished, self._exchanges)
        self.exchanged += time.perf_counter() - started

    def join(self, part: Array, out: Array) -> None:
        self.wait_for_exchanges()
        out[self.rank] = part
        self._start([part] * self.size, out, range(self.size))
        self.wait_for_exchanges()

    def _values(
        self, value: Any, place: str, receivers: Sequence[int], senders: Sequence[int]
    ) -> dict[int, tuple[str, Any]]:
        """Send the pair (place, value) to each receiver. Return the pairs of the senders, by rank."""
        started, byte, status = time.perf_counter(), self._mpi.BYTE, self._mpi.Status()
        self._progress.stop()
        content = self._mpi.pickle.dumps((place, value)) if receivers else b""
        messages, contents = Messages(), dict[int, bytearray]()
        for rank in receivers:
            messages.sends.append((rank, self._comm.Isend([content, byte], dest=rank, tag=_VALUE)))

        def missing() -> list[int]:
            for rank in senders:
                if rank not in contents:
                    message = self._comm.Improbe(rank, _VALUE, status)
                    if message is not None:
                        contents[rank] = bytearray(status.Get_count(byte))
                        messages.receives.append((rank, message.Irecv([contents[rank], byte])))
            return [rank for rank in senders if rank not in contents] + messages.unfinished()

        self._wait(missing, messages)
        self.waited += time.perf_counter() - started
        return {rank: self._mpi.pickle.loads(content) for rank, content in contents.items()}

    def _start(self, rows: Sequence[Array], out: Array, senders: Sequence[int]) -> None:
        """Start to send `rows` to the other ranks, and to receive row s of `out` from each sender s.

        Args:
            rows: row r goes to rank r; empty if this rank sends nothing.
        """
        for rank in senders:
            if rank != self.rank:
                request = self._comm.Irecv(out[rank], source=rank, tag=_ROW)
                self._exchanges.receives.append((rank, request))
        for rank in self._others() if rows else ():
            request = self._comm.Isend(rows[rank], dest=rank, tag=_ROW)
            self._exchanges.sends.append((rank, request))

    def _others(self) -> list[int]:
        """The ranks after this rank, then those before it. In this order, the first messages of the ranks go
        to different ranks."""
        return [(self.rank + step) % self.size for step in range(1, self.size)]

    def _wait(self, missing: Callable[[], list[int]], messages: Messages) -> None:
        """Wait until all `messages` are complete, and remove them from `messages`.

        Args:
            missing: a function that returns the ranks of incomplete messages.
        Raises:
            RankError: another rank has failed, or does not respond within the timeout.
        """
        farewell, started = self._farewell, time.monotonic()
        try:
            farewell.raise_failure()
            while absent := missing():
                farewell.listen()
                farewell.raise_failure(absent)
                waited = time.monotonic() - started
                if waited > farewell.timeout:
                    raise farewell.no_answer(absent)
                if waited > _SPIN:
                    time.sleep(PAUSE)
        except BaseException:
            messages.abandon(farewell.pending)
            raise
        messages.clear()

    # ---- the with block ----

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if self.size > 1:
                self._end(error)
            if error is None or self.size == 1:  # MPI requires that all ranks free a communicator together
                self._comm.Free()
        finally:
            if self._threads is not None:
                set_num_threads(self._threads)

    def _end(self, error: BaseException | None) -> None:
        """End the communication with the other ranks, after an error or at the regular end of the block."""
        if error is not None:
            try:
                with contextlib.suppress(Exception):  # an MPI error must not replace `error`
                    self._progress.stop()
                self._exchanges.abandon(self._farewell.pending)
            finally:
                self._farewell.leave(error)
            return
        try:  # the other ranks may still fail, for example when rank 0 saves its results
            self.wait_for_exchanges()  # a signal may have ended a step before its exchanges were complete
            self.gather(None, "the end of the communicator's with block")
        except BaseException as late:
            self._farewell.leave(late)
            raise


def _elsewhere(rank: int, place: str, first: str) -> RankError:
    return RankError(
        rank,
        f"this rank has reached {place or 'an exchange'}, but rank 0 has reached {first or 'an exchange'}",
    )


def _checked_timeout(seconds: float | None) -> float:
    """Check and return the timeout. If the caller gives no timeout, the environment sets it."""
    if seconds is not None:
        if not _check.number(_OP, "timeout", seconds) > 0:
            raise ValueError(f"{_OP}: timeout is {seconds}, expected a number of seconds above 0")
        return float(seconds)
    given = os.environ.get(_TIMEOUT, "")
    if not given:
        return _DEFAULT_TIMEOUT
    try:
        found = float(given)
    except ValueError:
        found = 0.0
    if not found > 0:
        raise ValueError(f"{_OP}: {_TIMEOUT} is {given!r}, expected a number of seconds above 0")
    return found
