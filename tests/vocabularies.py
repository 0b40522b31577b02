"""Small tokenizers as the metadata of GGUF files, made from parts."""

from typing import Any

import numpy as np

from nplora.formats import gguf
from nplora.formats.gguf import GgufFile, Typed


def byte_characters() -> dict[int, str]:
    """GPT-2's characters for the 256 bytes (Radford et al. 2019, encoder.py)."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = (byte for byte in range(256) if byte not in plain)
    return {byte: chr(byte) for byte in plain} | {byte: chr(256 + n) for n, byte in enumerate(others)}


BYTES = byte_characters()
MERGES = ["h e", "l l", "he ll", "hell o", "Ġ hello", "1 2", "12 3", "Ġ Ġ"]


def byte_level(**changes: Any) -> dict[str, Any]:
    """The metadata of a small byte-level model."""
    tokens = ["<|end|>", *BYTES.values(), *(merge.replace(" ", "") for merge in MERGES), "<tool>"]
    kinds = [3] + [1] * (len(tokens) - 2) + [4]
    values = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": Typed(kinds, "INT32"),
        "tokenizer.ggml.merges": MERGES,
        "tokenizer.ggml.eos_token_id": 0,
    }
    values |= {f"tokenizer.ggml.{key}": value for key, value in changes.items()}
    return {key: value for key, value in values.items() if value is not None}


PIECES = {
    "▁": -3.0,
    "a": -4.0,
    "b": -4.5,
    "ab": -2.0,
    "▁a": -1.5,
    "▁ab": -1.0,
    "ba": -2.5,
    "aba": -1.2,
    "n": -5.0,
}


def sentencepiece(**changes: Any) -> dict[str, Any]:
    """The metadata of a small SentencePiece model."""
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *PIECES]
    values = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.scores": np.array([0.0] * 259 + list(PIECES.values()), np.float32),
        "tokenizer.ggml.token_type": Typed([2, 3, 3] + [6] * 256 + [1] * len(PIECES), "INT32"),
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
    }
    values |= {f"tokenizer.ggml.{key}": value for key, value in changes.items()}
    return {key: value for key, value in values.items() if value is not None}


def opened(metadata: dict[str, Any]) -> GgufFile:
    typed = {key: Typed(value, "UINT32") if type(value) is int else value for key, value in metadata.items()}
    return gguf.loads(gguf.dumps({}, typed))
