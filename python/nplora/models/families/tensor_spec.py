"""TensorSpec: describes one tensor of a model. A family lists all tensors of a model in this form."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """A tensor of a model, in Hugging Face's files and in GGUF.

    Attributes:
        name, gguf: the tensor's name in Hugging Face's files, and in GGUF.
        heads: the number of heads if GGUF reorders the rows within each head (see `formats.gguf_rows`); 0 if
            the rows have the same order in both files.
        offset: nplora adds this number to the values from Hugging Face's files. The values in GGUF files
            already contain it.
    """

    name: str
    gguf: str
    shape: tuple[int, ...]
    heads: int = 0
    offset: float = 0.0
