"""Temperature scaling: divides the logits of a classifier by one number, the temperature.

With the right temperature, for example, 80 % of the predictions with probability 0.8 are right.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from nplora.lm.classifier import probabilities
from nplora.runtime.user_warning import warn_user

Array = npt.NDArray[Any]

_LEAST, _MOST = 1e-2, 1e2
_HALVINGS = 60


def temperature(task: str, logits: Array, targets: Array) -> float:
    """The temperature T for which logits / T have the smallest loss on `targets` (Guo et al. 2017).

    The loss is convex in 1 / T, so the zero of its derivative is found by bisection. The result is limited to
    the range from 0.01 to 100, because the loss has no minimum if all predictions are right: a smaller T then
    always gives a smaller loss.

    Args:
        task: "single" or "multi".
        logits: (n, outputs).
        targets: for "single", indices of labels (n,); for "multi", zeros and ones (n, outputs).
    """
    wide = np.asarray(logits, np.float64)
    # The terms of the sum of truth · logits. For "single", no matrix of zeros and ones is made.
    right = wide[np.arange(len(wide)), targets] if task == "single" else np.asarray(targets) * wide
    low, high = 1 / _MOST, 1 / _LEAST
    for _ in range(_HALVINGS):
        middle = (low * high) ** 0.5
        slope = float((probabilities(task, middle * wide) * wide).sum() - right.sum())
        low, high = (middle, high) if slope < 0 else (low, middle)
    return float(1 / (low * high) ** 0.5)


def warn_if_all_right(op: str, fitted: float) -> None:
    """Warn if a temperature is at its lower limit, because all predictions on the held-out data are right."""
    if fitted < 1.01 * _LEAST:
        warn_user(
            f"{op}: calibrate=True: all predictions on the validation data are right, so most calibrated "
            "probabilities are almost 0 or 1; use more validation data, or no calibration"
        )
