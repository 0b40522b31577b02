"""The metadata about a file's tensor types: the most common type, and the version of the block layouts."""

from collections import Counter
from collections.abc import Mapping
from math import prod
from typing import Protocol

from nplora.formats.gguf.ggml_types import GGML_TYPES
from nplora.formats.gguf.metadata import Typed

FILE_TYPE = "general.file_type"

# The numbers are those of llama.cpp's enum llama_ftype.
_NUMBERS = {
    "F32": 0, "F16": 1, "Q4_0": 2, "Q4_1": 3, "Q8_0": 7, "Q5_0": 8, "Q5_1": 9, "Q2_K": 10, "Q3_K": 11,
    "Q4_K": 14, "Q5_K": 16, "Q6_K": 18, "IQ2_XXS": 19, "IQ2_XS": 20, "IQ3_XXS": 23, "IQ1_S": 24, "IQ4_NL": 25,
    "IQ3_S": 26, "IQ2_S": 28, "IQ4_XS": 30, "IQ1_M": 31, "BF16": 32, "TQ1_0": 36, "TQ2_0": 37,
}  # fmt: skip
_QUANTIZATION_VERSION = 2  # the current version of ggml's block layouts


class _Tensor(Protocol):
    @property
    def type(self) -> str: ...
    @property
    def shape(self) -> tuple[int, ...]: ...


def main_type(tensors: Mapping[str, _Tensor]) -> str:
    """The type that most elements are stored in. `tensors` must not be empty."""
    elements = Counter[str]()
    for tensor in tensors.values():
        elements[tensor.type] += prod(tensor.shape)
    return elements.most_common(1)[0][0]


def describe(tensors: Mapping[str, _Tensor]) -> dict[str, Typed]:
    """Make the metadata entries about the types of `tensors`.

    If llama.cpp's enum llama_ftype has no number for the main type, there is no entry `general.file_type`.
    """
    number = _NUMBERS.get(main_type(tensors))
    entries = {} if number is None else {FILE_TYPE: Typed(number, "UINT32")}
    if any(GGML_TYPES[tensor.type].dtype is None for tensor in tensors.values()):
        entries["general.quantization_version"] = Typed(_QUANTIZATION_VERSION, "UINT32")
    return entries


def redescribe(
    metadata: dict[str, Typed], before: Mapping[str, _Tensor], after: Mapping[str, _Tensor]
) -> dict[str, Typed]:
    """Return a file's metadata, updated for tensors that changed their types from `before` to `after`."""
    if all(before[name].type == tensor.type for name, tensor in after.items()):
        return metadata
    if main_type(before) == main_type(after):
        return describe(after) | metadata  # a mixture such as Q4_K_M keeps its file type
    return {key: value for key, value in metadata.items() if key != FILE_TYPE} | describe(after)
