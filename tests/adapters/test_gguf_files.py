"""Adapters between PEFT and llama.cpp: both formats give the same ΔW, or the conversion is refused."""

import dataclasses
import itertools
import json
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf as oracle
import ml_dtypes
import numpy as np
import pytest

import nplora
from nplora import adapters, cli
from nplora.cli import description
from nplora.formats import gguf, gguf_rows, peft_adapter, peft_config, safetensors
from nplora.formats.errors import CorruptError, FormatError, LimitError, UnsupportedError
from nplora.formats.gguf import Typed
from nplora.formats.name_pattern import NamePattern
from nplora.formats.peft_config import Patterns, PeftConfig
from nplora.models import base_model, families
from nplora.models.families import Family
from taken import assert_nothing_is_lost

Array = np.ndarray[Any, Any]
Shape = tuple[int, int]
Pairs = dict[str, tuple[Array, Array]]

PREFIX = "base_model.model."
HEADS, KV_HEADS, HEAD_DIM = 4, 2, 6
WIDTH, FFN, VOCAB = 20, 28, 40
SHAPES: dict[str, Shape] = {
    "model.layers.0.self_attn.q_proj": (HEADS * HEAD_DIM, WIDTH),
    "model.layers.0.self_attn.k_proj": (KV_HEADS * HEAD_DIM, WIDTH),
    "model.layers.0.self_attn.v_proj": (KV_HEADS * HEAD_DIM, WIDTH),
    "model.layers.0.self_attn.o_proj": (WIDTH, HEADS * HEAD_DIM),
    "model.layers.0.mlp.gate_proj": (FFN, WIDTH),
    "model.layers.0.mlp.up_proj": (FFN, WIDTH),
    "model.layers.0.mlp.down_proj": (WIDTH, FFN),
    "model.layers.11.self_attn.q_proj": (HEADS * HEAD_DIM, WIDTH),
    "model.embed_tokens": (VOCAB, WIDTH),
    "lm_head": (VOCAB, WIDTH),
}
STORED = {
    "model.layers.0.self_attn.q_proj": "blk.0.attn_q.weight",
    "model.layers.0.self_attn.k_proj": "blk.0.attn_k.weight",
    "model.layers.0.self_attn.v_proj": "blk.0.attn_v.weight",
    "model.layers.0.self_attn.o_proj": "blk.0.attn_output.weight",
    "model.layers.0.mlp.gate_proj": "blk.0.ffn_gate.weight",
    "model.layers.0.mlp.up_proj": "blk.0.ffn_up.weight",
    "model.layers.0.mlp.down_proj": "blk.0.ffn_down.weight",
    "model.layers.11.self_attn.q_proj": "blk.11.attn_q.weight",
    "model.embed_tokens": "token_embd.weight",
    "lm_head": "output.weight",
}


@dataclasses.dataclass
class Settings:
    """The settings in PEFT's configuration, as one value for each layer."""

    rank: dict[str, int]
    alpha: dict[str, float]
    use_rslora: bool = False

    def scale(self, name: str) -> float:
        return self.alpha[name] / (math.sqrt(self.rank[name]) if self.use_rslora else self.rank[name])


def alike(rank: int = 4, alpha: float = 6, use_rslora: bool = False) -> Settings:
    return Settings(dict.fromkeys(SHAPES, rank), dict.fromkeys(SHAPES, alpha), use_rslora)


def patterned(use_rslora: bool = False) -> Settings:
    settings = alike(use_rslora=use_rslora)
    settings.rank |= {"model.layers.0.self_attn.q_proj": 2, "model.embed_tokens": 3}
    settings.alpha |= {"model.layers.0.self_attn.q_proj": 5, "lm_head": 0.5, "model.layers.0.mlp.up_proj": -6}
    return settings


CASES = {
    "plain": alike(),
    "rsLoRA": alike(use_rslora=True),
    "patterns": patterned(),
    "rsLoRA and patterns": patterned(use_rslora=True),
    "alpha of a fraction": alike(alpha=0.1),
    "alpha 0": alike(alpha=0),
    "alpha 0 in one layer": Settings(alike().rank, alike().alpha | {"lm_head": 0}),
    "an alpha that float32 takes for 0": alike(alpha=1e-50),
    "an alpha of few digits in float32": alike(alpha=1e-40),
    "a large alpha in one layer": Settings(alike().rank, alike().alpha | {"lm_head": -1e6}),
}


def factors(settings: Settings, seed: int = 0) -> Pairs:
    """PEFT's lora_A (r, d_in) and lora_B (d_out, r), of an embedding (r, vocab) and (dim, r)."""
    rng = np.random.default_rng(seed)
    found = {}
    for name, (d_out, d_in) in SHAPES.items():
        rank = settings.rank[name]
        shape_a, shape_b = (d_out, d_in) if name == "model.embed_tokens" else (d_in, d_out)
        found[name] = (
            rng.standard_normal((rank, shape_a), np.float32),
            rng.standard_normal((shape_b, rank), np.float32),
        )
    return found


