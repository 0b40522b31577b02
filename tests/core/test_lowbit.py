"""Frozen weights in low-bit blocks and in mapped files: products, gradients, layers, memory, real models."""

import copy
import pickle
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import nplora
import reference
import systems
from block_formats import EXPECTED
from figures import Figure
from nplora import FrozenWeight
from nplora.formats import UnsupportedError, gguf, safetensors
from nplora.weights import storages

FORMATS = list(storages.BLOCKS)
OF_32 = [name for name in FORMATS if storages.block_elements(name) == 32]
GGUF_FORMATS = [name for name in FORMATS if name != "nf4"]
SCALE = 0.7


def random(rng: np.random.Generator, *shape: int) -> Any:
    return rng.standard_normal(shape).astype(np.float32)


def unit_bound(compute: str, rows: int, depth: int) -> float:
    """The relative error of a product of `depth` steps, relative to the sum of its terms' magnitudes."""
    # bfloat16 rounds both operands to 8 bits, so each product is off by a little over 2^-8.
    rounded = 2.001 * 2**-8 if compute == "bfloat16" and rows > 4 else 0.0
    return rounded + reference.gamma(2 * depth)


# ---- products ----


@pytest.mark.slow
@pytest.mark.parametrize("compute", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", FORMATS)
def test_products_equal_those_of_the_decoded_matrix(
    name: str, compute: str, rng: np.random.Generator
) -> None:
    for d_out, d_in in ((1, 256), (37, 512), (131, 768), (1100, 256)):
        fw = FrozenWeight(random(rng, d_out, d_in), name, compute)
        W = fw.to_numpy().astype(np.float64)
        for n in (1, 2, 3, 4, 5, 7, 8, 9, 33, 300):
            x, dy = random(rng, n, d_in), random(rng, n, d_out)
            error = np.abs(fw.matmul(x) - x.astype(np.float64) @ W.T)
            bound = unit_bound(compute, n, d_in) * (np.abs(x).astype(np.float64) @ np.abs(W).T)
            assert np.all(error <= bound), (d_out, d_in, n)
            error = np.abs(fw.matmul_t(dy) - dy.astype(np.float64) @ W)
            bound = unit_bound(compute, n, d_out) * (np.abs(dy).astype(np.float64) @ np.abs(W))
            assert np.all(error <= bound), (d_out, d_in, n)


@pytest.mark.slow
@pytest.mark.parametrize("name", OF_32)
def test_rows_that_are_no_multiple_of_a_panel_or_a_pair_of_them_work(
    name: str, rng: np.random.Generator
) -> None:
    for d_in in (32, 64, 96, 160, 224, 1056, 1088, 2080):
        fw = FrozenWeight(random(rng, 49, d_in), name)
        W = fw.to_numpy().astype(np.float64)
        for n in (1, 3, 20, 500):
            x, dy = random(rng, n, d_in), random(rng, n, 49)
            bound = reference.gamma(2 * d_in) * (np.abs(x).astype(np.float64) @ np.abs(W).T)
            assert np.all(np.abs(fw.matmul(x) - x.astype(np.float64) @ W.T) <= bound)
            bound = reference.gamma(2 * 49) * (np.abs(dy).astype(np.float64) @ np.abs(W))
            assert np.all(np.abs(fw.matmul_t(dy) - dy.astype(np.float64) @ W) <= bound)


@pytest.mark.slow
@pytest.mark.parametrize("compute", ["float32", "bfloat16"])
@pytest.mark.parametrize("d_in", [1, 31, 33, 63, 65, 100, 577])
def test_blocks_of_nf4_may_straddle_rows(d_in: int, compute: str, rng: np.random.Generator) -> None:
    fw = FrozenWeight(random(rng, 77, d_in), "nf4", compute)
    W = fw.to_numpy().astype(np.float64)
    for n in (1, 2, 8, 9, 70, 300):
        x, dy = random(rng, n, d_in), random(rng, n, 77)
        bound = unit_bound(compute, n, d_in) * (np.abs(x).astype(np.float64) @ np.abs(W).T)
        assert np.all(np.abs(fw.matmul(x) - x.astype(np.float64) @ W.T) <= bound)
        bound = unit_bound(compute, n, 77) * (np.abs(dy).astype(np.float64) @ np.abs(W))
        assert np.all(np.abs(fw.matmul_t(dy) - dy.astype(np.float64) @ W) <= bound)


@pytest.mark.parametrize("name", ["q8_0", "q4_1", "q6_k", "nf4"])
@pytest.mark.parametrize("shape", [(0, 256), (5, 0), (0, 0)])
def test_empty_matrices_work(name: str, shape: tuple[int, int]) -> None:
    fw = FrozenWeight(np.ones(shape), name)
    for n in (0, 1, 9, 300):
        assert fw.matmul(np.ones((n, shape[1]))).shape == (n, shape[0])
        np.testing.assert_array_equal(fw.matmul(np.ones((n, shape[1]))), 0)
        np.testing.assert_array_equal(fw.matmul_t(np.ones((n, shape[0]))), np.zeros((n, shape[1])))
    assert fw.to_numpy().shape == shape


@pytest.mark.slow
@pytest.mark.usefixtures("thread_limit")
@pytest.mark.parametrize("compute", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", FORMATS)
def test_results_are_the_same_to_the_bit_on_any_number_of_threads(
    name: str, compute: str, rng: np.random.Generator
) -> None:
    for counts, (d_out, d_in) in ((range(1, 10), (1021, 1024)), ((33, 300), (509, 512))):
        fw = FrozenWeight(random(rng, d_out, d_in), name, compute)
        A, B = random(rng, d_out, 11), random(rng, 11, d_in)
        for n in counts:
            x, dy, results = random(rng, n, d_in), random(rng, n, d_out), set()
            for threads in (1, 2, 3):
                nplora.set_num_threads(threads)
                y, z = nplora.lora_forward(x, fw, A, B, SCALE)
                gradients = nplora.lora_backward(dy, x, z, fw, A, B, SCALE)
                products = fw.matmul(x), fw.matmul_t(dy)
                results.add(b"".join(array.tobytes() for array in (y, z, *gradients, *products)))
            assert len(results) == 1, n


def test_non_finite_scales_propagate() -> None:
    W = np.ones((3, 64), np.float32)
    blocks = nplora.FrozenWeight(W, "q8_0")
    raw = pickle.loads(pickle.dumps(blocks))._arrays[0]
    raw = raw.copy()
    raw[1, :2] = np.array([np.nan], np.float16).view(np.uint8)
    raw[2, 34:36] = np.array([np.inf], np.float16).view(np.uint8)
    file = gguf.loads(gguf.dumps({"w": gguf.Tensor("w", "Q8_0", (3, 64), raw.reshape(-1))}, {}))
    fw = FrozenWeight.from_gguf(file, "w")
    for n in (1, 5, 40):
        y = fw.matmul(np.ones((n, 64), np.float32))
        np.testing.assert_array_equal(np.isnan(y), np.array([[False, True, False]] * n))
        np.testing.assert_array_equal(np.isinf(y), np.array([[False, False, True]] * n))


# ---- the low-rank update ----


@pytest.mark.slow
@pytest.mark.parametrize("n", [1, 3, 8, 40, 300])
@pytest.mark.parametrize("name", FORMATS)
def test_lora_gradients_equal_those_of_the_decoded_matrix(
    name: str, n: int, rng: np.random.Generator, figure: Figure
) -> None:
    d_out, d_in, r = 101, 512, 5
    fw = FrozenWeight(random(rng, d_out, d_in), name)
    W, A, B = fw.to_numpy(), random(rng, d_out, r), random(rng, r, d_in)
    x, dy, bias = random(rng, n, d_in), random(rng, n, d_out), random(rng, d_out)
    y, z = nplora.lora_forward(x, fw, A, B, SCALE, bias)
    expected, _ = reference.lora_forward(x, W, A, B, SCALE, bias)
    magnitude, _ = reference.lora_forward(*map(np.abs, (x, W, A, B)), SCALE, np.abs(bias))
    assert np.all(np.abs(y - expected) <= reference.gamma(2 * (d_in + r + 2)) * magnitude)
    gradients = nplora.lora_backward(dy, x, z, fw, A, B, SCALE)
    wanted = reference.lora_backward(dy, x, W, A, B, SCALE)
    magnitudes = reference.lora_backward(*map(np.abs, (dy, x, W, A, B)), SCALE)
    depths = (d_out + r, n + d_in, n + d_out)
    for got, want, size, depth in zip(gradients, wanted, magnitudes, depths, strict=True):
        share = np.abs(got - want) / (reference.gamma(4 * (depth + 4)) * size)
        assert np.all(share <= 1)
        figure("error of a gradient over its bound", share.max())


@pytest.mark.parametrize("n", [2, 700])
def test_a_large_batch_merges_the_update_on_the_fly(n: int, rng: np.random.Generator) -> None:
    d_out, d_in, r = 120, 192, 64
    fw = FrozenWeight(random(rng, d_out, d_in), "q8_0")
    A, B = random(rng, d_out, r), random(rng, r, d_in)
    x, dy = random(rng, n, d_in), random(rng, n, d_out)
    plain = FrozenWeight(fw.to_numpy())
    y, z = nplora.lora_forward(x, fw, A, B, SCALE)
    for got, want in zip(
        (y, *nplora.lora_backward(dy, x, z, fw, A, B, SCALE)),
        (
            nplora.lora_forward(x, plain, A, B, SCALE)[0],
            *nplora.lora_backward(dy, x, z, plain, A, B, SCALE),
        ),
        strict=True,
    ):
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4 * np.abs(want).max())


@pytest.mark.parametrize("name", FORMATS)
def test_layers_work_over_blocks(name: str, rng: np.random.Generator) -> None:
    fw = FrozenWeight(random(rng, 48, 256), name)
    W, x = fw.to_numpy(), random(rng, 9, 256)
    for use_dora in (False, True):
        low, plain = (
            nplora.LoRALinear(weight, rank=4, use_dora=use_dora, init="gaussian", rng=0) for weight in (fw, W)
        )
        assert low.weight is fw
        y, saved = low.forward(x)
        y_plain, saved_plain = plain.forward(x)
        np.testing.assert_allclose(y, y_plain, rtol=1e-4, atol=1e-3)
        np.testing.assert_allclose(low.backward(y, saved), plain.backward(y, saved_plain), 1e-4, 1e-2)
        np.testing.assert_allclose(low.dA, plain.dA, 1e-4, 1e-2)
        np.testing.assert_allclose(low.merged_weight(), plain.merged_weight(), 1e-6, 1e-6)
        low.merge()
        np.testing.assert_allclose(low(x), y, rtol=1e-3, atol=1e-3)
        low.unmerge()
        np.testing.assert_array_equal(low(x), y)
        assert low.merge_and_unload().weight.dtype == "float32"
    linear = nplora.Linear(fw)
    np.testing.assert_array_equal(linear(x), fw.matmul(x))
    ids = np.array([[3, 0], [47, 3]])
    np.testing.assert_array_equal(nplora.Embedding(fw)(ids), W[ids])
    np.testing.assert_array_equal(nplora.LoRAEmbedding(fw, rank=2)(ids), W[ids])
    with pytest.raises(ValueError, match="trainable=True, expected dtype='float32' or 'float64'"):
        nplora.Linear(fw, trainable=True)


def test_a_stack_may_mix_storages(rng: np.random.Generator) -> None:
    names = ["q4_1", "float32", "nf4", "q6_k", "bfloat16"]
    for n in (1, 8, 300):
        layers = [nplora.LoRALinear(random(rng, 40, 256), rank=3, dtype=d, init="gaussian") for d in names]
        x = random(rng, n, 256)
        outputs, saved = nplora.stack_forward(layers, x)
        for layer, y in zip(layers, outputs, strict=True):
            np.testing.assert_allclose(y, layer(x), rtol=1e-4, atol=1e-3)
        dx = nplora.stack_backward(layers, outputs, saved)
        alone = sum(layer.backward(y, layer.forward(x)[1]) for layer, y in zip(layers, outputs, strict=True))
        np.testing.assert_allclose(dx, alone, rtol=1e-3, atol=1e-2 * np.abs(alone).max())


# ---- the object ----


@pytest.mark.parametrize("name", FORMATS)
def test_a_weight_knows_its_storage(name: str, rng: np.random.Generator) -> None:
    fw = FrozenWeight(random(rng, 6, 512), name)
    of = nplora._core.block_formats()[name]
    length, nbytes = of.elements, of.nbytes
    scales = 4 * fw.size // length if name == "nf4" else 0
    assert (fw.dtype, fw.shape, fw.compute) == (name, (6, 512), "float32")
    assert fw.nbytes == fw.size // length * nbytes + scales
    W = fw.to_numpy()
    np.testing.assert_array_equal(fw.take([5, 0, 5]), W[[5, 0, 5]])
    np.testing.assert_array_equal(np.asarray(fw), W)
    assert copy.deepcopy(fw) is fw
    for compute in ("float32", "bfloat16"):
        fw = FrozenWeight(W, name, compute)
        loaded = pickle.loads(pickle.dumps(fw))
        assert (loaded.dtype, loaded.compute, loaded.nbytes) == (name, compute, fw.nbytes)
        np.testing.assert_array_equal(loaded.to_numpy(), fw.to_numpy())


def test_every_format_has_an_entry_in_block_formats() -> None:
    assert set(EXPECTED) == set(FORMATS), "tests/block_formats.py needs one entry for each format"


@pytest.mark.parametrize("name", FORMATS)
def test_quantised_values_are_near(name: str, rng: np.random.Generator) -> None:
    W = random(rng, 30, 512)
    error = np.sqrt(np.mean((FrozenWeight(W, name).to_numpy() - W) ** 2))
    assert error < EXPECTED[name].error


def test_float64_and_half_arrays_are_quantised_as_float32(rng: np.random.Generator) -> None:
    W = random(rng, 3, 64).astype(np.float16)
    for given in (W, W.astype(np.float64), W.astype(np.float32).tolist(), np.asfortranarray(W)):
        np.testing.assert_array_equal(
            FrozenWeight(given, "q8_0").to_numpy(), FrozenWeight(W.astype(np.float32), "q8_0").to_numpy()
        )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            (np.ones((2, 40)), "q4_1"),
            r"FrozenWeight: W: d_in=40, but q4_1 has blocks of 32 values along a row",
        ),
        ((np.ones((2, 576)), "q4_k"), "d_in=576, but q4_k has blocks of 256 values along a row"),
        ((np.full((2, 32), np.inf), "q8_0"), "FrozenWeight: W: row 0 holds inf, expected finite values"),
        ((np.full((2, 33), np.nan), "nf4"), "row 0 holds nan, expected finite values"),
        ((np.full((2, 32), 1e9), "q4_0"), r"row 0 holds 1e\+09, beyond 524032, the largest that q4_0"),
        ((np.ones(32), "q8_0"), "W has 1 axis"),
        ((np.ones((2, 32)), "q8_0", "int4"), "compute='int4' is not available"),
    ],
)
def test_weights_that_blocks_cannot_hold_are_refused(arguments: tuple[Any, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        FrozenWeight(*arguments)


# ---- files ----


@pytest.fixture
def model(tmp_path: Path, rng: np.random.Generator) -> Path:
    """A GGUF file with a matrix in every type that is used in place."""
    W = random(rng, 9, 512)
    tensors: dict[str, Any] = {"F32": W, "F16": W.astype(np.float16), "F64": W.astype(np.float64)}
    bits = (W.view(np.uint32) >> 16).astype(np.uint16)
    tensors["BF16"] = gguf.Tensor("BF16", "BF16", W.shape, bits.view(np.uint8).reshape(-1))
    for name in GGUF_FORMATS:
        blocks = FrozenWeight(W, name)._arrays[0]
        tensors[name.upper()] = gguf.Tensor(name, name.upper(), W.shape, blocks.reshape(-1))
    tensors["I32"] = np.ones((2, 2), np.int32)
    tensors["vector"] = np.ones(4, np.float32)
    gguf.save(tmp_path / "model.gguf", tensors, {"general.architecture": "test"})
    return tmp_path / "model.gguf"


def test_every_type_of_a_gguf_file_is_used_in_place(model: Path, rng: np.random.Generator) -> None:
    file, x = gguf.open(model), random(rng, 40, 512)
    floats = {"F32": "float32", "F16": "float16", "F64": "float64", "BF16": "bfloat16"}
    for name in (*floats, *(block.upper() for block in GGUF_FORMATS)):
        fw = FrozenWeight.from_gguf(file, name)
        assert fw.dtype == floats.get(name, name.lower())
        assert np.shares_memory(fw._arrays[0], file[name].data), "the matrix was copied"
        assert fw.nbytes == file[name].nbytes
        W = fw.to_numpy()
        if name in floats:
            assert np.abs(W - FrozenWeight.from_gguf(model, "F32").to_numpy()).max() < 0.05
        for n in (1, 8, 40):
            expected = x[:n].astype(np.float64) @ W.T.astype(np.float64)
            bound = reference.gamma(2 * 512) * (np.abs(x[:n]).astype(np.float64) @ np.abs(W).T)
            assert np.all(np.abs(fw.matmul(x[:n]) - expected) <= bound)
            back = fw.matmul_t(x[:n, :9]) - x[:n, :9].astype(np.float64) @ W
            assert np.all(np.abs(back) <= reference.gamma(18) * (np.abs(x[:n, :9]) @ np.abs(W)) + 1e-6)
        np.testing.assert_array_equal(fw.take([8, 1]), W[[8, 1]])


def test_a_weight_keeps_its_file_mapped(model: Path) -> None:
    fw, wanted = FrozenWeight.from_gguf(model, "Q4_K"), FrozenWeight.from_gguf(model, "Q4_K").to_numpy()
    model.unlink()
    np.testing.assert_array_equal(fw.to_numpy(), wanted)
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(fw)).to_numpy(), wanted)


