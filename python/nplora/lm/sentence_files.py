"""Reads the settings of sentence-transformers: pooling, prompts, and the maximum length of a text."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from nplora.formats import files, safetensors, strict_json
from nplora.formats.config_json import MAX_CONFIG, Fields, read_fields
from nplora.formats.errors import FormatError, UnsafeError, UnsupportedError, brief
from nplora.formats.tokenizer_json import TOKENIZER_CONFIG
from nplora.lm.pooling import Pooling
from nplora.nn import Linear

MODULES = "modules.json"
_SETTINGS = "config_sentence_transformers.json"
_TRANSFORMER_SETTINGS = ("sentence_bert_config.json", "sentence_roberta_config.json",
                         "sentence_distilbert_config.json", "sentence_mpnet_config.json",
                         "sentence_xlm-roberta_config.json")  # fmt: skip
_MOST_MODULES = 32
# The flags for poolings in older 1_Pooling/config.json files. The results are concatenated in this order.
_FLAGS = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt",
    "pooling_mode_weightedmean_tokens": "weighted_mean",
    "pooling_mode_lasttoken": "last",
}
_MODES = {
    "cls": "cls",
    "max": "max",
    "mean": "mean",
    "mean_sqrt_len_tokens": "mean_sqrt",
    "weightedmean": "weighted_mean",
    "lasttoken": "last",
}
_ACTIVATIONS = {"Identity": None, "Tanh": "tanh"}


@dataclass(frozen=True)
class SentenceSettings:
    """The settings that sentence-transformers stores in a model's directory.

    Attributes:
        pooling: how hidden states become an embedding, or None if the directory has no modules.json.
        max_length: the maximum number of tokens in a text, or None if the files give no maximum.
        prompts: a dict from names to prompts. A prompt is a text that can be put before each input text.
        default_prompt: the name of the prompt that is used by default, or None for no prompt.
        include_prompt: whether the tokens of the prompt take part in the pooling.
        transformer: the folder with the encoder's files, relative to the model's directory.
    """

    pooling: Pooling | None = None
    max_length: int | None = None
    prompts: Mapping[str, str] = field(default_factory=dict)
    default_prompt: str | None = None
    include_prompt: bool = True
    transformer: str = ""


def read(directory: Path) -> SentenceSettings:
    """Read the module files in a model's directory.

    Raises:
        UnsupportedError: a module is not known.
        UnsafeError: the path of a module leaves the directory, or the weights of a module are a pickle.
        FormatError: a file breaks its format.
    """
    path = directory / MODULES
    if not path.exists():
        return SentenceSettings(max_length=_max_length(directory))
    modules = _modules(path)
    kind, folder = modules[0]
    if kind != "Transformer":
        raise UnsupportedError(f"{files.name(path)}: the first module is {brief(kind)}, expected Transformer")
    modes: tuple[str, ...] = ()
    include_prompt, normalize, layers = True, False, list[tuple[Linear, str | None]]()
    for kind, name in modules[1:]:
        if kind == "Pooling" and not modes:
            fields = read_fields(directory / name / "config.json")
            modes, include_prompt = _pooling_modes(fields), fields.boolean("include_prompt", True)
        elif kind == "Dense" and modes and not normalize:
            layers.append(_dense(directory / name))
        elif kind == "Normalize" and modes:
            normalize = True
        else:
            raise UnsupportedError(
                f"{files.name(path)}: module {brief(kind)} is not supported at this position; nplora reads "
                "Transformer, Pooling, Dense and Normalize, in this order"
            )
    if not modes:
        raise UnsupportedError(f"{files.name(path)}: no module Pooling")
    prompts, default = _prompts(directory / _SETTINGS)
    return SentenceSettings(
        Pooling(modes, layers, normalize),
        _max_length(directory / folder) or _tokenizer_length(directory / folder),
        prompts,
        default,
        include_prompt,
        folder,
    )


def _modules(path: Path) -> list[tuple[str, str]]:
    """Return a pair for each module: the name of its class, and its folder."""
    source = files.name(path)
    listed = strict_json.loads(bytes(files.read(path, MAX_CONFIG)), source)
    if not isinstance(listed, list) or not 1 <= len(listed) <= _MOST_MODULES:
        raise FormatError(f"{source}: expected a list of 1 to {_MOST_MODULES} modules")
    found = []
    for entry in listed:
        if not isinstance(entry, dict):
            raise FormatError(f"{source}: {brief(entry)}, expected an object")
        fields = Fields(source, entry)
        folder = fields.string("path", "")
        parts = PurePosixPath(folder)
        if parts.is_absolute() or ".." in parts.parts or any(sign in folder for sign in "\\:\0"):
            raise UnsafeError(f"{source}: the path {brief(folder)} leads out of the directory")
        found.append((fields.string("type").rpartition(".")[2], folder))
    return found


def _pooling_modes(fields: Fields) -> tuple[str, ...]:
    """Return the names of the pooling modes.

    Newer files have a list of names; older files have a true or false entry for each mode.
    """
    named = dict(fields.items()).get("pooling_mode")
    if named is not None:
        names = named if isinstance(named, list) else [named]
        if not names:
            raise FormatError(
                f"{fields.source}: pooling_mode is an empty list, expected one pooling or several"
            )
        for name in names:
            if not isinstance(name, str) or name not in _MODES:
                raise UnsupportedError(
                    f"{fields.source}: pooling_mode is {brief(name)}, expected one of {', '.join(_MODES)}"
                )
        if len(set(names)) < len(names):
            raise FormatError(f"{fields.source}: pooling_mode is {brief(names)}, which names a pooling twice")
        return tuple(_MODES[name] for name in names)
    modes = tuple(mode for flag, mode in _FLAGS.items() if fields.boolean(flag, False))
    if not modes:
        raise FormatError(f"{fields.source}: no pooling is chosen, expected one of {', '.join(_FLAGS)}")
    return modes


def _dense(directory: Path) -> tuple[Linear, str | None]:
    """The linear layer of a Dense module, and the name of its activation."""
    fields = read_fields(directory / "config.json")
    name = fields.string("activation_function", "torch.nn.modules.activation.Tanh").rpartition(".")[2]
    if name not in _ACTIVATIONS:
        raise UnsupportedError(
            f"{fields.source}: activation_function is {brief(name)}, expected {' or '.join(_ACTIVATIONS)}"
        )
    path = directory / "model.safetensors"
    if not path.exists() and (directory / "pytorch_model.bin").exists():
        raise UnsafeError(f"{files.name(directory)}: a pickle can run any code; expected model.safetensors")
    tensors = safetensors.open(path)
    shape = fields.integer("out_features"), fields.integer("in_features")
    if min(shape) < 1:
        raise FormatError(f"{fields.source}: out_features and in_features are {shape}, expected at least 1")
    weight = _array(tensors, "linear.weight", shape)
    bias = _array(tensors, "linear.bias", shape[:1]) if fields.boolean("bias", True) else None
    return Linear(weight, bias), _ACTIVATIONS[name]


def _array(tensors: safetensors.SafetensorsFile, name: str, shape: tuple[int, ...]) -> Any:
    if name not in tensors:
        raise FormatError(f"{tensors.source}: there is no tensor {name}")
    tensor = tensors[name]
    if tensor.shape != shape or tensor.dtype not in ("float32", "float16", "float64"):
        found = f"{tensor.dtype} {tensor.shape}, expected float32 {shape}"
        raise FormatError(f"{tensors.source}: tensor {name} is {found}")
    with np.errstate(over="ignore"):
        values = np.asarray(tensor.numpy(), np.float32)
    if not np.isfinite(values).all():
        raise FormatError(f"{tensors.source}: tensor {name} holds NaN or an infinity")
    return values


def _max_length(directory: Path) -> int | None:
    for name in _TRANSFORMER_SETTINGS:
        if (directory / name).exists():
            fields = read_fields(directory / name)
            length = fields.integer_or_null("max_seq_length", None)
            if length is not None and length < 1:
                raise FormatError(f"{fields.source}: max_seq_length is {length}, expected at least 1")
            return length
    return None


def _tokenizer_length(directory: Path) -> int | None:
    """Read the maximum number of tokens in a text from the tokenizer's file. None: there is no maximum.

    sentence-transformers 6 stores the maximum in this file. If there is no maximum, transformers writes an
    immense number.
    """
    if not (directory / TOKENIZER_CONFIG).exists():
        return None
    length = dict(read_fields(directory / TOKENIZER_CONFIG).items()).get("model_max_length")
    return length if type(length) is int and 1 <= length < 1 << 31 else None


def _prompts(path: Path) -> tuple[dict[str, str], str | None]:
    if not path.exists():
        return {}, None
    fields = read_fields(path)
    prompts = fields.object("prompts")
    named = {name: prompts.string(name) for name, _ in prompts.items()}
    default = fields.string("default_prompt_name", "") or None
    if default is not None and default not in named:
        raise FormatError(
            f"{fields.source}: default_prompt_name is {brief(default)}, but no prompt has this name"
        )
    return named, default
