"""A small random BERT, without torch: in the files of sentence-transformers, and in GGUF."""

import json
from pathlib import Path
from typing import Any

import numpy as np

from nplora.formats import gguf, safetensors

Array = np.ndarray[Any, Any]

WORDS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "cat", "dog", "and", "the", "sat", "##s",
         "##ting", "on", "mat", ".", "query", ":", "how", "do", "i", "return", "an", "order", "where", "is",
         "my", "parcel", "delivery", "refund", "late")  # fmt: skip
WIDTH, HIDDEN, LAYERS, HEADS, POSITIONS = 32, 64, 2, 4, 64


def config(**changes: Any) -> dict[str, Any]:
    return {
        "model_type": "bert",
        "vocab_size": len(WORDS),
        "hidden_size": WIDTH,
        "intermediate_size": HIDDEN,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "max_position_embeddings": POSITIONS,
        "type_vocab_size": 2,
        "layer_norm_eps": 1e-12,
        "hidden_act": "gelu",
        "pad_token_id": 0,
    } | changes


def tensors(seed: int = 0) -> dict[str, Array]:
    """Random tensors by transformers' names."""
    rng = np.random.default_rng(seed)
    linears = {"embeddings.word_embeddings": (len(WORDS), WIDTH),
               "embeddings.position_embeddings": (POSITIONS, WIDTH),
               "embeddings.token_type_embeddings": (2, WIDTH)}  # fmt: skip
    biases, norms = dict[str, int](), ["embeddings.LayerNorm"]
    for i in range(LAYERS):
        layer = f"encoder.layer.{i}"
        shapes = {f"attention.self.{part}": (WIDTH, WIDTH) for part in ("query", "key", "value")}
        shapes |= {"attention.output.dense": (WIDTH, WIDTH), "intermediate.dense": (HIDDEN, WIDTH)}
        shapes |= {"output.dense": (WIDTH, HIDDEN)}
        linears |= {f"{layer}.{name}": shape for name, shape in shapes.items()}
        biases |= {f"{layer}.{name}.bias": shape[0] for name, shape in shapes.items()}
        norms += [f"{layer}.attention.output.LayerNorm", f"{layer}.output.LayerNorm"]
    made = {
        f"{name}.weight": 0.25 * rng.standard_normal(shape, np.float32) for name, shape in linears.items()
    }
    made |= {name: 0.1 * rng.standard_normal(size, np.float32) for name, size in biases.items()}
    for norm in norms:
        made[f"{norm}.weight"] = 1 + 0.1 * rng.standard_normal(WIDTH, np.float32)
        made[f"{norm}.bias"] = 0.1 * rng.standard_normal(WIDTH, np.float32)
    return made


def tokenizer() -> dict[str, Any]:
    """A WordPiece tokenizer.json, which pads and cuts, as many files on the Hub do."""
    special = [
        {"id": i, "content": WORDS[i], "special": True, "normalized": False, "single_word": False,
         "lstrip": False, "rstrip": False}
        for i in range(5)
    ]  # fmt: skip
    names = {"[CLS]": 2, "[SEP]": 3}
    around = [{"SpecialToken": {"id": name, "type_id": 0}} for name in names]
    first = {"Sequence": {"id": "A", "type_id": 0}}
    return {
        "version": "1.0",
        "truncation": {"direction": "Right", "max_length": 5, "strategy": "LongestFirst", "stride": 0},
        "padding": {"strategy": {"Fixed": 9}, "direction": "Right", "pad_to_multiple_of": None, "pad_id": 0,
                    "pad_type_id": 0, "pad_token": "[PAD]"},
        "added_tokens": special,
        "normalizer": {"type": "BertNormalizer", "clean_text": True, "handle_chinese_chars": True,
                       "strip_accents": None, "lowercase": True},
        "pre_tokenizer": {"type": "BertPreTokenizer"},
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [around[0], first, around[1]],
            "pair": [around[0], first, around[1], {"Sequence": {"id": "B", "type_id": 1}}, around[1]],
            "special_tokens": {
                name: {"id": name, "ids": [id_], "tokens": [name]} for name, id_ in names.items()
            },
        },
        "decoder": {"type": "WordPiece", "prefix": "##", "cleanup": True},
        "model": {"type": "WordPiece", "unk_token": "[UNK]", "continuing_subword_prefix": "##",
                  "max_input_chars_per_word": 100, "vocab": {word: i for i, word in enumerate(WORDS)}},
    }  # fmt: skip


