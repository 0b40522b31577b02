"""GGUF's names for the layers of a language model, and the order in which it stores the rows of some.

Hugging Face's files, and PEFT's adapters for them, say "model.layers.3.self_attn.q_proj"; GGUF says
"blk.3.attn_q". Source: llama.cpp's gguf-py/gguf/tensor_mapping.py and convert_hf_to_gguf.py.
"""

import re
from typing import Any

import numpy as np
from numpy.typing import NDArray

# Hugging Face's model_type: GGUF's architecture.
ARCHITECTURES = {"llama": "llama", "mistral": "llama", "qwen2": "qwen2", "qwen3": "qwen3"}

TOKEN_EMBEDDING = "token_embd"

_OUTSIDE = {"model.embed_tokens": TOKEN_EMBEDDING, "lm_head": "output"}
_IN_A_LAYER = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
_NORMS = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
}
_OUTSIDE_BACK = {theirs: name for name, theirs in _OUTSIDE.items()}
_IN_A_LAYER_BACK = {theirs: name for name, theirs in _IN_A_LAYER.items()}
_LAYER = re.compile(r"model\.layers\.(0|[1-9][0-9]{0,5})\.(.+)")
_BLOCK = re.compile(r"blk\.(0|[1-9][0-9]{0,5})\.(.+)")


def to_gguf(name: str) -> str | None:
    """GGUF's name of a linear layer or embedding that has Hugging Face's name; None if it has none."""
    match = _LAYER.fullmatch(name)
    if match is None:
        return _OUTSIDE.get(name)
    layer = _IN_A_LAYER.get(match[2])
    return None if layer is None else f"blk.{match[1]}.{layer}"


def tensor_to_gguf(name: str) -> str | None:
    """GGUF's name of any tensor, of "model.layers.0.input_layernorm.weight" say; None if it has none."""
    layer, _, kind = name.rpartition(".")
    match = _LAYER.fullmatch(layer)
    norm = "output_norm" if layer == "model.norm" else None
    if match is not None and match[2] in _NORMS:
        norm = f"blk.{match[1]}.{_NORMS[match[2]]}"
    stored = norm or to_gguf(layer)
    return None if stored is None else f"{stored}.{kind}"


def from_gguf(name: str) -> str | None:
    """The other way round."""
    match = _BLOCK.fullmatch(name)
    if match is None:
        return _OUTSIDE_BACK.get(name)
    layer = _IN_A_LAYER_BACK.get(match[2])
    return None if layer is None else f"model.layers.{match[1]}.{layer}"


def is_permuted(architecture: str, name: str) -> bool:
    """Whether GGUF stores the rows of a layer, by its name there, in another order than Hugging Face.

    Architecture llama rotates neighbouring rows of a head of q and k together; Hugging Face, and the other
    architectures, row i and row half + i.
    """
    return architecture == "llama" and name.rpartition(".")[2] in ("attn_q", "attn_k")


def interleave(rows: NDArray[Any], heads: int) -> NDArray[Any]:
    """Rows (heads * 2 * half, d) in the order of llama: in each head, i to 2 i and half + i to 2 i + 1."""
    half = len(rows) // heads // 2
    return rows.reshape(heads, 2, half, rows.shape[1]).swapaxes(1, 2).reshape(rows.shape)


def row_order(rows: int, heads: int) -> NDArray[Any]:
    """The numbers of Hugging Face's rows in the order of llama."""
    return interleave(np.arange(rows)[:, None], heads)[:, 0]


def deinterleave(rows: NDArray[Any], heads: int) -> NDArray[Any]:
    """The other way round."""
    half = len(rows) // heads // 2
    return rows.reshape(heads, half, 2, rows.shape[1]).swapaxes(1, 2).reshape(rows.shape)