def write_peft(directory: Path, settings: Settings, pairs: Pairs, **more: Any) -> Path:
    first = next(iter(SHAPES))
    r, alpha = settings.rank["lm_head"], settings.alpha[first]
    config = PeftConfig(
        r=r,
        lora_alpha=alpha,
        target_modules=tuple(SHAPES),
        use_rslora=settings.use_rslora,
        rank_pattern=Patterns.exact({k: v for k, v in settings.rank.items() if v != r}),
        alpha_pattern=Patterns.exact({k: v for k, v in settings.alpha.items() if v != alpha}),
        **more,
    )
    tensors = {}
    for name, (lora_a, lora_b) in pairs.items():
        if name == "model.embed_tokens":
            tensors |= {
                f"{PREFIX}{name}.lora_embedding_A": lora_a,
                f"{PREFIX}{name}.lora_embedding_B": lora_b,
            }
        else:
            tensors |= {f"{PREFIX}{name}.lora_A.weight": lora_a, f"{PREFIX}{name}.lora_B.weight": lora_b}
    peft_adapter.save(directory, config, tensors)
    return directory


def peft_delta(settings: Settings, pairs: Pairs, name: str) -> Array:
    """ΔW by PEFT's rule, float64; of an embedding (vocab, dim)."""
    lora_a, lora_b = (factor.astype(np.float64) for factor in pairs[name])
    delta = settings.scale(name) * lora_b @ lora_a
    return delta.T if name == "model.embed_tokens" else delta


def rounding(settings: Settings, pairs: Pairs, name: str) -> Array:
    """How far ΔW may move: alpha and lora_b are rounded to float32, once each. Twice that, for the rest."""
    lora_a, lora_b = (np.abs(factor).astype(np.float64) for factor in pairs[name])
    bound = (4 * 2.0**-24 * abs(settings.scale(name)) * lora_b + 2.0**-149) @ lora_a
    return bound.T if name == "model.embed_tokens" else bound


def llama_delta(path: Path, stored: str, user_scale: float = 1.0) -> Array:
    """ΔW by llama.cpp's rule (llama_adapter_lora_weight::get_scale, build_inp_embd), read by PyPI's gguf."""
    reader = oracle.GGUFReader(path)
    alpha = reader.fields["adapter.lora.alpha"].contents()
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    a, b = tensors[stored + ".lora_a"], tensors[stored + ".lora_b"]
    rank = int(b.shape[0])
    scale = user_scale * alpha / rank if alpha else user_scale
    lora_a, lora_b = a.data.astype(np.float64), b.data.astype(np.float64)
    if stored == "token_embd.weight":
        return scale * lora_a @ lora_b.T  # rows of lora_a are taken by token, then multiplied by lora_b
    return scale * lora_b @ lora_a


def in_llama_order(delta: Array, stored: str) -> Array:
    """Rows that are rotated as a pair are half a head apart in PEFT, and neighbours in llama.cpp."""
    heads = {"attn_q": HEADS, "attn_k": KV_HEADS}.get(stored.split(".")[-2])
    if heads is None:
        return delta
    half = len(delta) // heads // 2
    moved = np.full_like(delta, np.nan)
    for head in range(heads):
        for i in range(half):
            moved[head * 2 * half + 2 * i] = delta[head * 2 * half + i]
            moved[head * 2 * half + 2 * i + 1] = delta[head * 2 * half + half + i]
    return moved


def base_gguf(path: Path, architecture: str = "llama", **shapes: Shape) -> Path:
    metadata = {
        "general.architecture": architecture,
        f"{architecture}.attention.head_count": Typed(HEADS, "UINT32"),
        f"{architecture}.attention.head_count_kv": Typed(KV_HEADS, "UINT32"),
    }
    tensors = {STORED[name]: np.zeros(shape, np.float16) for name, shape in SHAPES.items()}
    gguf.save(path, tensors | {name: np.zeros(shape, np.float16) for name, shape in shapes.items()}, metadata)
    return path


def base_config(directory: Path, model_type: str = "llama") -> Path:
    directory.mkdir(exist_ok=True)
    fields = {"model_type": model_type, "num_attention_heads": HEADS, "num_key_value_heads": KV_HEADS}
    (directory / "config.json").write_text(json.dumps(fields))
    return directory


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_llama_cpp_s_rule_gives_peft_s_update(case: str, tmp_path: Path) -> None:
    settings = CASES[case]
    pairs = factors(settings)
    write_peft(tmp_path / "peft", settings, pairs)
    report = nplora.adapter_to_gguf(tmp_path / "peft", tmp_path / "a.gguf", base_gguf(tmp_path / "base.gguf"))
    assert set(report.layers) == set(SHAPES)
    for name, stored in STORED.items():
        expected = in_llama_order(peft_delta(settings, pairs, name), stored)
        for user_scale in (1.0, 0.5):
            got = llama_delta(tmp_path / "a.gguf", stored, user_scale)
            bound = in_llama_order(rounding(settings, pairs, name), stored)
            assert (np.abs(got - user_scale * expected) <= user_scale * bound).all(), name
        assert settings.alpha[name] == 0 or np.abs(expected).max() > 0


