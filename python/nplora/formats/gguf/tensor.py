"""A tensor of a GGUF file: its bytes, and what they mean."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from numpy.typing import NDArray

from nplora.formats.errors import UnsupportedError, brief
from nplora.formats.files import Chunk
from nplora.formats.gguf.ggml_types import GGML_TYPES, elements


@dataclass(frozen=True, eq=False)
class Stream:
    """A tensor to be saved whose bytes are made while the file is written, a few rows at a time.

    Attributes:
        type, shape: as in `Tensor`.
        chunks: called once; gives the bytes in their order.
    """

    type: str
    shape: tuple[int, ...]
    chunks: Callable[[], Iterable[Chunk]]


@dataclass(frozen=True, eq=False)
class Tensor:
    """The elements of a tensor as they lie in the file. Made by hand, it is what `save` takes for raw blocks.

    Attributes:
        name: its name in the file.
        type: ggml's name of the element type: "F32", "BF16", "Q4_0", ...
        shape: as NumPy has it, rows first: ggml's `ne` the other way round.
        data: the bytes as uint8; those of a file are read-only, and keep it mapped.
        offset: where the bytes begin in the file, if they come from one.
        source: the file, as messages name it.
    """

    name: str
    type: str
    shape: tuple[int, ...]
    data: NDArray[Any]
    offset: int | None = None
    source: str = "<memory>"

    @property
    def nbytes(self) -> int:
        return self.data.nbytes

    def numpy(self) -> NDArray[Any]:
        """The elements without a copy, read-only (BF16 as uint16 bit patterns).

        Raises:
            UnsupportedError: the type has no element of its own in NumPy: it is quantised.
        """
        dtype = GGML_TYPES[self.type].dtype
        if dtype is None:
            raise UnsupportedError(
                f"{self.source}: tensor {brief(self.name)} is {self.type}, which NumPy does not have; "
                "FrozenWeight.from_gguf reads the blocks that nplora decodes"
            )
        return elements(self.data.reshape(-1), dtype).reshape(self.shape)

    def __repr__(self) -> str:
        return f"Tensor({self.name!r}, {self.type}, {self.shape})"


@runtime_checkable
class HasTensor(Protocol):
    """What is saved as the tensor that it gives, as a `FrozenWeight` is."""

    def to_gguf(self, name: str) -> Tensor | Stream: ...
