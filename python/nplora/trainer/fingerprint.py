"""The parts of a model that a checkpoint stores: a fingerprint of the frozen weights, and the factors."""

import hashlib
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from nplora.nn import LoRALayer
from nplora.nn.module import Module
from nplora.weights import FrozenWeight

_SAMPLE_BYTES = 1 << 16

Array = npt.NDArray[Any]


def base_fingerprint(model: Module, whole: bool = False) -> str:
    """The SHA-256 of all frozen arrays (names, shapes, rows), then the SHA-256 of `model.configuration()`.

    Args:
        whole: whether to read all rows, so that every changed bit is detected. By default, only sampled rows
            are read, because reading a large model would take longer than the first training steps. Sampled
            rows are enough to distinguish base models.
    """
    digest = hashlib.sha256()
    for name, module in model.named_modules():
        for frozen in module.local_frozen():
            if isinstance(module, LoRALayer) and frozen is module.B:
                continue  # the checkpoint contains a frozen B
            digest.update(f"\n{name} {fingerprint(frozen, whole)}".encode())
    configuration = model.configuration()
    digests = [digest, hashlib.sha256(configuration.encode())] if configuration else [digest]
    return " ".join(found.hexdigest() for found in digests)


def is_same_base(found: str, base: str) -> bool:
    """Whether the fingerprint `found` in a checkpoint matches the fingerprint `base` of a model.

    Checkpoints of earlier versions have no SHA-256 of the configuration.
    """
    return found in (base, base.partition(" ")[0])


def fingerprint(array: FrozenWeight | Array, whole: bool = False) -> str:
    """The dtype and shape of an array, and the SHA-256 of some evenly spaced rows.

    Args:
        whole: whether the SHA-256 covers all rows. By default, it covers as many rows as fit into 64 KiB, but
            at least one row.
    """
    digest = hashlib.sha256()
    for part in _contents(array) if whole else [_sample(array)]:
        digest.update(np.ascontiguousarray(part).view(np.uint8).data)
    return f"{array.dtype} {array.shape} {digest.hexdigest()}"


def _contents(array: FrozenWeight | Array) -> Iterable[Array]:
    return array.contents() if isinstance(array, FrozenWeight) else [array]


def _sample(array: FrozenWeight | Array) -> Array:
    table = array if isinstance(array, FrozenWeight) else np.atleast_1d(array)
    rows = table.shape[0]
    row_bytes = max(1, table.nbytes // max(1, rows))
    count = min(rows, max(1, _SAMPLE_BYTES // row_bytes))
    ids = np.arange(count, dtype=np.int64) * (rows - 1) // max(1, count - 1)
    return table.take(ids) if isinstance(table, FrozenWeight) else table[ids]


def factors(model: Module) -> dict[str, Array]:
    """A dict from names to the arrays that a checkpoint stores: the parameters and each frozen factor B."""
    arrays = {p.name: p.value for p in model.parameters()}
    for name, module in model.named_modules():
        if isinstance(module, LoRALayer) and module.freeze_B:
            arrays[f"{name}.B" if name else "B"] = module.B
    return arrays


def set_factors(model: Module, values: Mapping[str, Array]) -> None:
    """Copy each array in `values` into the model's array that `factors` returns under the same name."""
    for name, array in factors(model).items():
        array[...] = values[name]


def differences(found: Mapping[str, Array], wanted: Mapping[str, Array]) -> list[str]:
    """Compare the arrays `found` with the model's arrays `wanted`; return one sentence for each difference.

    An array can be missing or unknown to the model, or have the wrong shape or dtype.
    """
    problems = [f"{name} is missing" for name in wanted if name not in found]
    problems += [f"{name} is not in the model" for name in found if name not in wanted]
    for name, want in wanted.items():
        have = found.get(name, want)
        if have.shape != want.shape or have.dtype != want.dtype:
            problems.append(
                f"{name} is {have.dtype} {have.shape}, but {want.dtype} {want.shape} in the model"
            )
    return problems