def test_the_file_has_llama_cpp_s_names_shapes_and_metadata(tmp_path: Path) -> None:
    pairs = factors(alike())
    write_peft(tmp_path / "peft", alike(), pairs)
    nplora.adapter_to_gguf(tmp_path / "peft", tmp_path / "a.gguf", base_config(tmp_path / "base"))
    reader = oracle.GGUFReader(tmp_path / "a.gguf")
    fields = {
        k: (f.types[0].name, f.contents()) for k, f in reader.fields.items() if not k.startswith("GGUF.")
    }
    assert fields == {
        "general.architecture": ("STRING", "llama"),
        "general.type": ("STRING", "adapter"),
        "adapter.type": ("STRING", "lora"),
        "adapter.lora.alpha": ("FLOAT32", 6.0),
    }
    found = {t.name: (t.tensor_type.name, t.shape.tolist()) for t in reader.tensors}
    expected = {}
    for name, (d_out, d_in) in SHAPES.items():
        shape_a, shape_b = (
            ([d_in, 4], [4, d_out]) if name != "model.embed_tokens" else ([4, VOCAB], [4, WIDTH])
        )
        expected[STORED[name] + ".lora_a"] = ("F32", shape_a)
        expected[STORED[name] + ".lora_b"] = ("F32", shape_b)
    assert found == expected
    stored = {t.name: t.data for t in reader.tensors}
    v = "model.layers.0.self_attn.v_proj"  # neither permuted nor folded: the same bits
    np.testing.assert_array_equal(stored[STORED[v] + ".lora_a"], pairs[v][0])
    np.testing.assert_array_equal(stored[STORED[v] + ".lora_b"], pairs[v][1])


def test_one_scale_for_all_layers_is_not_folded(tmp_path: Path) -> None:
    base = base_config(tmp_path / "base")
    for case, alpha, folded in (("plain", 6, 0), ("rsLoRA", 12, 0), ("alpha 0", 1, 10), ("patterns", 6, 3)):
        write_peft(tmp_path / "peft", CASES[case], factors(CASES[case]))
        report = nplora.adapter_to_gguf(tmp_path / "peft", tmp_path / "a.gguf", base, overwrite=True)
        assert (report.alpha, len(report.folded)) == (alpha, folded), case


def test_only_architecture_llama_permutes_rows(tmp_path: Path) -> None:
    pairs = factors(alike())
    write_peft(tmp_path / "peft", alike(), pairs)
    for family, architecture in (("qwen2", "qwen2"), ("qwen3", "qwen3"), ("mistral", "llama")):
        base = base_config(tmp_path / "base", family)
        report = nplora.adapter_to_gguf(tmp_path / "peft", tmp_path / "a.gguf", base, overwrite=True)
        assert report.architecture == architecture
        name = "model.layers.0.self_attn.q_proj"
        delta = peft_delta(alike(), pairs, name)
        expected = in_llama_order(delta, STORED[name]) if architecture == "llama" else delta
        np.testing.assert_allclose(llama_delta(tmp_path / "a.gguf", STORED[name]), expected, rtol=1e-12)


@pytest.mark.parametrize("case", CASES)
def test_an_adapter_comes_back_with_the_same_update(case: str, tmp_path: Path) -> None:
    settings = CASES[case]
    pairs = factors(settings)
    base = base_gguf(tmp_path / "base.gguf")
    nplora.adapter_to_gguf(write_peft(tmp_path / "peft", settings, pairs), tmp_path / "a.gguf", base)
    report = nplora.adapter_from_gguf(tmp_path / "a.gguf", tmp_path / "back", base, "the base")
    assert set(report.layers) == set(SHAPES)
    config = json.loads((tmp_path / "back" / "adapter_config.json").read_text())
    assert (config["task_type"], config["base_model_name_or_path"]) == ("CAUSAL_LM", "the base")
    assert tuple(config["target_modules"]) == report.layers
    with peft_adapter.reading(tmp_path / "back") as back:
        back.require_pair()
        assert not back.config.use_rslora

        for name in SHAPES:
            is_embedding = name == "model.embed_tokens"
            kinds = ("embedding_A", "embedding_B") if is_embedding else ("A.weight", "B.weight")
            lora_a, lora_b = (back.tensors[f"{PREFIX}{name}.lora_{kind}"].numpy() for kind in kinds)
            np.testing.assert_array_equal(lora_a, pairs[name][0])
            delta = back.config.scale(name) * lora_b.astype(np.float64) @ lora_a.astype(np.float64)
            expected, bound = peft_delta(settings, pairs, name), rounding(settings, pairs, name)
            assert (np.abs((delta.T if is_embedding else delta) - expected) <= bound).all(), name


def of_llama_cpp(path: Path, alpha: float | None, **ranks: int) -> Path:
    """As llama.cpp's own converter would write it: no alpha, or one; a layer for each rank."""
    metadata: dict[str, Any] = {
        "general.architecture": "qwen2",
        "general.type": "adapter",
        "adapter.type": "lora",
    }
    if alpha is not None:
        metadata["adapter.lora.alpha"] = np.float32(alpha)
    tensors = {}
    for name, rank in ranks.items():
        tensors[f"blk.0.{name}.weight.lora_a"] = np.full((rank, WIDTH), rank, np.float32)
        tensors[f"blk.0.{name}.weight.lora_b"] = np.full((WIDTH, rank), 2, np.float32)
    gguf.save(path, tensors, metadata)
    return path


@pytest.mark.parametrize("alpha", [None, 0.0, 16.0, 0.3])
def test_an_alpha_of_0_or_none_is_a_scale_of_1_in_peft_too(alpha: float | None, tmp_path: Path) -> None:
    path = of_llama_cpp(tmp_path / "a.gguf", alpha, attn_q=4, attn_k=4, attn_v=2)
    nplora.adapter_from_gguf(path, tmp_path / "back")
    with peft_adapter.reading(tmp_path / "back") as back:
        assert (back.config.r, back.config.rank("model.layers.0.self_attn.v_proj")) == (4, 2)
        for layer, rank in (("q_proj", 4), ("k_proj", 4), ("v_proj", 2)):
            scale = back.config.scale(f"model.layers.0.self_attn.{layer}")
            assert scale == (np.float32(alpha) / rank if alpha else 1)


