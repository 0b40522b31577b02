"""A model's tensors, from GGUF or safetensors, checked before any tensor is used."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from nplora.formats import bfloat16, bitsandbytes
from nplora.formats.errors import FormatError, UnsupportedError, brief, counted, in_places, nearest_names
from nplora.formats.files import Stamp
from nplora.formats.gguf import GgufFile
from nplora.formats.safetensors import SafetensorsFile
from nplora.formats.sharded import ShardedFile
from nplora.models import families
from nplora.models.config import ModelConfig
from nplora.models.families import TensorSpec
from nplora.weights import FrozenWeight, storages
from nplora.weights.nonfinite import require_finite

Array = npt.NDArray[Any]

_MOST_HINTS = 20  # the maximum number of hints in a message, because each hint is a slow search


class Weights(Protocol):
    """A source of a model's tensors.

    Attributes:
        mapped: the size and the time stamp of each memory-mapped file, to detect later changes.
    """

    source: str
    mapped: tuple[Stamp, ...]

    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """The shapes of all tensors, by their names in the file."""

    def stored(self, tensor: TensorSpec) -> str:
        """The name of a tensor in the file."""

    def unused(self, config: ModelConfig) -> frozenset[str]:
        """The names of tensors that the file may contain, but that the model does not use."""

    def matrix(self, tensor: TensorSpec) -> FrozenWeight:
        """Return a matrix in the storage format of the file, except that float64 is converted to float32.

        Raises:
            FormatError: a value, or the scale of a quantised block, is NaN or infinite. Only weights that
                were opened with check=True raise this error.
        """

    def vector(self, tensor: TensorSpec) -> Array:
        """Return a vector as float32. Raises FormatError if a value is not finite."""


def require_tensors(weights: Weights, config: ModelConfig) -> None:
    """Check that the file holds all tensors of the model with the right shapes, and no other tensors.

    An unexpected tensor, for example a bias, means that the configuration describes another model. If the
    tensor were ignored, the outputs would look plausible but be wrong.

    Raises:
        FormatError: the tensors do not match. The message lists all problems, and similar names for missing
            tensors.
    """
    tensors, unused = families.of(config).tensors(config), weights.unused(config)
    require_fitting(weights, config.model_type, tensors, unused.__contains__)


def require_fitting(
    weights: Weights, model_type: str, tensors: Iterable[TensorSpec], is_unused: Callable[[str], bool]
) -> None:
    """Check that a file holds `tensors` with the right shapes, and that the model ignores all other tensors.

    Args:
        is_unused: a function that returns whether the model ignores a tensor of the file.
    Raises:
        FormatError: as in `require_tensors`.
    """
    found, wanted = weights.shapes(), {weights.stored(tensor): tensor.shape for tensor in tensors}
    problems: list[str] = []
    for name, shape in wanted.items():
        if name not in found:
            near = nearest_names(name, found) if len(problems) < _MOST_HINTS else []
            hint = f", the nearest names: {', '.join(near)}" if near else ""
            problems.append(f"tensor {brief(name)} is missing{hint}")
        elif found[name] != shape:
            problems.append(f"tensor {brief(name)} has shape {found[name]}, expected {shape}")
    left = [name for name in found.keys() - wanted.keys() if not is_unused(name)]
    problems += [f"tensor {brief(name)} is not used by {model_type}" for name in sorted(left)]
    if problems:
        raise FormatError(f"{weights.source}: the tensors do not fit the model {in_places(problems)}")


def require_decoded(file: GgufFile) -> None:
    """Check that nplora can read all tensor types of a file.

    Raises:
        UnsupportedError: nplora cannot read some types; the message lists all tensors of these types.
    """
    known, unknown = storages.GGML_NAMES.values(), dict[str, list[str]]()
    for name, entry in file.entries.items():
        if entry.type.name not in known:
            unknown.setdefault(entry.type.name, []).append(brief(name))
    if unknown:
        raise UnsupportedError(
            f"{file.source}: tensors have types that nplora does not read, expected {', '.join(known)}:"
            + "".join(
                f"\n  {kind}, {counted(len(names), 'tensor')}: {', '.join(names)}"
                for kind, names in unknown.items()
            )
        )


class GgufWeights:
    """The tensors of a memory-mapped GGUF file. Matrices are not copied.

    Args:
        elsewhere: the names of further tensors that the file may contain. The caller reads these tensors.
    """

    def __init__(
        self, file: GgufFile, compute: str, check: bool = True, elsewhere: Iterable[str] = ()
    ) -> None:
        self.source, self.mapped = file.source, file.mapped
        self._elsewhere = frozenset(elsewhere)
        self._file, self._compute, self._check = file, compute, check

    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        return {name: entry.shape for name, entry in self._file.entries.items()}

    def stored(self, tensor: TensorSpec) -> str:
        return tensor.gguf

    def unused(self, config: ModelConfig) -> frozenset[str]:
        # The tensors of the rotation are read with the configuration.
        return families.of(config).rope_tensors | self._elsewhere

    def matrix(self, tensor: TensorSpec) -> FrozenWeight:
        stored = self._file[tensor.gguf]
        if self._check:
            require_finite(self.source, stored)
        if stored.type == "F64":
            return FrozenWeight(stored.numpy(), "float32", self._compute)
        return FrozenWeight.from_gguf(self._file, stored.name, self._compute)

    def vector(self, tensor: TensorSpec) -> Array:
        stored = self._file[tensor.gguf]
        dtype = storages.GGML_FLOATS.get(stored.type, stored.type)
        return _floats(self.source, stored.name, dtype, stored.numpy())


class SafetensorsWeights:
    """The tensors of one or several memory-mapped safetensors files. Matrices are not copied.

    Args:
        stored: a function from Hugging Face's name of a tensor to the tensor's name in the file. None: the
            names are equal.
    """

    def __init__(
        self,
        file: SafetensorsFile | ShardedFile,
        compute: str,
        check: bool = True,
        stored: Callable[[str], str] | None = None,
    ) -> None:
        self.source, self.mapped, self._stored = file.source, file.mapped, stored
        self._file, self._compute, self._check = file, compute, check

    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        parts = bitsandbytes.parts(self._file)
        return {name: self._shape(name) for name in self._file if name not in parts}

    def _shape(self, name: str) -> tuple[int, ...]:
        if bitsandbytes.holds(self._file, name):
            return bitsandbytes.shape(self._file, name)
        return self._file[name].shape

    def stored(self, tensor: TensorSpec) -> str:
        return tensor.name if self._stored is None else self._stored(tensor.name)

    def unused(self, config: ModelConfig) -> frozenset[str]:
        """The names of tensors that are ignored: rotation frequencies in old files; and the head's weight,
        if the head shares the embedding's weight."""
        layers = range(config.num_hidden_layers)
        names = {f"model.layers.{i}.self_attn.rotary_emb.inv_freq" for i in layers}
        return frozenset(names | ({"lm_head.weight"} if config.tie_word_embeddings else set()))

    def matrix(self, tensor: TensorSpec) -> FrozenWeight:
        stored = self._file[self.stored(tensor)]
        if self._check:
            require_finite(self.source, stored)
        if stored.dtype == "float64":
            return FrozenWeight(stored.array, "float32", self._compute)
        return FrozenWeight.from_safetensors(self._file, stored.name, self._compute)

    def vector(self, tensor: TensorSpec) -> Array:
        stored = self._file[self.stored(tensor)]
        values = _floats(self.source, stored.name, stored.dtype, stored.array)
        return values + np.float32(tensor.offset) if tensor.offset else values

    def array(self, name: str) -> Array | None:
        """Return a float32 copy of a tensor, or None if the file has no tensor with this name."""
        if name not in self._file:
            return None
        stored = self._file[name]
        return _floats(self.source, name, stored.dtype, stored.array)


def _floats(source: str, name: str, dtype: str, array: Array) -> Array:
    """Copy an array to float32."""
    where = f"{source}: tensor {brief(name)}"
    if dtype not in storages.FLOATS:
        raise UnsupportedError(f"{where} is {dtype}, expected one of {', '.join(storages.FLOATS)}")
    with np.errstate(over="ignore"):
        values = np.array(bfloat16.widen(array) if dtype == "bfloat16" else array, np.float32)
    if not np.isfinite(values).all():
        raise FormatError(f"{where} holds NaN or an infinity")
    return values
