"""The range and accuracy that the tests expect of each block format. A new format needs one entry here."""

from typing import NamedTuple

import numpy as np

HALF = 65_504  # the largest float16


class Expected(NamedTuple):
    """The range and accuracy of a format.

    Attributes:
        largest: the largest magnitude that the format can store.
        step: the largest error of a value in a ramp, relative to the ramp's largest magnitude.
        error: the root mean square error of values from a standard normal distribution.
        short_rows: the type that llama.cpp uses for rows that are not whole blocks of 256 values.
    """

    largest: float
    step: float
    error: float
    short_rows: str | None = None


# With 4 bits, 15 steps over [-1, 1] are 0.133 each. With 2 or 3 bits, some values are clipped.
EXPECTED = {
    "q4_0": Expected(8 * HALF, step=0.08, error=0.12),
    "q4_1": Expected(HALF, step=0.08, error=0.12),
    "q5_0": Expected(16 * HALF, step=0.08, error=0.06),
    "q5_1": Expected(HALF, step=0.08, error=0.06),
    "q8_0": Expected(127 * HALF, step=0.08, error=0.01),
    "q4_k": Expected(63 * HALF, step=0.08, error=0.12, short_rows="q5_0"),
    "q5_k": Expected(63 * HALF, step=0.08, error=0.06, short_rows="q5_1"),
    "q6_k": Expected(31 * 127 * HALF, step=0.08, error=0.03, short_rows="q8_0"),
    "iq4_nl": Expected(113 * HALF, step=0.11, error=0.12),
    "q3_k": Expected(31 * 3 * HALF, step=0.16, error=0.2, short_rows="iq4_nl"),
    "q2_k": Expected(15 * HALF, step=0.1, error=0.35, short_rows="iq4_nl"),
    "iq4_xs": Expected(31 * 113 * HALF, step=0.11, error=0.12, short_rows="iq4_nl"),
    "nf4": Expected(float(np.finfo(np.float32).max), step=0.16, error=0.12),
}
