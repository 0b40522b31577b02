"""Reads the fields of config.json that several families share."""

from __future__ import annotations

import dataclasses

from nplora.formats.config_json import Fields
from nplora.formats.errors import FormatError, UnsupportedError, brief
from nplora.models.config import ModelConfig, require_layers
from nplora.models.rope import Llama3Scaling, RopeConfig, require_theta

NO_WINDOW = 0
_WINDOW = 4096  # the sliding window if config.json does not have the field; null means no window

# The activations that config.json may name, and the core's names for them.
_ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_pytorch_tanh": "gelu_pytorch_tanh",
    "gelu_new": "gelu_pytorch_tanh",
}


def require_readable(fields: Fields) -> None:
    """Raise UnsupportedError if the weights are quantised, unless the format is NF4 of bitsandbytes."""
    if "quantization_config" in fields:
        found = fields.object("quantization_config")
        if found.string("quant_method", "") != "bitsandbytes" or not found.boolean("load_in_4bit", False):
            raise UnsupportedError(
                f"{found.source}: the weights are quantised in a format that nplora does not read (expected "
                "NF4 of bitsandbytes): use the model in bfloat16, or as GGUF"
            )


def require_absent(fields: Fields, *names: str) -> None:
    """Raise UnsupportedError if config.json sets one of the fields `names`, which nplora does not support."""
    for name in names:
        if name in fields:
            raise UnsupportedError(f"{fields.source}: {name} is set, which nplora does not implement")


def activation(fields: Fields, name: str, default: str) -> str:
    """Read the MLP's activation. Return the name that the compiled core uses for it."""
    word = fields.string(name, default)
    if word not in _ACTIVATIONS:
        raise UnsupportedError(
            f"{fields.source}: {name} is {brief(word)}, expected one of {', '.join(_ACTIVATIONS)}"
        )
    return _ACTIVATIONS[word]


def heads(fields: Fields, name: str) -> int:
    """The number of attention heads, at least 1."""
    count = fields.integer(name)
    if count < 1:
        raise FormatError(f"{fields.source}: {name} is {count}, expected at least 1")
    return count


def after_padding(fields: Fields) -> int:
    """The position table's row for the first token, in families that do not use rows 0 to `pad_token_id`."""
    return fields.integer("pad_token_id", 1) + 1


def no_windows(fields: Fields, layers: int) -> tuple[int, ...]:
    """Return `ModelConfig.sliding_windows` for a model without sliding windows: a 0 for each layer.

    Raises FormatError if the number of layers is impossible.
    """
    require_layers(fields.source, layers)
    return (NO_WINDOW,) * layers


def with_attention_bias(config: ModelConfig, fields: Fields) -> ModelConfig:
    """A copy of the configuration, with biases on the q, k, v and o layers if `attention_bias` is true."""
    has_bias = fields.boolean("attention_bias", False)
    return dataclasses.replace(config, qkv_bias=has_bias, o_bias=has_bias)


def require_whole_rotation(fields: Fields) -> None:
    """Raise UnsupportedError if only a part of each head is rotated."""
    for found in (fields, rope_fields(fields)):
        if found.number("partial_rotary_factor", 1.0) != 1:
            raise UnsupportedError(f"{found.source}: partial_rotary_factor is not 1, which is not supported")


def rope_fields(fields: Fields) -> Fields:
    """The object that describes the rotation: `rope_parameters`, or `rope_scaling` before transformers 5.

    Raises:
        FormatError: `rope_parameters` and `rope_scaling` are both set, and differ.
    """
    new, old = fields.object("rope_parameters"), fields.object("rope_scaling")
    if new.items() and old.items() and dict(new.items()) != dict(old.items()):
        raise FormatError(f"{fields.source}: rope_parameters and rope_scaling are both set, and differ")
    return new if new.items() else old


def rope_kind(found: Fields) -> str:
    """The name that transformers gives to the scaling of the rotation: "default", "linear", "llama3", ..."""
    return found.string("rope_type", found.string("type", "default"))


def rope(found: Fields, theta: float) -> RopeConfig:
    """The rotation that the object `found` describes. If `rope_theta` is missing, the base is `theta`."""
    require_whole_rotation(found)
    theta = require_theta(found.source, found.number("rope_theta", theta))
    kind = rope_kind(found)
    if kind == "default":
        return RopeConfig(theta)
    if kind == "linear":
        return RopeConfig(theta, linear_factor=positive(found, "factor"))
    if kind == "llama3":
        low, high = positive(found, "low_freq_factor"), positive(found, "high_freq_factor")
        if low >= high:
            raise FormatError(f"{found.source}: low_freq_factor {low} is not below high_freq_factor {high}")
        length = int(positive(found, "original_max_position_embeddings"))
        return RopeConfig(theta, llama3=Llama3Scaling(positive(found, "factor"), low, high, length))
    raise UnsupportedError(
        f"{found.source}: the rotation is scaled by {brief(kind)}, expected 'default', 'linear' or 'llama3'"
    )


def positive(fields: Fields, name: str, default: float | None = None) -> float:
    """Read a number, and check that it is above 0."""
    value = fields.number(name, default)
    if not 0 < value < 1e30:
        raise FormatError(f"{fields.source}: {name} is {value}, expected above 0 and below 1e30")
    return value


# ---- sliding windows ----


def has_window(fields: Fields) -> bool:
    """Whether there is a sliding window: False only if the field `sliding_window` exists and is null."""
    return fields.integer_or_null("sliding_window", _WINDOW) is not None


def windows(fields: Fields, kinds: list[str], default: int | None = _WINDOW) -> tuple[int, ...]:
    """The sliding window of each layer.

    Args:
        kinds: the type of each layer, for a config.json without the field `layer_types`.
        default: the window to use if the field `sliding_window` is missing; None for no window.
    Raises:
        FormatError: a layer has type "sliding_attention", but there is no window.
    """
    if "layer_types" in fields:
        kinds = fields.strings("layer_types", len(kinds))
    sizes = {"full_attention": NO_WINDOW}
    window = fields.integer_or_null("sliding_window", default)
    if window is None and "sliding_attention" in kinds:
        raise FormatError(
            f"{fields.source}: a layer has type 'sliding_attention', but there is no sliding_window"
        )
    if window is not None:
        sizes["sliding_attention"] = require_window(fields.source, window)
    for kind in kinds:
        if kind not in sizes:
            known = ", ".join(map(repr, sizes))
            raise UnsupportedError(
                f"{fields.source}: a layer has type {brief(kind)}, expected one of {known}"
            )
    return tuple(sizes[kind] for kind in kinds)


def require_window(source: str, window: int) -> int:
    """Check a sliding window, and return it. A window is at least 1, because a token attends to itself."""
    if not 1 <= window < 1 << 31:
        raise FormatError(f"{source}: sliding_window is {window:,}, expected 1 to 2^31 - 1")
    return window
