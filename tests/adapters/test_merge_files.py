"""Adapters merged into files: NumPy's sum of the gguf package's weights, all else byte for byte."""

import json
import os
import re
import tracemalloc
from pathlib import Path
from typing import Any

import gguf as oracle
import ml_dtypes
import numpy as np
import pytest
from gguf.quants import dequantize
from test_gguf_files import HEADS, KV_HEADS, in_llama_order

import nplora
from nplora import cli
from nplora.adapters import Adapter, TokenRows, merge_gate
from nplora.formats import gguf, safetensors
from nplora.formats.errors import FormatError, UnsafeError
from nplora.formats.gguf import Typed
from nplora.lora.delta import LoraDelta
from nplora.models import model_files
from nplora.weights import storages
from taken import assert_nothing_is_lost

Array = np.ndarray[Any, Any]

WIDTH, HEAD_DIM = 256, 16
LAYERS = {
    "model.layers.0.self_attn.q_proj": ("blk.0.attn_q.weight", (HEADS * HEAD_DIM, WIDTH)),
    "model.layers.0.self_attn.k_proj": ("blk.0.attn_k.weight", (KV_HEADS * HEAD_DIM, WIDTH)),
    "model.layers.0.mlp.up_proj": ("blk.0.ffn_up.weight", (72, WIDTH)),
    "model.embed_tokens": ("token_embd.weight", (50, WIDTH)),
    "lm_head": ("output.weight", (50, WIDTH)),
}
STORAGES = [name for name in storages.GGML_NAMES if name != "float64"]


def random_adapter(rng: np.random.Generator, size: float = 0.02, dora: bool = False) -> Adapter:
    updates = {}
    for name, (_, (d_out, d_in)) in LAYERS.items():
        a, b = rng.standard_normal((d_out, 3), np.float32), rng.standard_normal((3, d_in), np.float32)
        m = rng.uniform(10, 20, d_out).astype(np.float32) if dora and name != "model.embed_tokens" else None
        updates[name] = LoraDelta(a, b, size, m, name == "model.embed_tokens")
    return Adapter("random", updates)


def base_gguf(path: Path, rng: np.random.Generator, storage: str, tied: bool = False) -> Path:
    metadata = {
        "general.architecture": "llama",
        "llama.attention.head_count": Typed(HEADS, "UINT32"),
        "llama.attention.head_count_kv": Typed(KV_HEADS, "UINT32"),
        "general.alignment": Typed(64, "UINT32"),
        "tokenizer.ggml.tokens": ["a", "b"],
        "tokenizer.ggml.scores": np.array([1, 2], np.float32),
    }
    tensors: dict[str, Any] = {"output_norm.weight": np.ones(WIDTH, np.float32)}
    for stored, shape in LAYERS.values():
        if not (tied and stored == "output.weight"):
            rows = rng.standard_normal(shape, np.float32)
            raw = storages.encode(rows, storage)
            tensors[stored] = gguf.Tensor(stored, storages.GGML_NAMES[storage], shape, raw.reshape(-1))
    tensors["blk.0.attn_v.weight"] = rng.standard_normal((8, WIDTH)).astype(np.float16)
    gguf.save(path, tensors, metadata)
    return path


def weights(path: Path) -> dict[str, Array]:
    """All tensors of a GGUF file in float64, by PyPI's gguf."""
    return {
        t.name: dequantize(t.data, t.tensor_type).astype(np.float64).reshape(t.shape[::-1].tolist())
        for t in oracle.GGUFReader(path).tensors
    }


def delta(update: LoraDelta, stored: str) -> Array:
    return in_llama_order(update.scale * update.A.astype(np.float64) @ update.B.astype(np.float64), stored)


