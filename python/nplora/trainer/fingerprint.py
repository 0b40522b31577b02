"""A model as a checkpoint knows it: a fingerprint of its frozen weights, and its factors by name."""

import hashlib
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from nplora.nn import LoRALayer
from nplora.nn.module import Module
from nplora.weights import FrozenWeight

_SAMPLE_BYTES = 1 << 16

Array = npt.NDArray[Any]


def base_fingerprint(model: Module) -> str:
    """SHA-256 over the names, shapes and sampled rows of all frozen arrays.

    It distinguishes base models. It does not detect every changed bit: reading all of a large model
    would take longer than the first steps.
    """
    digest = hashlib.sha256()
    for name, module in model.named_modules():
        for frozen in module.local_frozen():
            if isinstance(module, LoRALayer) and frozen is module.B:
                continue  # it is in the checkpoint
            digest.update(f"\n{name} {fingerprint(frozen)}".encode())
    return digest.hexdigest()


def fingerprint(array: FrozenWeight | Array) -> str:
    """The dtype and shape of an array, and a SHA-256 over at most 64 KiB of evenly spaced rows."""
    table = array if isinstance(array, FrozenWeight) else np.atleast_1d(array)
    rows = table.shape[0]
    row_bytes = max(1, table.nbytes // max(1, rows))
    count = min(rows, max(1, _SAMPLE_BYTES // row_bytes))
    ids = np.arange(count, dtype=np.int64) * (rows - 1) // max(1, count - 1)
    sample = table.take(ids) if isinstance(table, FrozenWeight) else table[ids]
    return f"{array.dtype} {array.shape} {hashlib.sha256(sample.tobytes()).hexdigest()}"


def factors(model: Module) -> dict[str, Array]:
    """The live arrays that a checkpoint keeps: the parameters, and B of layers that train only A."""
    arrays = {p.name: p.value for p in model.parameters()}
    for name, module in model.named_modules():
        if isinstance(module, LoRALayer) and module.freeze_B:
            arrays[f"{name}.B" if name else "B"] = module.B
    return arrays


def set_factors(model: Module, values: Mapping[str, Array]) -> None:
    """Write these values into the arrays that `factors` lists."""
    for name, array in factors(model).items():
        array[...] = values[name]


def differences(found: Mapping[str, Array], wanted: Mapping[str, Array]) -> list[str]:
    """One sentence for every array that is missing, unknown, or of another shape or dtype."""
    problems = [f"{name} is missing" for name in wanted if name not in found]
    problems += [f"{name} is not in the model" for name in found if name not in wanted]
    for name, want in wanted.items():
        have = found.get(name, want)
        if have.shape != want.shape or have.dtype != want.dtype:
            problems.append(f"{name} is {have.dtype} {have.shape}, in the model {want.dtype} {want.shape}")
    return problems
