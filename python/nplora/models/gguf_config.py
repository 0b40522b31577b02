"""The metadata of a GGUF file, as llama.cpp has them: to a ModelConfig."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from nplora.formats import gguf_names
from nplora.formats.errors import FormatError, UnsupportedError, brief
from nplora.formats.gguf import GgufFile
from nplora.models.config import ModelConfig, require_layers
from nplora.models.families import by_architecture
from nplora.models.families.family import NO_WINDOW, require_window
from nplora.models.rope import RopeConfig, require_theta

_ROPE_FREQS = "rope_freqs.weight"

Array = npt.NDArray[Any]
Key = Callable[[str], str]  # an entry's name, to which the architecture's is put in front


def read(file: GgufFile) -> ModelConfig:
    """What the metadata, and the presence of tensors, tell of a model.

    Raises:
        UnsupportedError: an architecture or scaling that is not known here.
        FormatError: an entry is missing, of another type, or makes no sense; or the file is no model.
    """
    data, source = file.metadata, file.source
    kind = data.string("general.type", "model")
    if kind != "model":
        raise FormatError(f"{source}: general.type is {brief(kind)}, expected 'model'")
    architecture = data.string("general.architecture")
    family = by_architecture(source, architecture)

    def key(name: str) -> str:
        return f"{architecture}.{name}"

    layers = data.integer(key("block_count"))
    require_layers(source, layers)
    heads, width = data.integer(key("attention.head_count")), data.integer(key("embedding_length"))
    if heads < 1:
        raise FormatError(f"{source}: {key('attention.head_count')} is {heads}, expected at least 1")
    head_dim = data.integer(key("attention.key_length"), width // heads)
    _require_whole_heads(file, key, head_dim)
    window = data.integer(key("attention.sliding_window"), NO_WINDOW)
    return ModelConfig(
        source=source,
        model_type="mistral" if architecture == "llama" and window else family.model_type,
        vocab_size=_vocabulary(file),
        hidden_size=width,
        intermediate_size=data.integer(key("feed_forward_length")),
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=data.integer(key("attention.head_count_kv"), heads),
        head_dim=head_dim,
        rms_norm_eps=data.number(key("attention.layer_norm_rms_epsilon")),
        max_position_embeddings=data.integer(key("context_length")),
        rope=_rope(file, key, head_dim),
        sliding_windows=(require_window(source, window) if window else NO_WINDOW,) * layers,
        tie_word_embeddings="output.weight" not in file,
        qkv_bias="blk.0.attn_q.bias" in file,
        o_bias="blk.0.attn_output.bias" in file,
        mlp_bias="blk.0.ffn_up.bias" in file,
        qk_norm=family.qk_norm,
        interleaved=gguf_names.is_permuted(architecture, "blk.0.attn_q"),
    )


def _vocabulary(file: GgufFile) -> int:
    """The rows of the embedding; that a `vocab_size` says the same is seen when shapes are compared."""
    entry = file.entries.get("token_embd.weight")
    rows = entry.shape[0] if entry is not None and entry.shape else None
    return file.metadata.integer(f"{file.metadata.string('general.architecture')}.vocab_size", rows)


def _require_whole_heads(file: GgufFile, key: Key, head_dim: int) -> None:
    for name in ("attention.value_length", "rope.dimension_count"):
        found = file.metadata.integer(key(name), head_dim)
        if found != head_dim:
            raise UnsupportedError(
                f"{file.source}: {key(name)} is {found}, expected head_dim={head_dim}: keys and "
                "values of one length that rotate as a whole"
            )


def _rope(file: GgufFile, key: Key, head_dim: int) -> RopeConfig:
    data = file.metadata
    theta = require_theta(file.source, data.number(key("rope.freq_base"), 10_000.0))
    kind = data.string(key("rope.scaling.type"), "none")
    if kind not in ("none", "linear"):
        raise UnsupportedError(
            f"{file.source}: {key('rope.scaling.type')} is {brief(kind)}, expected 'none' or 'linear'"
        )
    factor = data.number(key("rope.scaling.factor"), 1.0) if kind == "linear" else 1.0
    if not 0 < factor < 1e30:
        raise FormatError(f"{file.source}: {key('rope.scaling.factor')} is {factor}, expected above 0")
    return RopeConfig(theta, factor, factors=_pair_factors(file, head_dim))


def _pair_factors(file: GgufFile, head_dim: int) -> Array | None:
    """Llama 3's scaling: a tensor, not metadata."""
    if _ROPE_FREQS not in file:
        return None
    tensor = file[_ROPE_FREQS]
    if tensor.type != "F32" or tensor.shape != (head_dim // 2,):
        found = f"{tensor.type} {tensor.shape}, expected F32 {(head_dim // 2,)}"
        raise FormatError(f"{file.source}: tensor {_ROPE_FREQS} is {found}")
    factors = tensor.numpy().astype(np.float64)
    if not ((factors > 0) & (factors < 1e30)).all():
        raise FormatError(f"{file.source}: tensor {_ROPE_FREQS} holds a factor that is not above 0")
    return np.asarray(factors)