@pytest.mark.slow
@pytest.mark.parametrize("storage", STORAGES)
def test_a_gguf_file_gets_the_sum_in_its_own_storage(
    storage: str, rng: np.random.Generator, tmp_path: Path
) -> None:
    base = base_gguf(tmp_path / "base.gguf", rng, storage)
    adapter = random_adapter(rng)
    done = nplora.merge_adapter(base, adapter, tmp_path / "out.gguf", lossy=True)
    before, after = weights(base), weights(tmp_path / "out.gguf")
    assert [report.name for report in done.reports] == [
        name for name in before if name in dict(LAYERS.values())
    ]
    reports = {report.name: report for report in done.reports}
    for layer, (stored, shape) in LAYERS.items():
        asked = delta(adapter[layer], stored)
        lost = after[stored] - before[stored] - asked
        elements = storages.block_elements(storage)
        blocks = (shape[0], -1, elements if elements > 1 else shape[1])
        errors = np.linalg.norm(lost.reshape(blocks), axis=2) / np.linalg.norm(asked.reshape(blocks), axis=2)
        report = reports[stored]
        along = np.sum((lost + asked) * asked) / np.sum(asked**2)
        np.testing.assert_allclose(report.kept, along, rtol=1e-6)
        np.testing.assert_allclose(report.error, np.linalg.norm(lost) / np.linalg.norm(asked), rtol=1e-6)
        np.testing.assert_allclose(report.norm, np.linalg.norm(asked), rtol=1e-6)
        np.testing.assert_allclose(report.weight_norm, np.linalg.norm(before[stored]), rtol=1e-6)
        beside = lost + asked - along * asked  # orthogonal to ΔW
        np.testing.assert_allclose(report.noise, np.linalg.norm(beside) / np.linalg.norm(asked), rtol=1e-6)
        np.testing.assert_allclose(report.worst_error, errors.max(), rtol=1e-6)
        row, column = report.worst_block
        assert errors[row, column // blocks[2]] == errors.max()
        assert report.nbytes == gguf.open(base)[stored].nbytes
        assert report.storage == storage
        expected = {"float32": 1e-5, "float16": 0.03, "bfloat16": 0.3, "q8_0": 0.5}.get(storage, 4.0)
        assert 0 < report.error < expected
    deltas = {stored: delta(adapter[layer], stored) for layer, (stored, _) in LAYERS.items()}
    asked = np.concatenate([part.ravel() for part in deltas.values()])
    lost = np.concatenate([(after[s] - before[s]).ravel() for s in deltas]) - asked
    np.testing.assert_allclose(done.delta_kept, (lost + asked) @ asked / (asked @ asked), rtol=1e-6)
    np.testing.assert_allclose(done.error, np.linalg.norm(lost) / np.linalg.norm(asked), rtol=1e-6)
    beside = lost - (lost @ asked) / (asked @ asked) * asked
    np.testing.assert_allclose(done.noise, np.linalg.norm(beside) / np.linalg.norm(asked), rtol=1e-6)
    whole = np.concatenate([before[s].ravel() for s in deltas])
    np.testing.assert_allclose(done.change, np.linalg.norm(asked) / np.linalg.norm(whole), rtol=1e-6)


@pytest.mark.parametrize("storage", ["q4_1", "float16"])
def test_all_else_in_a_gguf_file_stays(storage: str, rng: np.random.Generator, tmp_path: Path) -> None:
    base = base_gguf(tmp_path / "base.gguf", rng, storage)
    done = nplora.merge_adapter(base, random_adapter(rng), tmp_path / "out.gguf", lossy=True)
    old, new = gguf.open(base), gguf.open(tmp_path / "out.gguf")
    assert list(new) == list(old)
    assert new.alignment == 64
    assert list(new.metadata) == list(old.metadata)
    for key, value in old.metadata.items():
        assert new.metadata.types[key] == old.metadata.types[key]
        np.testing.assert_array_equal(np.asarray(new.metadata[key]), np.asarray(value))
    for name in old:
        assert (new[name].type, new[name].shape) == (old[name].type, old[name].shape)
        if name in ("output_norm.weight", "blk.0.attn_v.weight"):
            np.testing.assert_array_equal(new[name].data, old[name].data)
    assert done.kept == 2
    lines, lost = str(done).splitlines(), min(report.kept for report in done.reports) < 0.5
    assert lost == (storage == "q4_1")
    assert lines[0].endswith(f" bytes, 5 tensors merged ({storage}), 2 copied")
    assert done.warning.endswith("--dtype q8_0 keeps more") == lost


def test_noise_larger_than_the_update_is_shown_beside_the_size_of_the_weights(
    rng: np.random.Generator, tmp_path: Path
) -> None:
    """Rounding an unrounded model to 4 bits moves it further than the adapter does, and still keeps ΔW."""
    base = base_gguf(tmp_path / "base.gguf", rng, "float16")
    done = nplora.merge_adapter(base, random_adapter(rng, 0.006), tmp_path / "out.gguf", "q4_0")
    assert done.noise > 5
    assert 0.05 < done.noise * done.change < 0.12
    lines = str(done).splitlines()
    assert lines[2] == f"the merged weights keep {done.delta_kept:.1%} of the adapter's change (ΔW)"
    assert lines[3] == (
        f"rounding also adds random noise: {100 * done.noise * done.change:.3g}% of the weights' norm "
        f"({done.noise:.3g} times ΔW)"
    )


# ---- what keeps too little is refused ----


def test_a_merge_that_loses_the_update_is_refused_and_leaves_nothing(
    rng: np.random.Generator, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A tenth of a step of the 4-bit blocks: the smallest storage that is said to keep it does."""
    base = base_gguf(tmp_path / "base.gguf", rng, "q4_1")
    adapter = random_adapter(rng, 0.002)
    adapter.save(tmp_path / "adapter")
    before = sorted(path.name for path in tmp_path.iterdir())
    output = tmp_path / "out.gguf"
    arguments = ["merge", str(base), str(tmp_path / "adapter"), "--output", str(output)]
    assert cli.main(arguments) == 2
    out, err = capsys.readouterr()
    said = re.fullmatch(
        r"nplora: error: merge: rounding to q4_1 would keep ([\d.]+)% of the adapter's change \(ΔW\), "
        r"expected at least 90%; --dtype (\w+) keeps about (\d+)%; "
        r"--lossy merges anyway\n",
        err,
    )
    assert said is not None, err
    assert out == ""
    assert sorted(path.name for path in tmp_path.iterdir()) == before
    done = nplora.merge_adapter(base, adapter, output, said[2])
    assert done.delta_kept == pytest.approx(float(said[3]) / 100, abs=0.02)
    kept = {}
    for dtype in STORAGES:
        kept[dtype] = nplora.merge_adapter(base, adapter, output, dtype, overwrite=True, lossy=True)
    assert kept["q4_1"].delta_kept == pytest.approx(float(said[1]) / 100, abs=0.02)
    smaller = [d for d in kept.values() if kept["q4_1"].nbytes < d.nbytes < kept[said[2]].nbytes]
    assert all(other.delta_kept < 0.92 for other in smaller)
    assert cli.main([*arguments, "--lossy", "--overwrite"]) == 0
    out, err = capsys.readouterr()
    assert out.splitlines()[2] == f"the merged weights keep {said[1]}% of the adapter's change (ΔW)"
    assert gguf.open(output)["blk.0.attn_q.weight"].type == "Q4_1"


def test_a_refused_merge_leaves_the_model_and_the_directory_that_were_there(
    rng: np.random.Generator, tmp_path: Path
) -> None:
    base = hf_directory(tmp_path / "base", rng, ml_dtypes.bfloat16)
    adapter = random_adapter(rng, 5e-4)
    new = tmp_path / "new"
    with pytest.raises(ValueError, match=r"bfloat16 would keep .* --dtype float16 keeps about \d+%; --lossy"):
        nplora.merge_adapter(base, adapter, new)
    assert not new.exists()
    nplora.merge_adapter(base, adapter, new, "float32")
    before = {path: path.read_bytes() for path in new.iterdir()}
    with pytest.raises(ValueError, match="bfloat16 would keep"):
        nplora.merge_adapter(base, adapter, new, overwrite=True)
    assert {path: path.read_bytes() for path in new.iterdir()} == before


def test_a_matrix_of_large_numbers_does_not_hide_those_that_lost_their_update(tmp_path: Path) -> None:
    """All of the large matrix' ΔW is kept, and nothing of the others: 99.99 % in the Frobenius norm."""
    ones = storages.encode(np.ones((8, 32), np.float32), "bfloat16").view(np.uint16)
    large = storages.encode(np.full((8, 32), 1024, np.float32), "bfloat16").view(np.uint16)
    tensors = {f"{n}.weight": safetensors.Tensor("", "bfloat16", large if n == "a" else ones) for n in "abcd"}
    safetensors.save(tmp_path / "base.safetensors", tensors)

    def update(size: float) -> LoraDelta:
        return LoraDelta(np.full((8, 1), size, "f4"), np.ones((1, 32), "f4"), 1.0)

    adapter = Adapter("a", {"a": update(8), **{n: update(0.003) for n in "bcd"}})
    with pytest.raises(ValueError, match=r"bfloat16 would keep [\d.]+% .*--dtype float16 keeps about \d+%"):
        nplora.merge_adapter(tmp_path / "base.safetensors", adapter, tmp_path / "out.safetensors")
    done = nplora.merge_adapter(
        tmp_path / "base.safetensors", adapter, tmp_path / "out.safetensors", lossy=True
    )
    assert done.delta_kept > 0.999


def test_no_storage_is_named_if_none_keeps_enough(tmp_path: Path) -> None:
    """Sums in float32 lose the update, in every storage type."""
    small = LoraDelta(np.full((4, 1), 1e-9, "f4"), np.ones((1, 32), "f4"), 1.0)
    safetensors.save(tmp_path / "base.safetensors", {"fc.weight": np.ones((4, 32), np.float32)})
    with pytest.raises(
        ValueError, match=r"float32 would keep -?0\.0% .*; no other type keeps enough of ΔW; --lo"
    ):
        nplora.merge_adapter(
            tmp_path / "base.safetensors", Adapter("a", {"fc": small}), tmp_path / "out.safetensors"
        )
    assert [path.name for path in tmp_path.iterdir()] == ["base.safetensors"]


def test_an_estimate_by_a_sample_of_rows_is_near_to_the_whole(
    rng: np.random.Generator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = storages.encode(rng.standard_normal((2048, 256), np.float32), "q4_0")
    gguf.save(tmp_path / "base.gguf", {"fc": gguf.Tensor("fc", "Q4_0", (2048, 256), weights.reshape(-1))})
    a, b = rng.standard_normal((2048, 4), np.float32), rng.standard_normal((4, 256), np.float32)
    adapter, model = Adapter("a", {"fc": LoraDelta(a, b, 0.01)}), model_files.open(tmp_path / "base.gguf")
    monkeypatch.setattr(merge_gate, "_SAMPLED_ELEMENTS", 1 << 17)
    for dtype in ("q5_0", "q6_k", "q8_0"):
        done = nplora.merge_adapter(
            tmp_path / "base.gguf", adapter, tmp_path / "o.gguf", dtype, overwrite=True, lossy=True
        )
        estimated = merge_gate._estimated_kept(model, {"fc": adapter["fc"]}, dtype)
        assert estimated == pytest.approx(done.delta_kept, abs=0.02)
        assert estimated != done.delta_kept


@pytest.mark.parametrize(
    ("dtype", "worst", "words"),
    [
        ("same", "q4_1", "q8_0 keeps more"),
        ("q5_0", "q5_0", "q8_0 keeps more"),
        ("q8_0", "q8_0", "float16 keeps more"),
        ("bfloat16", "bfloat16", "float16 keeps more"),
        ("float16", "float16", "float32 keeps more"),
    ],
)
def test_what_would_keep_more_is_told_by_the_worst_weight(
    dtype: str, worst: str, words: str, tmp_path: Path
) -> None:
    """Its ΔW is far below the steps of any storage of 16 bits or fewer; of the other weight all is kept."""
    small = LoraDelta(np.full((72, 1), 1e-7, "f4"), np.ones((1, WIDTH), "f4"), 1.0)
    large = LoraDelta(np.full((50, 1), 10, "f4"), np.ones((1, WIDTH), "f4"), 1.0)
    ones = storages.encode(np.ones((72, WIDTH), np.float32), "q4_1").reshape(-1)
    tensors = {
        "up": gguf.Tensor("up", "Q4_1", (72, WIDTH), ones),
        "down": gguf.Tensor("down", "Q8_0", (50, WIDTH), np.zeros(50 * WIDTH // 32 * 34, np.uint8)),
    }
    gguf.save(tmp_path / "base.gguf", tensors)
    adapter = Adapter("a", {"up": small, "down": large})
    done = nplora.merge_adapter(tmp_path / "base.gguf", adapter, tmp_path / "out.gguf", dtype)
    assert [report.kept < 0.5 for report in done.reports] == [True, False]
    assert done.reports[0].storage == worst
    kept = f"{done.reports[0].kept:.1%} of its ΔW is kept"
    assert done.warning == f"rounding lost much of what up learned ({kept}): --dtype {words}"
    assert "lost" not in str(done)


def test_what_float32_loses_is_told_without_a_remedy(tmp_path: Path) -> None:
    small = LoraDelta(np.full((4, 1), 1e-9, "f4"), np.ones((1, 32), "f4"), 1.0)
    safetensors.save(tmp_path / "base.safetensors", {"fc.weight": np.ones((4, 32), np.float32)})
    done = nplora.merge_adapter(
        tmp_path / "base.safetensors", Adapter("a", {"fc": small}), tmp_path / "out.safetensors", lossy=True
    )
    assert done.delta_kept == pytest.approx(0, abs=1e-6)
    assert done.warning.startswith("rounding lost much of what fc.weight learned (")
    assert done.warning.endswith("% of its ΔW is kept)")


def test_what_would_keep_more_is_something_that_the_file_can_hold(tmp_path: Path) -> None:
    adapter = Adapter("a", {"fc": LoraDelta(np.full((4, 1), 1e-4, "f4"), np.ones((1, 32), "f4"), 1.0)})
    bits = storages.encode(np.ones((4, 32), np.float32), "bfloat16").view(np.uint16)
    weight = safetensors.Tensor("fc.weight", "bfloat16", bits)
    safetensors.save(tmp_path / "base.safetensors", {"fc.weight": weight})
    done = nplora.merge_adapter(
        tmp_path / "base.safetensors", adapter, tmp_path / "out.safetensors", lossy=True
    )
    assert done.delta_kept == pytest.approx(0, abs=1e-12)
    assert done.warning.endswith("of its ΔW is kept): --dtype float16 keeps more")


def test_another_storage_is_that_of_the_merged_weights_alone(
    rng: np.random.Generator, tmp_path: Path
) -> None:
    base = base_gguf(tmp_path / "base.gguf", rng, "q4_1")
    adapter = random_adapter(rng)
    errors = {}
    for dtype in ("float32", "float16", "q8_0", "q4_k"):
        done = nplora.merge_adapter(base, adapter, tmp_path / "out.gguf", dtype, overwrite=True, lossy=True)
        after, before = weights(tmp_path / "out.gguf"), weights(base)
        file = gguf.open(tmp_path / "out.gguf")
        for layer, (stored, _) in LAYERS.items():
            assert file[stored].type == storages.GGML_NAMES[dtype]
            lost = after[stored] - before[stored] - delta(adapter[layer], stored)
            errors[dtype] = np.linalg.norm(lost)
        assert file["blk.0.attn_v.weight"].type == "F16"
        assert {report.storage for report in done.reports} == {dtype}
    assert errors["float32"] < errors["float16"] < errors["q8_0"] < errors["q4_k"]


def test_dora_is_merged_into_a_file(rng: np.random.Generator, tmp_path: Path) -> None:
    base = base_gguf(tmp_path / "base.gguf", rng, "float32")
    adapter = random_adapter(rng, dora=True)
    done = nplora.merge_adapter(base, adapter, tmp_path / "out.gguf")
    before, after = weights(base), weights(tmp_path / "out.gguf")
    for layer, (stored, _) in LAYERS.items():
        expected, m = before[stored] + delta(adapter[layer], stored), adapter[layer].m
        if m is not None:
            norms = np.linalg.norm(expected, axis=1, keepdims=True)
            expected *= in_llama_order(m.astype(np.float64)[:, None], stored) / norms
        np.testing.assert_allclose(after[stored], expected, rtol=1e-5, atol=1e-6)
    assert max(report.error for report in done.reports) < 1e-5


# ---- safetensors ----


def hf_directory(
    directory: Path, rng: np.random.Generator, dtype: Any, shards: int = 1, tied: bool = False
) -> Path:
    directory.mkdir()
    config = {"model_type": "llama", "num_attention_heads": HEADS, "num_key_value_heads": KV_HEADS}
    (directory / "config.json").write_text(json.dumps(config))
    (directory / "tokenizer.json").write_text("{}")
    (directory / "pytorch_model.bin").write_bytes(b"left alone")
    tensors = {"model.norm.weight": np.ones(WIDTH, dtype)}
    for layer, (_, shape) in LAYERS.items():
        if not (tied and layer == "lm_head"):
            tensors[f"{layer}.weight"] = rng.standard_normal(shape).astype(dtype)
    if shards == 1:
        safetensors.save(directory / "model.safetensors", tensors, {"format": "pt", "note": "kept"})
        return directory
    names = list(tensors)
    weight_map = {}
    for i in range(shards):
        file = f"model-{i}.safetensors"
        weight_map |= dict.fromkeys(names[i::shards], file)
        safetensors.save(directory / file, {name: tensors[name] for name in names[i::shards]})
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return directory


def floats(path: Path) -> dict[str, Array]:
    """All tensors in float64. Other tests compare this reader with PyPI's."""
    return {
        name: (t.array.view(ml_dtypes.bfloat16) if t.dtype == "bfloat16" else t.array).astype(np.float64)
        for name, t in safetensors.open(path).items()
    }


@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.float16, ml_dtypes.bfloat16], ids=str)
def test_a_safetensors_file_gets_the_sum(dtype: Any, rng: np.random.Generator, tmp_path: Path) -> None:
    base = hf_directory(tmp_path / "base", rng, dtype) / "model.safetensors"
    adapter = random_adapter(rng)
    done = nplora.merge_adapter(base, adapter, tmp_path / "out.safetensors")
    before, after = floats(base), floats(tmp_path / "out.safetensors")
    assert list(after) == list(before)
    assert safetensors.open(tmp_path / "out.safetensors").metadata == {"format": "pt", "note": "kept"}
    reports = {report.name: report for report in done.reports}
    unit = float(ml_dtypes.finfo(dtype).eps) / 2
    for layer, update in adapter.items():
        name = f"{layer}.weight"
        asked = update.scale * update.A.astype(np.float64) @ update.B.astype(np.float64)
        expected = before[name] + asked
        sums = 1e-6 if dtype != np.float64 else 1e-14
        assert (np.abs(after[name] - expected) <= unit * np.abs(expected) + sums).all()
        lost = after[name] - before[name] - asked
        error = np.linalg.norm(lost) / np.linalg.norm(asked)
        np.testing.assert_allclose(reports[name].error, error, rtol=1e-6, atol=1e-15)
    np.testing.assert_array_equal(after["model.norm.weight"], 1)


@pytest.mark.parametrize("shards", [1, 3])
def test_a_hugging_face_directory_becomes_a_file_or_a_directory(
    shards: int, rng: np.random.Generator, tmp_path: Path
) -> None:
    base = hf_directory(tmp_path / "base", rng, np.float32, shards)
    adapter = random_adapter(rng)
    adapter.save(tmp_path / "adapter")
    nplora.merge_adapter(base, tmp_path / "adapter", tmp_path / "out.safetensors")
    nplora.merge_adapter(base, tmp_path / "adapter", tmp_path / "out")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "config.json", "model.safetensors", "tokenizer.json",
    ]  # fmt: skip
    assert (tmp_path / "out" / "config.json").read_text() == (base / "config.json").read_text()
    one, other = floats(tmp_path / "out.safetensors"), floats(tmp_path / "out" / "model.safetensors")
    assert set(one) == set(other) == {"model.norm.weight", *(f"{layer}.weight" for layer in LAYERS)}
    for name in one:
        np.testing.assert_array_equal(one[name], other[name])
    assert safetensors.open(tmp_path / "out" / "model.safetensors").metadata["format"] == "pt"


@pytest.mark.parametrize("shards", [1, 3])
def test_the_base_is_never_written_to(shards: int, rng: np.random.Generator, tmp_path: Path) -> None:
    base = hf_directory(tmp_path / "base", rng, np.float32, shards)
    before = {path.name: path.read_bytes() for path in base.iterdir()}
    (tmp_path / "link").symlink_to(base)
    adapter = random_adapter(rng)
    for output in (base, f"{base}/../base", tmp_path / "link"):
        with pytest.raises(ValueError, match="is the base itself, which is never overwritten"):
            nplora.merge_adapter(base, adapter, output)
    with pytest.raises(
        ValueError, match="is the base itself" if shards == 1 else "already lists other weights"
    ):
        nplora.merge_adapter(base, adapter, base / "model.safetensors")
    for shard in base.glob("model-*.safetensors"):
        with pytest.raises(ValueError, match="is the base itself"):
            nplora.merge_adapter(base, adapter, shard, overwrite=True)
    assert {path.name: path.read_bytes() for path in base.iterdir()} == before
    file = base_gguf(tmp_path / "base.gguf", rng, "float32")
    with pytest.raises(ValueError, match="is the base itself"):
        nplora.merge_adapter(file, adapter, file)


def test_an_index_of_other_weights_is_not_left_beside_new_ones(
    rng: np.random.Generator, tmp_path: Path
) -> None:
    base = hf_directory(tmp_path / "base", rng, np.float32)
    other = hf_directory(tmp_path / "other", rng, np.float32, 3)
    for output in (other, other / "model.safetensors"):
        with pytest.raises(ValueError, match=r"model\.safetensors\.index\.json already lists other weights"):
            nplora.merge_adapter(base, random_adapter(rng), output)
    assert not (other / "model.safetensors").exists()


def test_a_model_takes_no_place_of_an_adapter(rng: np.random.Generator, tmp_path: Path) -> None:
    base, adapter = hf_directory(tmp_path / "base", rng, np.float32), random_adapter(rng)
    for name, found in (
        ("adapter_config.json", "an adapter"),
        ("adapter_model.safetensors", "an adapter"),
        ("checkpoint-0.safetensors", "a run"),
    ):
        output = tmp_path / name.partition(".")[0]
        output.mkdir()
        (output / name).touch()
        with pytest.raises(FileExistsError, match=f"the directory holds {found}; choose another one"):
            nplora.merge_adapter(base, adapter, output)
        for file in ("model.safetensors", name if name.endswith(".safetensors") else "any.safetensors"):
            with pytest.raises(FileExistsError, match=f"the directory holds {found}; choose another one"):
                nplora.merge_adapter(base, adapter, output / file, overwrite=True)
        assert [path.name for path in output.iterdir()] == [name]
    file = base_gguf(tmp_path / "base.gguf", rng, "float32")
    random_adapter(rng).save(tmp_path / "adapter")
    nplora.adapter_to_gguf(tmp_path / "adapter", tmp_path / "adapter.gguf", file)
    with pytest.raises(ValueError, match=r"adapter\.gguf is the adapter itself, which is never overwritten"):
        nplora.merge_adapter(file, tmp_path / "adapter.gguf", tmp_path / "adapter.gguf")


def test_weights_are_replaced_on_request_alone(
    rng: np.random.Generator, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    random_adapter(rng).save(tmp_path / "adapter")
    file = base_gguf(tmp_path / "base.gguf", rng, "float32")
    directory, out = hf_directory(tmp_path / "hf", rng, np.float32), tmp_path / "out"
    out.mkdir()
    for base, output, weights_file in (
        (file, tmp_path / "out.gguf", tmp_path / "out.gguf"),
        (directory, tmp_path / "out.safetensors", tmp_path / "out.safetensors"),
        (directory, out, out / "model.safetensors"),
        (directory, tmp_path / "mine", tmp_path / "mine" / "config.json"),
    ):
        weights_file.parent.mkdir(exist_ok=True)
        weights_file.write_bytes(b"of another model")
        line = ["merge", str(base), str(tmp_path / "adapter"), "--output", str(output)]
        assert cli.main(line) == 2
        assert f"{weights_file}: the file already exists; name another one" in capsys.readouterr().err
        assert weights_file.read_bytes() == b"of another model"
        assert cli.main([*line, "--overwrite"]) == 0
        assert weights_file.read_bytes() != b"of another model"


def test_what_has_the_name_of_the_merged_file_is_not_lost(rng: np.random.Generator, tmp_path: Path) -> None:
    base, adapter = base_gguf(tmp_path / "base.gguf", rng, "float32"), random_adapter(rng)
    target = tmp_path / "out" / "out.gguf"
    target.parent.mkdir()
    assert_nothing_is_lost(
        target, lambda overwrite: nplora.merge_adapter(base, adapter, target, overwrite=overwrite)
    )


def test_no_file_that_a_merge_reads_is_replaced_under_another_name(
    rng: np.random.Generator, tmp_path: Path
) -> None:
    base, out = hf_directory(tmp_path / "base", rng, np.float32), tmp_path / "out"
    random_adapter(rng).save(tmp_path / "adapter")
    tensors = tmp_path / "adapter" / "adapter_model.safetensors"
    out.mkdir()
    for source, name, words in (
        (base / "model.safetensors", "model.safetensors", "base"),
        (base / "config.json", "config.json", "base"),
        (tensors, "model.safetensors", "adapter"),
    ):
        for make in (os.link, os.symlink):
            before = source.read_bytes()
            make(source, out / name)
            with pytest.raises(ValueError, match=f"{name} is the {words} itself, which is never overwritten"):
                nplora.merge_adapter(base, tmp_path / "adapter", out, overwrite=True)
            assert source.read_bytes() == before
            (out / name).unlink()
    assert os.listdir(out) == []


def test_a_failure_leaves_no_new_directory(rng: np.random.Generator, tmp_path: Path) -> None:
    base = hf_directory(tmp_path / "base", rng, np.float16)
    (tmp_path / "old").mkdir()
    huge = Adapter(
        "huge", {"lm_head": LoraDelta(np.full((50, 1), 1e30, np.float32), np.ones((1, WIDTH)), 1.0)}
    )
    for output in ("new", "old"):
        with pytest.raises(ValueError, match="lm_head"):
            nplora.merge_adapter(base, huge, tmp_path / output)
    assert not (tmp_path / "new").exists()
    assert list((tmp_path / "old").iterdir()) == []


def test_a_file_beside_the_weights_is_no_way_out_of_the_model(
    rng: np.random.Generator, tmp_path: Path
) -> None:
    (tmp_path / "secret").write_text("not of the model")
    cache = tmp_path / "models--a--b"
    (cache / "snapshots").mkdir(parents=True)
    (cache / "blobs").mkdir()
    base = hf_directory(cache / "snapshots" / "0123", rng, np.float32)
    (base / "tokenizer.json").rename(cache / "blobs" / "89ab")
    (base / "tokenizer.json").symlink_to("../../blobs/89ab")
    nplora.merge_adapter(base, random_adapter(rng), tmp_path / "out")
    assert (tmp_path / "out" / "tokenizer.json").read_text() == "{}"
    assert not (tmp_path / "out" / "tokenizer.json").is_symlink()
    (base / "notes.txt").symlink_to(tmp_path / "secret")
    with pytest.raises(UnsafeError, match=r"notes\.txt: a symbolic link, expected a regular file"):
        nplora.merge_adapter(base, random_adapter(rng), tmp_path / "other")
    assert not (tmp_path / "other").exists()


def test_of_a_file_and_an_index_all_read_the_file(rng: np.random.Generator, tmp_path: Path) -> None:
    """As transformers does, so that nobody merges what nobody loads."""
    base = hf_directory(tmp_path / "base", rng, np.float32, 3)
    file = hf_directory(tmp_path / "one", rng, np.float32) / "model.safetensors"
    file.rename(base / "model.safetensors")
    nplora.merge_adapter(base, random_adapter(rng, 0.0), tmp_path / "out.safetensors")
    one, other = floats(base / "model.safetensors"), floats(tmp_path / "out.safetensors")
    for name in one:
        np.testing.assert_array_equal(one[name], other[name])


def test_an_update_of_zero_leaves_the_blocks_as_they_were(rng: np.random.Generator, tmp_path: Path) -> None:
    base = base_gguf(tmp_path / "base.gguf", rng, "q4_0")
    done = nplora.merge_adapter(base, random_adapter(rng, 0.0), tmp_path / "out.gguf")
    assert (tmp_path / "out.gguf").read_bytes() == base.read_bytes()
    assert {(report.error, report.kept, report.storage) for report in done.reports} == {(0, 1, "q4_0")}
    assert (len(done.reports), done.kept) == (5, 2)


def test_what_a_file_says_of_its_types_follows_them(rng: np.random.Generator, tmp_path: Path) -> None:
    base = base_gguf(tmp_path / "plain.gguf", rng, "float16")
    old = gguf.open(base)
    metadata = old.metadata.typed() | {"general.file_type": Typed(1, "UINT32")}
    gguf.save(tmp_path / "base.gguf", dict(old), metadata)
    for dtype, number, version in (("same", 1, None), ("q4_0", 2, 2), ("q5_k", 16, 2), ("float32", 0, None)):
        out = tmp_path / f"{dtype}.gguf"
        nplora.merge_adapter(tmp_path / "base.gguf", random_adapter(rng), out, dtype)
        fields = oracle.GGUFReader(out).fields
        found = oracle.LlamaFileType(fields["general.file_type"].contents())
        assert found == number, found.name
        version_field = fields.get("general.quantization_version")
        assert (version_field and version_field.contents()) == version


def test_a_mixture_of_types_keeps_its_name(rng: np.random.Generator, tmp_path: Path) -> None:
    """Q4_K_M is a Q4_K in which some tensors are finer, and stays one when an adapter makes others finer."""
    old = gguf.open(base_gguf(tmp_path / "plain.gguf", rng, "q4_k"))
    metadata = old.metadata.typed() | {"general.file_type": Typed(15, "UINT32")}
    gguf.save(tmp_path / "base.gguf", dict(old), metadata)
    layer = "model.layers.0.self_attn.k_proj"
    adapter = Adapter("one", {layer: random_adapter(rng)[layer]})
    nplora.merge_adapter(tmp_path / "base.gguf", adapter, tmp_path / "out.gguf", "q8_0")
    metadata = gguf.open(tmp_path / "out.gguf").metadata
    assert metadata["general.file_type"] == 15
    assert metadata["general.quantization_version"] == 2


def test_a_network_of_your_own_is_merged_by_its_own_names(rng: np.random.Generator, tmp_path: Path) -> None:
    W = rng.standard_normal((12, 9)).astype(np.float32)
    model = nplora.Sequential(nplora.LoRALinear(W, 2, init="gaussian", rng=0))
    nplora.save_adapter(model, tmp_path / "adapter")
    for names in ({"0": W}, {"0.weight": W}):
        safetensors.save(tmp_path / "net.safetensors", names)
        gguf.save(tmp_path / "net.gguf", names)
        for kind in ("gguf", "safetensors"):
            net, out = tmp_path / f"net.{kind}", tmp_path / f"out.{kind}"
            nplora.merge_adapter(net, tmp_path / "adapter", out, overwrite=True)
        expected = model[0].merged_weight()
        (name,) = names
        np.testing.assert_array_equal(safetensors.open(tmp_path / "out.safetensors")[name].numpy(), expected)
        np.testing.assert_array_equal(gguf.open(tmp_path / "out.gguf")[name].numpy(), expected)


# ---- what is refused, and what it costs ----


def test_what_does_not_fit_is_listed_and_nothing_is_written(rng: np.random.Generator, tmp_path: Path) -> None:
    base = base_gguf(tmp_path / "base.gguf", rng, "q4_1")
    update = random_adapter(rng)["lm_head"]
    adapter = Adapter(
        "wrong",
        {
            "lm_head": LoraDelta(update.A[:7], update.B, 1.0),
            "model.layers.1.self_attn.q_proj": update,
            "model.layers.0.mlp.up_proj": random_adapter(rng)["model.layers.0.mlp.up_proj"],
        },
    )
    with pytest.raises(FormatError) as error:
        nplora.merge_adapter(base, adapter, tmp_path / "out.gguf")
    assert "wrong: the adapter does not fit" in str(error.value)
    assert (
        "in 2 places:\n  'lm_head': the adapter is for a weight of shape (7, 256), "
        "but output.weight has shape (50, 256)" in str(error.value)
    )
    assert "'model.layers.1.self_attn.q_proj': the model has no tensor for this layer" in str(error.value)
    good = random_adapter(rng)
    for output, dtype, message in (
        ("out.safetensors", "same", "can only become a .gguf file"),
        ("out", "same", "can only become a .gguf file"),
        ("out.gguf", "q3", "a .gguf file cannot hold dtype='q3'; possible: 'same', 'float32'"),
    ):
        with pytest.raises(ValueError, match=message) as refused:
            nplora.merge_adapter(base, good, tmp_path / output, dtype)
        assert "nplora convert" not in str(refused.value)
    net = tmp_path / "net.safetensors"
    safetensors.save(net, {"lm_head": np.zeros((50, WIDTH), np.float32)})
    with pytest.raises(ValueError, match=r"a \.safetensors file cannot hold dtype='q8_0'"):
        nplora.merge_adapter(net, good, tmp_path / "out.safetensors", "q8_0")
    huge = Adapter(
        "huge", {"lm_head": LoraDelta(np.full((50, 1), 1e30, np.float32), np.ones((1, WIDTH)), 1e30)}
    )
    with pytest.raises(ValueError, match="lm_head"):
        nplora.merge_adapter(net, huge, tmp_path / "out.safetensors", "float16")
    assert not list(tmp_path.glob("*out*"))


def test_a_type_whose_blocks_do_not_fill_the_rows_is_told_once_with_those_that_do(tmp_path: Path) -> None:
    base = tmp_path / "base.gguf"
    names = ["blk.0.attn_q", "blk.1.attn_q"]
    gguf.save(base, {f"{name}.weight": np.zeros((4, 64), np.float32) for name in names})
    update = LoraDelta(np.ones((4, 1), np.float32), np.ones((1, 64), np.float32), 1.0)
    adapter = Adapter("ref", dict.fromkeys(names, update))
    with pytest.raises(ValueError, match="dtype q4_k") as error:
        nplora.merge_adapter(base, adapter, tmp_path / "out.gguf", "q4_k")
    fitting = [name for name in storages.GGML_NAMES if storages.block_elements(name) <= 32]
    assert str(error.value) == (
        "merge: dtype q4_k needs a multiple of 256 elements in each row, but blk.1.attn_q.weight has rows of "
        f"64 elements; possible: same, {', '.join(fitting)}"
    )


def test_two_layers_of_one_tensor_are_refused(rng: np.random.Generator, tmp_path: Path) -> None:
    base, layer = base_gguf(tmp_path / "base.gguf", rng, "float32"), "model.layers.0.self_attn.q_proj"
    adapter = Adapter("twice", dict.fromkeys((layer, "blk.0.attn_q"), random_adapter(rng)[layer]))
    with pytest.raises(
        FormatError, match=rf"'blk\.0\.attn_q': its tensor blk\.0\.attn_q\.weight also belongs to '{layer}'"
    ):
        nplora.merge_adapter(base, adapter, tmp_path / "out.gguf")


def test_factors_and_trained_rows_of_one_weight_are_refused(rng: np.random.Generator, tmp_path: Path) -> None:
    base = base_gguf(tmp_path / "base.gguf", rng, "float32")
    rows = TokenRows(np.array([3]), np.zeros((1, WIDTH), np.float32))
    adapter = Adapter("both", {"lm_head": random_adapter(rng)["lm_head"]}, token_rows={"lm_head": rows})
    message = "both: lm_head: for this weight, the adapter has LoRA factors and trained rows"
    with pytest.raises(FormatError, match=message):
        nplora.merge_adapter(base, adapter, tmp_path / "out.gguf")
    assert not (tmp_path / "out.gguf").exists()


@pytest.mark.parametrize("name", ["out.gguf", "out.GGUF"])
def test_a_file_of_another_kind_is_not_taken_for_a_directory(
    name: str, rng: np.random.Generator, tmp_path: Path
) -> None:
    base = hf_directory(tmp_path / "base", rng, np.float32)
    message = rf"base.* can only become a \.safetensors file, got '.*[/\\]{name}'"
    with pytest.raises(ValueError, match=message):
        nplora.merge_adapter(base, random_adapter(rng), tmp_path / name)
    assert not (tmp_path / name).exists()
    nplora.merge_adapter(base, random_adapter(rng), tmp_path / "out.SafeTensors")
    assert (tmp_path / "out.SafeTensors").is_file()


def test_a_head_that_nobody_reads_is_not_merged(rng: np.random.Generator, tmp_path: Path) -> None:
    """config.json ties it to the embedding, and its own tensor is in the file all the same."""
    base = hf_directory(tmp_path / "base", rng, np.float32)
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))
    for source in (base, base / "model.safetensors"):
        with pytest.raises(
            FormatError, match=r"in 2 places:(\n.*embedding and its output share one weight.*){2}"
        ):
            nplora.merge_adapter(source, random_adapter(rng), tmp_path / "out.safetensors")


@pytest.mark.parametrize("family", ["gemma3_text", "smollm3"])
def test_a_head_in_the_file_of_a_family_that_ties_is_not_merged(
    family: str, rng: np.random.Generator, tmp_path: Path
) -> None:
    """config.json does not say whether it is tied, as that of Gemma 3; then the family says it."""
    base = hf_directory(tmp_path / "base", rng, np.float32)
    config = json.loads((base / "config.json").read_text())
    config.pop("tie_word_embeddings", None)
    (base / "config.json").write_text(json.dumps(config | {"model_type": family}))
    with pytest.raises(
        FormatError, match=r"in 2 places:(\n.*embedding and its output share one weight.*){2}"
    ):
        nplora.merge_adapter(base, random_adapter(rng), tmp_path / "out.safetensors")


def test_a_layer_that_a_tied_model_has_not_is_told_so(rng: np.random.Generator, tmp_path: Path) -> None:
    base = base_gguf(tmp_path / "base.gguf", rng, "float32", tied=True)
    adapter = Adapter("a", {"model.layers.9.mlp.up_proj": random_adapter(rng)["model.layers.0.mlp.up_proj"]})
    with pytest.raises(FormatError, match=r"up_proj': the model has no tensor for this layer"):
        nplora.merge_adapter(base, adapter, tmp_path / "out.gguf")


@pytest.mark.parametrize("kind", ["gguf", "safetensors"])
def test_a_weight_that_serves_twice_is_not_merged(
    kind: str, rng: np.random.Generator, tmp_path: Path
) -> None:
    if kind == "gguf":
        base = base_gguf(tmp_path / "base.gguf", rng, "float32", tied=True)
    else:
        base = hf_directory(tmp_path / "base", rng, np.float32, tied=True) / "model.safetensors"
    with pytest.raises(FormatError, match=r"in 2 places:\n.*embedding and its output share one weight"):
        nplora.merge_adapter(base, random_adapter(rng), tmp_path / f"out.{kind}")


def test_blocks_that_are_not_decoded_are_refused(rng: np.random.Generator, tmp_path: Path) -> None:
    blocks = np.zeros(50 * 74, np.uint8)
    gguf.save(tmp_path / "base.gguf", {"lm_head": gguf.Tensor("lm_head", "IQ2_XS", (50, WIDTH), blocks)})
    adapter = Adapter("a", {"lm_head": random_adapter(rng)["lm_head"]})
    with pytest.raises(FormatError, match="'lm_head': lm_head has type IQ2_XS, which nplora cannot decode"):
        nplora.merge_adapter(tmp_path / "base.gguf", adapter, tmp_path / "out.gguf")


@pytest.mark.slow
def test_no_weight_is_held_as_a_whole(rng: np.random.Generator, tmp_path: Path) -> None:
    shape = (6000, 2048)
    raw = np.zeros(shape[0] * 64 * 20, np.uint8)
    gguf.save(tmp_path / "base.gguf", {"fc": gguf.Tensor("fc", "Q4_1", shape, raw)})
    a, b = rng.standard_normal((shape[0], 2), np.float32), rng.standard_normal((2, shape[1]), np.float32)
    tracemalloc.start()
    try:
        nplora.merge_adapter(
            tmp_path / "base.gguf", Adapter("a", {"fc": LoraDelta(a, b, 1.0)}), tmp_path / "out.gguf"
        )
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 16 << 20 < shape[0] * shape[1] * 4 / 2


def test_the_command_merges_and_reports(
    rng: np.random.Generator, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = base_gguf(tmp_path / "base.gguf", rng, "q4_1")
    random_adapter(rng).save(tmp_path / "adapter")
    arguments = ["merge", str(base), str(tmp_path / "adapter"), "--output", str(tmp_path / "out.gguf")]
    assert cli.main([*arguments, "--dtype", "q8_0"]) == 0
    out, err = capsys.readouterr()
    lines = out.splitlines()
    assert err == ""
    size = (tmp_path / "out.gguf").stat().st_size
    assert lines[0] == f"{tmp_path / 'out.gguf'}: {size:,} bytes, 5 tensors merged (q8_0), 2 copied"
    assert (
        lines[1]
        == "held-out loss not measured (measure it with nplora merge --check FILE, or check= in Python)"
    )
    assert re.fullmatch(r"the merged weights keep \d+\.\d% of the adapter's change \(ΔW\)", lines[2])
    noise = r"rounding also adds random noise: 0\.\d+% of the weights' norm \(0\.\d+ times ΔW\)"
    assert re.fullmatch(noise, lines[3])
    assert lines[4] == "the tensors that keep the least of ΔW:"
    assert len(lines) == 8
    kept = [float(re.findall(r"([\d.]+)% of ΔW", line)[0]) for line in lines[5:]]
    assert kept == sorted(kept)
    assert cli.main([*arguments, "--dtype", "q8_0", "--verbose", "--overwrite"]) == 0
    table = capsys.readouterr().out.splitlines()
    assert table[5:] == lines
    assert table[0].startswith("blk.0.attn_q.weight: q8_0, 17,408 bytes, ")
    assert set(map(str.strip, lines[5:])) <= set(table[:5])
    with pytest.raises(SystemExit) as ended:
        cli.main([*arguments, "--dtype", "int4"])
    assert ended.value.code == 2
    assert "argument --dtype: invalid choice: 'int4'" in capsys.readouterr().err
    with pytest.raises(ValueError, match="cannot hold dtype='int4'"):
        nplora.merge_adapter(base, tmp_path / "adapter", tmp_path / "o.gguf", "int4")


def test_a_command_that_loses_much_warns(
    rng: np.random.Generator, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = base_gguf(tmp_path / "base.gguf", rng, "q4_1")
    random_adapter(rng, 1e-5).save(tmp_path / "adapter")
    output = str(tmp_path / "o.gguf")
    assert cli.main(["merge", str(base), str(tmp_path / "adapter"), "--output", output, "--lossy"]) == 0
    out, err = capsys.readouterr()
    assert "lost" not in out
    assert re.fullmatch(
        r"nplora: warning: rounding lost much of what \S+ learned \(-?[\d.]+% of its ΔW is kept\): "
        r"--dtype q8_0 keeps more\n",
        err,
    )
