"""The oracle itself, compared with published values and with torch."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import reference


def test_philox_gives_the_published_values() -> None:
    # Random123's kat_vectors, "philox4x32 10": the two whose upper counter words are zero or can be made so.
    words = reference.philox4x32(np.array([0], np.uint64), 0)
    assert [f"{w:08x}" for w in words[0]] == ["6627e8d5", "e169c58d", "bc57ac4c", "9b00dbd8"]


def test_gamma_grows_with_the_number_of_operations() -> None:
    assert reference.gamma(1) == pytest.approx(2**-24, rel=1e-6)
    assert reference.gamma(100) > 100 * 2**-24


@pytest.mark.parametrize("name", ["mse", "huber", "bce", "cross_entropy"])
def test_losses_agree_with_torch(name: str, rng: np.random.Generator) -> None:
    torch = pytest.importorskip("torch")
    functional = torch.nn.functional
    p = 3 * rng.standard_normal((7, 5))
    if name == "cross_entropy":
        t: Any = np.array([0, 4, -100, 2, 2, 1, 3])
    else:
        t = rng.uniform(size=(7, 5))
    peers: dict[str, Callable[..., Any]] = {
        "mse": functional.mse_loss,
        "huber": functional.huber_loss,
        "bce": functional.binary_cross_entropy_with_logits,
        "cross_entropy": functional.cross_entropy,
    }
    expected = float(peers[name](torch.from_numpy(p), torch.from_numpy(t)))
    assert getattr(reference, name)(p, t) == pytest.approx(expected, rel=1e-13)


def test_activations_and_norms_agree_with_torch(rng: np.random.Generator) -> None:
    torch = pytest.importorskip("torch")
    functional = torch.nn.functional
    x, weight, bias = rng.standard_normal((4, 6)), rng.standard_normal(6), rng.standard_normal(6)
    tx, tw, tb = map(torch.from_numpy, (x, weight, bias))
    for approximate in ("none", "tanh"):
        expected = functional.gelu(tx, approximate=approximate).numpy()
        np.testing.assert_allclose(reference.gelu(x, approximate), expected, rtol=1e-13)
    np.testing.assert_allclose(reference.silu(x), functional.silu(tx).numpy(), rtol=1e-13)
    expected = functional.layer_norm(tx, (6,), tw, tb, 1e-5).numpy()
    np.testing.assert_allclose(reference.layer_norm(x, weight, bias, 1e-5), expected, rtol=1e-12)
    expected = functional.rms_norm(tx, (6,), tw, 1e-5).numpy()
    np.testing.assert_allclose(reference.rms_norm(x, weight, 1e-5), expected, rtol=1e-12)


@pytest.mark.parametrize("name", ["adamw", "sgd", "nesterov"])
def test_optimisers_agree_with_torch(name: str, rng: np.random.Generator) -> None:
    torch = pytest.importorskip("torch")
    p = rng.standard_normal(9)
    parameter = torch.nn.Parameter(torch.from_numpy(p.copy()))
    if name == "adamw":
        peer = torch.optim.AdamW([parameter], lr=0.1, betas=(0.8, 0.95), eps=1e-6, weight_decay=0.2)
    else:
        peer = torch.optim.SGD(
            [parameter], lr=0.1, momentum=0.7, weight_decay=0.2, nesterov=name == "nesterov"
        )
    first, second = np.zeros(9), np.zeros(9)
    for t in range(1, 6):
        g = rng.standard_normal(9)
        parameter.grad = torch.from_numpy(g)
        peer.step()
        if name == "adamw":
            p, first, second = reference.adamw(p, g, first, second, t, 0.1, 0.8, 0.95, 1e-6, 0.2)
        else:
            p, first = reference.sgd(p, g, first, 0.1, 0.7, 0.2, name == "nesterov")
        np.testing.assert_allclose(p, parameter.detach().numpy(), rtol=1e-12)


def test_the_low_rank_oracle_agrees_with_the_dense_product(rng: np.random.Generator) -> None:
    x, W, A, B = (rng.standard_normal(s) for s in ((4, 6), (5, 6), (5, 2), (2, 6)))
    y, _ = reference.lora_forward(x, W, A, B, 0.5)
    np.testing.assert_allclose(y, x @ reference.merge(W, A, B, 0.5).T, rtol=1e-12)