def test_an_adapter_of_another_float_type_is_converted(tmp_path: Path) -> None:
    base = base_config(tmp_path / "base", "qwen2")
    pairs = factors(alike())
    for dtype in (np.float16, np.float64, ml_dtypes.bfloat16):
        given = {name: (a.astype(dtype), b.astype(dtype)) for name, (a, b) in pairs.items()}
        write_peft(tmp_path / "peft", alike(), given)
        nplora.adapter_to_gguf(tmp_path / "peft", tmp_path / "a.gguf", base, overwrite=True)
        name = "model.layers.0.mlp.down_proj"
        stored = gguf.open(tmp_path / "a.gguf")
        for half, factor in zip(("a", "b"), given[name], strict=True):
            np.testing.assert_array_equal(
                stored[f"{STORED[name]}.lora_{half}"].numpy(), factor.astype(np.float32)
            )
        again = {key: tensor.numpy().astype(dtype) for key, tensor in stored.items()}
        gguf.save(tmp_path / "b.gguf", again, stored.metadata.typed())
        nplora.adapter_from_gguf(tmp_path / "b.gguf", tmp_path / "back", overwrite=True)
        back = safetensors.open(tmp_path / "back" / "adapter_model.safetensors")
        np.testing.assert_array_equal(
            back[f"{PREFIX}{name}.lora_B.weight"].numpy(), given[name][1].astype(np.float32)
        )


# ---- what is refused ----


def rewritten(directory: Path, change: Callable[[dict[str, Any]], object]) -> Path:
    path = directory / "adapter_model.safetensors"
    tensors = {name: t.numpy() for name, t in safetensors.open(path, mmap=False).items()}
    change(tensors)
    safetensors.save(path, tensors)
    return directory


def test_dora_is_refused_with_the_reason(tmp_path: Path) -> None:
    directory = write_peft(tmp_path / "peft", alike(), factors(alike()), use_dora=True)
    with pytest.raises(
        UnsupportedError, match=r"uses DoRA, which rescales the rows of W [+] ΔW\. llama\.cpp only adds"
    ):
        nplora.adapter_to_gguf(directory, tmp_path / "a.gguf", base_config(tmp_path / "base"))
    directory = write_peft(tmp_path / "peft", alike(), factors(alike()))
    magnitude = f"{PREFIX}lm_head.lora_magnitude_vector"
    rewritten(directory, lambda tensors: tensors.update({magnitude: np.ones(VOCAB, np.float32)}))
    with pytest.raises(UnsupportedError, match=r"DoRA"):
        nplora.adapter_to_gguf(directory, tmp_path / "a.gguf", base_config(tmp_path / "base"))
    assert not (tmp_path / "a.gguf").exists()


def test_layers_trained_whole_are_refused(tmp_path: Path) -> None:
    directory = write_peft(tmp_path / "peft", alike(), factors(alike()), modules_to_save=("score",))
    with pytest.raises(
        UnsupportedError, match=r"fully trained layers \('score'\); a llama\.cpp adapter can only hold"
    ):
        nplora.adapter_to_gguf(directory, tmp_path / "a.gguf", base_config(tmp_path / "base"))


def test_all_that_does_not_fit_is_listed_and_nothing_is_written(tmp_path: Path) -> None:
    directory = write_peft(tmp_path / "peft", alike(), factors(alike()))

    def damage(tensors: dict[str, Any]) -> None:
        layer = f"{PREFIX}model.layers.0."
        del tensors[layer + "self_attn.v_proj.lora_B.weight"]
        tensors["stray"] = np.zeros(1)
        tensors["stray.lora_A.weight"] = np.zeros((4, 2))
        tensors[layer + "mlp.bias"] = np.zeros(1)
        tensors[layer + "self_attn.rotary.lora_A.weight"] = np.zeros((4, 2))
        tensors[layer + "self_attn.rotary.lora_B.weight"] = np.zeros((2, 4))
        tensors[layer + "mlp.up_proj.lora_A.weight"] = np.zeros((3, WIDTH))
        tensors[layer + "mlp.gate_proj.lora_A.weight"] = np.zeros((4, WIDTH + 1))
        tensors[layer + "mlp.down_proj.lora_B.weight"] = np.full((WIDTH, 4), np.nan)
        tensors[layer + "self_attn.o_proj.lora_B.weight"] = np.zeros((WIDTH, 4), np.int8)
        tensors[f"{PREFIX}lm_head.lora_A.weight"] = np.zeros((4, WIDTH, 1))

    rewritten(directory, damage)
    base = base_gguf(tmp_path / "base.gguf")
    with pytest.raises(FormatError) as caught:
        nplora.adapter_to_gguf(directory, tmp_path / "a.gguf", base)
    lines = str(caught.value).splitlines()
    assert lines[0] == f"{directory}: the adapter does not fit {base} in 10 places:"
    for words in (
        f"tensor '{PREFIX}model.layers.0.self_attn.v_proj.lora_B.weight' is missing, "
        "but the layer's other factor is present",
        "tensor 'stray' is not a LoRA factor of a layer",
        "tensor 'stray.lora_A.weight' is not a LoRA factor of a layer",
        f"tensor '{PREFIX}model.layers.0.mlp.bias' is not a LoRA factor of a layer",
        "'model.layers.0.self_attn.rotary': llama has no layer of this name",
        "'model.layers.0.mlp.up_proj': lora_A has shape (3, 20), lora_B (28, 4), expected rank 4",
        "'model.layers.0.mlp.gate_proj': the adapter is for a weight of shape (28, 21), "
        "but blk.0.ffn_gate.weight has shape (28, 20)",
        f"tensor '{PREFIX}model.layers.0.mlp.down_proj.lora_B.weight' holds NaN or an infinity",
        f"tensor '{PREFIX}model.layers.0.self_attn.o_proj.lora_B.weight' is int8, expected floats",
        "'lm_head': lora_A has shape (4, 20, 1), lora_B (40, 4), expected rank 4",
    ):
        assert f"  {words}" in lines
    assert len(lines) == 11
    assert not (tmp_path / "a.gguf").exists()


