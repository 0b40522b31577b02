"""Temperature scaling: divides all logits by one number, so that the probabilities are well calibrated."""

import numpy as np
import numpy.typing as npt

_LEAST, _MOST = 0.05, 20.0  # limits of a temperature; held-out rows are too few to show a more extreme one
_STEPS = 60  # steps of the search; each step narrows the interval by the golden ratio
_RATIO = (np.sqrt(5) - 1) / 2


def log_probabilities(logits: npt.NDArray[np.floating]) -> npt.NDArray[np.floating]:
    """Return the logarithms of the softmax of each row."""
    shifted = logits - logits.max(axis=1, keepdims=True)
    result: npt.NDArray[np.floating] = shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    return result


def temperature(logits: npt.ArrayLike, labels: npt.ArrayLike) -> float:
    """Return the T between 0.05 and 20 that minimises the cross entropy of softmax(logits / T).

    The cross entropy is a convex function of 1 / T, so it has only one minimum. A golden-section search over
    log T finds this minimum. Source: Guo et al. 2017, section 4.2.

    >>> logits = np.array([[4.0, 0.0], [4.0, 0.0], [4.0, 0.0], [0.0, 4.0]])
    >>> from nplora.sklearn.calibration import temperature
    >>> round(temperature(logits, [0, 0, 1, 1]), 2)   # three of four are right: the odds are 3 = exp(4 / T)
    3.64

    Args:
        logits: array (n, classes).
        labels: array (n,), the index of each row's class.
    """
    rows, at = np.asarray(logits, np.float64), np.asarray(labels, np.int64)

    def entropy(log_t: float) -> float:
        chosen = log_probabilities(rows / np.exp(log_t))[np.arange(len(rows)), at]
        return -float(chosen.mean())

    low, high = np.log(_LEAST), np.log(_MOST)
    for _ in range(_STEPS):
        left, right = high - _RATIO * (high - low), low + _RATIO * (high - low)
        if entropy(left) <= entropy(right):
            high = right
        else:
            low = left
    return float(np.exp((low + high) / 2))
