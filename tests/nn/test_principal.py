"""PiSSA and OLoRA: the initial factors, the rest of the weight, and saving the result as plain LoRA."""

import tracemalloc
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import nplora
from nplora.formats import peft_adapter
from nplora.nn.principal import randomized_svd

Array = np.ndarray[Any, Any]

D_OUT, D_IN, RANK, ALPHA = 70, 45, 6, 9
UNIT = {"float64": 2.0**-53, "float32": 2.0**-24, "float16": 2.0**-11, "bfloat16": 2.0**-8}


def decaying(rng: np.random.Generator, d_out: int = D_OUT, d_in: int = D_IN) -> Array:
    """A matrix with singular values 1, 1/2, 1/3, ..., as those of trained layers fall off."""
    n = min(d_out, d_in)
    u = np.linalg.qr(rng.standard_normal((d_out, n)))[0]
    v = np.linalg.qr(rng.standard_normal((d_in, n)))[0]
    return u / np.arange(1, n + 1) @ v.T


def truncated(W: Array, rank: int) -> Array:
    u, s, vt = np.linalg.svd(W.astype(np.float64), full_matrices=False)
    return u[:, :rank] * s[:rank] @ vt[:rank]


def product(layer: nplora.LoRALinear) -> Array:
    return layer.scale * layer.A.astype(np.float64) @ layer.B.astype(np.float64)


def relative(got: Array, expected: Array) -> float:
    return float(np.linalg.norm(got - expected) / np.linalg.norm(expected))


@pytest.mark.parametrize("use_rslora", [False, True])
def test_pissa_takes_the_truncated_svd_in_equal_halves(use_rslora: bool, rng: np.random.Generator) -> None:
    W = decaying(rng).astype(np.float32)
    layer = nplora.LoRALinear(W, RANK, ALPHA, init="pissa", use_rslora=use_rslora)
    assert relative(product(layer), truncated(W, RANK)) < 1e-6
    np.testing.assert_allclose(np.linalg.norm(layer.A, axis=0), np.linalg.norm(layer.B, axis=1), rtol=1e-5)
    values = np.linalg.svd(W, compute_uv=False)[:RANK]
    np.testing.assert_allclose(np.linalg.norm(layer.B, axis=1) ** 2 * layer.scale, values, rtol=1e-5)


def test_olora_takes_the_first_columns_of_the_qr(rng: np.random.Generator) -> None:
    W = rng.standard_normal((D_OUT, D_IN)).astype(np.float32)
    layer = nplora.LoRALinear(W, RANK, ALPHA, init="olora")
    q, r = np.linalg.qr(W.astype(np.float64))
    assert relative(product(layer), layer.scale * q[:, :RANK] @ r[:RANK]) < 1e-6
    np.testing.assert_allclose(layer.A.T @ layer.A, np.eye(RANK), atol=1e-6)


@pytest.mark.slow
def test_without_a_gap_the_factors_are_as_good_as_the_best(rng: np.random.Generator) -> None:
    """A random matrix: the singular values lie close together, so directions mix, but little is lost."""
    W = rng.standard_normal((300, 200)).astype(np.float32)
    u, s, vt = randomized_svd(nplora.FrozenWeight(W), RANK)
    exact = np.linalg.svd(W.astype(np.float64), compute_uv=False)
    best = np.sqrt(np.sum(exact[RANK:] ** 2))
    assert best * (1 - 1e-12) <= np.linalg.norm(W - u * s @ vt) < best * (1 + 1e-4)
    np.testing.assert_allclose(s, exact[:RANK], rtol=1e-3)


