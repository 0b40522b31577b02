"""balanced_weights: loss weights that give all labels the same total weight."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt


def balanced_weights(targets: npt.NDArray[Any], count: int) -> tuple[float, ...]:
    """Return a weight for each of the `count` labels. `targets` holds the label index of each text or word.

    The weight of a label is n / (`count` · m), as in scikit-learn, where n is the number of all targets, and
    m is the number of targets with this label. A label without targets has the weight 0. A negative target
    stands for a word without a token, and does not count.
    """
    known = targets[targets >= 0]
    found = np.bincount(known, minlength=count).tolist()
    return tuple(len(known) / (count * own) if own else 0.0 for own in found)
