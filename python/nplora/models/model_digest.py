"""A hash of a model's norm weights, which identifies the model. An adapter stores the hash of its base model.

Norm weights are 16- or 32-bit floats in every file, even if the matrices are quantised. After rounding to
bfloat16, the norm weights are equal in all copies of a model. Norms are trained together with the matrices,
so norm weights differ between models.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nplora.formats import bfloat16, gguf, safetensors
from nplora.formats.errors import brief
from nplora.models.families import Family

_FLOATS = ("F64", "F32", "F16", "float64", "float32", "float16", "BF16", "bfloat16")
_SHOWN = 12  # hexadecimal digits
TAKEN = "use --any-base (any_base=True) to accept it anyway"


def is_norm(name: str) -> bool:
    """Whether the tensor with this GGUF name is part of the digest."""
    return name == "output_norm.weight" or (name.startswith("blk.") and name.endswith("_norm.weight"))


def of(norms: Mapping[str, NDArray[Any]]) -> str | None:
    """Return the SHA-256 of a dict from GGUF names to norm weights (d,); None if the dict is empty."""
    digest = hashlib.sha256()
    for name in sorted(norms):
        with np.errstate(over="ignore"):
            rounded = bfloat16.narrow(np.ascontiguousarray(norms[name], np.float32))
        digest.update(f"\n{name} {len(rounded)} ".encode() + rounded.astype("<u2").tobytes())
    return digest.hexdigest() if norms else None


def of_tensors(tensors: Mapping[str, gguf.Tensor | safetensors.Tensor], family: Family) -> str | None:
    """Return the digest of the norm weights among a file's tensors, or None if there are none."""
    norms = {}
    for name, tensor in tensors.items():
        if isinstance(tensor, gguf.Tensor):
            stored, kind, offset = name, tensor.type, 0.0
        else:
            stored, kind, offset = family.gguf_tensor(name) or "", tensor.dtype, family.norm_offset
        if is_norm(stored) and len(tensor.shape) == 1 and kind in _FLOATS:
            values = tensor.numpy()
            values = bfloat16.widen(values) if kind in ("BF16", "bfloat16") else values
            norms[stored] = np.asarray(values, np.float32) + np.float32(offset) if offset else values
    return of(norms)


def described(name: str | None, digest: str | None) -> str:
    """Describe a base model by its name and its digest, as far as they are known."""
    known = [] if name is None else [brief(name, 200)]
    known += [] if digest is None else [f"sha256 {digest[:_SHOWN]} of its norm weights"]
    return ", ".join(known) or "an unnamed model"


def difference(name: str | None, digest: str | None, model: str | None) -> str:
    """If both digests are known and differ, return a text for an error message. If not, return ""."""
    if digest is None or model is None or digest == model:
        return ""
    return (
        f"the adapter belongs to another model ({described(name, digest)}; "
        f"this model has sha256 {model[:_SHOWN]})"
    )


def refusal(name: str | None, digest: str | None, model: str | None) -> str:
    """Like `difference`, but the text also says how to use the adapter anyway."""
    text = difference(name, digest, model)
    return f"{text}; {TAKEN}" if text else ""


def subject(name: str | None, digest: str | None, model: str | None) -> str:
    """Begin an error message about an adapter. If the base models differ, the text says so."""
    text = difference(name, digest, model)
    return f"{text}, and" if text else "the adapter"