@pytest.mark.parametrize("init", ["pissa", "olora"])
@pytest.mark.parametrize("dtype", ["float64", "float32", "float16", "bfloat16"])
@pytest.mark.parametrize("compute", ["float32", "bfloat16"])
def test_what_is_taken_and_what_remains_are_the_weight(
    init: str, dtype: str, compute: str, rng: np.random.Generator
) -> None:
    """What remains is rounded once to its storage, whatever the products are rounded to."""
    if dtype == "float64" and compute == "bfloat16":
        return
    given = nplora.FrozenWeight(decaying(rng), dtype, compute)
    W = given.to_numpy().astype(np.float64)
    layer = nplora.LoRALinear(given, RANK, ALPHA, init=init)
    assert (layer.weight.dtype, layer.weight.compute) == (given.dtype, given.compute)
    rest = layer.weight.to_numpy().astype(np.float64)
    sums = 8 * UNIT["float64" if dtype == "float64" else "float32"]
    bound = UNIT[dtype] * np.abs(rest) + sums * np.abs(W).max() + 2.0**-25
    assert (np.abs(rest + product(layer) - W) <= bound).all()
    if init == "pissa":
        tolerance = 1e-12 if dtype == "float64" else 1e-6
        assert relative(product(layer), truncated(W, RANK)) < max(tolerance, 1e-6)


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_the_start_depends_on_the_weight_alone(init: str, rng: np.random.Generator) -> None:
    W = decaying(rng)
    layer = nplora.LoRALinear(W, RANK, init=init, rng=1)
    a, b, rest = layer.A.copy(), layer.B.copy(), layer.weight
    layer.A[...] += 1
    layer.seed(7)  # the whole weight is gone: the start is remembered
    np.testing.assert_array_equal(layer.A, a)
    np.testing.assert_array_equal(layer.B, b)
    assert layer.weight is rest
    other = nplora.LoRALinear(W, RANK, init=init, rng=2)
    np.testing.assert_array_equal(other.A, a)
    np.testing.assert_array_equal(other.weight.to_numpy(), rest.to_numpy())


@pytest.mark.parametrize("use_rslora", [False, True])
@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_a_trained_layer_is_saved_as_plain_lora_for_the_whole_weight(
    init: str, use_rslora: bool, rng: np.random.Generator, tmp_path: Path
) -> None:
    W = decaying(rng).astype(np.float32)
    model = nplora.Sequential(nplora.LoRALinear(W, RANK, ALPHA, init=init, use_rslora=use_rslora))
    before = product(model[0])
    model[0].A[...] += rng.standard_normal(model[0].A.shape) / 10
    model[0].B[...] += rng.standard_normal(model[0].B.shape) / 10
    delta = product(model[0]) - before
    nplora.save_adapter(model, tmp_path)
    with peft_adapter.reading(tmp_path) as adapter:
        assert (adapter.config.r, adapter.config.use_rslora) == (2 * RANK, use_rslora)
    plain = nplora.Sequential(nplora.LoRALinear(W, 1, use_rslora=use_rslora))
    nplora.load_adapter(plain, tmp_path)
    assert relative(product(plain[0]), delta) < 1e-6
    x = rng.standard_normal((5, D_IN)).astype(np.float32)
    np.testing.assert_allclose(plain(x), model(x), atol=1e-5)
    update = nplora.read_adapter(model)["0"]
    assert relative(update.scale * update.A.astype(np.float64) @ update.B, delta) < 1e-6


@pytest.mark.slow
def test_the_search_makes_no_matrix_of_the_weights_shape(rng: np.random.Generator) -> None:
    weight = nplora.FrozenWeight(decaying(rng, 900, 700), "bfloat16")
    tracemalloc.start()
    try:
        randomized_svd(weight, 4)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 900 * 700 * 2


def test_what_makes_no_sense_is_refused(rng: np.random.Generator, tmp_path: Path) -> None:
    W = decaying(rng)
    with pytest.raises(
        ValueError, match=r"init='pissa' with use_dora=True: DoRA needs the norms of the rows"
    ):
        nplora.LoRALinear(W, init="pissa", use_dora=True)
    with pytest.raises(ValueError, match=r"init='olora' is not available; possible: 'zero', 'gaussian'$"):
        nplora.LoRAEmbedding(W, init="olora")
    for rank, alpha in ((46, 8), (4, 0), (4, -1)):
        with pytest.raises(
            ValueError, match=rf"needs a rank of at most min\(d_out, d_in\) = 45.*rank {rank} and"
        ):
            nplora.LoRALinear(W, rank, alpha, init="pissa")
    model = nplora.Sequential(nplora.LoRALinear(W, init="olora"))
    with pytest.raises(ValueError, match=r"LoRALinear.alpha: init='olora' moved a part of the frozen weight"):
        model[0].alpha = 3
    nplora.save_adapter(model, tmp_path)
    with pytest.raises(ValueError, match="use a layer with init='zero', which keeps the whole weight"):
        nplora.load_adapter(model, tmp_path)