def test_other_tensors_of_a_gguf_file_are_refused(model: Path) -> None:
    with pytest.raises(UnsupportedError, match=r"model\.gguf: tensor 'I32' is I32, expected one of F32, "):
        FrozenWeight.from_gguf(model, "I32")
    with pytest.raises(ValueError, match=r"tensor 'vector' has shape \(4,\), expected \(d_out, d_in\)"):
        FrozenWeight.from_gguf(model, "vector")
    with pytest.raises(KeyError, match=r"no tensor 'Q4_Z', the nearest names: 'Q4_"):
        FrozenWeight.from_gguf(model, "Q4_Z")
    with pytest.raises(ValueError, match="a float64 weight computes in float64"):
        FrozenWeight.from_gguf(model, "F64", compute="bfloat16")
    with pytest.raises(ValueError, match=r"FrozenWeight\.from_gguf: compute='fast' is not available"):
        FrozenWeight.from_gguf(model, "Q4_0", compute="fast")
    with pytest.raises(UnsupportedError, match=r"which NumPy does not have; FrozenWeight\.from_gguf"):
        gguf.open(model)["Q4_0"].numpy()


@pytest.mark.parametrize("shape", [(0, 256), (3, 0), (0, 0)])
def test_a_matrix_without_elements_works(shape: tuple[int, int]) -> None:
    for storage, kind in storages.GGML_NAMES.items():
        file = gguf.loads(gguf.dumps({"w": gguf.Tensor("w", kind, shape, np.empty(0, np.uint8))}))
        fw = FrozenWeight.from_gguf(file, "w")
        assert (fw.shape, fw.dtype, fw.nbytes) == (shape, storage, 0)
        x = np.ones((2, shape[1]), fw.compute_dtype)
        np.testing.assert_array_equal(fw.matmul(x), np.zeros((2, shape[0])))
        raw = storages.encode(fw.to_numpy(), storage)
        assert storages.decode(raw, storage, shape[1]).shape == shape


