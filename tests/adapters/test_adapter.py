"""Adapters in memory: reading them (also from untrusted files), saving them, and attaching them to models."""

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_gguf_files import base_gguf, patterned, write_peft
from test_gguf_files import factors as pairs

import nplora
from hostile import damaged, refused
from nplora.adapters import Adapter
from nplora.formats import gguf, gguf_adapter, peft_adapter, safetensors
from nplora.formats.errors import CorruptError, FormatError, LimitError, UnsafeError, UnsupportedError
from nplora.formats.peft_config import PeftConfig
from nplora.lora.delta import LoraDelta
from small_net import adapted_net, plain_net

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
        {B: tensors()[B]}, FormatError, f"tensor {A!r} is missing, but the layer's other factor is present"
    ),
    "factors of two kinds": (
        tensors() | {PREFIX + f"fc.lora_embedding_{letter}": np.ones((2, 2), "f4") for letter in "AB"},
        FormatError,
        "the layer has both linear and embedding factors",
    ),
    "a tensor that is no factor": (
        tensors() | {"bias": np.ones(3)}, FormatError, "tensor 'bias' is not a LoRA factor of a layer"
    ),
    "magnitudes without DoRA": (
        tensors() | {PREFIX + "fc.lora_magnitude_vector": np.ones(3, "f4")},
        FormatError,
        "is not a LoRA factor of a layer",
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
        ('"lora_alpha": 4', '"lora_alpha": 1e999', FormatError, "1e999 is beyond the range of float64"),
        ('"rank_pattern": {}', '"rank_pattern": {"(a+)+$": 1}', UnsafeError, "rank_pattern"),
        ('"peft_type": "LORA"', '"peft_type": "IA3"', UnsupportedError, "peft_type is 'IA3'"),
        ('"r": 2', '"r": 1000000000', LimitError, "r is 1,000,000,000"),
        ('"lora_alpha": 4', '"lora_alpha": 5', CorruptError, "not the file that was saved with"),
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


@pytest.mark.slow
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
    with pytest.raises(FormatError, match=r"cannot be used \(2 reasons\):") as error:
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


# ---- one adapter, from and to everything ----


def files_of(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


@pytest.mark.parametrize("options", [{}, {"use_rslora": True}, {"use_dora": True}])
def test_an_adapter_that_is_read_is_saved_as_the_same_files(options: dict[str, Any], tmp_path: Path) -> None:
    nplora.save_adapter(adapted_net(**options), tmp_path / "one", "the base")
    adapter = Adapter.read(tmp_path / "one")
    assert adapter.base_model_name_or_path == "the base"
    adapter.save(tmp_path / "two")
    assert files_of(tmp_path / "two") == files_of(tmp_path / "one")
    with pytest.raises(FileExistsError):
        adapter.save(tmp_path / "two")
    Adapter.from_model(adapted_net(**options)).save(tmp_path / "three")
    tensors = "adapter_model.safetensors"
    assert (
        dict(safetensors.open(tmp_path / "three" / tensors)).keys()
        == dict(safetensors.open(tmp_path / "one" / tensors)).keys()
    )


def test_an_adapter_that_is_read_keeps_dropout_and_an_expression_for_its_layers(tmp_path: Path) -> None:
    """PEFT would take the list ["0"] for the layer "1.0" too."""
    inner = nplora.Sequential(nplora.Linear(np.ones((6, 6))))
    model = nplora.Sequential(nplora.LoRALinear(np.ones((6, 5)), 2, dropout=0.25, rng=0), inner)
    nplora.save_adapter(model, tmp_path / "one")
    Adapter.read(tmp_path / "one").save(tmp_path / "two")
    config = json.loads((tmp_path / "two" / "adapter_config.json").read_text())
    assert (config["target_modules"], config["lora_dropout"]) == ("0", 0.25)
    assert files_of(tmp_path / "two") == files_of(tmp_path / "one")


def test_layers_trained_whole_are_in_the_adapter_and_in_nothing_of_low_rank(tmp_path: Path) -> None:
    head = nplora.Linear(np.float32([[1, 2, 3, 4]]), np.float32([5]), trainable=True)
    model = nplora.Sequential(*(module for _, module in adapted_net().named_children()), head)
    nplora.save_adapter(model, tmp_path / "one")
    adapter = Adapter.read(tmp_path / "one")
    assert list(adapter.modules_to_save) == ["3"]
    np.testing.assert_array_equal(adapter.modules_to_save["3"]["weight"], [[1, 2, 3, 4]])
    np.testing.assert_array_equal(adapter.modules_to_save["3"]["bias"], [5])
    adapter.save(tmp_path / "two")
    assert files_of(tmp_path / "two") == files_of(tmp_path / "one")
    for refusing in (
        lambda: nplora.read_adapter(tmp_path / "one"),
        lambda: adapter.attach(plain_net()),
        lambda: Adapter.combine([(adapter, 1)]),
        lambda: nplora.read_adapter(adapter),
    ):
        with pytest.raises(UnsupportedError, match=r"fully trained layers \('3'\)"):
            refusing()


def test_dora_on_an_embedding_is_refused(tmp_path: Path) -> None:
    """PEFT rescales the columns of a table. If it is square, magnitudes of rows have the same shape."""
    names = [f"{PREFIX}fc.lora_embedding_{letter}" for letter in "AB"] + [f"{PREFIX}fc.lora_magnitude_vector"]
    values = [np.ones((2, 6), "f4"), np.ones((6, 2), "f4"), np.ones(6, "f4")]
    write(tmp_path, dict(zip(names, values, strict=True)), use_dora=True)
    with refused(FormatError, "'fc': DoRA on an embedding is not supported", tmp_path):
        nplora.read_adapter(tmp_path)
    delta = LoraDelta(np.ones((6, 2), "f4"), np.ones((2, 6), "f4"), 1.0, np.ones(6, "f4"), embedding=True)
    model = nplora.Sequential(nplora.Embedding(np.ones((6, 6))))
    with pytest.raises(FormatError, match="'0': use_dora is True in the adapter and False in the layer"):
        Adapter("dora", {"0": delta}).attach(model)


def test_an_adapter_in_memory_is_saved_for_llama_cpp_as_its_directory_is(tmp_path: Path) -> None:
    settings = patterned(use_rslora=True)
    directory, base = write_peft(tmp_path / "peft", settings, pairs(settings)), base_gguf(tmp_path / "m.gguf")
    report = nplora.adapter_to_gguf(directory, tmp_path / "one.gguf", base)
    adapter = Adapter.read(directory)
    again = adapter.save(tmp_path / "two.gguf", base=base)
    assert again is not None
    assert (again.alpha, again.folded, again.layers) == (report.alpha, report.folded, report.layers)
    assert (tmp_path / "two.gguf").read_bytes() == (tmp_path / "one.gguf").read_bytes()
    back = Adapter.read(tmp_path / "two.gguf", base)
    for name, update in delta(adapter).items():
        np.testing.assert_allclose(delta(back)[name], update, rtol=1e-5, atol=1e-5)
    with pytest.raises(FileExistsError):
        adapter.save(tmp_path / "two.gguf", base=base)
    with pytest.raises(ValueError, match=r"three\.gguf: a GGUF adapter needs its base model"):
        adapter.save(tmp_path / "three.gguf")
    dora = Adapter("dora", {"q": LoraDelta(np.ones((2, 1)), np.ones((1, 2)), 1.0, np.ones(2))})
    with pytest.raises(UnsupportedError, match="dora: the adapter uses DoRA, which rescales the rows"):
        dora.save(tmp_path / "three.gguf", base=base)
    down = "model.layers.0.mlp.down_proj"
    wide = LoraDelta(np.full((20, 1), 0.1), np.ones((1, 28)), 1.0)  # float64, which llama.cpp does not read
    Adapter("wide", {down: wide}).save(tmp_path / "wide.gguf", base=base)
    stored = gguf.open(tmp_path / "wide.gguf")
    assert {tensor.type for tensor in stored.values()} == {"F32"}
    np.testing.assert_array_equal(
        stored["blk.0.ffn_down.weight.lora_b"].numpy(), np.full((20, 1), 0.1, np.float32)
    )
    for value in (np.nan, 1e39):
        broken = LoraDelta(np.full((20, 1), value), np.ones((1, 28)), 1.0)
        with pytest.raises(
            ValueError, match=r"broken: .*down_proj: a factor holds NaN, an infinity or a value"
        ):
            Adapter("broken", {down: broken}).save(tmp_path / "three.gguf", base=base)
    unfit = Adapter("unfit", {"model.layers.0.mlp.up_proj": LoraDelta(np.ones((2, 1)), np.ones((1, 2)), 1.0)})
    with pytest.raises(
        FormatError, match=r"a weight of shape \(2, 2\), but blk\.0\.ffn_up\.weight has shape \(28, 20\)"
    ):
        unfit.save(tmp_path / "three.gguf", base=base)
    assert not (tmp_path / "three.gguf").exists()
