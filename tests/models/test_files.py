"""Files that describe no model, or an unknown one: each error names the file and the reason."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import nplora
import small_models
from hostile import refused
from nplora.formats.errors import FormatError, UnsafeError, UnsupportedError
from nplora.formats.gguf import Tensor, Typed

Array = np.ndarray[Any, Any]
LAYERS = small_models.LAYERS

GGUF_FAULTS: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "no heads": ({"llama.attention.head_count": 0}, FormatError, "head_count is 0"),
    "uneven groups": ({"llama.attention.head_count_kv": 3}, FormatError, "heads, expected a multiple of 3"),
    "no kv heads": ({"llama.attention.head_count_kv": 0}, FormatError, "num_key_value_heads is 0"),
    "a billion blocks": ({"llama.block_count": 10**9}, FormatError, "1,000,000,000 layers, expected 1 to"),
    "an odd head": ({"llama.attention.key_length": 7}, FormatError, "head_dim is 7, expected an even"),
    "values of another length": ({"llama.attention.value_length": 4}, UnsupportedError, "value_length is 4"),
    "half a rotation": ({"llama.rope.dimension_count": 4}, UnsupportedError, "dimension_count is 4"),
    "no rotation": ({"llama.rope.freq_base": 0.0}, FormatError, "rope_theta) is 0"),
    "NaN eps": ({"llama.attention.layer_norm_rms_epsilon": float("nan")}, FormatError, "rms_norm_eps is nan"),
    "yarn": ({"llama.rope.scaling.type": "yarn"}, UnsupportedError, "'yarn', expected 'none' or 'linear'"),
    "another family": (
        {"general.architecture": "mamba"}, UnsupportedError, "'mamba', expected one of ",
    ),
    "an adapter": ({"general.type": "adapter"}, FormatError, "general.type is 'adapter', expected 'model'"),
    "types in an array": (
        {"general.type": Typed(["model", "model"], "STRING")}, FormatError, "expected a STRING",
    ),
    "numbers for a type": ({"general.type": np.uint32([1, 2])}, FormatError, "expected a STRING"),
    "text for a number": ({"llama.block_count": "3"}, FormatError, "expected an integer"),
    "no context": ({"llama.context_length": None}, FormatError, "context_length' is missing"),
    "another vocabulary": ({"llama.vocab_size": 59}, FormatError, "shape (60, 32), expected (59, 32)"),
    "a window of -1": ({"llama.attention.sliding_window": -1}, FormatError, "sliding_window is -1"),
    "a wider model": ({"llama.embedding_length": 64}, FormatError, "do not fit the model in 30 places"),
}  # fmt: skip


@pytest.mark.parametrize("fault", GGUF_FAULTS)
def test_impossible_metadata_are_refused(fault: str, tmp_path: Path) -> None:
    changes, error, message = GGUF_FAULTS[fault]
    path = small_models.write(tmp_path / "m.gguf", small_models.metadata(**changes))
    with refused(error, message, path):
        nplora.load_model(path)


def test_tensors_that_are_missing_or_too_many_are_all_named(tmp_path: Path) -> None:
    weights = small_models.tensors()
    weights["blk.1.attn_qq.weight"] = weights.pop("blk.1.attn_q.weight")
    weights["blk.0.ffn_up.weight"] = weights["blk.0.ffn_up.weight"][1:]
    path = small_models.write(tmp_path / "m.gguf", weights=weights)
    with pytest.raises(FormatError) as caught:
        nplora.load_model(path)
    lines = str(caught.value).splitlines()
    assert "in 3 places" in lines[0]
    assert any(
        "'blk.1.attn_q.weight' is missing, the nearest names: blk.1.attn_qq.weight" in s for s in lines
    )
    assert any("'blk.0.ffn_up.weight' has shape (63, 32), expected (64, 32)" in line for line in lines)
    assert any("'blk.1.attn_qq.weight' is not used by llama" in line for line in lines)


def test_a_bias_that_only_some_layers_have_is_not_ignored(tmp_path: Path) -> None:
    weights = small_models.tensors()
    weights["blk.1.attn_q.bias"] = np.ones(small_models.WIDTH, np.float32)
    with pytest.raises(FormatError, match=r"'blk.1.attn_q.bias' is not used by"):
        nplora.load_model(small_models.write(tmp_path / "m.gguf", weights=weights))


def blocks_of(name: str, values: Array, poison: Callable[[Array], None]) -> Tensor:
    of = nplora._core.block_formats()[name]
    elements, size = of.elements, of.nbytes
    blocks = np.empty((len(values), values.shape[1] // elements * size), np.uint8)
    nplora._core.quantize(values, name, blocks)
    poison(blocks)
    return Tensor("", name.upper(), values.shape, blocks)


SCALES = [
    (name, at)
    for name, of in nplora._core.block_formats().items()
    if of.elements == 32
    for at in of.scale_offsets
]


@pytest.mark.parametrize(("name", "at"), SCALES)
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_block_whose_scale_is_not_finite_is_named(name: str, at: int, value: float, tmp_path: Path) -> None:
    weights: dict[str, Any] = dict(small_models.tensors())
    size = nplora._core.block_formats()[name].nbytes

    def poison(blocks: Array) -> None:
        blocks[5, size + at : size + at + 2] = np.array([value], np.float16).view(np.uint8)

    for i in range(LAYERS):
        down = f"blk.{i}.ffn_down.weight"
        weights[down] = blocks_of(name, weights[down], poison if i == 2 else lambda blocks: None)
    path = small_models.write(tmp_path / "m.gguf", weights=weights)
    place = f"tensor 'blk.2.ffn_down.weight': block 11 (row 5, from column 32) has a scale of {value}"
    with refused(FormatError, place, path):
        nplora.load_model(path)


def test_one_error_lists_all_tensors_of_unreadable_types(tmp_path: Path) -> None:
    weights: dict[str, Any] = dict(small_models.tensors())
    names = [f"blk.{i}.ffn_down.weight" for i in range(LAYERS)]
    for name in names:
        weights[name] = Tensor(
            "", "MXFP4", weights[name].shape, np.zeros(weights[name].size // 32 * 17, np.uint8)
        )
    weights["output_norm.weight"] = np.zeros(small_models.WIDTH, np.int32)
    with pytest.raises(UnsupportedError) as caught:
        nplora.load_model(small_models.write(tmp_path / "m.gguf", weights=weights))
    first, *lines = str(caught.value).splitlines()
    assert (
        "m.gguf: tensors have types that nplora does not read, expected F32, F64, F16, BF16, Q4_0, " in first
    )
    assert sorted(lines) == [
        "  I32, 1 tensor: 'output_norm.weight'",
        f"  MXFP4, {LAYERS} tensors: {', '.join(map(repr, names))}",
    ]


def test_a_norm_that_is_not_finite_is_named(tmp_path: Path) -> None:
    weights = small_models.tensors()
    weights["blk.2.ffn_norm.weight"][3] = np.inf
    with pytest.raises(FormatError, match=r"'blk\.2\.ffn_norm\.weight' holds NaN or an infinity"):
        nplora.load_model(small_models.write(tmp_path / "m.gguf", weights=weights))


CONFIG_FAULTS: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "another family": (
        {"model_type": "gpt2"}, UnsupportedError, "'gpt2', expected one of ",
    ),
    "no heads": ({"num_attention_heads": 0}, FormatError, "num_attention_heads is 0"),
    "a bool": ({"num_hidden_layers": True}, FormatError, "num_hidden_layers is True, expected an integer"),
    "no width": ({"hidden_size": None}, FormatError, "hidden_size is missing"),
    "a billion layers": ({"num_hidden_layers": 10**9}, FormatError, "1,000,000,000 layers"),
    "another activation": ({"hidden_act": "relu"}, UnsupportedError, "hidden_act is 'relu'"),
    "quantised": ({"quantization_config": {"bits": 4}}, UnsupportedError, "quantization_config"),
    "yarn": ({"rope_scaling": {"type": "yarn", "factor": 4.0}}, UnsupportedError, "'yarn', expected"),
    "a ramp upside down": (
        {"rope_scaling": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 4.0,
                          "high_freq_factor": 1.0, "original_max_position_embeddings": 32}},
        FormatError, "low_freq_factor 4.0 is not below",
    ),
    "a factor of 0": ({"rope_scaling": {"type": "linear", "factor": 0}}, FormatError, "factor is 0"),
    "a vocabulary of 2^40": ({"vocab_size": 2**40}, FormatError, "vocab_size is 1,099,511,627,776"),
    "layer types": ({"model_type": "qwen2", "layer_types": ["full_attention", "x", "full_attention"]},
                    UnsupportedError, "a layer has type 'x'"),
    "no bias": ({"attention_bias": True}, FormatError, "'model.layers.0.self_attn.q_proj.bias' is missing"),
}  # fmt: skip


@pytest.mark.parametrize("fault", CONFIG_FAULTS)
def test_an_impossible_config_is_refused(fault: str, tmp_path: Path) -> None:
    changes, error, message = CONFIG_FAULTS[fault]
    (tmp_path / "config.json").write_text(json.dumps(small_models.config(**changes)))
    small_models.write_tensors(tmp_path / "model.safetensors", small_models.hf_tensors())
    with refused(error, message, tmp_path):
        nplora.load_model(tmp_path)


def test_directories_without_safe_weights_are_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(small_models.config()))
    with pytest.raises(FormatError, match=r"neither model\.safetensors nor"):
        nplora.load_model(tmp_path)
    (tmp_path / "pytorch_model.bin").touch()
    with pytest.raises(UnsafeError, match="a pickle can run any code"):
        nplora.load_model(tmp_path)
    with pytest.raises(FileNotFoundError):
        nplora.load_model(tmp_path / "none.gguf")
    with pytest.raises(ValueError, match="compute='int4' is not available"):
        nplora.load_model(tmp_path, compute="int4")


@pytest.mark.parametrize("mmap", [True, False])
def test_a_directory_of_float16_or_float64_loads(mmap: bool, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(small_models.config()))
    weights = small_models.hf_tensors()
    ids, found = np.arange(12), {}
    for dtype in (np.float32, np.float64, np.float16):
        small_models.write_tensors(
            tmp_path / "model.safetensors", {name: array.astype(dtype) for name, array in weights.items()}
        )
        found[dtype] = nplora.load_model(tmp_path, mmap=mmap).logits(ids)
    np.testing.assert_allclose(found[np.float64], found[np.float32], rtol=0, atol=2e-4)
    np.testing.assert_allclose(found[np.float16], found[np.float32], rtol=0, atol=0.05)
    assert (found[np.float16] != found[np.float32]).any()


def test_rope_scaling_is_read_from_files_of_transformers_4_and_5(tmp_path: Path) -> None:
    small_models.write_tensors(tmp_path / "model.safetensors", small_models.hf_tensors())

    def logits(**fields: Any) -> Array:
        (tmp_path / "config.json").write_text(json.dumps(small_models.config(**fields)))
        return nplora.load_model(tmp_path).logits(np.arange(40))

    ramp = {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
    }
    plain = logits()
    np.testing.assert_array_equal(logits(rope_theta=10000.0, rope_scaling=None), plain)
    for kind, scaling in (("linear", {"factor": 4.0}), ("llama3", ramp)):
        new = logits(rope_parameters={"rope_type": kind, "rope_theta": 5e4, **scaling})
        assert np.abs(new - plain).max() > 0.1
        old = logits(rope_theta=50000.0, rope_scaling={"rope_type": kind, **scaling})
        np.testing.assert_array_equal(old, new)
    older = logits(rope_theta=50000.0, rope_scaling={"type": "linear", "factor": 4.0})
    newer = logits(rope_parameters={"rope_type": "linear", "rope_theta": 5e4, "factor": 4.0})
    np.testing.assert_array_equal(older, newer)


@pytest.mark.parametrize("mmap", [True, False])
def test_a_file_of_many_types_computes_as_its_values(mmap: bool, tmp_path: Path) -> None:
    """Layers that read one input may have different storage."""
    types = {
        "token_embd": "q8_0", "output": "q5_0", "attn_q": "q4_0", "attn_k": "q5_1", "attn_v": "q8_0",
        "ffn_gate": "q4_1", "ffn_up": "F16",
    }  # fmt: skip
    stored: dict[str, Any] = dict(small_models.tensors())
    values = dict(stored)
    for name in stored:
        kind = types.get(name.split(".")[-2])
        if kind == "F16":
            stored[name] = stored[name].astype(np.float16)
            values[name] = stored[name].astype(np.float32)
        elif kind is not None:
            stored[name] = blocks_of(kind, stored[name], lambda blocks: None)
            nplora._core.dequantize(stored[name].data, kind, values[name])
    path = small_models.write(tmp_path / "stored.gguf", weights=stored)
    lm = nplora.load_model(path, mmap=mmap)
    assert lm.model.layers[0].self_attn.k_proj.weight.dtype == "q5_1"  # type: ignore[union-attr]
    wanted = nplora.load_model(small_models.write(tmp_path / "values.gguf", weights=values))
    ids = np.arange(50)
    np.testing.assert_allclose(lm.logits(ids), wanted.logits(ids), rtol=0, atol=2e-4)
    for model in (lm, wanted):
        model.add_lora(rank=2)
        model.train_step(ids, ids, nplora.SGD(lr=0.1))
    for p, q in zip(lm.parameters(), wanted.parameters(), strict=True):
        np.testing.assert_allclose(p.value, q.value, rtol=0, atol=1e-4 * np.abs(q.value).max())


def test_the_tokenizer_is_read_on_first_use(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(small_models.config()))
    small_models.write_tensors(tmp_path / "model.safetensors", small_models.hf_tensors())
    lm = nplora.load_model(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"tokenizer\.json"):
        _ = lm.tokenizer
    lm = nplora.load_model(small_models.write(tmp_path / "m.gguf"))
    with pytest.raises(FormatError, match=r"tokenizer\.ggml"):
        _ = lm.tokenizer