@pytest.mark.parametrize("compute", ["float32", "bfloat16"])
@pytest.mark.parametrize("shape", [(77, 101), (1100, 250)])  # the second is divided along both axes
def test_matrices_of_a_safetensors_file_are_used_in_place(
    tmp_path: Path, shape: tuple[int, int], compute: str, rng: np.random.Generator
) -> None:
    W = random(rng, *shape)
    bits = (W.view(np.uint32) >> 16).astype(np.uint16)
    tensors: dict[str, Any] = {
        "float32": W,
        "float16": W.astype(np.float16),
        "bfloat16": safetensors.Tensor("bfloat16", "bfloat16", bits),
    }
    if compute == "float32":
        tensors["float64"] = W.astype(np.float64)
    safetensors.save(tmp_path / "m.safetensors", tensors | {"ids": np.ones((2, 2), np.int64)})
    file = safetensors.open(tmp_path / "m.safetensors")
    for name in tensors:
        fw = FrozenWeight.from_safetensors(file, name, compute)
        assert (fw.dtype, fw.compute) == (name, "float64" if name == "float64" else compute)
        if name == "float32":  # with rows of odd length, some narrower types are not aligned
            assert np.shares_memory(fw._arrays[0], file[name].array), "the matrix was copied"
        packed = FrozenWeight(fw.to_numpy(), name, compute)
        for n in (1, 2, 4, 7, 17, 60, 400):
            x, dy = random(rng, n, shape[1]), random(rng, n, shape[0])
            np.testing.assert_array_equal(fw.matmul(x), packed.matmul(x))
            np.testing.assert_array_equal(fw.matmul_t(dy), packed.matmul_t(dy))
        by_path = FrozenWeight.from_safetensors(tmp_path / "m.safetensors", name)
        np.testing.assert_array_equal(by_path.to_numpy(), fw.to_numpy())
    with pytest.raises(UnsupportedError, match=r"m\.safetensors: tensor 'ids' is int64, expected one of"):
        FrozenWeight.from_safetensors(file, "ids")


