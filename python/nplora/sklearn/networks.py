"""Builds the networks of the estimators: copies of a pretrained network with LoRA layers and a head."""

from __future__ import annotations

import copy
import re
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from nplora import _check
from nplora.formats import bfloat16, files, safetensors
from nplora.formats.errors import FormatError, brief, nearest_names
from nplora.formats.files import StrPath
from nplora.nn import GELU, Conv2d, Linear, LoRAConv2d, LoRALinear, ReLU, Sequential, SiLU, Tanh
from nplora.nn.module import Module, layer_stream
from nplora.weights import FrozenWeight, storages
from nplora.weights.nonfinite import require_finite

Array = npt.NDArray[Any]

ACTIVATIONS = {"relu": ReLU, "gelu": GELU, "silu": SiLU, "tanh": Tanh}
HEADS = ("replace", "append", "keep")
HEAD = "head"  # the name of the random stream of a new head


@dataclass(frozen=True)
class Adaptation:
    """How to adapt a network: the settings of the LoRA layers, and the kind of head.

    Attributes:
        rank: the rank of each LoRA layer. If d_in or d_out of a layer is less than `rank`, the layer's rank
            is the smaller of d_in and d_out.
        targets: the names of the layers to adapt, or the last parts of their dotted names; None: all frozen
            linear layers and convolutions.
        head: "replace", "append" or "keep", as in `LoRAClassifier`.
        outputs: the number of outputs that the adapted network must have.
        seed: the seed of the LoRA weights and of the head.
    """

    rank: int
    alpha: float
    dropout: float
    targets: tuple[str, ...] | None
    head: str
    outputs: int
    seed: int


# ---- networks without adapters ----


def read_network(path: StrPath, activation: str = "relu") -> Sequential:
    """Read a network of linear layers from a safetensors file, with the same activation between all layers.

    For each layer, the file contains a matrix "NAME.weight" (d_out, d_in), and optionally a vector
    "NAME.bias" (d_out,). The layers follow each other in the sorted order of their names. Numbers in names
    are compared by value, so "fc2" comes before "fc10". The state dict of a `torch.nn.Sequential` of linear
    layers has this form. The weights stay in the file, which is mapped into memory.

        >>> from nplora.formats import safetensors
        >>> W1, W2 = np.ones((8, 4), np.float32), np.ones((3, 8), np.float32)
        >>> safetensors.save("net.safetensors", {"0.weight": W1, "2.weight": W2})
        >>> nplora.sklearn.read_network("net.safetensors")
        Sequential: 0 of 56 values trained
          0: Linear((8, 4), dtype='float32', trainable=False)
          1: ReLU()
          2: Linear((3, 8), dtype='float32', trainable=False)

    Args:
        activation: "relu", "gelu", "silu" or "tanh".
    Raises:
        FormatError: the file breaks its format, a tensor does not belong to a linear layer, or d_in of a
            layer differs from d_out of the layer before it.
        OSError: the file cannot be read. ValueError: the activation is unknown.
    """
    _check.choice("read_network", "activation", activation, ACTIVATIONS)
    opened, source = safetensors.open(path), files.name(path)
    names = sorted((name for name in opened if name.endswith(".weight")), key=_natural)
    biases = {name: f"{name.removesuffix('weight')}bias" for name in names}
    if others := set(opened) - {*names, *biases.values()}:
        raise FormatError(
            f"{source}: the tensor {brief(min(others), 200)} belongs to no linear layer, expected "
            "NAME.weight and NAME.bias only; build any other network as a Module"
        )
    layers, width = list[Module](), None
    for name in names:
        shape = opened[name].shape
        if len(shape) != 2 or width not in (None, shape[1]):
            wanted = "two axes" if width is None else f"shape (d_out, {width}) to fit the layer before it"
            raise FormatError(f"{source}: the tensor {brief(name, 200)} has shape {shape}, expected {wanted}")
        width = shape[0]
        bias = _bias(opened, biases[name])
        if bias is not None and bias.shape != (width,):
            raise FormatError(
                f"{source}: {brief(biases[name], 200)} has shape {bias.shape}, expected ({width},)"
            )
        weight = FrozenWeight.from_safetensors(opened, name)
        require_finite(opened.source, opened[name])
        layers += [Linear(weight, bias), ACTIVATIONS[activation]()]
    if not layers:
        raise FormatError(f"{source}: no tensor is named NAME.weight, expected the matrices of linear layers")
    return Sequential(*layers[:-1])


def _bias(opened: safetensors.SafetensorsFile, name: str) -> Array | None:
    if name not in opened:
        return None
    tensor = opened[name]
    if tensor.dtype not in storages.FLOATS:
        known = ", ".join(storages.FLOATS)
        raise FormatError(f"{opened.source}: {brief(name, 200)} is {tensor.dtype}, expected one of {known}")
    require_finite(opened.source, tensor)
    return bfloat16.widen(tensor.array) if tensor.dtype == "bfloat16" else tensor.array


def _natural(name: str) -> list[tuple[int, int, str]]:
    """Return a sort key for a name: numbers in names are compared by value.

    The numbers are not converted to int, because this would be slow for a name with very many digits.
    """
    parts = re.split(r"([0-9]+)", name)
    digits = [part.lstrip("0") if i % 2 else "" for i, part in enumerate(parts)]
    return [
        (1, len(number), number) if i % 2 else (0, 0, part)
        for i, (part, number) in enumerate(zip(parts, digits, strict=True))
    ]


