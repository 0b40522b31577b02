"""The text that `nplora info FILE` prints."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import nplora
import small_models
from nf4_tensors import stored
from nplora.cli import description
from nplora.formats import gguf, gguf_adapter, peft_adapter, safetensors
from nplora.formats.errors import FormatError, TruncatedError, UnsupportedError
from nplora.formats.gguf import Tensor, Typed
from nplora.formats.gguf_adapter import GgufAdapter, Pair
from nplora.formats.peft_config import Patterns, PeftConfig
from nplora.models import families
from small_encoder import save_gguf, save_small_encoder
from small_llama import save_small_llama

Array = np.ndarray[Any, Any]
PREFIX = "base_model.model."

MODEL_TYPES = ", ".join(sorted(family.model_type for family in families.FAMILIES))
ARCHITECTURES = ", ".join(sorted({family.architecture for family in families.FAMILIES}))


def test_a_gguf_file_is_listed(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    gguf.save(
        path,
        {
            "token_embd.weight": Tensor("", "Q8_0", (4, 32), np.zeros(136, np.uint8)),
            "blk.0.ffn_up.weight": Tensor("", "IQ2_XS", (2, 256), np.zeros(148, np.uint8)),
            "norm": np.ones(32, np.float32),
            "eps": np.float32(1),
        },
        {
            "general.architecture": "llama",
            "llama.block_count": Typed(1, "UINT32"),
            "tokens": ["a"] * 1234,
            "scores": np.zeros(1234, np.float32),
            "template": "x" * 100,
        },
    )
    size = path.stat().st_size
    assert description.describe(path).splitlines() == [
        f"{path}: GGUF version 3, 4 tensors, {size:,} bytes",
        "",
        "metadata",
        "  general.architecture  llama",
        "  llama.block_count     1",
        "  tokens                1,234 strings",
        "  scores                1,234 x float32",
        "  template              '" + "x" * 58 + "…",
        "",
        "tensors",
        "  token_embd.weight    Q8_0    4 x 32   136 bytes",
        "  blk.0.ffn_up.weight  IQ2_XS  2 x 256  148 bytes",
        "  norm                 F32     32       128 bytes",
        "  eps                  F32     scalar   4 bytes",
        "",
        "types",
        "  F32     2  132 bytes",
        "  Q8_0    1  136 bytes",
        "  IQ2_XS  1  148 bytes  not supported",
        "",
        "LoRA of rank 8",
        "  embed_tokens  1 layer  4 x 32   288 parameters",
        "  up_proj       1 layer  2 x 256  2,064 parameters",
        "  all-linear    1 layer  2 x 256  2,064 parameters",
    ]


def test_a_gguf_file_with_the_ninth_byte_of_safetensors_is_still_gguf(tmp_path: Path) -> None:
    gguf.save(tmp_path / "m.gguf", {str(i): np.zeros(1, np.int8) for i in range(ord("{"))})
    assert "GGUF version 3, 123 tensors" in description.describe(tmp_path / "m.gguf")


def test_a_safetensors_file_is_listed(tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    safetensors.save(path, {"w": np.ones((2, 3), np.float32), "n": np.int8([1])}, {"format": "pt"})
    assert description.describe(path).splitlines() == [
        f"{path}: safetensors, 2 tensors, {path.stat().st_size:,} bytes",
        "",
        "metadata",
        "  format  pt",
        "",
        "tensors",
        "  w  float32  2 x 3  24 bytes",
        "  n  int8     1      1 byte",
        "",
        "types",
        "  float32  1  24 bytes",
        "  int8     1  1 byte",
        "",
        "LoRA of rank 8",
        "  w           1 layer  2 x 3  40 parameters",
        "  all-linear  1 layer  2 x 3  40 parameters",
    ]


def test_what_lora_can_adapt_is_counted_as_all_linear_trains_it(tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    tensors: dict[str, Any] = {"model.layers.3.up_proj.weight": np.ones((15, 9), "f4")}
    for name, rows in (("q_proj", 12), ("up_proj", 14), ("k_proj", 8)):
        tensors |= {f"model.layers.{i}.{name}.weight": np.ones((rows, 9), "f4") for i in range(3)}
    layers = [nplora.LoRALinear(tensor, 8) for tensor in tensors.values()]
    tensors |= {"model.embed_tokens.weight": np.ones((20, 9)), "lm_head.weight": np.ones((20, 9))}
    tensors |= {"model.norm.weight": np.ones(9), "ids": np.ones((2, 2), np.int64)}
    safetensors.save(path, tensors)
    assert description.describe(path).partition("LoRA of rank 8\n")[2].splitlines() == [
        "  lm_head       1 layer    20 x 9  232 parameters",
        "  embed_tokens  1 layer    20 x 9  232 parameters",
        "  k_proj        3 layers   8 x 9   408 parameters",
        "  q_proj        3 layers   12 x 9  504 parameters",
        "  up_proj       4 layers           744 parameters",
        "  all-linear    10 layers          1,656 parameters",
    ]
    assert sum(layer.num_trainable for layer in layers) == 1656


def test_the_layers_of_gguf_are_named_as_they_are_targeted(tmp_path: Path) -> None:
    model = save_small_llama(tmp_path / "model.gguf")
    rows = squeezed(description.describe(model).partition("LoRA of rank 8\n")[2])
    for target, count, *_, parameters, _ in (row.split() for row in rows):
        lm = nplora.load_model(model)
        lm.add_lora(rank=8, targets=target)
        assert (count, parameters) == (str(len(lm.adapter_layers())), f"{lm.num_trainable:,}")
    assert {"q_proj", "down_proj", "embed_tokens", "all-linear"} <= {row.split()[0] for row in rows}


def test_an_index_lists_the_tensors_of_all_its_files(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors.index.json"
    safetensors.save(tmp_path / "one.safetensors", {"a": np.zeros(2), "b": np.zeros(3)})
    path.write_text('{"weight_map": {"b": "one.safetensors", "a": "one.safetensors"}}')
    assert description.describe(path).splitlines() == [
        f"{path}: safetensors in several files, 2 tensors",
        "",
        "tensors",
        "  b  float64  3  24 bytes",
        "  a  float64  2  16 bytes",
        "",
        "types",
        "  float64  2  40 bytes",
    ]


@pytest.mark.parametrize("shards", [1, 2])
def test_a_model_of_hugging_face_is_described_in_one_file_and_in_several(shards: int, tmp_path: Path) -> None:
    tensors = small_models.hf_tensors()
    (tmp_path / "config.json").write_text(json.dumps(small_models.config(rope_scaling=None, ids=[1, 2])))
    names = list(tensors)
    parts = [dict.fromkeys(names[i::shards]) for i in range(shards)]
    for number, part in enumerate(parts):
        file = tmp_path / ("model.safetensors" if shards == 1 else f"part-{number}.safetensors")
        safetensors.save(file, {name: tensors[name] for name in part})
    if shards > 1:
        weight_map = {
            name: f"part-{number}.safetensors" for number, part in enumerate(parts) for name in part
        }
        (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    lines = squeezed(description.describe(tmp_path))
    size = sum(array.nbytes for array in tensors.values())
    assert lines[0] == f"{tmp_path}: a model of architecture llama, {len(tensors)} tensors, {size:,} bytes"
    assert lines[1:5] == ["", "config", "model_type llama", "vocab_size 60"]
    assert {"rope_scaling null", "ids [1, 2]"} <= set(lines)
    assert "model.layers.2.self_attn.k_proj.weight float32 16 x 32 2,048 bytes" in lines
    assert lines[lines.index("types") + 1] == f"float32 {len(tensors)} {size:,} bytes"
    lm = nplora.load_model(tmp_path)
    lm.add_lora(rank=8)
    assert lines[-1] == f"all-linear {len(lm.adapter_layers())} layers {lm.num_trainable:,} parameters"


def test_matrices_in_nf4_are_described_as_matrices(tmp_path: Path) -> None:
    """The matrices of test_bitsandbytes; their parts are not listed as tensors of the model."""
    tensors, _ = stored((5, 64), nested=True)
    tensors = {name.replace("w", "up.weight", 1): array for name, array in tensors.items()}
    safetensors.save(tmp_path / "model.safetensors", tensors | {"norm": np.ones(64, np.float16)})
    (tmp_path / "config.json").write_text('{"model_type": "x\\u001b"}')
    nbytes = sum(array.nbytes for array in tensors.values())
    assert squeezed(description.describe(tmp_path)) == [
        f"{tmp_path}: a model of architecture x\\x1b, 2 tensors, {nbytes + 128:,} bytes",
        "architecture 'x\\x1b' is not supported: finetune, eval, generate and convert refuse it; "
        f"supported: {MODEL_TYPES}",
        "", "config", "model_type x\\x1b",
        "", "tensors", "norm float16 64 128 bytes", f"up.weight nf4 5 x 64 {nbytes:,} bytes",
        "", "types", "float16 1 128 bytes", f"nf4 1 {nbytes:,} bytes",
        "", "LoRA of rank 8", "up 1 layer 5 x 64 552 parameters",
        "all-linear 1 layer 5 x 64 552 parameters",
    ]  # fmt: skip


def test_a_directory_with_an_adapter_and_a_model_is_described_as_the_adapter(tmp_path: Path) -> None:
    tensors = {f"{PREFIX}q.lora_{half}.weight": factor for half, factor in zip("AB", pair(2), strict=True)}
    peft_adapter.save(tmp_path, PeftConfig(r=2), tensors)
    (tmp_path / "config.json").write_text("{}")
    assert "PEFT's LoRA adapter" in description.describe(tmp_path)


def pair(rank: int) -> tuple[Array, Array]:
    rng = np.random.default_rng(rank)
    return rng.standard_normal((rank, 5), np.float32), rng.standard_normal((4, rank), np.float32)


def row(name: str, lora_a: Array, lora_b: Array, scale: float, is_dora: bool = False) -> str:
    """A line of the table, with ΔW formed. With DoRA, ΔW depends on the base model, so it has no norm."""
    norms = (
        np.linalg.norm(lora_a),
        np.linalg.norm(lora_b),
        np.linalg.norm(scale * lora_b.astype(float) @ lora_a),
    )
    parts = [f"{name}", f"rank {len(lora_a)}", f"scale {scale:g}"]
    parts += [f"‖{key}‖ {norm:.4g}" for key, norm in zip(("lora_A", "lora_B", "ΔW"), norms, strict=True)]
    parts = parts[:-1] if is_dora else parts
    return " ".join(parts)


def squeezed(text: str) -> list[str]:
    return [" ".join(line.split()) for line in text.splitlines()]


@pytest.mark.parametrize(
    ("use_rslora", "scales"), [(False, (3, -1.5)), (True, (6 / np.sqrt(2), -3 / np.sqrt(2)))]
)
def test_a_peft_adapter_is_described_with_its_norms(
    use_rslora: bool, scales: tuple[float, float], tmp_path: Path
) -> None:
    tensors = {"stray": np.zeros(1)}
    for name in ("layers.0.q_proj", "layers.1.q_proj"):
        for half, factor in zip("AB", pair(2), strict=True):
            tensors[f"{PREFIX}{name}.lora_{half}.weight"] = factor
    config = PeftConfig(
        r=2,
        lora_alpha=6,
        use_rslora=use_rslora,
        alpha_pattern=Patterns.exact({"layers.1.q_proj": -3}),
        base_model_name_or_path="digits",
    )
    peft_adapter.save(tmp_path, config, tensors)
    assert squeezed(description.describe(tmp_path)) == [
        f"{tmp_path}: PEFT's LoRA adapter for digits",
        f"rank 2, alpha 6, scale = alpha / {'sqrt(rank)' if use_rslora else 'rank'}; layers may differ",
        "",
        "targets",
        "q_proj 2 layers",
        "",
        "layers",
        row("layers.0.q_proj", *pair(2), scales[0]),
        row("layers.1.q_proj", *pair(2), scales[1]),
        "",
        "others",
        "tensor 'stray' is not a LoRA factor of a layer",
    ]


def test_layers_are_listed_by_their_numbers(tmp_path: Path) -> None:
    digits = "7" * 5000  # more than Python converts to an int
    names = ["layers.0.q", "layers.2.q", "layers.02.v", "layers.10.q", f"layers.{digits}.q"]
    tensors = {}
    for name in sorted(names, reverse=True):
        for half, factor in zip("AB", pair(2), strict=True):
            tensors[f"{PREFIX}{name}.lora_{half}.weight"] = factor
    peft_adapter.save(tmp_path, PeftConfig(r=2), tensors)
    lines = squeezed(description.describe(tmp_path))
    assert [line.split()[0] for line in lines if line.startswith("layers.")] == names


def test_tensors_of_a_peft_adapter_that_do_not_fit_are_listed_too(tmp_path: Path) -> None:
    lora_a, lora_b = pair(2)
    tensors = {f"{PREFIX}{name}.lora_A.weight": lora_a for name in ("good", "rank", "nan")}
    tensors |= {f"{PREFIX}{name}.lora_B.weight": lora_b for name in ("good", "rank", "nan")}
    tensors[f"{PREFIX}rank.lora_A.weight"] = pair(3)[0]
    tensors[f"{PREFIX}nan.lora_B.weight"] = lora_b * np.float32(np.nan)
    peft_adapter.save(tmp_path, PeftConfig(r=2, use_dora=True), tensors)
    path = tmp_path / "adapter_config.json"
    path.write_text(path.read_text() + "\n")
    lines = squeezed(description.describe(tmp_path))
    assert lines[0] == f"{tmp_path}: PEFT's DoRA adapter for an unnamed model"
    assert lines[2] == "adapter_config.json differs from the configuration that was saved with the tensors"
    assert row("good", lora_a, lora_b, 4, is_dora=True) in lines
    assert lines[-2:] == [
        f"tensor '{PREFIX}nan.lora_B.weight' holds NaN or an infinity",
        "'rank': lora_A has shape (3, 5), lora_B (4, 2), expected rank 2",
    ]


@pytest.mark.parametrize(("alpha", "scale"), [(6.0, 3.0), (0.0, 1.0)])
def test_a_llama_cpp_adapter_is_described_with_its_norms(alpha: float, scale: float, tmp_path: Path) -> None:
    lora_a, lora_b = pair(2)
    pairs = {
        "blk.0.attn_q.weight": Pair(lora_a, lora_b),
        "blk.1.attn_q.weight": Pair(lora_a, lora_b),
        "token_embd.weight": Pair(lora_a, lora_b),
    }
    gguf_adapter.save(tmp_path / "a.gguf", GgufAdapter("llama", alpha, pairs))
    assert squeezed(description.describe(tmp_path / "a.gguf")) == [
        f"{tmp_path / 'a.gguf'}: llama.cpp's LoRA adapter for a model of architecture llama",
        f"alpha {alpha:g}, scale = {'alpha / rank' if alpha else '1'}",
        "",
        "targets",
        "q_proj 2 layers",
        "embed_tokens 1 layer",
        "",
        "layers",
        *(row(name, lora_a, lora_b, scale) for name in pairs),
    ]


def test_the_description_says_which_commands_refuse_a_file(tmp_path: Path) -> None:
    """The commands that the line names really refuse it."""
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf" / "config.json").write_text(json.dumps(small_models.config(model_type="gemma9")))
    safetensors.save(tmp_path / "hf" / "model.safetensors", small_models.hf_tensors())
    model = small_models.write(tmp_path / "m.gguf", small_models.metadata(general__architecture="gemma9"))
    lora_a, lora_b = pair(2)
    adapter = tmp_path / "a.gguf"
    gguf_adapter.save(adapter, GgufAdapter("gemma9", 1.0, {"blk.0.attn_q.weight": Pair(lora_a, lora_b)}))
    start, known = "architecture 'gemma9' is not supported: ", f"supported: {ARCHITECTURES}"
    words = "finetune, eval, generate, merge and convert refuse it"
    assert description.describe(model).splitlines()[1] == f"{start}{words}; {known}"
    words, known_there = (
        "finetune, eval, generate and convert refuse it",
        f"supported: {MODEL_TYPES}",
    )
    assert description.describe(tmp_path / "hf").splitlines()[1] == f"{start}{words}; {known_there}"
    words = "eval, generate, merge, combine and convert refuse it"
    assert description.describe(adapter).splitlines()[1] == f"{start}{words}; {known}"
    for path in (model, tmp_path / "hf"):
        with pytest.raises(UnsupportedError, match="'gemma9', expected one of"):
            nplora.load_model(path)
    with pytest.raises(UnsupportedError, match="'gemma9', expected one of"):
        nplora.read_adapter(adapter)
    lm = small_models.load(tmp_path)
    assert "not supported" not in description.describe(tmp_path / "small.gguf")
    assert lm.config.model_type == "llama"


@pytest.mark.parametrize("kind", ["directory", "gguf"])
def test_an_encoder_is_described_with_the_layers_that_add_lora_adapts(kind: str, tmp_path: Path) -> None:
    path = {"directory": save_small_encoder, "gguf": save_gguf}[kind](tmp_path / "model")
    lines = description.describe(path).splitlines()
    words = "finetune, eval, generate and convert" if kind == "directory" else (
        "finetune, eval, generate, merge and convert"
    )  # fmt: skip
    assert lines[1] == f"an encoder: embed, classify and serve read it; {words} refuse it"
    with pytest.raises(UnsupportedError, match=r"nplora\.load_encoder reads \(commands: embed, classify\)$"):
        nplora.load_model(path)
    encoder = nplora.load_encoder(path)
    encoder.add_lora(rank=8)
    found = lines[-1].split()
    assert found[:3] == ["all-linear", f"{len(encoder.adapter_layers())}", "layers"]
    assert found[3:] == [f"{encoder.num_trainable:,}", "parameters"]
    assert any(line.split()[:2] == ["query", "2"] for line in lines)


def test_control_characters_of_a_file_do_not_reach_the_terminal(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    gguf.save(path, {"w\x1b[2J": np.zeros(1, np.int8)}, {"k\n": "v\x1b]0;title\x07"})
    text = description.describe(path)
    assert all(line.isprintable() for line in text.splitlines())
    assert "  w\\x1b[2J  I8" in text
    assert "  k\\n  v\\x1b]0;title\\x07" in text


def test_any_other_file_is_refused(tmp_path: Path) -> None:
    for name, data in (("text", b"a text of some kind"), ("short", b"GG")):
        (tmp_path / name).write_bytes(data)
        with pytest.raises(FormatError, match=r"begins with '.+', expected GGUF or") as caught:
            description.describe(tmp_path / name)
        assert str(tmp_path / name) in str(caught.value)
    (tmp_path / "cut").write_bytes(b"GGUF\x03")
    with pytest.raises(TruncatedError):
        description.describe(tmp_path / "cut")
    with pytest.raises(FileNotFoundError, match=r"neither adapter_config\.json nor config\.json"):
        description.describe(tmp_path)


def test_adapters_and_checkpoints_have_no_layers_to_adapt(tmp_path: Path) -> None:
    model = nplora.Sequential(nplora.LoRALinear(np.ones((4, 5), np.float32), rank=2))
    nplora.save_adapter(model, tmp_path)
    trainer = nplora.Trainer(model, loss="mse", optimizer=nplora.AdamW(lr=0.1))
    trainer.fit(np.ones((3, 5)), np.ones((3, 4)), epochs=1, checkpoint_dir=tmp_path / "run")
    checkpoints = list((tmp_path / "run").glob("checkpoint-*.safetensors"))
    assert checkpoints
    for path in (tmp_path / peft_adapter.TENSORS, *checkpoints):
        text = description.describe(path)
        assert "types" in text.splitlines()
        assert "LoRA of rank" not in text


def test_trained_tokens_and_layers_trained_as_a_whole_are_listed(tmp_path: Path) -> None:
    model = save_small_llama(tmp_path / "m.gguf")
    for number, options in enumerate(({"trainable_tokens": [0, 5]}, {"modules_to_save": "lm_head"})):
        lm = nplora.load_model(model)
        lm.add_lora(rank=2, targets="q_proj", **options)  # type: ignore[arg-type]
        nplora.save_adapter(lm, tmp_path / str(number))
    tokens, whole = (description.describe(tmp_path / name).split("\n\n") for name in "01")
    wanted = "trained tokens\n  lm_head             2 tokens  0, 5\n  model.embed_tokens  2 tokens  0, 5"
    assert tokens[-1] == wanted
    assert whole[-1] == "fully trained layers\n  lm_head  266 x 32"


def test_new_tokens_are_listed(tmp_path: Path) -> None:
    lm = nplora.load_model(save_small_llama(tmp_path / "m.gguf"))
    lm.add_lora(rank=2, targets="q_proj", add_tokens=["<a>", "\n\x1b[1m"])
    nplora.save_adapter(lm, tmp_path / "a")
    lines = squeezed(description.describe(tmp_path / "a"))
    start = lines.index("new tokens")
    assert lines[start + 1 : start + 3] == ["'<a>' 266", r"'\n\x1b[1m' 267"]


def test_the_invocation_tokens_of_activated_lora_are_shown(tmp_path: Path) -> None:
    model = save_small_llama(tmp_path / "m.gguf")
    lm = nplora.load_model(model)
    lm.add_lora(rank=2, targets="q_proj", invocation=[7, 4])
    nplora.save_adapter(lm, tmp_path / "a")
    nplora.adapter_to_gguf(tmp_path / "a", tmp_path / "a.gguf", model)
    for name in ("a", "a.gguf"):
        line = "activated LoRA: acts from the last occurrence of the tokens 7, 4 onwards"
        assert line in description.describe(tmp_path / name)
