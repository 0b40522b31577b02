"""Giving way: a long computation pauses again and again, so that more urgent work can run."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextvars import ContextVar

_pause: ContextVar[Callable[[], None] | None] = ContextVar("nplora_pause", default=None)


def give_way() -> None:
    """Call the function that `giving_way` has set in this thread (or asyncio task), if there is one.

    Long computations call this function often. For example, a model calls it between two transformer blocks.
    """
    pause = _pause.get()
    if pause is not None:
        pause()


@contextlib.contextmanager
def giving_way(pause: Callable[[], None]) -> Iterator[None]:
    """A context in which `give_way` calls `pause`. `pause` may wait, or raise an error to end the work.

    The setting is valid only in the thread (or asyncio task) that enters the context.

    >>> from nplora.runtime.giving_way import give_way, giving_way
    >>> with giving_way(lambda: print("after you")):
    ...     give_way()
    after you
    >>> give_way()
    """
    token = _pause.set(pause)
    try:
        yield
    finally:
        _pause.reset(token)
