"""TensorSpec: describes one tensor of a model. A family lists all tensors of a model in this form."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """A tensor of a model, in Hugging Face's files and in GGUF.

    Attributes:
        name, gguf: the tensor's name in Hugging Face's files, and in GGUF.
        heads: the number of heads if GGUF reorders the rows of each head (`formats.gguf_rows`), else 0.
        offset: a number that must be added to values from Hugging Face's files. GGUF files store the values
            after the addition.
    """

    name: str
    gguf: str
    shape: tuple[int, ...]
    heads: int = 0
    offset: float = 0.0
