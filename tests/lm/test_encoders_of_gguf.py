"""Encoders from GGUF files, written as llama.cpp's converter writes them."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import nplora
from nplora.formats import gguf
from nplora.formats.errors import FormatError, UnsupportedError
from small_encoder import HEADS, HIDDEN, LAYERS, POSITIONS, WIDTH, WORDS, save_small_encoder, tensors

pytest.importorskip("tokenizers")

Array = np.ndarray[Any, Any]
TEXTS = ["a cat", "the dogs sat on the mat .", "Where is my PARCEL"]

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


def metadata(**changes: Any) -> dict[str, Any]:
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


def write(path: Path, weights: dict[str, Array] | None = None, **changes: Any) -> Path:
    made = {gguf_name(name): array for name, array in (weights or tensors()).items()}
    gguf.save(path, made, metadata(**changes))
    return path


def test_an_encoder_from_gguf_is_that_of_the_directory(tmp_path: Path) -> None:
    ours = nplora.load_encoder(write(tmp_path / "model.gguf"))
    theirs = nplora.load_encoder(save_small_encoder(tmp_path / "model"))
    assert ours.encode(TEXTS) == theirs.encode(TEXTS)
    assert ours.pooling.modes == ("mean",)
    np.testing.assert_allclose(ours.embed(TEXTS), theirs.embed(TEXTS), atol=1e-6)
    assert ours.tokenizer.decode(ours.encode(["the dogs sat"])[0], skip_special_tokens=True) == "the dogs sat"


@pytest.mark.parametrize(("kind", "mode"), [(2, "cls"), (3, "last")])
def test_the_pooling_of_the_metadata_is_used(kind: int, mode: str, tmp_path: Path) -> None:
    path = write(tmp_path / "model.gguf", bert__pooling_type=gguf.Typed(kind, "UINT32"))
    assert nplora.load_encoder(path).pooling.modes == (mode,)


def test_old_files_name_cls_and_sep_only_in_their_tokens(tmp_path: Path) -> None:
    old = {"tokenizer.ggml.cls_token_id": None, "tokenizer.ggml.seperator_token_id": None}
    path = write(tmp_path / "model.gguf", **old)
    wanted = nplora.load_encoder(write(tmp_path / "new.gguf")).encode(TEXTS)
    assert nplora.load_encoder(path).encode(TEXTS) == wanted


def test_what_a_file_cannot_be_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "model.gguf", bert__attention__causal=True)
    with pytest.raises(UnsupportedError, match=r"bert\.attention\.causal is set, expected an encoder"):
        nplora.load_encoder(path)
    with pytest.raises(UnsupportedError, match=r"'bert', .*nplora\.load_encoder reads"):
        nplora.load_model(path)
    kept = tensors()
    del kept["encoder.layer.1.output.dense.bias"]
    with pytest.raises(FormatError, match=r"'blk\.1\.ffn_down\.bias' is missing"):
        nplora.load_encoder(write(path, kept))


@pytest.mark.parametrize("name", ["$A", "$B", "$7", "$", "a:b", "x:9", "[CLS]:1"])
def test_any_token_may_be_the_one_before_a_text(name: str, tmp_path: Path) -> None:
    words = list(metadata()["tokenizer.ggml.tokens"])
    words[2] = name
    write(tmp_path / "model.gguf", tokenizer__ggml__tokens=words)
    assert nplora.load_encoder(tmp_path / "model.gguf").encode(["a cat"]) == [[2, 5, 6, 3]]


@pytest.mark.parametrize("number", [4, 9])
def test_a_pooling_that_is_not_known_is_refused(number: int, tmp_path: Path) -> None:
    write(tmp_path / "model.gguf", bert__pooling_type=gguf.Typed(number, "UINT32"))
    with pytest.raises(UnsupportedError, match=f"pooling_type is {number}, expected 0"):
        nplora.load_encoder(tmp_path / "model.gguf")
