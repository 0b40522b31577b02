"""Converts between the factors A and B of nplora and the factors of PEFT and llama.cpp.

In nplora, the update is scale · A B, with A of shape (d_out, r) and B of shape (r, d_in). The LoRA paper,
PEFT and llama.cpp swap the names A and B:

    here             PEFT, a linear layer       PEFT, an embedding
    A (d_out, r)     lora_B (d_out, r)          lora_embedding_A (r, vocab), transposed
    B (r, d_in)      lora_A (r, d_in)           lora_embedding_B (dim, r), transposed
"""

from typing import Any

from numpy.typing import NDArray

Array = NDArray[Any]


def from_peft(lora_a: Array, lora_b: Array, embedding: bool) -> tuple[Array, Array]:
    """Convert lora_A and lora_B to A and B."""
    return (lora_a.T, lora_b.T) if embedding else (lora_b, lora_a)


def to_peft(a: Array, b: Array, embedding: bool) -> tuple[Array, Array]:
    """Convert A and B to lora_A and lora_B."""
    return (a.T, b.T) if embedding else (b, a)


def weight_shape(lora_a: tuple[int, ...], lora_b: tuple[int, ...], embedding: bool) -> tuple[int, int]:
    """Derive the weight's shape (d_out, d_in) from the shapes of lora_A and lora_B."""
    return (lora_a[1], lora_b[0]) if embedding else (lora_b[0], lora_a[1])
