"""Real messages for the page about errors: each function here makes a mistake, and nplora reports it."""

import contextlib
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
from nplora.formats import gguf, safetensors

Mistake = Callable[[], object]


def message_of(kind: str) -> tuple[str, str]:
    """The class of the error that a mistake raises, with its public module, and the message."""
    with tempfile.TemporaryDirectory() as directory, contextlib.chdir(directory), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            MISTAKES[kind]()
        except Exception as error:
            name = type(error).__name__
            public = next((m for m in ("nplora", "nplora.formats") if hasattr(_module(m), name)), "")
            return f"{public}.{name}" if public else name, str(error)
    raise AssertionError(f"the mistake for {kind} raises no error")


def block(kind: str) -> str:
    """The message as a block of Markdown."""
    name, text = message_of(kind)
    if name.rpartition(".")[2] != kind:
        raise AssertionError(f"the mistake for {kind} raises {name}: {text}")
    return f"```{{code-block}} text\n:class: message\n\n{name}: {text}\n```\n"


def _module(path: str) -> object:
    return nplora if path == "nplora" else nplora.formats


def _small_model(name: str = "model.gguf") -> bytes:
    gguf.save(name, {"token_embd.weight": np.ones((8, 32), np.float32)}, {"general.architecture": "llama"})
    return Path(name).read_bytes()


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
    "ValueError": a_wrong_shape,
    "TypeError": an_integer_weight,
    "FileExistsError": an_adapter_in_the_way,
    "FileNotFoundError": a_name_of_the_hub,
}
