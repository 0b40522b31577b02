"""OrderedSum: adds up arrays of several ranks, in an order that does not depend on the number of ranks."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from nplora import _core
from nplora.distributed.communicator import Communicator

COMMUNICATION_DTYPES = ("float32", "bfloat16")
_BFLOAT16 = "bfloat16"

Array = npt.NDArray[Any]


class OrderedSum:
    """Adds up arrays, such as the gradients of a model, over all ranks.

    A term is what the arrays of one rank contain when this rank calls `keep`. Floating-point sums depend on
    the order of their terms, so the terms are added in a fixed order. For this, the arrays are cut into one
    slice for each rank. Each rank takes its slice from every term, adds up these slices in the order of the
    terms, and sends the sum to all other ranks. The sums have the same bits as if one process added all
    terms.

    The ranks exchange terms while the caller computes the next terms.

    Args:
        arrays: the arrays. `keep` reads and clears the arrays, and `finish` overwrites the arrays.
        dtype: "bfloat16" rounds each term, and later the sum, to bfloat16, so the ranks send fewer bytes. The
            terms are still added in the dtype of the arrays. A single process rounds in the same way.
            "float32" sends all values unchanged, including float64 values.

    >>> import nplora, numpy as np
    >>> gradient = np.zeros(3, np.float32)
    >>> total = nplora.distributed.OrderedSum(nplora.distributed.Alone(), [gradient])
    >>> for value in (1, 2):
    ...     gradient += value
    ...     total.keep()
    ...     total.add([1])
    >>> total.finish()
    >>> gradient
    array([3., 3., 3.], dtype=float32)
    """

    def __init__(
        self, communicator: Communicator, arrays: Sequence[Array], dtype: str = COMMUNICATION_DTYPES[0]
    ) -> None:
        kinds = dict.fromkeys(array.dtype for array in arrays)
        self._communicator = communicator
        self._slices = [
            _Slices(communicator, [array for array in arrays if array.dtype == kind], dtype == _BFLOAT16)
            for kind in kinds
        ]

    @property
    def kept(self) -> int:
        """The number of terms of this rank that have not been sent yet."""
        return len(self._slices[0].terms) if self._slices else 0

    def keep(self) -> None:
        """Keep the contents of the arrays as the next term of this rank, and set the arrays to zero."""
        for each in self._slices:
            each.keep()

    def forget(self) -> None:
        """Discard the terms of this rank that have not been sent yet."""
        for each in self._slices:
            each.terms.clear()

    def restart(self) -> None:
        """Discard the terms of this rank, the terms that `add` has sent, and the sums."""
        self.forget()
        self._add_sent()
        for each in self._slices:
            each.sum = None

    def add(self, counts: Sequence[int]) -> None:
        """Add the terms of all ranks: first the terms of rank 0, then the terms of rank 1, and so on.

        This method may return before all terms have arrived.

        Args:
            counts: the number of terms that each rank has kept.
        """
        self._add_sent()
        for each in self._slices:
            each.send(counts)
        if self._communicator.size == 1:
            self._add_sent()  # the next terms can then use the memory of these terms

    def finish(self) -> None:
        """Write the sums into the arrays of all ranks, and start new sums at zero."""
        self._add_sent()
        for each in self._slices:
            each.finish()

    def _add_sent(self) -> None:
        """Wait for the terms that were sent, and add them."""
        self._communicator.wait_for_exchanges()
        for each in self._slices:
            each.add_sent()


class _Slices:
    """The arrays of one dtype, joined into one flat array and cut into one slice for each rank.

    Args:
        rounds: True if terms and sums are rounded to bfloat16, and stored and sent as bit patterns.
    """

    def __init__(self, communicator: Communicator, arrays: list[Array], rounds: bool) -> None:
        self._communicator, self._arrays, self._rounds = communicator, arrays, rounds
        self._kind: np.dtype[Any] = np.dtype(np.uint16) if rounds else arrays[0].dtype
        self._shape = communicator.size, -(-sum(array.size for array in arrays) // communicator.size)
        self.terms: list[Array] = []
        self.sum: Array | None = None
        self._sent: list[Array] = []  # terms of this rank that `send` has started to send
        self._counts: Sequence[int] = ()  # for each rank, the number of terms that it has started to send
        self._received: list[Array] = []
        self._idle: list[Array] = []  # memory that later terms can use

    def _empty(self) -> Array:
        return self._idle.pop() if self._idle else np.zeros(self._shape, self._kind)

    def keep(self) -> None:
        term = self._empty()
        flat, begin = term.reshape(-1), 0
        for array in self._arrays:
            self._store(array.reshape(-1), flat[begin : begin + array.size])
            begin += array.size
            array.fill(0)
        self.terms.append(term)

    def send(self, counts: Sequence[int]) -> None:
        """Start to exchange the terms that all ranks have kept."""
        most = max(counts)
        while len(self._received) < most:
            self._received.append(np.empty(self._shape, self._kind))
        for number in range(most):
            senders = [rank for rank, count in enumerate(counts) if number < count]
            mine = self.terms[number] if number < len(self.terms) else self._received[number]
            self._communicator.start_exchange(mine, self._received[number], senders)
        self._sent, self.terms, self._counts = self.terms, [], counts

    def add_sent(self) -> None:
        """Add the terms that have arrived."""
        for rank, count in enumerate(self._counts):
            for number in range(count):
                self._add(self._received[number][rank])
        self._idle += self._sent
        self._sent, self._counts = [], ()

    def _add(self, term: Array) -> None:
        values = self._loaded(term)
        if self.sum is None:
            self.sum = values.copy()
        else:
            self.sum += values

    def finish(self) -> None:
        if self.sum is None:
            for array in self._arrays:
                array.fill(0)
            return
        out, mine = self._empty(), self.sum
        if self._rounds:
            mine = np.empty(self.sum.shape, self._kind)
            self._store(self.sum, mine)
        self._communicator.join(mine, out)
        flat, begin = out.reshape(-1), 0
        for array in self._arrays:
            array[...] = self._loaded(flat[begin : begin + array.size]).reshape(array.shape)
            begin += array.size
        self._idle.append(out)
        self.sum = None

    def _store(self, values: Array, out: Array) -> None:
        """Write values in the form that is sent: as bit patterns of bfloat16, or unchanged."""
        if self._rounds:
            _core.narrow(np.ascontiguousarray(values, np.float32), _BFLOAT16, out)
        else:
            out[...] = values

    def _loaded(self, sent: Array) -> Array:
        """Convert values from the form in which `_store` writes them to the dtype of the arrays."""
        if not self._rounds:
            return sent
        values = np.empty(sent.shape, np.float32)
        _core.widen(sent, _BFLOAT16, values)
        return values.astype(self._arrays[0].dtype, copy=False)