@pytest.mark.parametrize("init", ["pissa", "olora"])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_weight_that_is_not_finite_has_no_principal_part(
    init: str, value: float, rng: np.random.Generator
) -> None:
    W = decaying(rng)
    W[3, 40] = value
    with (
        np.errstate(invalid="ignore"),
        pytest.raises(ValueError, match=rf"init='{init}': the weight \(70, 45\) holds NaN, an infinity"),
    ):
        nplora.LoRALinear(W, init=init)


# ---- against PEFT ----


def peft_model(W: Array, init: str) -> tuple[Any, Any]:
    torch, peft = pytest.importorskip("torch"), pytest.importorskip("peft")
    linear = torch.nn.Linear(W.shape[1], W.shape[0], bias=False)
    with torch.no_grad():
        linear.weight.copy_(torch.from_numpy(W))
    settings = peft.LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=["0"], init_lora_weights=init)
    model = peft.get_peft_model(torch.nn.Sequential(linear), settings)
    return model, model.base_model.model[0]


@pytest.mark.slow
@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_the_start_is_that_of_peft(init: str, rng: np.random.Generator) -> None:
    W = decaying(rng).astype(np.float32)
    _, theirs = peft_model(W, init)
    ours = nplora.LoRALinear(W, RANK, ALPHA, init=init)
    a, b = (getattr(theirs, name)["default"].weight.detach().numpy() for name in ("lora_B", "lora_A"))
    assert theirs.scaling["default"] == ours.scale
    assert relative(product(ours), ours.scale * a.astype(np.float64) @ b) < 1e-5
    np.testing.assert_allclose(np.abs(ours.A), np.abs(a), atol=1e-4)  # a direction may be the other way round
    np.testing.assert_allclose(ours.weight.to_numpy(), theirs.base_layer.weight.detach().numpy(), atol=1e-6)


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_the_plain_lora_is_that_of_peft(init: str, rng: np.random.Generator, tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    W = decaying(rng).astype(np.float32)
    peft, theirs = peft_model(W, init)
    ours = nplora.Sequential(nplora.LoRALinear(W, RANK, ALPHA, init=init))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs_start = tmp_path / "start"
        peft.peft_config["default"].init_lora_weights = True  # as PEFT's documentation says
        peft.save_pretrained(theirs_start)
        peft.peft_config["default"].init_lora_weights = init
        a, b = theirs.lora_B["default"].weight, theirs.lora_A["default"].weight
        signs = np.sign(np.sum(a.detach().numpy() * ours[0].A, axis=0))
        step_a, step_b = (rng.standard_normal(x.shape).astype(np.float32) / 10 for x in (a, b))
        with torch.no_grad():
            a += torch.from_numpy(step_a)
            b += torch.from_numpy(step_b)
        peft.save_pretrained(tmp_path / "theirs", path_initial_model_for_weight_conversion=str(theirs_start))
    ours[0].A[...] += step_a * signs
    ours[0].B[...] += step_b * signs[:, None]
    nplora.save_adapter(ours, tmp_path / "ours")
    deltas = []
    for path in (tmp_path / "theirs", tmp_path / "ours"):
        with peft_adapter.reading(path) as adapter:
            assert adapter.config.r == 2 * RANK
        update = nplora.read_adapter(path)["0"]
        deltas.append(update.scale * update.A.astype(np.float64) @ update.B)
    assert relative(deltas[1], deltas[0]) < 1e-4
