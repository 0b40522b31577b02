"""The description of one tensor of a model, which families of decoders and of encoders list."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """A tensor of a model, in Hugging Face's files and in GGUF.

    Attributes:
        name, gguf: the tensor's name in Hugging Face's files, and in GGUF.
        heads: the number of heads if GGUF reorders the rows of each head (`formats.gguf_rows`), else 0.
        offset: a number to add to the values of Hugging Face's files; GGUF files store the sums.
    """

    name: str
    gguf: str
    shape: tuple[int, ...]
    heads: int = 0
    offset: float = 0.0
