"""Farewell: how the ranks of MPI learn that a rank has failed, and end together."""

import contextlib
import os
import sys
import time
from collections.abc import Collection
from typing import Any

from nplora.distributed.communicator import RankError, mark_reported
from nplora.runtime.error_text import message_of
from nplora.runtime.stderr import stderr

_QUIET = 5.0  # a failed rank waits this many seconds before it prints that it waits
_FORWARDING = 0.3  # seconds that the launcher gets to print a rank's message before the rank ends all ranks
_LAST_VALUES = 0.1  # for this many seconds after a failure, values that the failed rank has sent may arrive
PAUSE = 5e-4  # seconds between two checks for messages

_NOTICE = 3  # the tag of notices; other tags are those of `MPICommunicator`
_ENDS, _LEAVES = "ends", "leaves"  # kinds of notices


class Farewell:
    """Tells the other ranks about a failure, and waits until all ranks have left.

    - "ends": a rank sends this notice when it learns of a failure, or when another rank does not respond. The
      rank may then save the run. The other ranks raise the same failure in their next exchange.
    - "leaves": a rank sends this notice when an exception leaves the `with` block of its communicator. The
      other ranks also raise the failure, and no longer wait for this rank.

    A rank reads notices only while it waits in an exchange, so it may first finish its current batch. For
    this reason, a leaving rank waits until all other ranks have left. If the leaving rank receives no notice
    for `timeout` seconds, it ends all ranks by force. If every remaining rank has already exceeded the
    timeout in an exchange, the leaving rank ends all ranks without waiting.

    Attributes:
        timeout: the seconds after which a rank that does not respond counts as failed.
        pending: requests of MPI that may be incomplete. They belong to notices, or to an exchange that an
            exception has interrupted. The list keeps the requests and their buffers alive, because MPI may
            still use them.
    """

    def __init__(self, mpi: Any, comm: Any, timeout: float) -> None:
        self._mpi, self._comm = mpi, comm
        self.timeout = timeout
        self.rank, self.size = int(comm.rank), int(comm.size)
        self.pending: list[Any] = []
        self._failure: RankError | None = None
        self._failed_at = 0.0  # the time at which this rank learned of the failure
        self._noticed_at = 0.0  # the time of the last notice of another rank
        self._hung: set[int] = set()  # ranks that did not respond within the timeout
        self._ended: set[int] = set()  # ranks that send no more values
        self._gone: set[int] = set()  # ranks that have left
        self._reported: tuple[int, str] | None = None  # the failed rank and the reason that rank 0 has sent

    # ---- in an exchange ----

    def raise_failure(self, missing: Collection[int] | None = None) -> None:
        """If another rank has failed, raise the error that reports this failure.

        Args:
            missing: the ranks whose values have not arrived. The error is raised only if one of these ranks
                has sent a notice, and values that it sent earlier have had time to arrive. None: the error is
                always raised.
        """
        if self._failure is None:
            return
        # Values that a rank sent before its failure may still arrive.
        is_late = time.monotonic() - self._failed_at > _LAST_VALUES
        if missing is None or (is_late and self._ended.intersection(missing)):
            raise self._failure

    def no_answer(self, missing: Collection[int]) -> RankError:
        """Make the error for ranks that did not respond within the timeout, and report it to other ranks."""
        self._hung.update(missing)
        words = f"no answer for {self.timeout:g} s: the rank hangs, is stopped, or needs more time"
        if len(set(missing)) > 1:
            names = ", ".join(map(str, sorted(set(missing))))
            words = (
                f"no answer for {self.timeout:g} s from the ranks {names}: these ranks hang, are stopped, or "
                "need more time"
            )
        error = RankError(min(missing, default=0), words)
        self._fail(error)
        return error

    def listen(self) -> None:
        """Read the notices of other ranks."""
        while (message := self._comm.improbe(tag=_NOTICE)) is not None:
            sender, kind, rank, reason = message.recv()
            self._noticed_at = time.monotonic()
            self._hung.discard(sender)
            self._ended.add(sender)
            if kind == _LEAVES:
                self._gone.add(sender)
                if sender == 0:
                    self._reported = rank, reason
            if self._failure is None:
                self._fail(RankError(rank, reason))

    def _fail(self, failure: RankError) -> None:
        self._failure, self._failed_at = failure, time.monotonic()
        self._notify(_ENDS, failure.rank, failure.reason)

    def _notify(self, kind: str, rank: int, reason: str) -> None:
        """Send all other ranks a notice that names the failed rank and the reason."""
        notice = self.rank, kind, rank, reason
        self.pending += [self._comm.isend(notice, dest=other, tag=_NOTICE) for other in self._others()]

    def _others(self) -> list[int]:
        return [rank for rank in range(self.size) if rank != self.rank]

    # ---- after an exception ----

    def leave(self, error: BaseException) -> None:
        """Report an error to the other ranks, and wait until these ranks have ended their runs too."""
        rank, reason = (error.rank, error.reason) if isinstance(error, RankError) else (self.rank, "")
        reason = reason or message_of(error)
        try:
            self._notify(_LEAVES, rank, reason + _notes(error))
            self._wait_for_the_end_of_others(error)
        except KeyboardInterrupt:
            if self.rank == 0:  # another rank must not end rank 0, which may still be saving the run
                self._abort_beside(error, set(self._others()) - self._gone)
            raise
        except Exception:  # MPI itself has failed
            self._abort_beside(error, set(self._others()) - self._gone)
        if isinstance(error, OSError | MemoryError) and not isinstance(error, RankError):
            error.add_note(f"the error occurred on rank {self.rank}")  # says whose disk or memory failed
        if self.rank and self._reported is not None:
            their_rank, theirs = self._reported
            if their_rank == rank or theirs.startswith(reason):
                mark_reported(error)

    def _wait_for_the_end_of_others(self, error: BaseException) -> None:
        """Wait until the other ranks have left.

        Before the other ranks leave, they may finish a batch or save the run.
        """
        started = self._noticed_at = time.monotonic()
        is_told = not isinstance(error, Exception) or isinstance(error, RankError)
        while silent := set(self._others()) - self._gone:
            limit = 0.0 if silent <= self._hung else self.timeout
            now = time.monotonic()
            if now - self._noticed_at > limit:
                self._abort_beside(error, silent)
            if now - started > _QUIET and not is_told:
                is_told = True
                print(
                    f"nplora: rank {self.rank} has failed ({message_of(error)}) and waits up to "
                    f"{self.timeout:g} s for {_named(silent)}, which may be computing a batch or saving the "
                    "run",
                    file=stderr,
                )
            self.listen()
            for request in self.pending:
                request.Test()
            time.sleep(PAUSE)

    def _abort_beside(self, error: BaseException, silent: Collection[int]) -> None:
        """Print the error and end all ranks, because some ranks do not respond."""
        text = str(error) if isinstance(error, RankError) else f"rank {self.rank}: {message_of(error)}"
        others = f"; {_named(silent)} did not react" if silent else ""
        print(f"nplora: error: {text}{_notes(error)}{others}, so all ranks are ended", file=stderr)
        with contextlib.suppress(OSError, ValueError, AttributeError):
            sys.stdout.flush()
            sys.stderr.flush()
        time.sleep(_FORWARDING)
        self.abort()

    def abort(self) -> None:
        """End all ranks immediately."""
        self._mpi.COMM_WORLD.Abort(1)
        os._exit(1)  # MPICH's Abort returns if the launcher has ended already


def _named(ranks: Collection[int]) -> str:
    return f"rank{'s' if len(ranks) > 1 else ''} {', '.join(map(str, sorted(ranks)))}"


def _notes(error: BaseException) -> str:
    return "".join(f"; {note}" for note in getattr(error, "__notes__", ()))
