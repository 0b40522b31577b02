"""AdapterMemory: the memory for adapters that are loaded while a server runs."""

from __future__ import annotations

import gc
import threading
import weakref

from nplora.adapters import Adapter
from nplora.formats.errors import brief
from nplora.lm import LanguageModel
from nplora.serving.request_error import RequestError

_COPIES = 2  # of a loaded adapter: one by its name, and one in the model's layers
_LOADING = _COPIES + 1  # while it is read


class AdapterMemory:
    """Counts the memory of adapters, and refuses one that does not fit.

    The memory of an unloaded adapter is free when the last request with this adapter has ended.

    Args:
        most: the bytes for all adapters that are loaded from now on.
    """

    def __init__(self, most: int) -> None:
        self.most, self._used, self._lock = most, 0, threading.Lock()

    @property
    def used(self) -> int:
        """The bytes that are taken."""
        return self._used

    def require(self, name: str, adapter: Adapter) -> None:
        """Check that an adapter fits.

        Raises:
            RequestError: it does not. The status is 507.
        """
        needed = _LOADING * adapter.nbytes
        if self._used + needed > self.most:
            gc.collect()
        left = self.most - self._used
        if needed > left:
            raise RequestError(
                f"there is no memory for the adapter {brief(name)}: it needs {needed / 1e6:,.1f} MB, and "
                f"{left / 1e6:,.1f} MB of the {self.most / 1e6:,.1f} MB for adapters are free: unload "
                "another adapter, or start the server with a larger --adapter-memory",
                507,
                code="insufficient_memory",
            )

    def count(self, lm: LanguageModel, name: str) -> None:
        """Count an adapter that was loaded, until nobody uses it any more."""
        size = _COPIES * lm.adapters[name].nbytes
        self._add(size)
        weakref.finalize(lm.named_model(name), self._add, -size)

    def _add(self, size: int) -> None:
        with self._lock:
            self._used += size
