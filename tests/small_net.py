"""Small networks for tests of adapters."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

import nplora
from nplora.formats import peft_adapter, safetensors

Array = np.ndarray[Any, Any]


class Net(nplora.Module):
    """Embedding, two linear layers and a head: every kind of layer that an adapter file can contain."""

    def __init__(self, rank: int = 3, alpha: float = 6, embedding: bool = True, **options: Any) -> None:
        rng = np.random.default_rng(0)
        if embedding:
            rslora = options.get("use_rslora", False)
            self.emb = nplora.LoRAEmbedding(
                rng.normal(size=(11, 6)), rank=rank, alpha=alpha, init="gaussian", use_rslora=rslora, rng=1
            )
        else:
            self.emb = nplora.Embedding(rng.normal(size=(11, 6)))
        self.blocks = [
            nplora.LoRALinear(rng.normal(size=(7, 6)), rank, alpha, init="gaussian", rng=2, **options),
            nplora.LoRALinear(rng.normal(size=(5, 7)), rank, alpha, init="gaussian", rng=3, **options),
        ]

    def forward(self, ids: Any) -> tuple[Array, Any]:
        h, s0 = self.emb.forward(ids)
        h, s1 = self.blocks[0].forward(h)
        y, s2 = self.blocks[1].forward(h)
        return y, (s0, s1, s2)

    def backward(self, dy: Array, saved: Any, need_dx: bool = True) -> None:
        dh = self.blocks[1].backward(dy, saved[2])
        self.emb.backward(self.blocks[0].backward(dh, saved[1]), saved[0])


IDS = np.arange(11)


def state(model: nplora.Module) -> dict[str, bytes]:
    """Everything that loading may change, for comparison bit by bit."""
    found = {p.name: p.value.tobytes() for p in model.parameters()}
    for name, layer in model.adapter_layers().items():
        assert isinstance(layer, nplora.LoRALayer)
        found[name] = repr((layer.rank, layer.alpha, layer.scale, layer.use_rslora)).encode()
    return found


def perturbed(model: nplora.Module, seed: int) -> nplora.Module:
    rng = np.random.default_rng(seed)
    for parameter in model.parameters():
        parameter.value[...] += rng.normal(0, 0.1, parameter.value.shape)
    return model


def edit(directory: Path, **fields: Any) -> None:
    path = directory / peft_adapter.CONFIG
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def rewrite(directory: Path, change: Callable[[dict[str, Any]], object]) -> None:
    tensors = {
        name: t.numpy() for name, t in safetensors.open(directory / peft_adapter.TENSORS, mmap=False).items()
    }
    change(tensors)
    safetensors.save(directory / peft_adapter.TENSORS, tensors)


def adapted_net(**options: Any) -> nplora.Module:
    """Two layers of different ranks. The second has its rows in another order than in files."""
    rng = np.random.default_rng(0)
    first = nplora.LoRALinear(rng.normal(size=(6, 5)), 2, 0.1, init="gaussian", rng=1, **options)
    second = nplora.LoRALinear(rng.normal(size=(4, 6)), 3, 7, init="gaussian", rng=2, **options)
    second.row_order = np.array([2, 0, 3, 1])
    return nplora.Sequential(first, nplora.ReLU(), second)


def plain_net() -> nplora.Module:
    rng = np.random.default_rng(0)
    return nplora.Sequential(
        nplora.Linear(rng.normal(size=(6, 5))), nplora.ReLU(), nplora.Linear(rng.normal(size=(4, 6)))
    )
