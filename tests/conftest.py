"""Fixtures that many tests share."""

from collections.abc import Iterator

import numpy as np
import pytest

import nplora


@pytest.fixture
def rng() -> np.random.Generator:
    """A generator that starts the same way in every test."""
    return np.random.default_rng(20260101)


@pytest.fixture
def thread_limit() -> Iterator[None]:
    """Restores the number of threads that the test changes."""
    before = nplora.get_num_threads()
    yield
    nplora.set_num_threads(before)
