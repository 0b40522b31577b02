"""A tensor of a GGUF file: its bytes with their type and shape."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from numpy.typing import NDArray

from nplora.formats.errors import UnsupportedError, brief
from nplora.formats.files import Chunk
from nplora.formats.gguf.ggml_types import GGML_TYPES, elements


@dataclass(frozen=True, eq=False)
class Stream:
    """A tensor whose bytes are produced while the file is written, a few rows at a time.

    Attributes:
        type, shape: ggml's name of the element type, and the shape in NumPy's order.
        chunks: a function that returns an iterable of byte strings, which are the tensor's bytes in order.
            The writer calls this function once.

    >>> from nplora.formats import gguf
    >>> zeros = gguf.Stream("F32", (2, 3), lambda: [bytes(12), bytes(12)])
    >>> gguf.loads(gguf.dumps({"w": zeros}))["w"].numpy().tolist()
    [[0.0, 0.0, 0.0], [0.0, 0.0, 0.0]]
    """

    type: str
    shape: tuple[int, ...]
    chunks: Callable[[], Iterable[Chunk]]


@dataclass(frozen=True, eq=False)
class Tensor:
    """A tensor's bytes, as a file stores them, with the tensor's name, type and shape. `gguf.save` writes the
    bytes unchanged.

    Attributes:
        name: the tensor's name in the file.
        type: ggml's name of the element type: "F32", "BF16", "Q4_0", ...
        shape: the shape in NumPy's order, which is the reverse of ggml's `ne`.
        data: the elements' bytes as uint8. Bytes from a file are read-only and keep the file mapped.
        offset: the position of the bytes in the file; None if the tensor does not come from a file.
        source: the file's name in error messages.

    >>> import nplora
    >>> weight = nplora.FrozenWeight(np.ones((2, 32), np.float32), dtype="q8_0")
    >>> tensor = weight.to_gguf("w")
    >>> tensor, tensor.nbytes
    (Tensor('w', Q8_0, (2, 32)), 68)
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
        """View the elements as a read-only array, without a copy. BF16 elements become uint16 bit patterns.

        Raises:
            UnsupportedError: the type is quantised, so NumPy has no element type for it.

        >>> from nplora.formats import gguf
        >>> gguf.loads(gguf.dumps({"w": np.arange(3, dtype=np.float32)}))["w"].numpy()
        array([0., 1., 2.], dtype=float32)
        """
        dtype = GGML_TYPES[self.type].dtype
        if dtype is None:
            raise UnsupportedError(
                f"{self.source}: tensor {brief(self.name)} has type {self.type}, which NumPy does not have; "
                "FrozenWeight.from_gguf reads the quantised types that nplora supports"
            )
        return elements(self.data.reshape(-1), dtype).reshape(self.shape)

    def __repr__(self) -> str:
        return f"Tensor({self.name!r}, {self.type}, {self.shape})"


@runtime_checkable
class HasTensor(Protocol):
    """An object that can be saved as a GGUF tensor, such as a `FrozenWeight`."""

    def to_gguf(self, name: str) -> Tensor | Stream: ...
