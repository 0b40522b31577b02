"""QLoRA's NF4 in safetensors files: compared with the definition of the levels, and with bitsandbytes."""

import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import nplora
import small_models
from hostile import refused
from nf4_tensors import LEVELS, NAME, STATE, as_bytes, stored
from nplora import FrozenWeight
from nplora.formats import FormatError, UnsupportedError, bitsandbytes, safetensors
from nplora.formats.errors import LimitError

Array = np.ndarray[Any, Any]


def opened(tensors: dict[str, Array]) -> safetensors.SafetensorsFile:
    return safetensors.loads(safetensors.dumps(tensors))


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("shape", [(3, 64), (5, 33), (300, 128), (1, 1), (0, 8)])
def test_a_matrix_is_read_to_the_bit(shape: tuple[int, int], nested: bool) -> None:
    tensors, values = stored(shape, nested)
    weight = FrozenWeight.from_safetensors(opened(tensors), NAME)
    assert (weight.shape, weight.dtype) == (shape, "nf4")
    np.testing.assert_array_equal(weight.to_numpy(), values)


@pytest.mark.parametrize("compute", ["float32", "bfloat16"])
@pytest.mark.parametrize("n", [1, 6, 70])
def test_products_over_a_doubly_quantised_matrix_are_those_of_its_values(n: int, compute: str) -> None:
    tensors, values = stored((130, 96), nested=True)
    weight = FrozenWeight.from_safetensors(opened(tensors), NAME, compute)
    rng = np.random.default_rng(1)
    x, dy = rng.standard_normal((n, 96), np.float32), rng.standard_normal((n, 130), np.float32)
    unit = 2**-7 if compute == "bfloat16" else 2**-16
    for got, left, right in ((weight.matmul(x), x, values.T), (weight.matmul_t(dy), dy, values)):
        want, magnitude = left.astype(np.float64) @ right, np.abs(left) @ np.abs(right)
        assert (np.abs(got - want) <= unit * magnitude).all()


def test_double_quantisation_takes_less_and_loses_little() -> None:
    W = np.random.default_rng(2).standard_normal((512, 512), np.float32)
    single, double = FrozenWeight(W, "nf4"), FrozenWeight(W, "nf4", double_quant=True)
    assert single.nbytes == W.size // 2 + 4 * W.size // 64
    assert double.nbytes == W.size // 2 + W.size // 64 + 4 * W.size // 64 // 256 + 4 * 256
    errors = [np.square(weight.to_numpy() - W).mean() for weight in (single, double)]
    assert errors[0] != errors[1] < 1.01 * errors[0]
    layer = nplora.LoRALinear(double, rank=2)
    layer.A[...] = 0.1
    np.testing.assert_allclose(
        layer.merged_weight(), double.to_numpy() + 2 * 8 * layer.A @ layer.B / 2, atol=1e-5
    )
    with pytest.raises(ValueError, match="double_quant=True with dtype='q4_0', expected 'nf4'"):
        FrozenWeight(W, "q4_0", double_quant=True)


