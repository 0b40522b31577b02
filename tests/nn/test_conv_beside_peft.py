"""LoRAConv2d beside the real PEFT on torch: outputs, gradients, merging, and files in both directions."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import nplora
from nplora.formats import safetensors

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")

C_OUT, C_IN, RANK, N = 6, 4, 4, 5
OPTIONS: list[dict[str, Any]] = [{}, {"use_rslora": True}, {"use_dora": True}]
# PEFT gives its convolution A no dilation, so a layer with dilation fails there: torch is its oracle below.
GEOMETRIES: list[dict[str, Any]] = [{}, {"stride": 2, "padding": 1}, {"stride": (1, 2), "padding": (2, 0)}]


class Net(torch.nn.Module):  # type: ignore[misc]
    def __init__(self, kernel: tuple[int, int], **geometry: Any) -> None:
        super().__init__()
        self.conv = torch.nn.Conv2d(C_IN, C_OUT, kernel, **geometry).double()

    def forward(self, x: Any) -> Any:
        return self.conv(x)


def pair(
    rng: np.random.Generator, kernel: tuple[int, int] = (3, 3), dtype: str = "float64", **options: Any
) -> tuple[Any, Any, dict[str, Any]]:
    """The same layer here and in PEFT, in the middle of its training; here A is PEFT's B."""
    geometry = {name: options.pop(name) for name in ("stride", "padding") if name in options}
    net = Net(kernel, **geometry)
    config = peft.LoraConfig(r=RANK, lora_alpha=6, target_modules=["conv"], **options)
    peer = peft.get_peft_model(net, config).double()
    theirs = peer.base_model.model.conv
    W, bias = (t.detach().numpy() for t in (theirs.base_layer.weight, theirs.base_layer.bias))
    layer = nplora.LoRAConv2d(W, RANK, 6, bias, dtype=dtype, init="gaussian", rng=1, **options, **geometry)
    with torch.no_grad():
        theirs.lora_B["default"].weight.copy_(torch.from_numpy(layer.A[..., None, None]))
        theirs.lora_A["default"].weight.copy_(torch.from_numpy(layer.B.reshape(RANK, *layer.kernel)))
        if layer.m is not None:
            layer.m[...] = rng.uniform(0.5, 2, C_OUT)
            theirs.lora_magnitude_vector["default"].weight.copy_(
                torch.from_numpy(layer.m[None, :, None, None])
            )
    return layer, peer, geometry


@pytest.mark.parametrize("kernel", [(3, 3), (1, 1), (2, 3)], ids=str)
@pytest.mark.parametrize("geometry", GEOMETRIES, ids=json.dumps)
@pytest.mark.parametrize("options", OPTIONS, ids=json.dumps)
def test_forward_and_backward_agree_with_peft(
    options: dict[str, Any], geometry: dict[str, Any], kernel: tuple[int, int], rng: np.random.Generator
) -> None:
    layer, peer, _ = pair(rng, kernel, **options, **geometry)
    x = rng.standard_normal((N, C_IN, 8, 9))
    theirs_x = torch.from_numpy(x).requires_grad_()
    theirs_y = peer(theirs_x)
    y, saved = layer.forward(x)
    dy = rng.standard_normal(y.shape)
    theirs_y.backward(torch.from_numpy(dy))
    dx = layer.backward(dy, saved)

    theirs = peer.base_model.model.conv
    close: dict[str, Any] = {"rtol": 1e-9, "atol": 1e-11}
    np.testing.assert_allclose(y, theirs_y.detach().numpy(), **close)
    np.testing.assert_allclose(dx, theirs_x.grad.numpy(), **close)
    np.testing.assert_allclose(layer.dA, theirs.lora_B["default"].weight.grad.numpy()[..., 0, 0], **close)
    dB = theirs.lora_A["default"].weight.grad.numpy().reshape(RANK, -1)
    np.testing.assert_allclose(layer.dB, dB, **close)
    if layer.dm is not None:
        dm = theirs.lora_magnitude_vector["default"].weight.grad.numpy().reshape(-1)
        np.testing.assert_allclose(layer.dm, dm, **close)


@pytest.mark.parametrize("use_dora", [False, True])
def test_the_merged_kernel_is_pefts(use_dora: bool, rng: np.random.Generator) -> None:
    layer, peer, _ = pair(rng, use_dora=use_dora)
    merged = peer.merge_and_unload().conv.weight.detach().numpy()
    np.testing.assert_allclose(layer.merged_kernel(), merged, rtol=1e-9, atol=1e-11)


def test_fresh_magnitudes_are_pefts(rng: np.random.Generator) -> None:
    net = Net((3, 3))
    W = net.conv.weight.detach().numpy().copy()
    config = peft.LoraConfig(r=RANK, target_modules=["conv"], use_dora=True)
    theirs = peft.get_peft_model(net, config).base_model.model.conv.lora_magnitude_vector["default"].weight
    layer = nplora.LoRAConv2d(W, RANK, dtype="float64", use_dora=True)
    np.testing.assert_allclose(layer.m, theirs.detach().numpy().reshape(-1), rtol=1e-6)


