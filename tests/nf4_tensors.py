"""A matrix in NF4 as bitsandbytes stores it in safetensors."""

import json
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]

# Dettmers et al. 2023, appendix E.
LEVELS = np.array(
    [-1, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
     -0.18477343022823334, -0.09105003625154495, 0, 0.07958029955625534, 0.16093020141124725,
     0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941,
     0.7229568362236023, 1], np.float32,
)  # fmt: skip
NAME = "w"
STATE = f"{NAME}.quant_state.bitsandbytes__nf4"


def as_bytes(state: object) -> Array:
    return np.frombuffer(json.dumps(state).encode(), np.uint8)


def stored(shape: tuple[int, int], nested: bool, seed: int = 0) -> tuple[dict[str, Array], Array]:
    """The tensors of a random matrix, named as in bitsandbytes, and the values that they represent."""
    rng = np.random.default_rng(seed)
    size = shape[0] * shape[1]
    blocks = -(-size // 64)
    codes = rng.integers(0, 16, size + size % 2, np.uint8)
    state: dict[str, Any] = {"quant_type": "nf4", "blocksize": 64, "dtype": "float32", "shape": list(shape)}
    tensors = {NAME: (codes[::2] << 4 | codes[1::2])[:, None], f"{NAME}.quant_map": LEVELS}
    if nested:
        absmax_codes, levels = rng.integers(0, 256, blocks, np.uint8), np.sort(rng.random(256, np.float32))
        scales, offset = rng.random(-(-blocks // 256), np.float32), np.float32(0.37)
        absmax = levels[absmax_codes] * scales.repeat(256)[:blocks] + offset
        tensors |= {f"{NAME}.absmax": absmax_codes, f"{NAME}.nested_absmax": scales}
        tensors |= {f"{NAME}.nested_quant_map": levels}
        state |= {"nested_blocksize": 256, "nested_dtype": "float32", "nested_offset": float(offset)}
    else:
        absmax = tensors[f"{NAME}.absmax"] = rng.random(blocks, np.float32)
    values = LEVELS[codes[:size]] * absmax.repeat(64)[:size]
    return tensors | {STATE: as_bytes(state)}, values.reshape(shape)
