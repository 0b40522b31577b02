"""Adapters read into memory, from files that nobody vouches for too."""

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import nplora
from hostile import damaged, refused
from nplora.adapters import Adapter
from nplora.formats import gguf, gguf_adapter, peft_adapter, safetensors
from nplora.formats.errors import CorruptError, FormatError, LimitError, UnsafeError, UnsupportedError
from nplora.formats.peft_config import PeftConfig

Array = np.ndarray[Any, Any]
Tensors = dict[str, Array]

PREFIX = peft_adapter.PREFIX
A, B = PREFIX + "fc.lora_B.weight", PREFIX + "fc.lora_A.weight"


def tensors() -> Tensors:
    return {A: np.float32([[1, 0], [0, 1], [2, 2]]), B: np.float32([[1, 2], [3, 4]])}


def write(directory: Path, content: Tensors, **config: Any) -> Path:
    peft_adapter.save(directory, PeftConfig(r=2, lora_alpha=4, target_modules=("fc",), **config), content)
    return directory


HOSTILE: dict[str, tuple[Tensors, type[FormatError], str]] = {
    "factors of different rank": (
        tensors() | {B: np.ones((3, 2), "f4")},
        FormatError,
        "'fc': lora_A has shape (3, 2), lora_B (3, 2), expected rank 2",
    ),
    "factors of another rank than the configuration's": (
        tensors() | {A: np.ones((3, 1), "f4"), B: np.ones((1, 2), "f4")},
        FormatError,
        "expected rank 2",
    ),
    "a vector for a factor": (
        tensors() | {A: np.ones(2, "f4")}, FormatError, "lora_B (2,), expected rank 2"
    ),
    "one factor alone": (
        {B: tensors()[B]}, FormatError, f"tensor {A!r} is missing, its other half is there"
    ),
    "factors of two kinds": (
        tensors() | {PREFIX + f"fc.lora_embedding_{letter}": np.ones((2, 2), "f4") for letter in "AB"},
        FormatError,
        "the layer has factors of another kind too",
    ),
    "a tensor that is no factor": (
        tensors() | {"bias": np.ones(3)}, FormatError, "tensor 'bias' is no factor of a layer"
    ),
    "magnitudes without DoRA": (
        tensors() | {PREFIX + "fc.lora_magnitude_vector": np.ones(3, "f4")},
        FormatError,
        "is no factor of a layer",
    ),
    "infinity": (
        tensors() | {A: np.full((3, 2), np.inf, np.float32)}, FormatError, "holds NaN or an infinity"
    ),
    "a float64 beyond float32": (
        tensors() | {A: np.full((3, 2), 1e300)}, FormatError, "holds NaN or an infinity"
    ),
    "integers": (tensors() | {A: np.ones((3, 2), int)}, FormatError, "is int64, expected floats"),
    "no factors": ({}, FormatError, "the adapter holds no factors"),
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_directory_gives_its_exact_error(name: str, tmp_path: Path) -> None:
    content, error, words = HOSTILE[name]
    write(tmp_path, content)
    with refused(error, words, tmp_path):
        nplora.read_adapter(tmp_path)


def test_a_hostile_pair_of_files_gives_its_exact_error(tmp_path: Path) -> None:
    write(tmp_path, tensors())
    config, weights = tmp_path / "adapter_config.json", tmp_path / "adapter_model.safetensors"
    text = config.read_text()
    for old, new, error, words in (
        ('"lora_alpha": 4', '"lora_alpha": 1e999', FormatError, "1e999 is beyond float64"),
        ('"rank_pattern": {}', '"rank_pattern": {"(a+)+$": 1}', UnsafeError, "rank_pattern"),
        ('"peft_type": "LORA"', '"peft_type": "IA3"', UnsupportedError, "peft_type is 'IA3'"),
        ('"r": 2', '"r": 1000000000', LimitError, "r is 1,000,000,000"),
        ('"lora_alpha": 4', '"lora_alpha": 5', CorruptError, "not the one that was saved with"),
    ):
        config.write_text(text.replace(old, new))
        with refused(error, words, tmp_path):
            nplora.read_adapter(tmp_path)
    assert nplora.read_adapter(tmp_path, edited_config=True)["fc"].scale == 2.5
    config.write_text(text)
    weights.rename(tmp_path / "adapter_model.bin")
    with refused(UnsafeError, "adapter_model.bin: a pickle can run any code", tmp_path):
        nplora.read_adapter(tmp_path)
    os.mkfifo(weights)
    with refused(FormatError, "a FIFO, expected a regular file", tmp_path):
        nplora.read_adapter(tmp_path)
    weights.unlink()
    os.truncate(os.open(weights, os.O_CREAT | os.O_WRONLY), 1 << 40)  # sparse: nobody can read it
    with refused(FormatError, "the header begins with", tmp_path):
        nplora.read_adapter(tmp_path)
    config.unlink()
    with pytest.raises(FileNotFoundError, match=r"adapter_config\.json"):
        nplora.read_adapter(tmp_path)


def delta(adapter: Adapter) -> dict[str, Array]:
    return {name: update.scale * update.A @ update.B for name, update in adapter.items()}


@pytest.mark.parametrize("kind", ["safetensors", "gguf"])
def test_every_cut_and_every_damaged_byte_give_format_errors_or_an_adapter(kind: str, tmp_path: Path) -> None:
    if kind == "gguf":
        path = tmp_path / "a.gguf"
        pair = gguf_adapter.Pair(np.ones((1, 2), "f4"), np.ones((2, 1), "f4"))
        gguf_adapter.save(path, gguf_adapter.GgufAdapter("qwen2", 2.0, {"blk.0.attn_q.weight": pair}))
        source: Path = path
    else:
        source = write(tmp_path, tensors())
        path = source / "adapter_model.safetensors"
    refusals = accepted = 0
    for data in damaged(path.read_bytes()):
        path.write_bytes(data)
        try:
            adapter = nplora.read_adapter(source)
        except FormatError:
            refusals += 1
            continue
        accepted += 1
        with np.errstate(over="ignore", invalid="ignore"):
            assert all(value.ndim == 2 for value in delta(adapter).values())
    assert accepted > 10
    assert refusals > 300


def test_all_that_is_wrong_is_listed(tmp_path: Path) -> None:
    content = tensors() | {"x": np.ones(1), PREFIX + "k.lora_A.weight": np.ones((2, 2))}
    write(tmp_path, content)
    with pytest.raises(FormatError, match="for 2 reasons:") as error:
        nplora.read_adapter(tmp_path)
    assert len(str(error.value).splitlines()) == 3


def test_a_file_that_is_no_adapter_is_refused(tmp_path: Path) -> None:
    gguf.save(tmp_path / "model.gguf", {"w": np.ones((2, 2), "f4")}, {"general.architecture": "llama"})
    with refused(FormatError, "general.type", tmp_path):
        nplora.read_adapter(tmp_path / "model.gguf")
    safetensors.save(tmp_path / "model.safetensors", tensors())
    with refused(FormatError, "", tmp_path):
        nplora.read_adapter(tmp_path / "model.safetensors")
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf" / "config.json").write_text(json.dumps({"model_type": "llama"}))
    with pytest.raises(FileNotFoundError, match=r"adapter_config\.json"):
        nplora.read_adapter(tmp_path / "hf")
    with pytest.raises(ValueError, match="the ReLU has no LoRA layer"):
        nplora.read_adapter(nplora.ReLU())
