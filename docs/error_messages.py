"""Real messages for the page about errors: each function here makes a mistake, and nplora reports it."""

import contextlib
import importlib
import json
import struct
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

import nplora
from nplora.distributed.farewell import Farewell
from nplora.formats import gguf, safetensors

Mistake = Callable[[], object]

_PUBLIC = ("nplora", "nplora.formats", "nplora.distributed", "nplora.serving")


def message_of(kind: str) -> tuple[str, str]:
    """The class of the error that a mistake raises, with its public module, and the message."""
    with tempfile.TemporaryDirectory() as directory, contextlib.chdir(directory), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            MISTAKES[kind]()
        except Exception as error:
            name = type(error).__name__
            public = next((m for m in _PUBLIC if name in vars(importlib.import_module(m))), "")
            return f"{public}.{name}" if public else name, str(error)
    raise AssertionError(f"the mistake for {kind} raises no error")


def block(kind: str) -> str:
    """The message as a block of Markdown."""
    name, text = message_of(kind)
    if name.rpartition(".")[2] != kind:
        raise AssertionError(f"the mistake for {kind} raises {name}: {text}")
    return f"```{{code-block}} text\n:class: message\n\n{name}: {text}\n```\n"


def _small_model(name: str = "model.gguf") -> bytes:
    gguf.save(name, {"token_embd.weight": np.ones((8, 32), np.float32)}, {"general.architecture": "llama"})
    return Path(name).read_bytes()


def _language_model() -> nplora.LanguageModel:
    """A model of one block. It has no tokenizer, because these pages are built without the package."""
    block = ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down")
    norms = ("output_norm", "blk.0.attn_norm", "blk.0.ffn_norm")
    tensors = {f"{name}.weight": np.ones(32, np.float32) for name in norms}
    tensors |= {f"blk.0.{name}.weight": np.eye(32, dtype=np.float32) for name in block}
    tensors["token_embd.weight"] = np.eye(8, 32, dtype=np.float32)
    sizes = {"block_count": 1, "context_length": 256, "embedding_length": 32, "feed_forward_length": 32}
    heads = {"attention.head_count": 1, "attention.head_count_kv": 1, "vocab_size": 8}
    metadata = {f"llama.{key}": gguf.Typed(value, "UINT32") for key, value in (sizes | heads).items()}
    metadata["llama.attention.layer_norm_rms_epsilon"] = gguf.Typed(1e-5, "FLOAT32")
    gguf.save("model.gguf", tensors, {"general.architecture": "llama", **metadata})
    return nplora.load_model("model.gguf")


def _layer() -> nplora.Sequential:
    return nplora.Sequential(nplora.LoRALinear(np.eye(8, dtype=np.float32), rank=2, rng=0))


def another_file() -> None:
    Path("model.gguf").write_text("<!DOCTYPE html>\n<html>a web page that was saved as a model</html>\n")
    nplora.load_model("model.gguf")


def half_a_download() -> None:
    whole = _small_model()
    Path("model.gguf").write_bytes(whole[: len(whole) // 2])
    nplora.load_model("model.gguf")


def a_count_that_cannot_be() -> None:
    Path("model.gguf").write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 1 << 40, 0) + bytes(64))
    nplora.load_model("model.gguf")


def another_architecture() -> None:
    Path("gpt2").mkdir()
    Path("gpt2/config.json").write_text(json.dumps({"model_type": "gpt2"}))
    safetensors.save("gpt2/model.safetensors", {"wte.weight": np.ones((8, 8), np.float32)})
    nplora.load_model("gpt2")


def git_lfs_pointer() -> None:
    text = "version https://git-lfs.github.com/spec/v1\noid sha256:1f2e\nsize 98304\n"
    Path("model.gguf").write_text(text)
    nplora.load_model("model.gguf")


def a_pickle() -> None:
    Path("adapter").mkdir()
    Path("adapter/adapter_config.json").write_text('{"peft_type": "LORA", "r": 8, "lora_alpha": 16}')
    Path("adapter/adapter_model.bin").write_bytes(b"\x80\x04.")
    nplora.load_adapter(_layer(), "adapter")


def an_edited_configuration() -> None:
    nplora.save_adapter(_layer(), "adapter")
    path = Path("adapter/adapter_config.json")
    path.write_text(path.read_text().replace('"lora_alpha": 16', '"lora_alpha": 32'))
    nplora.load_adapter(_layer(), "adapter")


def unknown_fields() -> None:
    Path("train.jsonl").write_text('{"question": "When are you open?", "answer": "From ten to six."}\n')
    tokenizer: Any = SimpleNamespace(eos_id=0)  # the line is refused before it is encoded
    nplora.data.read_dataset("train.jsonl", tokenizer)


def numbers_that_are_not_finite() -> None:
    x = np.ones((16, 8), np.float32)
    x[3, 1] = np.nan
    nplora.Trainer(_layer(), "mse", nplora.AdamW(lr=1e-3), progress=False).fit(x, x, epochs=1, batch_size=8)


def a_rank_that_hangs() -> None:
    ranks = SimpleNamespace(rank=0, size=2, isend=lambda notice, dest, tag: None)  # instead of MPI's
    raise Farewell(None, ranks, timeout=600).no_answer({1})


def too_many_requests() -> None:
    lm = _language_model()
    lm._tokenizer = SimpleNamespace(eos_ids=(), vocab_size=8, stream=lambda context: None)  # type: ignore[assignment]
    engine = nplora.serving.Engine(lm, max_requests=1, max_waiting=2)
    for _ in range(4):  # there is one free slot, and two may wait
        engine.submit([1])


def a_wrong_shape() -> None:
    _layer()(np.ones((2, 5), np.float32))


def an_integer_weight() -> None:
    A, B = np.ones((8, 2), np.float32), np.ones((2, 8), np.float32)
    nplora.merge_lora(np.ones((8, 8), np.int64), A, B)


def an_adapter_in_the_way() -> None:
    nplora.save_adapter(_layer(), "adapter")
    nplora.combine([("adapter", 0.5)]).save("adapter")


def a_name_of_the_hub() -> None:
    nplora.load_model("Qwen/Qwen3-0.6B")


MISTAKES: dict[str, Mistake] = {
    "FormatError": another_file,
    "TruncatedError": half_a_download,
    "LimitError": a_count_that_cannot_be,
    "UnsupportedError": another_architecture,
    "NotFetchedError": git_lfs_pointer,
    "UnsafeError": a_pickle,
    "CorruptError": an_edited_configuration,
    "DataError": unknown_fields,
    "NonFiniteLossError": numbers_that_are_not_finite,
    "RankError": a_rank_that_hangs,
    "QueueFullError": too_many_requests,
    "ValueError": a_wrong_shape,
    "TypeError": an_integer_weight,
    "FileExistsError": an_adapter_in_the_way,
    "FileNotFoundError": a_name_of_the_hub,
}
