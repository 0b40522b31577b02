"""LoraDelta: wrong shapes are refused."""

import numpy as np
import pytest

from nplora.lora.delta import LoraDelta


@pytest.mark.parametrize(
    ("a", "b", "m", "words"),
    [
        (
            (4, 3),
            (2, 5),
            None,
            r"A has shape \(4, 3\), B has \(2, 5\), expected \(d_out, r\) and \(r, d_in\)",
        ),
        ((4,), (1, 5), None, r"A has shape \(4,\), B has \(1, 5\)"),
        ((4, 2), (2,), None, r"A has shape \(4, 2\), B has \(2,\)"),
        ((4, 2), (2, 5), (5,), r"m has shape \(5,\), expected \(4,\)"),
    ],
)
def test_shapes_that_do_not_fit_each_other_are_refused(
    a: tuple[int, ...], b: tuple[int, ...], m: tuple[int, ...] | None, words: str
) -> None:
    with pytest.raises(ValueError, match=f"^LoraDelta: {words}"):
        LoraDelta(np.ones(a), np.ones(b), 1.0, None if m is None else np.ones(m))
