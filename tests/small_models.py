"""Small random models as files, without torch. Tests can change metadata and tensors before writing them."""

from pathlib import Path
from typing import Any

import numpy as np

import nplora
from nplora.formats import gguf, safetensors
from nplora.lm import LanguageModel

Array = np.ndarray[Any, Any]

# The `model_type` of families that transformers does not know. They have tests of their own in tests/models.
UNKNOWN_TO_TRANSFORMERS: tuple[str, ...] = ()
VOCAB, WIDTH, HIDDEN, LAYERS, HEADS, KV_HEADS = 60, 32, 64, 3, 4, 2
DIM = WIDTH // HEADS


def tensors(seed: int = 0) -> dict[str, Array]:
    """Tensors by GGUF name, with rows in Hugging Face's order. Random rows need no permutation."""
    rng = np.random.default_rng(seed)
    shapes = {"token_embd.weight": (VOCAB, WIDTH), "output.weight": (VOCAB, WIDTH)}
    for i in range(LAYERS):
        shapes |= {
            f"blk.{i}.attn_q.weight": (WIDTH, WIDTH),
            f"blk.{i}.attn_k.weight": (KV_HEADS * DIM, WIDTH),
            f"blk.{i}.attn_v.weight": (KV_HEADS * DIM, WIDTH),
            f"blk.{i}.attn_output.weight": (WIDTH, WIDTH),
            f"blk.{i}.ffn_gate.weight": (HIDDEN, WIDTH),
            f"blk.{i}.ffn_up.weight": (HIDDEN, WIDTH),
            f"blk.{i}.ffn_down.weight": (WIDTH, HIDDEN),
        }
    made = {name: 0.25 * rng.standard_normal(shape, np.float32) for name, shape in shapes.items()}
    for norm in ("output_norm", *(f"blk.{i}.{part}_norm" for i in range(LAYERS) for part in ("attn", "ffn"))):
        made[f"{norm}.weight"] = 1 + 0.1 * rng.standard_normal(WIDTH, np.float32)
    return made


def metadata(**changes: Any) -> dict[str, Any]:
    """The metadata of a Llama model. In `changes`, __ stands for a dot, and None removes an entry."""
    entries: dict[str, Any] = {
        "general.architecture": "llama",
        "llama.block_count": LAYERS,
        "llama.context_length": 128,
        "llama.embedding_length": WIDTH,
        "llama.feed_forward_length": HIDDEN,
        "llama.attention.head_count": HEADS,
        "llama.attention.head_count_kv": KV_HEADS,
        "llama.attention.layer_norm_rms_epsilon": 1e-5,
        "llama.rope.freq_base": 10000.0,
    }
    entries |= {name.replace("__", "."): value for name, value in changes.items()}
    return {name: value for name, value in entries.items() if value is not None}


def write(path: Path, entries: dict[str, Any] | None = None, weights: dict[str, Any] | None = None) -> Path:
    types: dict[type, str] = {int: "INT32", float: "FLOAT32"}
    typed = {
        name: gguf.Typed(value, types[type(value)]) if type(value) in types else value
        for name, value in (entries or metadata()).items()
    }
    gguf.save(path, weights or tensors(), typed)
    return path


def load(directory: Path, **options: Any) -> LanguageModel:
    return nplora.load_model(write(directory / "small.gguf"), **options)


def config(**changes: Any) -> dict[str, Any]:
    """A config.json with the same sizes."""
    return {
        "model_type": "llama",
        "vocab_size": VOCAB,
        "hidden_size": WIDTH,
        "intermediate_size": HIDDEN,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "max_position_embeddings": 128,
        "rms_norm_eps": 1e-5,
        "hidden_act": "silu",
    } | changes


def hf_tensors() -> dict[str, Array]:
    names = {
        "token_embd": "model.embed_tokens", "output": "lm_head", "output_norm": "model.norm",
        "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj",
        "attn_output": "self_attn.o_proj", "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj",
        "ffn_down": "mlp.down_proj", "attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm",
    }  # fmt: skip
    made = {}
    for name, array in tensors().items():
        parts = name.split(".")
        layer = f"model.layers.{parts[1]}." if parts[0] == "blk" else ""
        made[f"{layer}{names[parts[-2]]}.weight"] = array
    return made


def write_tensors(path: Path, weights: dict[str, Array]) -> None:
    safetensors.save(path, weights)
