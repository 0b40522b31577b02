"""config.json, as transformers writes it: to a ModelConfig."""

from __future__ import annotations

from nplora.formats.config_json import Fields, attention_heads, read_fields
from nplora.formats.errors import FormatError, UnsupportedError, brief
from nplora.formats.files import StrPath
from nplora.models.config import ModelConfig, require_layers
from nplora.models.families import by_model_type
from nplora.models.rope import Llama3Scaling, RopeConfig, require_theta

# What config.json may say of the MLP's activation, and the core's name for it.
_ACTIVATIONS = {"silu": "silu", "swish": "silu", "gelu_pytorch_tanh": "gelu_pytorch_tanh"}


def read(path: StrPath) -> ModelConfig:
    """What a config.json tells of a model.

    Raises:
        UnsupportedError: a family, activation, scaling or quantisation that is not known here.
        FormatError: a field is missing, of another type, or makes no sense. OSError: it cannot be read.
    """
    fields = read_fields(path)
    source = fields.source
    family = by_model_type(source, fields.string("model_type"))
    _require_plain(fields)
    layers = fields.integer("num_hidden_layers")
    require_layers(source, layers)
    (heads, kv_heads), width = attention_heads(fields), fields.integer("hidden_size")
    return ModelConfig(
        source=source,
        model_type=family.model_type,
        vocab_size=fields.integer("vocab_size"),
        hidden_size=width,
        intermediate_size=fields.integer("intermediate_size"),
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=fields.integer("head_dim", family.head_dim or width // heads),
        rms_norm_eps=fields.number("rms_norm_eps", 1e-6),
        max_position_embeddings=fields.integer("max_position_embeddings"),
        rope=_rope(fields),
        sliding_windows=family.sliding_windows(fields, layers),
        tie_word_embeddings=fields.boolean("tie_word_embeddings", False),
        qk_norm=family.qk_norm,
        hidden_act=_activation(fields),
        **family.biases(fields),
    )


def _require_plain(fields: Fields) -> None:
    if "quantization_config" in fields:
        told = fields.object("quantization_config")
        if told.string("quant_method", "") != "bitsandbytes" or not told.boolean("load_in_4bit", False):
            raise UnsupportedError(
                f"{told.source}: of what other libraries quantise, only NF4 of bitsandbytes is read: "
                "take the model in bfloat16, or as GGUF"
            )
    if fields.number("partial_rotary_factor", 1.0) != 1:
        raise UnsupportedError(f"{fields.source}: partial_rotary_factor is not 1: heads rotate as a whole")


def _activation(fields: Fields) -> str:
    name = fields.string("hidden_act", "silu")
    if name not in _ACTIVATIONS:
        raise UnsupportedError(
            f"{fields.source}: hidden_act is {brief(name)}, expected one of {', '.join(_ACTIVATIONS)}"
        )
    return _ACTIVATIONS[name]


def _rope(fields: Fields) -> RopeConfig:
    """From `rope_parameters`, or from `rope_theta` and `rope_scaling` as before version 5 of transformers."""
    told = fields.object("rope_parameters" if "rope_parameters" in fields else "rope_scaling")
    default = fields.number("rope_theta", 10_000.0)
    theta = require_theta(fields.source, told.number("rope_theta", default))
    kind = told.string("rope_type", told.string("type", "default"))
    if kind == "default":
        return RopeConfig(theta)
    if kind == "linear":
        return RopeConfig(theta, linear_factor=_positive(told, "factor"))
    if kind == "llama3":
        low, high = _positive(told, "low_freq_factor"), _positive(told, "high_freq_factor")
        if low >= high:
            raise FormatError(f"{told.source}: low_freq_factor {low} is not below high_freq_factor {high}")
        length = int(_positive(told, "original_max_position_embeddings"))
        return RopeConfig(theta, llama3=Llama3Scaling(_positive(told, "factor"), low, high, length))
    raise UnsupportedError(f"{told.source}: {brief(kind)}, expected 'default', 'linear' or 'llama3'")


def _positive(fields: Fields, name: str) -> float:
    value = fields.number(name)
    if not 0 < value < 1e30:
        raise FormatError(f"{fields.source}: {name} is {value}, expected above 0")
    return value
