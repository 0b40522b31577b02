"""LoRALinear beside the real PEFT: the same numbers, forward and backward."""

import json
from typing import Any

import numpy as np
import pytest

import nplora

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")

D_OUT, D_IN, RANK, N = 12, 17, 4, 9


class Net(torch.nn.Module):  # type: ignore[misc]
    def __init__(self, W: Any) -> None:
        super().__init__()
        self.fc = torch.nn.Linear(D_IN, D_OUT, bias=True).double()
        with torch.no_grad():
            self.fc.weight.copy_(torch.from_numpy(W))

    def forward(self, x: Any) -> Any:
        return self.fc(x)


def pair(rng: np.random.Generator, **options: Any) -> tuple[nplora.LoRALinear, Any]:
    """The same layer here and in PEFT, in the middle of its training; here A is PEFT's B."""
    W = rng.standard_normal((D_OUT, D_IN))
    net = Net(W)
    config = peft.LoraConfig(r=RANK, lora_alpha=6, target_modules=["fc"], **options)
    peer = peft.get_peft_model(net, config).double()
    theirs = peer.base_model.model.fc
    layer = nplora.LoRALinear(
        W,
        RANK,
        6,
        theirs.base_layer.bias.detach().numpy(),
        dtype="float64",
        init="gaussian",
        rng=1,
        **options,
    )
    with torch.no_grad():
        theirs.lora_B["default"].weight.copy_(torch.from_numpy(layer.A))
        theirs.lora_A["default"].weight.copy_(torch.from_numpy(layer.B))
        if layer.m is not None:
            layer.m[...] = rng.uniform(0.5, 2, D_OUT)
            theirs.lora_magnitude_vector["default"].weight.copy_(torch.from_numpy(layer.m))
    return layer, peer


@pytest.mark.parametrize(
    "options",
    [{}, {"use_rslora": True}, {"use_dora": True}, {"use_dora": True, "use_rslora": True}],
    ids=json.dumps,
)
def test_forward_and_backward_agree_with_peft(options: dict[str, Any], rng: np.random.Generator) -> None:
    layer, peer = pair(rng, **options)
    x, dy = rng.standard_normal((N, D_IN)), rng.standard_normal((N, D_OUT))
    theirs_x = torch.from_numpy(x).requires_grad_()
    theirs_y = peer(theirs_x)
    theirs_y.backward(torch.from_numpy(dy))
    y, saved = layer.forward(x)
    dx = layer.backward(dy, saved)

    fc = peer.base_model.model.fc
    np.testing.assert_allclose(y, theirs_y.detach().numpy(), rtol=1e-10, atol=1e-12)
    np.testing.assert_allclose(dx, theirs_x.grad.numpy(), rtol=1e-10, atol=1e-12)
    np.testing.assert_allclose(layer.dA, fc.lora_B["default"].weight.grad.numpy(), rtol=1e-10, atol=1e-12)
    np.testing.assert_allclose(layer.dB, fc.lora_A["default"].weight.grad.numpy(), rtol=1e-10, atol=1e-12)
    if layer.dm is not None:
        theirs_dm = fc.lora_magnitude_vector["default"].weight.grad.numpy()
        np.testing.assert_allclose(layer.dm, theirs_dm, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("use_dora", [False, True])
def test_the_merged_weight_is_pefts(use_dora: bool, rng: np.random.Generator) -> None:
    layer, peer = pair(rng, use_dora=use_dora)
    merged = peer.merge_and_unload().fc.weight.detach().numpy()
    np.testing.assert_allclose(layer.merged_weight(), merged, rtol=1e-10, atol=1e-12)


def test_fresh_magnitudes_are_pefts(rng: np.random.Generator) -> None:
    W = rng.standard_normal((D_OUT, D_IN))
    config = peft.LoraConfig(r=RANK, target_modules=["fc"], use_dora=True)
    theirs = peft.get_peft_model(Net(W), config).base_model.model.fc.lora_magnitude_vector["default"].weight
    layer = nplora.LoRALinear(W, RANK, dtype="float64", use_dora=True)
    np.testing.assert_allclose(layer.m, theirs.detach().numpy(), rtol=1e-6)


def test_the_trainable_line_is_pefts(rng: np.random.Generator, capsys: pytest.CaptureFixture[str]) -> None:
    layer, peer = pair(rng, use_dora=True)
    peer.print_trainable_parameters()
    theirs = capsys.readouterr().out
    layer.print_trainable_parameters()
    assert capsys.readouterr().out == theirs


def test_an_embedding_agrees_with_peft(rng: np.random.Generator) -> None:
    table, ids = rng.standard_normal((11, 6)), np.array([[3, 0, 3], [10, 7, 3]])
    net = torch.nn.Sequential(torch.nn.Embedding.from_pretrained(torch.from_numpy(table)))
    peer = peft.get_peft_model(net, peft.LoraConfig(r=RANK, lora_alpha=6, target_modules=["0"])).double()
    layer = nplora.LoRAEmbedding(table, RANK, 6, dtype="float64", init="gaussian", rng=1)
    theirs = peer.base_model.model[0]
    with torch.no_grad():
        theirs.lora_embedding_A["default"].copy_(torch.from_numpy(layer.A.T))
        theirs.lora_embedding_B["default"].copy_(torch.from_numpy(layer.B.T))
    y, saved = layer.forward(ids)
    theirs_y = peer(torch.from_numpy(ids))
    np.testing.assert_allclose(y, theirs_y.detach().numpy(), rtol=1e-12)
    dy = rng.standard_normal(y.shape)
    theirs_y.backward(torch.from_numpy(dy))
    layer.backward(dy, saved)
    np.testing.assert_allclose(layer.dA, theirs.lora_embedding_A["default"].grad.numpy().T, rtol=1e-12)
    np.testing.assert_allclose(layer.dB, theirs.lora_embedding_B["default"].grad.numpy().T, rtol=1e-12)
