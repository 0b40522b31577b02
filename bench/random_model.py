"""Llama models with random weights, as GGUF files, in sizes for which no real model is at hand."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from bench.nodes import MODELS, Llama
from nplora import FrozenWeight
from nplora.formats import gguf
from nplora.formats.gguf import Typed

Tensor = Any  # whatever gguf.save accepts

LARGE = next(model for model in MODELS if model.name == "Llama-3.1-8B")
WIDE = Llama("random-0.5B", 8, 2048, 5632, 32, 8, 64, 49152)
OUTLIERS, OUTLIER = 6, 40.0  # channels of every norm with a large weight, and this weight
Q4_K_VALUES, Q4_K_BYTES = 256, 144
PARTS = ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down")


def write_large(path: Path) -> Path:
    """A model with the shape of Llama 3.1 8B. All its matrices are made of the same random Q4_K blocks."""
    rng = np.random.default_rng(0)
    blocks = LARGE.vocabulary * LARGE.hidden // Q4_K_VALUES
    raw = rng.integers(0, 256, (blocks, Q4_K_BYTES), np.uint8)
    # A value is d s q - dmin m with 6-bit s and m, and 4-bit q. These factors give a mean near 0.
    raw[:, :4] = np.array([6e-5, 6e-5 * 7.5], np.float16).view(np.uint8)

    def matrix(name: str, d_out: int, d_in: int) -> Tensor:
        return gguf.Tensor(name, "Q4_K", (d_out, d_in), raw[: d_out * d_in // Q4_K_VALUES].reshape(-1))

    return _write(path, LARGE, matrix, np.ones(LARGE.hidden, np.float32), {})


def write_wide(path: Path, tokenizer: Path) -> Path:
    """A model of half a billion parameters in Q8_0. A few channels of its activations are outliers.

    Args:
        tokenizer: a GGUF file whose tokenizer the model gets.
    """
    rng = np.random.default_rng(0)
    norm = np.ones(WIDE.hidden, np.float32)
    norm[rng.choice(WIDE.hidden, OUTLIERS, replace=False)] = OUTLIER

    def matrix(name: str, d_out: int, d_in: int) -> Tensor:
        values = rng.standard_normal((d_out, d_in), np.float32) / np.float32(np.sqrt(d_in))
        return FrozenWeight(values, "q8_0")

    words = {
        key: value for key, value in gguf.open(tokenizer).metadata.items() if key.startswith("tokenizer.")
    }
    typed = {key: Typed(value, "UINT32") if type(value) is int else value for key, value in words.items()}
    return _write(path, WIDE, matrix, norm, typed)


def _write(
    path: Path,
    shape: Llama,
    matrix: Callable[[str, int, int], Tensor],
    norm: np.ndarray,
    metadata: dict[str, Any],
) -> Path:
    shapes = dict.fromkeys(("token_embd", "output"), (shape.vocabulary, shape.hidden))
    norms = ["output_norm"]
    for i in range(shape.layers):
        shapes |= {f"blk.{i}.{part}": sizes for part, sizes in zip(PARTS, shape.shapes, strict=True)}
        norms += [f"blk.{i}.attn_norm", f"blk.{i}.ffn_norm"]
    tensors = {f"{name}.weight": matrix(f"{name}.weight", *sizes) for name, sizes in shapes.items()}
    tensors |= {f"{name}.weight": norm for name in norms}
    sizes = {
        "block_count": shape.layers,
        "context_length": 8192,
        "embedding_length": shape.hidden,
        "feed_forward_length": shape.inner,
        "attention.head_count": shape.heads,
        "attention.head_count_kv": shape.kv_heads,
        "vocab_size": shape.vocabulary,
    }
    metadata = {
        "general.architecture": "llama",
        **{f"llama.{key}": Typed(value, "UINT32") for key, value in sizes.items()},
        "llama.attention.layer_norm_rms_epsilon": Typed(1e-5, "FLOAT32"),
        **metadata,
    }
    gguf.save(path, tensors, metadata)
    return path
