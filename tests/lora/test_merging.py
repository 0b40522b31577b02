"""Merging layers into a chosen storage: the report against NumPy and the gguf package, and unmerging."""

from typing import Any

import gguf as oracle
import numpy as np
import pytest
from gguf.quants import dequantize

import nplora
from figures import Figure
from nplora.lora.merging import MergeReport
from nplora.weights import storages

Array = np.ndarray[Any, Any]

D_OUT, D_IN = 40, 512
BLOCKS = [name for name in storages.BLOCKS if name != "nf4"]
FLOATS = ["float32", "float16", "bfloat16"]


def layer_of(rng: np.random.Generator, dtype: str, size: float = 0.02, **settings: Any) -> nplora.LoRALinear:
    weight = nplora.FrozenWeight(rng.standard_normal((D_OUT, D_IN)), dtype)
    layer = nplora.LoRALinear(weight, 4, alpha=4 * size, init="gaussian", rng=0, **settings)
    return layer


def decoded(weight: nplora.FrozenWeight) -> Array:
    """The weight in float64. PyPI's gguf decodes low-bit blocks."""
    if weight.dtype not in BLOCKS:
        return weight.to_numpy().astype(np.float64)
    kind = oracle.GGMLQuantizationType[weight.dtype.upper()]
    return dequantize(weight._arrays[0], kind).astype(np.float64)


def update(layer: nplora.LoRALinear) -> Array:
    return layer.scale * layer.A.astype(np.float64) @ layer.B.astype(np.float64)