def modules(*kinds: str) -> list[dict[str, Any]]:
    """The entries of modules.json."""
    return [
        {"idx": i, "name": str(i), "path": "" if kind == "Transformer" else f"{i}_{kind}",
         "type": f"sentence_transformers.models.{kind}"}
        for i, kind in enumerate(kinds)
    ]  # fmt: skip


def save_small_encoder(directory: Path, pooling: str | None = "mean", **changes: Any) -> Path:
    """Write the model's files, with `changes` of config.json. Returns the directory.

    Args:
        pooling: the pooling that the files name, followed by a normalisation; None: no files of
            sentence-transformers.
    """
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(config(**changes)))
    (directory / "tokenizer.json").write_text(json.dumps(tokenizer()))
    safetensors.save(directory / "model.safetensors", tensors())
    if pooling is not None:
        (directory / "modules.json").write_text(json.dumps(modules("Transformer", "Pooling", "Normalize")))
        (directory / "1_Pooling").mkdir(exist_ok=True)
        flags = {
            "word_embedding_dimension": WIDTH,
            "pooling_mode_mean_tokens": False,
            f"pooling_mode_{pooling}": True,
        }
        if pooling in ("mean", "max", "cls"):
            name = "cls_token" if pooling == "cls" else f"{pooling}_tokens"
            flags = {"word_embedding_dimension": WIDTH, f"pooling_mode_{name}": True}
        (directory / "1_Pooling" / "config.json").write_text(json.dumps(flags))
        (directory / "sentence_bert_config.json").write_text(json.dumps({"max_seq_length": 32}))
    return directory


# ---- the same as a GGUF file ----

# Hugging Face's names of a block's layers and norms, and llama.cpp's.
_NAMES = {
    "attention.self.query": "attn_q",
    "attention.self.key": "attn_k",
    "attention.self.value": "attn_v",
    "attention.output.dense": "attn_output",
    "attention.output.LayerNorm": "attn_output_norm",
    "intermediate.dense": "ffn_up",
    "output.dense": "ffn_down",
    "output.LayerNorm": "layer_output_norm",
    "embeddings.word_embeddings": "token_embd",
    "embeddings.position_embeddings": "position_embd",
    "embeddings.token_type_embeddings": "token_types",
    "embeddings.LayerNorm": "token_embd_norm",
}


def gguf_name(name: str) -> str:
    layer, _, kind = name.rpartition(".")
    if layer.startswith("encoder.layer."):
        _, _, index, part = layer.split(".", 3)
        return f"blk.{index}.{_NAMES[part]}.{kind}"
    return f"{_NAMES[layer]}.{kind}"


def gguf_metadata(**changes: Any) -> dict[str, Any]:
    """The metadata of the small BERT. In `changes`, __ stands for a dot, and None removes an entry."""
    kinds = [3] * 5 + [1] * (len(WORDS) - 5)
    marked = [
        word if kind == 3 else word.removeprefix("##") if word.startswith("##") else f"▁{word}"
        for word, kind in zip(WORDS, kinds, strict=True)
    ]
    sizes = {
        "block_count": LAYERS, "context_length": POSITIONS, "embedding_length": WIDTH,
        "feed_forward_length": HIDDEN, "attention.head_count": HEADS, "pooling_type": 1,
    }  # fmt: skip
    entries: dict[str, Any] = {
        "general.architecture": "bert",
        **{f"bert.{name}": gguf.Typed(value, "UINT32") for name, value in sizes.items()},
        "bert.attention.layer_norm_epsilon": np.float32(1e-12),
        "bert.attention.causal": False,
        "tokenizer.ggml.model": "bert",
        "tokenizer.ggml.tokens": marked,
        "tokenizer.ggml.token_type": np.int32(kinds),
        "tokenizer.ggml.unknown_token_id": gguf.Typed(1, "UINT32"),
        "tokenizer.ggml.cls_token_id": gguf.Typed(2, "UINT32"),
        "tokenizer.ggml.seperator_token_id": gguf.Typed(3, "UINT32"),
    }
    entries |= {name.replace("__", "."): value for name, value in changes.items()}
    return {name: value for name, value in entries.items() if value is not None}


def save_gguf(path: Path, weights: dict[str, Array] | None = None, **changes: Any) -> Path:
    """Write the model as a GGUF file, as llama.cpp's converter does. Returns the path."""
    made = {gguf_name(name): array for name, array in (weights or tensors()).items()}
    gguf.save(path, made, gguf_metadata(**changes))
    return path