def test_a_dilated_convolution_agrees_with_torch(rng: np.random.Generator) -> None:
    options: dict[str, Any] = {"stride": (2, 1), "padding": (1, 2), "dilation": (2, 3)}
    layer = nplora.LoRAConv2d(
        rng.standard_normal((C_OUT, C_IN, 3, 2)), RANK, 6, dtype="float64", init="gaussian", rng=1, **options
    )
    x = torch.from_numpy(rng.standard_normal((N, C_IN, 9, 10))).requires_grad_()
    frozen = torch.from_numpy(layer.weight.to_numpy().reshape(C_OUT, C_IN, 3, 2))
    A, B = (torch.from_numpy(f.copy()).requires_grad_() for f in (layer.A, layer.B))
    low = torch.nn.functional.conv2d(x, B.reshape(RANK, C_IN, 3, 2), **options)
    update = torch.nn.functional.conv2d(low, A[..., None, None])
    theirs = torch.nn.functional.conv2d(x, frozen, **options) + layer.scale * update
    y, saved = layer.forward(x.detach().numpy())
    dy = rng.standard_normal(y.shape)
    theirs.backward(torch.from_numpy(dy))
    dx = layer.backward(dy, saved)
    for found, expected in ((y, theirs.detach()), (dx, x.grad), (layer.dA, A.grad), (layer.dB, B.grad)):
        np.testing.assert_allclose(found, expected.numpy(), rtol=1e-9, atol=1e-11)


def test_pooling_agrees_with_torch(rng: np.random.Generator) -> None:
    x = torch.from_numpy(rng.standard_normal((N, C_IN, 9, 10))).requires_grad_()
    theirs = torch.nn.functional.max_pool2d(x, (3, 2), (2, 2))
    pool = nplora.MaxPool2d((3, 2), 2)
    y, saved = pool.forward(x.detach().numpy())
    dy = rng.standard_normal(y.shape)
    theirs.backward(torch.from_numpy(dy))
    np.testing.assert_array_equal(y, theirs.detach().numpy())
    np.testing.assert_array_equal(pool.backward(dy, saved), x.grad.numpy())


class Here(nplora.Module):
    """The convolution under the name that it has in torch's network."""

    def __init__(self, layer: Any) -> None:
        self.conv = layer

    def forward(self, x: Any) -> Any:
        return self.conv.forward(x)


@pytest.mark.parametrize("options", OPTIONS, ids=json.dumps)
def test_peft_loads_our_file(options: dict[str, Any], tmp_path: Path, rng: np.random.Generator) -> None:
    layer, peer, geometry = pair(rng, **options, stride=2, padding=1)
    nplora.save_adapter(Here(layer), tmp_path)
    net = Net((3, 3), **geometry)
    net.load_state_dict(
        {f"conv.{n}": getattr(peer.base_model.model.conv.base_layer, n) for n in ("weight", "bias")}
    )
    loaded = peft.PeftModel.from_pretrained(net, tmp_path)
    x = rng.standard_normal((N, C_IN, 8, 8))
    with torch.no_grad():
        theirs = loaded(torch.from_numpy(x)).numpy()
    np.testing.assert_allclose(layer(x), theirs, rtol=1e-5, atol=1e-6)  # PEFT may keep factors in float32


@pytest.mark.parametrize("options", OPTIONS, ids=json.dumps)
def test_we_load_pefts_file(options: dict[str, Any], tmp_path: Path, rng: np.random.Generator) -> None:
    layer, peer, geometry = pair(rng, **options, stride=2, padding=1)
    peer.save_pretrained(tmp_path)
    W = layer.weight.to_numpy().reshape(C_OUT, *layer.kernel)
    fresh = nplora.LoRAConv2d(W, RANK, bias=layer.bias, dtype="float64", **options, **geometry)
    nplora.load_adapter(Here(fresh), tmp_path)
    plain = Here(nplora.Conv2d(W, layer.bias, dtype="float64", **geometry))
    nplora.read_adapter(tmp_path).attach(plain)  # reads the factors in float32
    x = rng.standard_normal((N, C_IN, 8, 8))
    with torch.no_grad():
        theirs = peer(torch.from_numpy(x)).numpy()
    np.testing.assert_allclose(fresh(x), theirs, rtol=1e-9, atol=1e-11)
    np.testing.assert_allclose(plain(x), theirs, rtol=1e-5, atol=1e-5)
    ours = Here(layer)
    nplora.save_adapter(ours, tmp_path / "ours")
    first, second = (
        safetensors.open(path / "adapter_model.safetensors") for path in (tmp_path, tmp_path / "ours")
    )
    assert {n: t.shape for n, t in first.items()} == {n: t.shape for n, t in second.items()}
    for name, tensor in first.items():
        np.testing.assert_array_equal(tensor.numpy(), second[name].numpy())
