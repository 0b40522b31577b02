"""Reads the GGUF metadata that several architectures share."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from nplora.formats.errors import FormatError, UnsupportedError, brief
from nplora.formats.gguf import GgufFile
from nplora.models.rope import RopeConfig, require_theta

ROPE_FREQS = "rope_freqs.weight"
_KINDS = ("none", "linear")

Array = npt.NDArray[Any]


class ArchitectureMetadata:
    """The metadata of a GGUF file, without the architecture's prefix: "block_count", not "llama.block_count".

    The methods raise FormatError if an entry has the wrong type, or is missing and has no default.
    """

    def __init__(self, file: GgufFile, architecture: str) -> None:
        self.file, self.source, self._architecture = file, file.source, architecture

    def key(self, name: str) -> str:
        """The full key of an entry, with the architecture's prefix."""
        return f"{self._architecture}.{name}"

    def integer(self, name: str, default: int | None = None) -> int:
        return self.file.metadata.integer(self.key(name), default)

    def number(self, name: str, default: float | None = None) -> float:
        return self.file.metadata.number(self.key(name), default)

    def boolean(self, name: str, default: bool | None = None) -> bool:
        return self.file.metadata.boolean(self.key(name), default)

    def string(self, name: str, default: str | None = None) -> str:
        return self.file.metadata.string(self.key(name), default)

    def __contains__(self, name: str) -> bool:
        return self.key(name) in self.file.metadata


def heads_of_keys(data: ArchitectureMetadata, default: int) -> int:
    """The number of key/value heads. A file may list one number for each layer.

    Raises:
        UnsupportedError: the layers have different numbers of heads.
    """
    name = "attention.head_count_kv"
    listed = data.file.metadata.get(data.key(name))
    if not isinstance(listed, np.ndarray) or listed.dtype.kind not in "iu" or not len(listed):
        return data.integer(name, default)
    if (listed != listed[0]).any():
        raise UnsupportedError(f"{data.source}: {data.key(name)} differs between layers")
    return int(listed[0])


def sliding_layers(data: ArchitectureMetadata, layers: int, pattern: int, first: bool = False) -> list[bool]:
    """For each layer, whether the layer has a sliding window.

    The file may list the layers with a window. If not, one layer in each group of layers has no window: the
    first layer if `first` is True, else the last layer. The file may give the size of a group; the default is
    `pattern`.
    """
    name = "attention.sliding_window_pattern"
    if name in data and data.file.metadata.types[data.key(name)] == "BOOL":
        return [bool(flag) for flag in data.file.metadata.array(data.key(name), "BOOL", layers)]
    pattern = data.integer(name, pattern)
    if pattern < 1:
        raise FormatError(f"{data.source}: {data.key(name)} is {pattern}, expected at least 1")
    return [(i if first else i + 1) % pattern != 0 for i in range(layers)]


def vocabulary(data: ArchitectureMetadata) -> int:
    """The size of the vocabulary, by default the number of rows of the embedding.

    A wrong `vocab_size` in the file is found later, when the shapes of tensors are checked.
    """
    entry = data.file.entries.get("token_embd.weight")
    return data.integer("vocab_size", entry.shape[0] if entry is not None and entry.shape else None)


def require_length(data: ArchitectureMetadata, name: str, head_dim: int) -> None:
    """Raise UnsupportedError if the entry `name`, such as the width of a value head, is not `head_dim`."""
    found = data.integer(name, head_dim)
    if found != head_dim:
        raise UnsupportedError(
            f"{data.source}: {data.key(name)} is {found}, expected head_dim={head_dim} (nplora reads only "
            "models whose values are as wide as their keys, and which rotate all dimensions of a head)"
        )


def require_number(data: ArchitectureMetadata, name: str, value: float) -> None:
    """Raise UnsupportedError if an entry differs from `value`, the only value that nplora implements."""
    found = data.number(name, value)
    if found != value:
        raise UnsupportedError(
            f"{data.source}: {data.key(name)} is {found:g}, expected {value:g}, the only value nplora reads"
        )


def scaling_kind(data: ArchitectureMetadata) -> str:
    """The name of the rotation's scaling. The default is "linear"."""
    return data.string("rope.scaling.type", "linear")


def rope(data: ArchitectureMetadata, dim: int, theta: float) -> RopeConfig:
    """The rotation of `dim` values of each head. The default base of the angles is `theta`."""
    require_number(data, "rope.scaling.attn_factor", 1.0)
    factors = pair_factors(data.file, ROPE_FREQS, dim) if ROPE_FREQS in data.file else None
    return RopeConfig(base(data, theta), linear_factor(data), factors=factors)


def base(data: ArchitectureMetadata, theta: float) -> float:
    """The base of the rotation's angles. The default is `theta`."""
    return require_theta(data.source, data.number("rope.freq_base", theta))


def linear_factor(data: ArchitectureMetadata, *others: str) -> float:
    """The divisor of all rotation frequencies: `rope.scaling.factor` or, in old files, `rope.scale_linear`.

    Args:
        others: the names of scalings that the family supports in addition to "none" and "linear".
    Raises:
        UnsupportedError: the file names a scaling that the family does not support.
    """
    kind, known = scaling_kind(data), (*_KINDS, *others)
    if kind not in known:
        name, words = data.key("rope.scaling.type"), " or ".join(map(repr, known))
        raise UnsupportedError(f"{data.source}: {name} is {brief(kind)}, expected {words}")
    if kind == "none":
        return 1.0
    factor = data.number("rope.scaling.factor", data.number("rope.scale_linear", 1.0))
    if not 0 < factor < 1e30:
        raise FormatError(f"{data.source}: {data.key('rope.scaling.factor')} is {factor}, expected above 0")
    return factor


def pair_factors(file: GgufFile, name: str, dim: int) -> Array:
    """Read a tensor of frequency divisors, one for each of the `dim` / 2 rotated pairs of a head."""
    if name not in file:
        raise FormatError(f"{file.source}: tensor {name} is missing")
    tensor = file[name]
    if tensor.type != "F32" or tensor.shape != (dim // 2,):
        found = f"{tensor.type} {tensor.shape}, expected F32 {(dim // 2,)}"
        raise FormatError(f"{file.source}: tensor {name} is {found}")
    factors = tensor.numpy().astype(np.float64)
    if not ((factors > 0) & (factors < 1e30)).all():
        raise FormatError(f"{file.source}: tensor {name} holds a factor that is not between 0 and 1e30")
    return np.asarray(factors)