def check_report(layer: nplora.LoRALinear, report: MergeReport, storage: str, figure: Figure) -> None:
    merged, asked = layer._merged, update(layer)
    assert merged is not None
    assert (merged.dtype, merged.nbytes) == (report.storage, report.nbytes)
    assert report.storage == storage
    lost = decoded(merged) - decoded(layer.weight) - asked
    expected = np.linalg.norm(lost) / np.linalg.norm(asked)
    np.testing.assert_allclose(report.error, expected, rtol=1e-6)
    figure("error of a report, relative to NumPy's figure", abs(report.error / expected - 1))
    along = np.sum((lost + asked) * asked) / np.sum(asked**2)
    np.testing.assert_allclose(report.kept, along, rtol=1e-6)
    blocks = (D_OUT, -1, storages.BLOCKS[merged.dtype][0] if merged.dtype in BLOCKS else D_IN)
    errors = np.linalg.norm(lost.reshape(blocks), axis=2) / np.linalg.norm(asked.reshape(blocks), axis=2)
    np.testing.assert_allclose(report.worst_error, errors.max(), rtol=1e-6)
    assert errors[report.worst_block[0], report.worst_block[1] // blocks[2]] == errors.max()
    assert report.name == "LoRALinear"


@pytest.mark.slow
@pytest.mark.parametrize("base", ["q4_1", "q8_0", "q4_k", "float32", "bfloat16"])
@pytest.mark.parametrize("dtype", ["same", *BLOCKS, *FLOATS])
def test_the_report_says_how_much_of_the_update_the_storage_kept(
    base: str, dtype: str, rng: np.random.Generator, figure: Figure
) -> None:
    layer = layer_of(rng, base)
    (report,) = layer.merge(dtype)
    check_report(layer, report, base if dtype == "same" else dtype, figure)


@pytest.mark.parametrize("base", ["q4_1", "q8_0", "q4_k"])
def test_a_trained_adapter_is_reported_correctly(base: str, rng: np.random.Generator, figure: Figure) -> None:
    layer = nplora.LoRALinear(nplora.FrozenWeight(rng.standard_normal((D_OUT, D_IN)), base), 4, rng=0)
    x = rng.standard_normal((64, D_IN), np.float32)
    wanted = layer.forward(x)[0] + x @ rng.standard_normal((D_IN, D_OUT), np.float32) / 8
    optimizer, losses = nplora.AdamW(lr=1e-2), []
    for _ in range(50):
        y, saved = layer.forward(x)
        losses.append(float(np.mean((y - wanted) ** 2)))
        layer.zero_grad()
        layer.backward(2 / y.size * (y - wanted), saved)
        optimizer.step(layer.parameters())
    assert losses[-1] < 0.9 * losses[0]
    (report,) = layer.merge("same")
    check_report(layer, report, base, figure)
    figure(f"relative error of a trained update in {base}", report.error)


@pytest.mark.parametrize("name", ["q4_1", "q8_0", "q4_k", "nf4"])
def test_finer_storages_keep_more(name: str, rng: np.random.Generator) -> None:
    layer = layer_of(rng, name)
    errors = []
    for dtype in ("q4_0", "q5_0", "q8_0", "bfloat16", "float16", "float32"):
        errors += [report.error for report in layer.merge(dtype)]
        layer.unmerge()
    assert errors == sorted(errors, reverse=True)
    assert errors[0] > 1 > 1e-4 > errors[-1]


def test_the_report_distinguishes_noise_from_a_lost_update(rng: np.random.Generator) -> None:
    """An update of a tenth of a step is lost in the weight's own blocks. In finer blocks with other edges
    it is not, although their rounding is as large as the update."""
    layer = layer_of(rng, "q4_1", size=0.01)
    (same,) = layer.merge("same")
    layer.unmerge()
    (finer,) = layer.merge("q8_0")
    assert same.kept < 0.3 < 0.95 < finer.kept < 1.05
    assert finer.error > 0.2


@pytest.mark.parametrize("dtype", ["float64", "float32", "float16", "bfloat16"])
def test_the_same_float_storage_has_the_bits_of_a_plain_merge(dtype: str, rng: np.random.Generator) -> None:
    layer = layer_of(rng, dtype, size=1.0)
    assert layer.merge() == []
    plain = layer._merged.to_numpy()
    layer.unmerge()
    layer.merge("same")
    np.testing.assert_array_equal(layer._merged.to_numpy(), plain)


@pytest.mark.parametrize("dtype", ["same", "q8_0", "float32"])
@pytest.mark.parametrize("base", ["q4_1", "q4_k", "nf4", "float16"])
def test_the_merged_weight_is_used_and_unmerge_restores_the_original(
    base: str, dtype: str, rng: np.random.Generator
) -> None:
    layer = layer_of(rng, base)
    weight, x = layer.weight, rng.standard_normal((3, D_IN)).astype(np.float32)
    before = layer(x)
    layer.merge(dtype)
    np.testing.assert_allclose(layer(x), x @ layer._merged.to_numpy().T, rtol=1e-4, atol=1e-4)
    layer.unmerge()
    assert layer.weight is weight
    np.testing.assert_array_equal(layer(x), before)


def test_nf4_is_merged_to_the_bits_that_the_sum_is_quantised_to(rng: np.random.Generator) -> None:
    layer = layer_of(rng, "nf4", size=1.0)
    layer.merge("same")
    again = nplora.FrozenWeight(layer.merged_weight(), "nf4")
    np.testing.assert_array_equal(layer._merged.to_numpy(), again.to_numpy())


def test_dora_is_compared_with_its_exact_change(rng: np.random.Generator) -> None:
    layer = layer_of(rng, "float32", use_dora=True)
    layer.m[...] *= rng.uniform(0.5, 2, D_OUT)
    expected = decoded(layer.weight) + update(layer)
    expected *= (layer.m / np.linalg.norm(expected, axis=1))[:, None]
    (report,) = layer.merge("float32")
    np.testing.assert_allclose(layer._merged.to_numpy(), expected, rtol=1e-5, atol=1e-6)
    assert report.error < 1e-6
    layer.unmerge()
    (report,) = layer.merge("q8_0")
    lost, asked = decoded(layer._merged) - expected, expected - decoded(layer.weight)
    np.testing.assert_allclose(report.error, np.linalg.norm(lost) / np.linalg.norm(asked), rtol=1e-5)


def test_a_model_is_merged_as_a_whole_with_a_report_for_each_layer(rng: np.random.Generator) -> None:
    model = nplora.Sequential(
        layer_of(rng, "q4_1"), nplora.ReLU(), nplora.LoRALinear(np.eye(48, D_OUT), 2, rng=0)
    )
    with pytest.raises(
        ValueError,
        match="merge: 2: a row has 40 elements, expected a multiple of 32, the block length of q8_0",
    ):
        model.merge("q8_0")
    assert not model[0].merged
    reports = model.merge("same")
    assert [(report.name, report.storage) for report in reports] == [("0", "q4_1"), ("2", "float32")]
    assert reports[1].error == 0  # A is 0: nothing was to change, and nothing changed
    plain = model.merge_and_unload()
    assert plain[0].weight.dtype == "q4_1"
    assert str(reports[0]).startswith(f"0: q4_1, 12,800 bytes, {reports[0].kept:.1%} of ΔW kept, noise ")
    assert reports[1].kept == 1


def test_an_embedding_is_merged_into_blocks(rng: np.random.Generator) -> None:
    table = nplora.LoRAEmbedding(
        nplora.FrozenWeight(rng.standard_normal((50, 64)), "q8_0"), 2, init="gaussian"
    )
    (report,) = table.merge("same")
    np.testing.assert_array_equal(table([3, 7]), table._merged.to_numpy()[[3, 7]])
    assert report.storage == "q8_0"


@pytest.mark.parametrize("which", ["A", "B", "scale"])
@pytest.mark.parametrize("base", ["q4_0", "q4_k", "nf4", "float16"])
def test_an_update_of_zero_leaves_the_weight_to_the_bit(
    base: str, which: str, rng: np.random.Generator
) -> None:
    layer = layer_of(rng, base)
    if which == "scale":
        layer.alpha = 0
    else:
        getattr(layer, which)[...] = 0
    before = layer.weight.to_numpy()
    (report,) = layer.merge("same")
    np.testing.assert_array_equal(layer._merged.to_numpy(), before)
    assert (report.storage, report.nbytes) == (base, layer.weight.nbytes)
    assert (report.error, report.kept, report.worst_error) == (0, 1, 0)
    layer.unmerge()
    (report,) = layer.merge("q4_1")
    assert report.error == np.inf
    assert str(report).endswith("ΔW is 0, only rounding changed the weight")


def test_an_update_of_zero_times_infinity_is_not_zero(rng: np.random.Generator) -> None:
    layer = layer_of(rng, "float32")
    layer.A[...], layer.B[0, 0] = 0, np.inf
    with np.errstate(invalid="ignore"), pytest.raises(ValueError, match="would become infinite or NaN"):
        layer.merge("same")


def test_sums_that_no_storage_can_hold_are_refused(rng: np.random.Generator) -> None:
    layer = layer_of(rng, "q8_0")
    for dtype, message in (
        ("float64", "dtype='float64', but the layer computes in float32"),
        ("q3", "merge: dtype='q3' is not available; possible: 'float32'"),
    ):
        with pytest.raises(ValueError, match=message):
            layer.merge(dtype)
    layer.A[7, 0] = 3e38
    layer.B[0, :] = 1e3
    for dtype in ("same", "float32", "float16"):
        with pytest.raises(
            ValueError, match=r"row 7|512 finite values would become infinite or NaN in float"
        ):
            layer.merge(dtype)
    assert not layer.merged


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["q8_0", "q4_k", "q4_1", "nf4"])
@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_the_residual_of_a_principal_start_keeps_the_storage_of_the_weight(
    dtype: str, init: str, rng: np.random.Generator
) -> None:
    given = nplora.FrozenWeight(rng.standard_normal((D_OUT, D_IN)), dtype)
    layer = nplora.LoRALinear(given, 4, init=init)
    assert (layer.weight.dtype, layer.weight.nbytes) == (dtype, given.nbytes)
    rest = given.to_numpy().astype(np.float64) - update(layer)
    again = nplora.FrozenWeight(rest.astype(np.float32), dtype).to_numpy()
    assert np.linalg.norm(layer.weight.to_numpy() - again) < 0.01 * np.linalg.norm(again)  # nearly equal sums