def test_a_base_model_without_the_layer_is_named(tmp_path: Path) -> None:
    directory = write_peft(tmp_path / "peft", alike(), factors(alike()))
    base = tmp_path / "base.gguf"
    file = gguf.open(base_gguf(base))
    gguf.save(base, {k: t for k, t in file.items() if k != "output.weight"}, file.metadata.typed())
    with pytest.raises(FormatError, match=r"'lm_head': .*base\.gguf has no tensor output\.weight"):
        nplora.adapter_to_gguf(directory, tmp_path / "a.gguf", base)


def test_an_embedding_with_the_factors_of_a_linear_layer_is_refused(tmp_path: Path) -> None:
    directory = write_peft(tmp_path / "peft", alike(), factors(alike()))
    name = f"{PREFIX}model.embed_tokens"

    def as_linear(tensors: dict[str, Any]) -> None:
        tensors[f"{name}.lora_A.weight"] = np.zeros((4, WIDTH))
        tensors[f"{name}.lora_B.weight"] = np.zeros((VOCAB, 4))

    base = base_config(tmp_path / "base")
    rewritten(directory, as_linear)
    with pytest.raises(FormatError, match=r"the layer has both linear and embedding factors"):
        nplora.adapter_to_gguf(directory, tmp_path / "a.gguf", base)
    rewritten(directory, lambda tensors: [tensors.pop(f"{name}.lora_embedding_{half}") for half in "AB"])
    with pytest.raises(
        FormatError, match=r"the adapter has a linear layer, but token_embd\.weight is an embedding"
    ):
        nplora.adapter_to_gguf(directory, tmp_path / "a.gguf", base)


@pytest.mark.parametrize("has_weights", [False, True])
def test_the_factors_of_a_convolution_are_refused(has_weights: bool, tmp_path: Path) -> None:
    directory = write_peft(tmp_path / "peft", alike(), factors(alike()))
    name = f"{PREFIX}model.layers.0.mlp.up_proj"

    def as_convolution(tensors: dict[str, Any]) -> None:
        tensors[f"{name}.lora_A.weight"] = np.zeros((4, WIDTH, 1, 1))
        tensors[f"{name}.lora_B.weight"] = np.zeros((FFN, 4, 1, 1))

    base = base_gguf(tmp_path / "base.gguf") if has_weights else base_config(tmp_path / "base")
    rewritten(directory, as_convolution)
    with pytest.raises(FormatError, match=r"has a convolution, but blk\.0\.ffn_up\.weight is a linear layer"):
        nplora.adapter_to_gguf(directory, tmp_path / "a.gguf", base)
    assert not (tmp_path / "a.gguf").exists()


def test_rows_that_do_not_make_the_base_s_heads_are_refused(tmp_path: Path) -> None:
    base = base_config(tmp_path / "base")
    fields = {"model_type": "llama", "num_attention_heads": 5}
    (base / "config.json").write_text(json.dumps(fields))
    directory = write_peft(tmp_path / "peft", alike(), factors(alike()))
    with pytest.raises(
        FormatError, match=r"q_proj': 24 rows cannot be divided into 5 heads with an even number of rows each"
    ):
        nplora.adapter_to_gguf(directory, tmp_path / "a.gguf", base)