FAULTS: dict[str, tuple[dict[str, Any], dict[str, Any], type[Exception], str]] = {
    "no absmax": ({f"{NAME}.absmax": None}, {}, FormatError, "'w.absmax' is missing"),
    "few codes": ({NAME: np.zeros((7, 1), np.uint8)}, {}, FormatError, "expected 192 values of uint8"),
    "codes of floats": ({NAME: np.zeros((192, 1), np.float32)}, {}, FormatError, "is float32"),
    "absmax of another type": (
        {f"{NAME}.absmax": np.zeros(6, np.uint8)}, {}, FormatError, "expected 6 values of float32"),
    "NaN": ({f"{NAME}.absmax": np.full(6, np.nan, np.float32)}, {}, FormatError, "holds NaN"),
    "other levels": ({f"{NAME}.quant_map": LEVELS[::-1]}, {}, UnsupportedError, "its own 4-bit levels"),
    "no shape": ({}, {"shape": None}, FormatError, "its shape is None"),
    "a negative shape": ({}, {"shape": [-3, -128]}, FormatError, r"its shape is \[-3, -128\]"),
    "a vast shape": ({}, {"shape": [1 << 40, 1 << 40]}, LimitError, "values, expected at most"),
    "a shape beyond the codes": ({}, {"shape": [3, 1280]}, FormatError, "expected 1,920 values of uint8"),
    "three axes": ({}, {"shape": [3, 64, 2]}, ValueError, r"expected \(d_out, d_in\)"),
    "larger blocks": ({}, {"blocksize": 128}, UnsupportedError, "blocksize is 128, expected 64"),
    "a state of numbers": ({STATE: as_bytes([1])}, {}, FormatError, r"quant_state is \[1\]"),
    "a state that is not JSON": ({STATE: np.full(9, 255, np.uint8)}, {}, FormatError, "not UTF-8"),
    "an endless state": ({STATE: np.full(1 << 17, 32, np.uint8)}, {}, LimitError, "at most 65,536"),
    "fp4": ({STATE: None, STATE[:-3] + "fp4": as_bytes({})}, {}, UnsupportedError, "bitsandbytes type 'fp4'"),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_each_fault_is_named(fault: str, tmp_path: Path) -> None:
    changes, state_changes, error, message = FAULTS[fault]
    tensors = stored((3, 128), nested=False)[0]
    state = json.loads(tensors[STATE].tobytes()) | state_changes
    tensors = tensors | {STATE: as_bytes(state)} | changes
    safetensors.save(tmp_path / "m.safetensors", {k: v for k, v in tensors.items() if v is not None})
    file = safetensors.open(tmp_path / "m.safetensors")
    with pytest.raises(error, match=message) as caught:
        FrozenWeight.from_safetensors(file, NAME)
    assert "m.safetensors" in str(caught.value)


def test_a_second_quantisation_in_other_blocks_is_refused() -> None:
    tensors = stored((3, 128), nested=True)[0]
    for size in (128, None):
        state = json.loads(tensors[STATE].tobytes()) | {"nested_blocksize": size}
        with pytest.raises(UnsupportedError, match=f"nested_blocksize is {size}, expected 256"):
            bitsandbytes.read(opened(tensors | {STATE: as_bytes(state)}), NAME)


@pytest.mark.parametrize("offset", [None, "0.1", True, 1e300, -3.5e38, 10**39])
def test_a_second_quantisation_without_an_offset_is_refused(offset: object) -> None:
    tensors = stored((3, 128), nested=True)[0]
    state = json.loads(tensors[STATE].tobytes()) | {"nested_offset": offset}
    file = opened(tensors | {STATE: as_bytes(state)})
    with refused(FormatError, "nested_offset is", file.source):
        bitsandbytes.read(file, NAME)


IDS = np.arange(12) % small_models.VOCAB


def write_models(directory: Path) -> None:
    """Three models: "nf4" as QLoRA stores it, the same labelled as FP4, and "plain" with the values."""
    plain, packed = dict(small_models.hf_tensors()), dict[str, Array]()
    for seed, (name, value) in enumerate(list(plain.items())):
        packed[name] = value
        if name.endswith("_proj.weight"):
            parts, plain[name] = stored(value.shape, nested=bool(seed % 2), seed=seed)
            plain[name] *= np.float32(0.2)
            packed |= {name + part.removeprefix(NAME): tensor for part, tensor in parts.items()}
            scale = ".absmax" if not seed % 2 else ".nested_absmax"
            packed[name + scale] = packed[name + scale] * np.float32(0.2)
            if seed % 2:
                key = f"{name}.quant_state.bitsandbytes__nf4"
                state = json.loads(packed[key].tobytes())
                packed[key] = as_bytes(state | {"nested_offset": state["nested_offset"] * 0.2})
    config = small_models.config()
    settings = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    fp4 = {name.replace("__nf4", "__fp4"): tensor for name, tensor in packed.items()}
    for kind, tensors, extra in (
        ("plain", plain, {}),
        ("nf4", packed, {"quantization_config": settings | {"bnb_4bit_quant_type": "nf4"}}),
        ("fp4", fp4, {"quantization_config": settings | {"bnb_4bit_quant_type": "fp4"}}),
    ):
        (directory / kind).mkdir()
        (directory / kind / "config.json").write_text(json.dumps(config | extra))
        small_models.write_tensors(directory / kind / "model.safetensors", tensors)


def test_a_language_model_in_nf4_computes_with_its_decoded_values(tmp_path: Path) -> None:
    write_models(tmp_path)
    plain, lm = (nplora.load_model(tmp_path / kind) for kind in ("plain", "nf4"))
    assert lm.model.layers[1].mlp.up_proj.weight.dtype == "nf4"
    np.testing.assert_allclose(plain.logits(IDS), lm.logits(IDS), rtol=1e-3, atol=1e-3)
    lm.add_lora(rank=2)
    losses = [lm.train_step(IDS, IDS, nplora.AdamW(lr=1e-2)) for _ in range(3)]
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_matrices_in_4_bits_are_neither_merged_into_nor_converted(kind: str, tmp_path: Path) -> None:
    write_models(tmp_path)
    lm = nplora.load_model(tmp_path / "nf4")
    lm.add_lora(rank=2)
    nplora.save_adapter(lm, tmp_path / "adapter")
    found = r"_proj\.weight' has a 4-bit type of bitsandbytes, which nplora does not {}; use the unquantised"
    with pytest.raises(UnsupportedError, match=found.format("merge into")):
        nplora.merge_adapter(tmp_path / kind, tmp_path / "adapter", tmp_path / "merged")
    with pytest.raises(UnsupportedError, match=found.format("convert")):
        nplora.model_to_gguf(tmp_path / kind, tmp_path / "model.gguf")
    assert not (tmp_path / "merged").exists()
    assert not (tmp_path / "model.gguf").exists()


def test_an_adapter_of_only_the_embedding_merges_into_a_model_with_nf4_matrices(tmp_path: Path) -> None:
    write_models(tmp_path)
    lm = nplora.load_model(tmp_path / "nf4")
    before = lm.logits(IDS)
    lm.add_lora(rank=2, targets="embed_tokens", init="gaussian")
    nplora.save_adapter(lm, tmp_path / "adapter")
    nplora.merge_adapter(tmp_path / "nf4", tmp_path / "adapter", tmp_path / "merged")
    merged = nplora.load_model(tmp_path / "merged").logits(IDS)
    np.testing.assert_allclose(merged, lm.logits(IDS), rtol=1e-3, atol=1e-3)
    assert np.abs(merged - before).max() > 0.1
    old, new = (safetensors.open(tmp_path / kind / "model.safetensors") for kind in ("nf4", "merged"))
    assert new.keys() == old.keys()
    for name in old.keys() - {"model.embed_tokens.weight"}:
        np.testing.assert_array_equal(new[name].array, old[name].array)


@pytest.mark.slow
@pytest.mark.parametrize("nested", [False, True])
def test_files_of_bitsandbytes_are_read_as_it_reads_them(nested: bool, tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        functional = pytest.importorskip("bitsandbytes.functional")
    # Only rows of whole blocks: on CPUs, bitsandbytes 0.50 cannot read back others that it wrote.
    values = torch.randn(96, 192, generator=torch.Generator().manual_seed(0)) * 0.05
    codes, state = functional.quantize_4bit(
        values, quant_type="nf4", blocksize=64, compress_statistics=nested
    )
    parts = {f"{NAME}.{k}": v.numpy() for k, v in state.as_dict(packed=True).items()}
    safetensors.save(tmp_path / "m.safetensors", {NAME: codes.numpy(), **parts})
    weight = FrozenWeight.from_safetensors(tmp_path / "m.safetensors", NAME)
    np.testing.assert_array_equal(weight.to_numpy(), functional.dequantize_4bit(codes, state).numpy())
