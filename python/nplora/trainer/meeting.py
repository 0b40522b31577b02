"""Meeting: exchanges values between the ranks of a run. If one rank gets a signal, all ranks end."""

from typing import TypeVar

from nplora.distributed.communicator import Communicator
from nplora.trainer.interrupts import Interrupts

T = TypeVar("T")


class Meeting:
    """The ranks of one call of `Trainer.fit`.

    A signal must not end only one rank, because the other ranks would wait for that rank. So on several
    ranks, a signal is only recorded when it arrives, and the next `gather` handles it on all ranks.

    Attributes:
        is_ended: whether a signal has ended the run on all ranks.
    """

    def __init__(self, communicator: Communicator, interrupts: Interrupts) -> None:
        self.communicator, self._interrupts = communicator, interrupts
        self.rank, self.size = communicator.rank, communicator.size
        self.is_ended = False

    def gather(self, value: T, place: str = "") -> list[T]:
        """Return the values of all ranks, in the order of the ranks.

        Args:
            place: a name for this call, such as "step 3". An error message contains the name if another rank
                makes a different call.
        Raises:
            KeyboardInterrupt, Terminated: a signal has reached one of the ranks.
        """
        if self.size == 1:
            return [value]
        rows = self.communicator.gather((self._interrupts.noted(), value), place)
        signals = [signal for signal, _ in rows if signal is not None]
        if signals:
            self.is_ended = True
            self._interrupts.end_run(*max(signals))
            self.is_ended = False  # a handler of the user's program has let the run continue
        return [value for _, value in rows]

    def broadcast(self, value: T, place: str = "") -> T:
        """Return the value of rank 0."""
        return self.communicator.broadcast(value, place)
