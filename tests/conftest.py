"""Fixtures that many tests share."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

import nplora
from nplora.demo import dictionary


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


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """The file of a real model, SmolLM2-135M in Q4_1, where its package is installed."""
    try:
        return dictionary.find_model()
    except ModuleNotFoundError as error:
        pytest.skip(str(error))
