"""AdapterMemory: the memory for adapters that are loaded while a server runs."""

from __future__ import annotations

import contextlib
import gc
import threading
import time
import weakref
from collections.abc import Iterator
from typing import Protocol

from nplora.formats.errors import brief
from nplora.serving.request_error import RequestError

# A loaded adapter is in memory twice: in `lm.adapters` and in the layers of its model. If bfloat16 holds the
# values exactly, as in most files, the layers also keep a copy in bfloat16 (half the size) for decoding.
_COPIES = 2.5
_LOADING = _COPIES + 1  # while the adapter is read
_WAIT = 5.0  # seconds


def most_needed(size: int, count: int) -> int:
    """Return the peak number of bytes if `count` adapters are read one after the other and stay loaded.

    Args:
        size: the bytes of one adapter's values.

    >>> most_needed(100, 1), most_needed(100, 2)
    (350, 600)
    """
    return int((_COPIES * (count - 1) + _LOADING) * size)


class NamedModels(Protocol):
    """A served model. `AdapterMemory` needs only its method `named_model`."""

    def named_model(self, name: str, /) -> object: ...


class AdapterMemory:
    """Counts the memory of adapters, and refuses an adapter that does not fit.

    The memory of an unloaded adapter becomes free when the last request with this adapter has ended.

    Args:
        most: the largest number of bytes for all adapters together. Adapters that were loaded before the
            engine planned its memory do not count.
    """

    def __init__(self, most: int) -> None:
        self.most, self._lock = most, threading.Lock()
        self._sizes: dict[object, int] = {}  # the bytes of each adapter
        self._unloaded = float("-inf")  # the time at which an adapter was last unloaded

    @property
    def used(self) -> int:
        """The bytes that adapters take now."""
        return sum(list(self._sizes.values()))

    def unloaded(self) -> None:
        """Record that an adapter was unloaded. Its memory becomes free when no request uses it any more."""
        self._unloaded = time.monotonic()

    def require(self, name: str, size: int, waits: bool = True) -> None:
        """Check that there is memory for an adapter that has not been read yet.

        The argument `waits` and the error are the same as in `room`.

        Args:
            size: the least number of bytes that the adapter's values can take.
        """
        self._wait(needed := int(_LOADING * size), waits)
        self._require(name, needed)

    @contextlib.contextmanager
    def room(self, lm: NamedModels, name: str, size: int, waits: bool = True) -> Iterator[None]:
        """Reserve memory for an adapter. Load the adapter in the `with` block.

        The memory stays reserved until nothing uses the adapter any more.

        Args:
            size: the bytes of the adapter's values.
            waits: whether to wait a few seconds until an adapter that was just unloaded has released its
                memory.
        Raises:
            RequestError: the adapter does not fit (HTTP status 507).
        """
        needed, key = int(_LOADING * size), object()
        self._wait(needed, waits)
        with self._lock:
            self._require(name, needed)
            self._sizes[key] = needed
        try:
            yield
            model = lm.named_model(name)
        except BaseException:
            del self._sizes[key]
            raise
        self._sizes[key] = int(_COPIES * size)
        weakref.finalize(model, self._sizes.pop, key, None)  # takes no lock, because it can run at any time

    def _wait(self, needed: int, waits: bool) -> None:
        while self.used + needed > self.most:
            gc.collect()
            if not waits or time.monotonic() > self._unloaded + _WAIT:
                return
            time.sleep(0.01)

    def _require(self, name: str, needed: int) -> None:
        left = self.most - self.used
        if needed > left:
            what = (
                f"the sum of adapters {brief(name[1:])}"
                if name.startswith("=")
                else f"the adapter {brief(name)}"
            )
            raise RequestError(
                f"there is too little memory for {what}: it needs {needed / 1e6:,.1f} MB, "
                f"but only {left / 1e6:,.1f} of {self.most / 1e6:,.1f} MB for adapters are free; unload "
                "another adapter, or start the server with a larger --adapter-memory",
                507,
                code="insufficient_memory",
            )