# ---- memory ----

PRIVATE = """
import sys
def private():
    lines = open("/proc/self/smaps_rollup").read().splitlines()[1:]
    sizes = {line.split(":")[0]: 1024 * int(line.split()[1]) for line in lines}
    return sizes["Anonymous"]
"""


def run(code: str, *arguments: object) -> list[str]:
    command = [sys.executable, "-c", PRIVATE + code, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()


OWNED = """
import numpy as np, nplora
nplora.set_num_threads(1)
W = np.ones((2048, 2048), np.float32)
nplora.FrozenWeight(W[:64], sys.argv[1])  # scratch and code
before = private()
fw = nplora.FrozenWeight(W, sys.argv[1])
print(private() - before, fw.nbytes)
"""


@pytest.mark.slow
@systems.needs_procfs("smaps_rollup")
@pytest.mark.parametrize("storage", ["float32", "bfloat16", "q4_1", "q6_k"])
def test_an_owned_weight_takes_little_more_than_its_storage(storage: str) -> None:
    grown, nbytes = map(int, run(OWNED, storage))
    assert 0.9 * nbytes <= grown <= 1.03 * nbytes + 65536


MAPPED = """
import nplora
file = nplora.formats.gguf.open(sys.argv[1])
names = [name for name, entry in file.entries.items() if len(entry.shape) == 2]
nplora.FrozenWeight.from_gguf(file, names[0]).take([0])
before = private()
weights = [nplora.FrozenWeight.from_gguf(file, name) for name in names]
sums = [float(weight.take([0]).sum()) for weight in weights]
print(len(weights), private() - before)
"""


@systems.needs_procfs("smaps_rollup")
def test_the_mapped_weights_of_a_model_take_almost_no_private_memory(smollm2: Path, figure: Figure) -> None:
    count, grown = map(int, run(MAPPED, smollm2))
    assert count == 211
    assert grown <= 0.01 * smollm2.stat().st_size
    figure("private memory of SmolLM2's 211 weights over its file", grown / smollm2.stat().st_size)


SHARED = """
import nplora, numpy as np
file = nplora.formats.gguf.open(sys.argv[1])
fw = nplora.FrozenWeight.from_gguf(file, "token_embd.weight")
fw.matmul(np.ones((1, 576), np.float32))
print("ready", flush=True)
input()
lines = open("/proc/self/smaps").read().split("\\n")
at = next(i for i, line in enumerate(lines) if line.endswith(".gguf"))
sizes = {line.split(":")[0]: int(line.split()[1]) for line in lines[at + 1 : at + 15] if line.endswith("kB")}
print(sizes["Rss"], sizes["Pss"], sizes["Private_Dirty"])
"""


@systems.needs_procfs("smaps")
def test_two_processes_share_the_pages_of_a_model(smollm2: Path, figure: Figure) -> None:
    command = [sys.executable, "-c", "import sys\n" + SHARED, str(smollm2)]
    two = [
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) for _ in range(2)
    ]
    try:
        for process in two:
            assert process.stdout is not None
            assert process.stdout.readline() == "ready\n"
        assert two[0].stdin is not None
        assert two[0].stdout is not None
        two[0].stdin.write("\n")
        two[0].stdin.flush()
        resident, proportional, dirty = map(int, two[0].stdout.readline().split())
    finally:
        for process in two:
            process.communicate("\n")
    assert resident * 1024 >= 49152 * 576 // 32 * 34, "not the whole table was read"
    assert proportional <= 0.55 * resident, "pages are not shared"
    assert dirty == 0
    figure("proportional over resident pages of two processes", proportional / resident)


# ---- real models ----


@pytest.mark.slow
def test_a_real_model_is_decoded_as_the_oracle_decodes_it(smollm2: Path, figure: Figure) -> None:
    oracle = pytest.importorskip("gguf")
    file, decoded = gguf.open(smollm2), set()
    for tensor in oracle.GGUFReader(smollm2).tensors:
        if len(tensor.shape) == 2:
            fw = FrozenWeight.from_gguf(file, tensor.name)
            expected = oracle.dequantize(tensor.data, tensor.tensor_type)
            np.testing.assert_array_equal(fw.to_numpy().view(np.uint32), expected.view(np.uint32))
            decoded.add(tensor.name)
    assert len(decoded) == 211
    figure("tensors of SmolLM2 with the bits of gguf", len(decoded))


def test_many_threads_may_use_one_mapped_weight(model: Path, rng: np.random.Generator) -> None:
    fw, x = FrozenWeight.from_gguf(model, "Q5_K"), random(rng, 20, 512)
    expected, failures = fw.matmul(x), []

    def work() -> None:
        for _ in range(200):
            if not np.array_equal(fw.matmul(x), expected):
                failures.append(1)

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
