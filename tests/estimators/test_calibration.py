"""The temperature beside a fine grid of temperatures."""

import numpy as np
import pytest

from nplora.sklearn.calibration import log_probabilities, temperature


@pytest.mark.slow
@pytest.mark.parametrize("factor", [0.3, 1.0, 4.0])
def test_the_temperature_minimises_the_cross_entropy(factor: float, rng: np.random.Generator) -> None:
    logits = rng.normal(size=(5000, 4)) * 2
    chances = np.exp(log_probabilities(logits))
    labels = (chances.cumsum(axis=1) < rng.random((5000, 1))).sum(axis=1)  # drawn from the probabilities
    found = temperature(factor * logits, labels)
    grid = np.exp(np.linspace(np.log(0.05), np.log(20), 401))
    losses = [-log_probabilities(factor * logits / t)[np.arange(5000), labels].mean() for t in grid]
    assert found == pytest.approx(grid[np.argmin(losses)], rel=0.02)
    assert found == pytest.approx(factor, rel=0.08)


def test_perfect_and_hopeless_logits_stay_within_the_limits() -> None:
    assert temperature(np.array([[9.0, 0.0], [0.0, 9.0]]), [0, 1]) == pytest.approx(0.05, rel=1e-6)
    assert temperature(np.array([[9.0, 0.0], [0.0, 9.0]]), [1, 0]) == pytest.approx(20, rel=1e-6)
