"""Chooses the layers of a language model that get a LoRA adapter, and creates their LoRA layers."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import numpy as np
import numpy.typing as npt

from nplora import _check
from nplora.formats import gguf_rows
from nplora.formats.errors import counted, nearest_names
from nplora.models import families
from nplora.models.config import ModelConfig
from nplora.nn import Embedding, Linear, LoRAEmbedding, LoRALayer, LoRALinear, TrainedRowsLayer
from nplora.nn.module import Module, layer_stream
from nplora.nn.principal import PRINCIPAL_INITS
from nplora.weights import buffers, storages

Array = npt.NDArray[Any]

_BLOCK = re.compile(r"(?:\w+\.){0,2}layers?\.(\d{1,6})(?:\.|$)")
ALL_LINEAR = "all-linear"  # PEFT's name for every linear layer of the blocks; the head is not included


def target_names(targets: str | Iterable[str]) -> tuple[str, ...]:
    """Split a text like "q_proj,v_proj", or a list of such texts, into names.

    Raises:
        TypeError: `targets` is neither a text nor an iterable of texts.
    """
    given: list[Any] = [targets]
    if isinstance(targets, Iterable) and not isinstance(targets, str):
        given = list(targets)
    if not all(isinstance(text, str) for text in given):
        raise TypeError(f"targets is {targets!r}, expected the name of a layer, or a list of names")
    return tuple(name.strip() for text in given for name in text.split(","))


def targeted(
    model: Module, layer_count: int, targets: str | Iterable[str], layers: Any, op: str = "add_lora"
) -> list[str]:
    """The dotted names of the layers that `targets` and `layers` choose, in the model's order.

    Raises:
        ValueError: the model has no layer for a target (the message lists the nearest names), all layers of a
            target already have an adapter, the model lacks a block in `layers`, or no layer is chosen.
    """
    plain = [name for name, module in model.named_modules() if isinstance(module, Linear | Embedding)]
    blocks = chosen_blocks(layers, layer_count, op)
    there = [
        name for name, module in model.named_modules() if isinstance(module, LoRALayer | TrainedRowsLayer)
    ]
    wanted = target_names(targets)
    found: set[str] = set()
    for target in wanted:
        hits = {name for name in plain if _hits(name, target)}
        if not hits and any(_hits(name, target) for name in there):
            raise ValueError(f"{op}: all layers with the name {target!r} have an adapter already")
        if not hits:
            known = [ALL_LINEAR, *dict.fromkeys(name.rpartition(".")[2] for name in plain)]
            near = nearest_names(target, [*known, *plain])
            hint = f"the nearest names: {', '.join(near)}" if near else f"known: {', '.join(known)}"
            raise ValueError(f"{op}: the model has no layer {target!r}; {hint}")
        found |= hits
    chosen = [name for name in plain if name in found and block_of(name) in {*blocks, None}]
    if not chosen:
        raise ValueError(f"{op}: targets={wanted!r} and layers={layers!r} choose no layer")
    return chosen


def parse_pattern(op: str, option: str, given: Mapping[str, Any] | str | None) -> dict[str, Any]:
    """Convert a text like "q_proj=16,layers.3.mlp=4" to a dictionary, or copy a mapping.

    Args:
        option: "rank_pattern" or "alpha_pattern".
    Raises:
        ValueError: the text does not have this form, or a number is out of range.
        TypeError: `given` is neither a text nor a mapping.
    """
    wanted = "expected pairs of a layer name and a number, such as q_proj=16,layers.3.mlp=4"
    if given is None:
        return {}
    if isinstance(given, str):
        pairs = [pair.rpartition("=") for pair in given.split(",")]
        values = {name.strip(): _parsed(value) for name, _, value in pairs}
        if not all(values) or None in values.values() or len(values) < len(pairs):
            raise ValueError(f"{op}: {option} is {given!r}, {wanted}")
    elif isinstance(given, Mapping) and all(isinstance(name, str) for name in given):
        values = dict(given)
    else:
        raise TypeError(
            f"{op}: {option} is {_check.kind(given)}, expected a dictionary from names to numbers"
        )
    for name, value in values.items():
        what = f"{option}[{name!r}]"
        if option == "rank_pattern":
            _check.integer(op, what, value, least=1, most=_check.MAX_RANK)
        elif _check.number(op, what, value) <= 0:
            raise ValueError(f"{op}: {what} is {value}, expected above 0")
    return values


def _parsed(text: str) -> float | None:
    """Convert a text to an integer or a float. Return None if the text is not a number."""
    try:
        number = float(text)
    except ValueError:
        return None
    return int(number) if number.is_integer() else number


def by_layer(op: str, option: str, pattern: Mapping[str, Any], names: Sequence[str]) -> dict[str, Any]:
    """Return a dictionary: layer -> number. The first key of `pattern` that matches a layer gives the number.

    A key such as "q_proj" or "layers.3.mlp" matches a layer if the key is one part, or several neighbouring
    parts, of the layer's dotted name.

    Args:
        names: the dotted names of the adapted layers.
    Raises:
        ValueError: a key matches none of the layers (the message lists the nearest names).
    """
    found = dict[str, Any]()
    for part, value in pattern.items():
        hits = [name for name in names if f".{part}." in f".{name}."]
        if not hits:
            near = nearest_names(part, [*dict.fromkeys(name.rpartition(".")[2] for name in names), *names])
            hint = f"; the nearest names: {', '.join(near)}" if near else ""
            raise ValueError(f"{op}: {option} has {part!r}, which matches no adapted layer{hint}")
        found = dict.fromkeys(hits, value) | found
    return found


def _hits(name: str, target: str) -> bool:
    if target == ALL_LINEAR:
        return block_of(name) is not None
    return name == target or name.endswith(f".{target}")


def block_of(name: str) -> int | None:
    """The number of the block that contains a layer: 3 for "model.layers.3.mlp.up_proj".

    Encoders call the list of blocks "layers" or "layer", as in "encoder.layer.3.output.dense".
    """
    found = _BLOCK.match(name)
    return None if found is None else int(found[1])


def chosen_blocks(layers: str | Sequence[int] | None, count: int, op: str = "add_lora") -> range | list[int]:
    """The blocks that `layers` chooses: None (all), "last:4", "first:4", a range or a list of numbers.

    Raises:
        ValueError: `layers` is none of these, or contains a number that no block has.
    """
    if layers is None:
        return range(count)
    if isinstance(layers, str):
        side, n = parse_blocks(layers, op)
        if n > count:
            raise ValueError(f"{op}: layers={layers!r}, but the model has {counted(count, 'block')}")
        return range(count - n, count) if side == "last" else range(n)
    numbers = _check.integers(op, "layers", np.asarray(layers))
    return [int(i) for i in _check.in_range(op, "layers", numbers.reshape(-1), count)]


def parse_blocks(text: str, op: str = "add_lora") -> tuple[str, int]:
    """The two parts of "last:4": the side, "first" or "last", and the number of blocks, at least 1.

    Raises:
        ValueError: the text does not have this form.
    """
    side, _, number = text.partition(":")
    if side not in ("first", "last") or not re.fullmatch("0*[1-9][0-9]{0,8}", number):
        raise ValueError(f"{op}: layers={text!r}, expected 'last:N' or 'first:N' with N above 0")
    return side, int(number)


def lora_layers(
    model: Module,
    names: Sequence[str],
    rank: int,
    alpha: float,
    rank_pattern: Mapping[str, int] | str | None,
    alpha_pattern: Mapping[str, float] | str | None,
    seed: int,
    options: dict[str, Any],
) -> dict[str, LoRALayer]:
    """Create LoRA layers, with initial factors, over the named layers of a model.

    Args:
        options: the options of the function `adapted` except "rank" and "alpha".
    Raises:
        ValueError: an option is out of range, or does not fit a layer.
    """
    op = "add_lora"
    rank = _check.rank(op, rank)
    ranks, alphas = (
        by_layer(op, option, parse_pattern(op, option, given), names)
        for option, given in (("rank_pattern", rank_pattern), ("alpha_pattern", alpha_pattern))
    )
    modules: dict[str, Any] = dict(model.named_modules())
    with factors_side_by_side((modules[name], ranks.get(name, rank)) for name in names):
        made = {
            name: adapted(
                name, modules[name], model.stored_row_order(name),
                {**options, "rank": ranks.get(name, rank), "alpha": alphas.get(name, alpha)},
            )
            for name in names
        }  # fmt: skip
    seed = _check.integer(op, "seed", seed, least=0)
    for name, layer in made.items():
        layer.reset(layer_stream(seed, name))
    return made


def factors_side_by_side(layers: Iterable[tuple[Linear | Embedding, int]]) -> AbstractContextManager[None]:
    """A context in which the function `adapted` allocates the LoRA factors of all `layers` in one buffer.

    Args:
        layers: pairs of a layer and the rank of its LoRA factors.
    """
    sizes = (rank * n * np.dtype(np.float32).itemsize for layer, rank in layers for n in layer.shape)
    return buffers.side_by_side(*sizes)


def adapted(
    name: str, layer: Linear | Embedding, row_order: Array | None, options: dict[str, Any]
) -> LoRALayer:
    """Create a LoRA layer with the frozen weight of `layer`. init="pissa" and "olora" change this weight.

    Raises:
        ValueError: an option does not fit the layer.
    """
    require_init(name, layer, options["init"])
    if isinstance(layer, Embedding):
        known = {name: options[name] for name in ("rank", "alpha", "use_rslora", "init", "freeze_B")}
        return LoRAEmbedding(layer.weight, **known, rng=0)
    lora = LoRALinear(layer.weight, bias=layer.bias, **options, rng=0)
    lora.row_order = row_order
    return lora


def require_init(name: str, layer: Linear | Embedding, init: str, op: str = "add_lora") -> None:
    """Raise ValueError if `init` is "pissa" or "olora" and the weight is quantised.

    "pissa" and "olora" change the weight. A quantised weight would be rounded again, so the model's outputs
    would change.
    """
    storage = getattr(layer.weight, "dtype", None)
    if init in PRINCIPAL_INITS and storage in storages.BLOCKS:
        raise ValueError(
            f"{op}: init={init!r} needs unquantised weights, but {name} is stored in {storage}; "
            "use init='zero', or load the unquantised model"
        )


def row_order(config: ModelConfig, name: str) -> Array | None:
    """The order of a weight's rows in the model's file; None if Hugging Face's files have the same order.

    Row i of the weight in the file is row `order[i]` of the weight in Hugging Face's files.
    """
    counts = config.num_attention_heads, config.num_key_value_heads
    heads = families.of(config).permuted_heads(name, *counts) if config.interleaved else 0
    return gguf_rows.row_order(heads * config.head_dim, heads) if heads else None