def test_a_directory_of_neither_an_adapter_nor_a_model_is_named(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(
        FormatError, match=r"empty: the directory holds neither config\.json nor adapter_config\.json"
    ):
        adapters.convert_adapter(tmp_path / "empty", tmp_path / "x.gguf")


def test_heads_of_a_single_pair_of_rows_are_allowed(tmp_path: Path) -> None:
    base, directory = base_config(tmp_path / "base"), write_peft(tmp_path / "peft", alike(), factors(alike()))
    for heads, kv_heads in ((12, 6), (1, 1)):
        fields = {"model_type": "llama", "num_attention_heads": heads, "num_key_value_heads": kv_heads}
        (base / "config.json").write_text(json.dumps(fields))
        nplora.adapter_to_gguf(directory, tmp_path / f"{heads}.gguf", base)


def test_an_alpha_beyond_float32_is_folded(tmp_path: Path) -> None:
    settings = alike(alpha=1e39)
    pairs = {name: (a, b * np.float32(1e-20)) for name, (a, b) in factors(settings).items()}
    directory = write_peft(tmp_path / "peft", settings, pairs)
    report = nplora.adapter_to_gguf(directory, tmp_path / "a.gguf", base_config(tmp_path / "base"))
    assert (report.alpha, len(report.folded)) == (1, len(SHAPES))
    expected = peft_delta(settings, pairs, "lm_head")
    bound = rounding(settings, pairs, "lm_head")
    assert (np.abs(llama_delta(tmp_path / "a.gguf", "output.weight") - expected) <= bound).all()


def test_a_fold_beyond_float32_is_refused(tmp_path: Path) -> None:
    settings = Settings(alike().rank, alike().alpha | {"lm_head": 1e38})
    pairs = factors(settings) | {"lm_head": (np.ones((4, WIDTH), "f4"), np.full((VOCAB, 4), 1e20, "f4"))}
    directory = write_peft(tmp_path / "peft", settings, pairs)
    with pytest.raises(FormatError, match=r"lm_head: lora_B times .* exceeds the range of float32"):
        nplora.adapter_to_gguf(directory, tmp_path / "a.gguf", base_config(tmp_path / "base"))


def test_an_edited_configuration_is_refused_until_it_is_said_to_be_edited(tmp_path: Path) -> None:
    directory = write_peft(tmp_path / "peft", alike(), factors(alike()))
    path = directory / "adapter_config.json"
    path.write_text(path.read_text().replace('"lora_alpha": 6', '"lora_alpha": 8'))
    base = base_config(tmp_path / "base")
    with pytest.raises(CorruptError, match=r"pass edited_config=True"):
        nplora.adapter_to_gguf(directory, tmp_path / "a.gguf", base)
    assert nplora.adapter_to_gguf(directory, tmp_path / "a.gguf", base, edited_config=True).alpha == 8


@pytest.mark.slow
def test_many_layers_and_many_patterns_are_refused_before_any_is_matched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = [f"model.layers.{i}.mlp.up_proj" for i in range(20_000)]
    tensors = {
        f"{PREFIX}{name}.lora_{half}.weight": np.zeros((1, 1), np.int8) for name in names for half in "AB"
    }
    pattern = json.dumps({f"{i:04}[a-c]*x": 1 for i in range(1000)})
    config = peft_config.loads(f'{{"peft_type": "LORA", "rank_pattern": {pattern}}}'.encode(), "here")
    peft_adapter.save(tmp_path / "peft", config, tensors)
    monkeypatch.setattr(NamePattern, "matches", lambda *arguments: pytest.fail("a pattern met a name"))
    with pytest.raises(
        LimitError, match=r"20,000 layers times 11,000 characters of patterns, .* at most 4,194,304"
    ):
        nplora.adapter_to_gguf(tmp_path / "peft", tmp_path / "a.gguf", base_config(tmp_path / "base"))
    with pytest.raises(LimitError):
        description.describe(tmp_path / "peft")


def test_an_adapter_without_factors_is_refused(tmp_path: Path) -> None:
    directory = write_peft(tmp_path / "peft", alike(), {})
    with pytest.raises(FormatError, match=r"the adapter holds no factors"):
        nplora.adapter_to_gguf(directory, tmp_path / "a.gguf", base_config(tmp_path / "base"))
    with pytest.raises(FormatError, match=r"the adapter holds no factors"):
        nplora.adapter_from_gguf(of_llama_cpp(tmp_path / "b.gguf", 1.0), tmp_path / "back")


def test_the_heads_are_asked_for_where_rows_are_permuted(tmp_path: Path) -> None:
    base = base_gguf(tmp_path / "base.gguf")
    nplora.adapter_to_gguf(
        write_peft(tmp_path / "peft", alike(), factors(alike())), tmp_path / "a.gguf", base
    )
    with pytest.raises(
        ValueError, match=r"number of heads; name the base model with --base MODEL \(base\)"
    ) as caught:
        nplora.adapter_from_gguf(tmp_path / "a.gguf", tmp_path / "back")
    assert type(caught.value) is ValueError
    with pytest.raises(FormatError, match=r"is for llama, .* is qwen2"):
        nplora.adapter_from_gguf(
            tmp_path / "a.gguf", tmp_path / "back", base_config(tmp_path / "other", "qwen2")
        )
    assert not (tmp_path / "back").exists()


def test_an_adapter_of_a_family_that_is_not_known_is_refused(tmp_path: Path) -> None:
    path = of_llama_cpp(tmp_path / "a.gguf", 1.0, attn_q=1)
    file = gguf.open(path)
    gguf.save(path, dict(file), file.metadata.typed() | {"general.architecture": "mamba"})
    with pytest.raises(UnsupportedError, match=r"general\.architecture is 'mamba', expected one of gemma3, "):
        nplora.adapter_from_gguf(path, tmp_path / "back")


def test_a_conversion_tells_what_it_did(tmp_path: Path) -> None:
    directory = write_peft(tmp_path / "peft", patterned(), factors(patterned()))
    report = nplora.adapter_to_gguf(directory, tmp_path / "a.gguf", base_config(tmp_path / "base", "qwen2"))
    assert str(report) == (
        f"{tmp_path / 'a.gguf'}: 10 layers of qwen2, alpha 6\n3 layers: the scale is multiplied into lora_b"
    )
    file = gguf.open(tmp_path / "a.gguf")
    norm = {"blk.0.attn_norm.weight": np.ones(WIDTH, np.float32)}
    gguf.save(tmp_path / "b.gguf", dict(file) | norm, file.metadata.typed())
    assert str(nplora.adapter_from_gguf(tmp_path / "b.gguf", tmp_path / "back")) == (
        f"{tmp_path / 'back'}: 10 layers of qwen2, alpha 6\nignored tensors: 'blk.0.attn_norm.weight'"
    )


def test_layers_of_a_gguf_adapter_that_are_not_known_are_listed(tmp_path: Path) -> None:
    path = of_llama_cpp(tmp_path / "a.gguf", 1.0, attn_q=1, ssm_in=1, attn_rot=2)
    with pytest.raises(FormatError, match=r"does not fit its architecture in 2 places") as caught:
        nplora.adapter_from_gguf(path, tmp_path / "back")
    assert "'blk.0.ssm_in.weight': qwen2 has no layer of this name" in str(caught.value)


# ---- what the command does ----


def test_the_command_converts_by_what_the_source_is(tmp_path: Path) -> None:
    directory = write_peft(tmp_path / "peft", alike(), factors(alike()))
    base, file, back = base_gguf(tmp_path / "base.gguf"), tmp_path / "a.gguf", tmp_path / "back"
    assert adapters.convert_adapter(directory, file, base).target == str(file)
    assert adapters.convert_adapter(file, back, base).target == str(back)
    assert sorted(path.name for path in back.iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    with pytest.raises(ValueError, match=r"_config\.json does not name the base model; use --base MODEL"):
        adapters.convert_adapter(directory, file)
    with pytest.raises(ValueError, match=r"the output must end in \.gguf, got '.*[/\\]back'"):
        adapters.convert_adapter(directory, back, base)
    for name in ("b.gguf", "b.GGUF", "b.safetensors"):
        with pytest.raises(
            ValueError, match=rf"is a file\. A GGUF adapter is converted to a directory, .*[/\\]{name}'"
        ):
            adapters.convert_adapter(file, tmp_path / name, base)


def test_the_base_model_is_found_by_its_name_in_the_configuration(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    base_gguf(tmp_path / "base.gguf")
    config = base_config(tmp_path / "models") / "config.json"
    revision = "0123456789abcdef" * 2 + "01234567"
    cached = tmp_path / "hub/models--owner--name/snapshots" / revision
    cached.parent.mkdir(parents=True)
    base_config(cached)
    (cached.parents[1] / "refs").mkdir()
    (cached.parents[1] / "refs/main").write_text(revision)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    for name, found in (
        ("base.gguf", "base.gguf"),
        (str(tmp_path / "base.gguf"), str(tmp_path / "base.gguf")),
        ("models", "models"),
        (str(config), str(config)),
        ("owner/name", str(cached)),
    ):
        directory = write_peft(tmp_path / "peft", alike(), factors(alike()), base_model_name_or_path=name)
        done = adapters.convert_adapter(directory, tmp_path / "a.gguf", overwrite=True)
        assert done.named_base == found
        assert f"base model, named in adapter_config.json: {found}" in str(done)
        expected = nplora.adapter_to_gguf(directory, tmp_path / "b.gguf", found, overwrite=True)
        assert done == dataclasses.replace(expected, target=done.target, named_base=found)
        assert (tmp_path / "a.gguf").read_bytes() == (tmp_path / "b.gguf").read_bytes()
    (tmp_path / "text.txt").write_text("private")
    os.mkfifo(tmp_path / "pipe.gguf")
    nothing = ("nowhere.gguf", "owner/other", "text.txt", "/etc/passwd", "pipe.gguf", ".", "\0", "../x/y")
    for name in (*nothing, "x" * 5000):
        directory = write_peft(tmp_path / "peft", alike(), factors(alike()), base_model_name_or_path=name)
        hint = "" if name.startswith("/") else r" \(it may be a relative path from another directory\)"
        with pytest.raises(ValueError, match=f", which is not found{hint}; use --base MODEL"):
            adapters.convert_adapter(directory, tmp_path / "c.gguf")


def test_a_model_is_not_replaced_by_an_adapter(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    directory = write_peft(tmp_path / "peft", alike(), factors(alike()))
    base, other = base_gguf(tmp_path / "base.gguf"), base_gguf(tmp_path / "other.gguf")
    (tmp_path / "link.gguf").symlink_to(base)
    cut = tmp_path / "cut.gguf"
    cut.write_bytes(base.read_bytes()[:100])
    for target in (base, tmp_path / "link.gguf", other, cut):
        before = target.read_bytes()
        with pytest.raises(FileExistsError, match="the file exists and is not an adapter"):
            nplora.adapter_to_gguf(directory, target, base, overwrite=True)
        assert cli.main(["convert", str(directory), str(target), "--base", str(base), "--overwrite"]) == 2
        assert f"{target}: the file exists and is not an adapter" in capsys.readouterr().err
        assert target.read_bytes() == before
    with pytest.raises(ValueError, match=r"the output must end in \.gguf, got '.*config\.json'"):
        nplora.adapter_to_gguf(directory, base_config(tmp_path / "hf") / "config.json", tmp_path / "hf")


def test_a_file_is_replaced_on_request_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base, target = base_gguf(tmp_path / "base.gguf"), tmp_path / "a.gguf"
    for name, seed in (("one", 0), ("two", 1)):
        write_peft(tmp_path / name, alike(), factors(alike(), seed))
    nplora.adapter_to_gguf(tmp_path / "one", target, base)
    one = target.read_bytes()
    for write in (nplora.adapter_to_gguf, adapters.convert_adapter):
        with pytest.raises(FileExistsError, match="the file already exists; name another one"):
            write(tmp_path / "two", target, base)
    line = ["convert", str(tmp_path / "two"), str(target), "--base", str(base)]
    assert cli.main(line) == 2
    assert capsys.readouterr().err == (
        f"nplora: error: {target}: the file already exists; "
        "name another one, or replace it with --overwrite\n"
    )
    assert target.read_bytes() == one
    assert cli.main([*line, "--overwrite"]) == 0
    two = target.read_bytes()
    assert two != one
    nplora.adapter_to_gguf(tmp_path / "one", target, base, overwrite=True)
    assert target.read_bytes() == one
    target.write_bytes(b"")  # which may be replaced, as it is no model
    adapters.convert_adapter(tmp_path / "two", target, base, overwrite=True)
    assert target.read_bytes() == two


def test_what_has_the_name_of_the_new_file_is_not_lost(tmp_path: Path) -> None:
    base = base_gguf(tmp_path / "base.gguf")
    peft, target = write_peft(tmp_path / "peft", alike(), factors(alike())), tmp_path / "out" / "a.gguf"
    target.parent.mkdir()
    assert_nothing_is_lost(
        target,
        lambda overwrite: nplora.adapter_to_gguf(peft, target, base, overwrite=overwrite),
        replaces=False,
    )


def test_no_file_that_a_conversion_reads_is_replaced(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = base_gguf(tmp_path / "base.gguf")
    peft = write_peft(tmp_path / "peft", alike(), factors(alike()))
    nplora.adapter_to_gguf(peft, tmp_path / "a.gguf", base)
    back = tmp_path / "back"
    nplora.adapter_from_gguf(tmp_path / "a.gguf", back, base)
    read = (tmp_path / "a.gguf", base)
    before = [file.read_bytes() for file in read]
    for source, make in itertools.product(read, (os.link, os.symlink)):
        (back / "adapter_config.json").unlink()
        make(source, back / "adapter_config.json")
        words = "adapter" if source == read[0] else "base"
        with pytest.raises(ValueError, match=f"adapter_config.json is the {words} itself, which is never"):
            nplora.adapter_from_gguf(tmp_path / "a.gguf", back, base, overwrite=True)
        assert cli.main(["convert", str(read[0]), str(back), "--base", str(base), "--overwrite"]) == 2
        assert "is never overwritten" in capsys.readouterr().err
    assert [file.read_bytes() for file in read] == before


# ---- names, rows and base models ----


@pytest.mark.parametrize("family", families.FAMILIES, ids=lambda family: family.model_type)
def test_names_are_those_of_llama_cpp(family: Family) -> None:
    numbers = {name: number for number, name in oracle.MODEL_ARCH_NAMES.items()}
    if not numbers.keys() & {family.architecture, family.model_type}:
        pytest.skip(
            f"the gguf package does not know the architecture {family.architecture}: no names to compare"
        )
    theirs = oracle.get_tensor_name_map(numbers[family.architecture], 12)
    inside = [f"model.layers.{i}.{name}" for i in (0, 11) for name in (*family.layers, *family.norms)]
    for name in ("model.embed_tokens", "lm_head", "model.norm", *inside):
        stored = family.gguf_layer(name)
        assert stored is not None
        assert stored == theirs.get_name(name)
        assert family.hf_layer(stored) == name
    for name in (
        "model.layers.01.mlp.down_proj",
        "model.layers.x.mlp.down_proj",
        "layers.0.mlp.down_proj",
        "",
        "model",
    ):
        assert family.gguf_layer(name) is None
    for stored in ("blk.0.attn_rot", "blk.00.attn_q", "blk.0", "out", ""):
        assert family.hf_layer(stored) is None


def test_rows_are_permuted_there_and_back() -> None:
    rows = np.arange(24.0)[:, None]
    np.testing.assert_array_equal(
        gguf_rows.interleave(rows, HEADS), in_llama_order(rows, "blk.0.attn_q.weight")
    )
    np.testing.assert_array_equal(gguf_rows.deinterleave(gguf_rows.interleave(rows, HEADS), HEADS), rows)
    assert gguf_rows.interleave(np.zeros((0, 3)), 2).shape == (0, 3)


@pytest.mark.parametrize(
    ("fields", "error", "words"),
    [
        (
            {"model_type": "gpt2"},
            UnsupportedError,
            "model_type is 'gpt2', expected one of gemma3_text, ",
        ),
        ({"model_type": ["llama"]}, FormatError, r"model_type is \['llama'\], expected text"),
        ({"model_type": "llama"}, FormatError, "num_attention_heads is missing, expected an integer"),
        ({"model_type": "llama", "num_attention_heads": True}, FormatError, "num_attention_heads is True"),
        ({"model_type": "llama", "num_attention_heads": 10**9}, FormatError, "1000000000 attention heads"),
        (
            {"model_type": "llama", "num_attention_heads": 4, "num_key_value_heads": -1},
            FormatError,
            "-1 attention heads",
        ),
        ([], FormatError, r"\[\], expected an object"),
    ],
)
def test_a_base_model_that_tells_nonsense_is_refused(
    fields: Any, error: type[FormatError], words: str, tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(fields))
    with pytest.raises(error, match=words) as caught:
        base_model.read(tmp_path)
    assert caught.type is error
    assert base_model.read(base_config(tmp_path / "good") / "config.json").kv_heads == KV_HEADS


def test_a_base_gguf_of_another_family_is_refused(tmp_path: Path) -> None:
    path = base_gguf(tmp_path / "base.gguf", "gpt2")
    with pytest.raises(UnsupportedError, match=r"general.architecture is 'gpt2', expected one of gemma3, "):
        base_model.read(path)
