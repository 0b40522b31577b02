"""A Llama with random weights and a byte-level tokenizer, as a GGUF file."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from nplora.formats import gguf
from nplora.formats.gguf import Typed
from nplora.weights import storages
from vocabularies import byte_level

HIDDEN, FFN, HEADS, BLOCKS, CONTEXT = 32, 64, 4, 2, 64


def save_small_llama(
    path: Path,
    storage: str = "float32",
    without: str = "",
    changes: dict[str, Any] | None = None,
    vocab: int | None = None,
    edit: Callable[[dict[str, Any]], None] | None = None,
) -> Path:
    """Write the model. Its output is random, and it learns fast.

    Args:
        storage: the storage of its matrices.
        without: a tensor to leave out.
        changes: metadata that replace its own.
        vocab: the number of rows of its embedding, if it differs from the tokenizer's.
        edit: a function that changes the tensors.
    """
    rng = np.random.default_rng(1)
    vocabulary = byte_level() | {
        "tokenizer.chat_template": "{% for m in messages %}{{ m.content }}{% endfor %}"
    }
    vocab = vocab or len(vocabulary["tokenizer.ggml.tokens"])
    sizes = {
        "block_count": BLOCKS,
        "context_length": CONTEXT,
        "embedding_length": HIDDEN,
        "feed_forward_length": FFN,
        "attention.head_count": HEADS,
        "attention.head_count_kv": HEADS,
        "vocab_size": vocab,
    }
    metadata = {
        "general.architecture": "llama",
        **{f"llama.{key}": Typed(value, "UINT32") for key, value in sizes.items()},
        "llama.attention.layer_norm_rms_epsilon": Typed(1e-5, "FLOAT32"),
        **vocabulary,
        "tokenizer.ggml.eos_token_id": Typed(0, "UINT32"),
    }
    square, up, down = (HIDDEN, HIDDEN), (FFN, HIDDEN), (HIDDEN, FFN)
    shapes: dict[str, tuple[int, ...]] = {"token_embd": (vocab, HIDDEN), "output": (vocab, HIDDEN)}
    for i in range(BLOCKS):
        shapes |= {f"blk.{i}.attn_{part}": square for part in ("q", "k", "v", "output")}
        shapes |= {f"blk.{i}.ffn_gate": up, f"blk.{i}.ffn_up": up, f"blk.{i}.ffn_down": down}
    tensors: dict[str, Any] = {
        f"{name}.weight": rng.standard_normal(shape, dtype=np.float32) / np.float32(np.sqrt(shape[1]))
        for name, shape in shapes.items()
    }
    for name, matrix in tensors.items() if storage != "float32" else ():
        raw = storages.encode(matrix, storage).reshape(-1)
        tensors[name] = gguf.Tensor(name, storages.GGML_NAMES[storage], matrix.shape, raw)
    norms = ["output_norm", *(f"blk.{i}.{part}_norm" for i in range(BLOCKS) for part in ("attn", "ffn"))]
    tensors |= {f"{name}.weight": np.ones(HIDDEN, np.float32) for name in norms}
    tensors.pop(without, None)
    if edit is not None:
        edit(tensors)
    gguf.save(path, tensors, metadata | (changes or {}))
    return path
