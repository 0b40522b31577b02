"""Checks of readers on untrusted files: exact errors, little time, little memory."""

import itertools
import time
import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import pytest

from nplora.formats.errors import FormatError

T = TypeVar("T")

MOST_SECONDS = 2.0  # of CPU time: the slowest take 0.8 on a slow machine
MOST_BYTES = 64 << 20


@contextmanager
def refused(error: type[Exception], words: str, source: object = "") -> Iterator[None]:
    """The body must quickly raise exactly this error. Its text contains `words` and begins with `source`."""
    tracemalloc.start()
    try:
        begin = time.process_time()
        with pytest.raises(FormatError) as caught:
            yield
        seconds = time.process_time() - begin
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert caught.type is error
    assert str(caught.value).startswith(str(source))
    assert words in str(caught.value)
    assert seconds < MOST_SECONDS
    assert peak < MOST_BYTES


def damaged(data: bytes) -> Iterator[bytes]:
    """Every truncation, and every byte replaced by 00, 7F, 80 and FF."""
    for length in range(len(data)):
        yield data[:length]
    for place, value in itertools.product(range(len(data)), (0x00, 0x7F, 0x80, 0xFF)):
        if data[place] != value:
            yield data[:place] + bytes([value]) + data[place + 1 :]


def accepted(data: bytes, read: Callable[[bytes], T]) -> Iterator[tuple[bytes, T]]:
    """The damaged versions that are accepted, with the results. The others must be refused quickly."""
    refusals = 0
    for version in damaged(data):
        begin = time.process_time()
        try:
            found = [read(version)]
        except FormatError:
            found = []
            refusals += 1
        assert time.process_time() - begin < MOST_SECONDS
        yield from ((version, content) for content in found)
    assert refusals