def random_features(d_in: int, width: int, activation: str, dtype: npt.DTypeLike, seed: int) -> Sequential:
    """Return a network of one frozen layer with random weights, in place of a pretrained network.

    The weights are drawn from N(0, 2 / d_in) and the biases from U(-1, 1). Source: Rahimi & Recht 2008.
    """
    rng = np.random.default_rng(layer_stream(seed, "features"))
    W = rng.normal(0, np.sqrt(2 / d_in), (width, d_in)).astype(dtype)
    bias = rng.uniform(-1, 1, width).astype(dtype)
    return Sequential(Linear(W, bias, np.dtype(dtype).name), ACTIVATIONS[activation]())


# ---- adapted networks ----


def adapted(network: Module, adaptation: Adaptation, probe: Array) -> Module:
    """Return a copy of a network with LoRA layers and a head. The copy shares the frozen weights.

    The network's trainable parameters are copied too, so training the copy does not change the network.

    Args:
        probe: one row of features, of shape (1, ...). The network is applied to this row to find its number
            of outputs.
    Raises:
        ValueError: no layer has a name in `adaptation.targets`; no layer can be adapted; the number of
            outputs differs from `adaptation.outputs`; or the network cannot be applied to `probe`.
    """
    model = copy.deepcopy(network)
    if isinstance(model, Linear) or not list(model.named_children()):
        model = Sequential(model)  # a layer cannot replace itself
    head = _new_head(model, adaptation, probe)
    replaced: dict[int, Module] = {}
    if adaptation.head == "replace":
        replaced[id(_last_linear(model))] = head
    for layer in _targets(model, adaptation.targets, replaced.keys()).values():
        replaced[id(layer)] = _lora_layer(layer, adaptation)
    model.exchange(replaced)
    model.seed(adaptation.seed)
    if adaptation.head == "append":
        model = Sequential(*model, head) if type(model) is Sequential else Sequential(model, head)
    if not model.adapter_layers():
        raise ValueError(
            "LoRA: the network has no frozen linear layer or convolution to adapt besides its head"
        )
    if adaptation.head == "replace":
        _require_outputs(model, adaptation.outputs, probe)
    return model


def _require_outputs(model: Module, outputs: int, probe: Array) -> None:
    """Raise ValueError if the layers after a new head refuse its outputs, or if the network does not output
    `outputs` numbers for each row."""
    words = f"LoRA: head='replace' gives the last linear layer {outputs} outputs"
    try:
        shape = model(probe).shape
    except ValueError as error:
        raise ValueError(f"{words}, but the next layers refuse them: {error}; use head='append'") from error
    if shape != (len(probe), outputs):
        raise ValueError(f"{words}, but the network's output has shape {shape}; use head='append'")


def _new_head(model: Module, adaptation: Adaptation, probe: Array) -> Linear:
    """Return a new layer for the head. With the head "keep", the caller does not use the returned layer.

    Raise ValueError if `adaptation.head` is "keep", but the network has the wrong number of outputs.
    """
    y = model(probe)
    if y.ndim != 2:
        raise ValueError(f"LoRA: the network's output has shape {y.shape}, expected (n, outputs)")
    if adaptation.head == "keep" and y.shape[1] != adaptation.outputs:
        raise ValueError(
            f"LoRA: head='keep', but the network has {y.shape[1]} outputs and the data need "
            f"{adaptation.outputs}; use head='replace' or 'append'"
        )
    width = _last_linear(model).weight.shape[1] if adaptation.head == "replace" else y.shape[1]
    dtype = np.float64 if y.dtype == np.float64 else np.float32
    rng, bound = np.random.default_rng(layer_stream(adaptation.seed, HEAD)), 1 / np.sqrt(max(1, width))
    W = rng.uniform(-bound, bound, (adaptation.outputs, width)).astype(dtype)
    return Linear(W, np.zeros(adaptation.outputs, dtype), np.dtype(dtype).name, trainable=True)


def _last_linear(model: Module) -> Linear | LoRALinear:
    """Return the last linear layer of a network. The layer may have an adapter.

    Raises:
        ValueError: the network has no linear layer.
    """
    layers = [
        module
        for _, module in model.named_modules()
        if isinstance(module, Linear | LoRALinear) and not isinstance(module, Conv2d | LoRAConv2d)
    ]
    if not layers:
        raise ValueError("LoRA: head='replace', but the network has no linear layer; use head='append'")
    return layers[-1]


def _targets(
    model: Module, wanted: tuple[str, ...] | None, without: Collection[int]
) -> dict[str, Linear | Conv2d]:
    """Return the frozen layers to adapt, as a dict {name: layer}.

    Layers whose Python id is in `without` are never adapted. As in PEFT, an entry of `wanted` is a layer's
    dotted name, or the last parts of this name. If `wanted` is None, all frozen layers outside `without`
    are adapted.
    """
    found = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, Linear) and not module.trainable and id(module) not in without
    }
    if wanted is None:
        return found
    for end in wanted:
        if not any(f".{name}".endswith(f".{end}") for name in found):
            near = ", ".join(map(repr, nearest_names(end, found)))
            raise ValueError(
                f"LoRA: targets has {end!r}, but no layer that can be adapted has this name; "
                f"nearest names: {near}"
            )
    return {n: m for n, m in found.items() if any(f".{n}".endswith(f".{end}") for end in wanted)}


def _lora_layer(layer: Linear, adaptation: Adaptation) -> LoRALinear:
    rank = max(1, min(adaptation.rank, *layer.shape))
    scale = adaptation.alpha / adaptation.rank  # also for a small layer, which gets a lower rank
    options: dict[str, Any] = {"dropout": adaptation.dropout, "rng": 0}
    if isinstance(layer, Conv2d):
        return LoRAConv2d.over(layer, rank, scale * rank, **options)
    assert isinstance(layer.weight, FrozenWeight)
    return LoRALinear(layer.weight, rank, scale * rank, layer.bias, **options)
