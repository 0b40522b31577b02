"""Small random models of every family, made by transformers, and the same weights as a GGUF file."""

import math
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
import transformers

from nplora import formats

SIZES: dict[str, Any] = {
    "vocab_size": 80,
    "hidden_size": 48,
    "intermediate_size": 72,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.25,  # large enough that every part of the model affects its logits
    "pad_token_id": None,  # transformers computes no gradient for its row
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 5e5,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
LINEAR = {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}


@dataclass(frozen=True)
class Kind:
    """A kind of model.

    Attributes:
        name: the prefix of transformers' classes (before Config and ForCausalLM).
        options: options of the configuration.
        norm_offset: the value that llama.cpp's converter adds to norm weights.
        permutes: whether the converter puts rows of q and k that rotate together side by side.
        metadata: writes the converter's other metadata.
    """

    name: str
    options: dict[str, Any] = field(default_factory=dict)
    norm_offset: float = 0.0
    permutes: bool = False
    metadata: Callable[[Any, Any], None] = lambda writer, config: None


def write_window(writer: Any, config: Any) -> None:
    writer.add_sliding_window(config.sliding_window)


def write_multipliers(writer: Any, config: Any) -> None:
    writer.add_attention_scale(config.attention_multiplier)
    writer.add_embedding_scale(config.embedding_multiplier)
    writer.add_residual_scale(config.residual_multiplier)
    writer.add_logit_scale(config.logits_scaling)


def write_long_rope(writer: Any, config: Any) -> None:
    rope = config.rope_parameters
    original = config.original_max_position_embeddings
    stretch = config.max_position_embeddings / original
    writer.add_rope_scaling_orig_ctx_len(original)
    writer.add_rope_scaling_attn_factors(math.sqrt(1 + math.log(stretch) / math.log(original)))
    for length in ("long", "short"):
        writer.add_tensor(f"rope_factors_{length}.weight", np.float32(rope[f"{length}_factor"]))


FAMILIES: dict[str, Kind] = {
    "llama": Kind("Llama", permutes=True),
    "llama3": Kind("Llama", {"rope_parameters": LLAMA3, "tie_word_embeddings": True}, permutes=True),
    "llama with biases": Kind(
        "Llama",
        {"attention_bias": True, "mlp_bias": True, "head_dim": 12, "rope_parameters": LINEAR},
        permutes=True,
    ),
    "mistral": Kind("Mistral", {"sliding_window": 5}, permutes=True, metadata=write_window),
    "qwen2": Kind("Qwen2", {"tie_word_embeddings": True}),
    "qwen3": Kind("Qwen3", {"head_dim": 16}),
    "gemma3": Kind(
        "Gemma3",
        {
            "num_hidden_layers": 7,  # the sixth one sees all tokens
            "head_dim": 10,
            "sliding_window": 5,
            "initializer_range": 0.1,
        },
        norm_offset=1.0,
        metadata=write_window,
    ),
    "smollm3": Kind("SmolLM3", {"num_hidden_layers": 5}, permutes=True),
    "granite": Kind(
        "Granite",
        {
            "embedding_multiplier": 3.0,
            "residual_multiplier": 0.22,
            "attention_multiplier": 0.2,
            "logits_scaling": 1.7,
            "attention_bias": True,
        },
        permutes=True,
        metadata=write_multipliers,
    ),
    "olmo2": Kind("Olmo2"),
    "phi3": Kind("Phi3", {"sliding_window": 6}, metadata=write_window),
    "phi3 in part": Kind("Phi3", {"partial_rotary_factor": 0.5, "tie_word_embeddings": True}),
    "phi3 with longrope": Kind(
        "Phi3",
        {
            "original_max_position_embeddings": 16,  # shorter than most texts of the tests
            "partial_rotary_factor": 0.5,
            "rope_parameters": {"rope_type": "longrope", "rope_theta": 1e4},
        },
        metadata=write_long_rope,
    ),
}

# GGUF cannot express these models, because llama.cpp computes all models of a family in the same way.
UNKNOWN_TO_GGUF = {
    "llama with gelu": Kind("Llama", {"hidden_act": "gelu_pytorch_tanh"}),
    "llama with exact gelu": Kind("Llama", {"hidden_act": "gelu"}),
    "gemma3 with another pattern": Kind(
        "Gemma3",
        {
            "layer_types": ["full_attention", "sliding_attention", "full_attention"],
            "sliding_window": 3,
            "head_dim": 14,
            "query_pre_attn_scalar": 30,
            "tie_word_embeddings": False,
            "attention_bias": True,
            "initializer_range": 0.1,
        },
    ),
    "smollm3 with a window": Kind(
        "SmolLM3",
        {
            "no_rope_layers": [0, 1, 0],
            "use_sliding_window": True,
            "sliding_window": 4,
            "attention_bias": True,
        },
    ),
}
KINDS = FAMILIES | UNKNOWN_TO_GGUF

# Other sizes: odd ones, one head of keys and values, as many as query heads.
SHAPES: dict[str, dict[str, Any]] = {
    "as usual": {},
    "odd": {"vocab_size": 97, "hidden_size": 45, "intermediate_size": 61, "num_attention_heads": 5,
            "num_key_value_heads": 1, "head_dim": 6},
    "wide": {"vocab_size": 131, "hidden_size": 32, "intermediate_size": 33, "num_attention_heads": 4,
             "num_key_value_heads": 4, "head_dim": 14},
}  # fmt: skip


def make(family: str, shape: str = "as usual", seed: int = 0, **changes: Any) -> Any:
    """A random model in float32, with some options changed. Its biases and norms are random too."""
    kind = KINDS[family]
    torch.manual_seed(zlib.crc32(family.encode()) + seed)
    options = {**SIZES, **kind.options, **SHAPES[shape], **changes}
    if kind.name == "Gemma3":  # the value that llama.cpp implies
        options.setdefault("query_pre_attn_scalar", options["head_dim"])
    if "partial_rotary_factor" in options:
        rotate_in_part(options)
    config = getattr(transformers, config_class(kind))(**options)
    config._attn_implementation = "eager"
    model = getattr(transformers, f"{kind.name}ForCausalLM")(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias") or "norm" in name:
                parameter.add_(0.3 * torch.randn_like(parameter))
    return model


def rotate_in_part(options: dict[str, Any]) -> None:
    """Let an even number of values of a head rotate, with factors for each pair if the model has them."""
    rope, heads = options.get("rope_parameters", {}), options["num_attention_heads"]
    if rope:  # transformers then accepts only hidden_size / heads as the width of a head
        options["head_dim"] = 8
        options["hidden_size"] = 8 * heads
    head_dim = options.get("head_dim") or options["hidden_size"] // heads
    pairs = int(head_dim * options["partial_rotary_factor"]) // 2
    options["partial_rotary_factor"] = 2 * pairs / head_dim
    if rope:
        numbers = 1 + np.arange(pairs)
        factors = {"short_factor": list(1 + 0.1 * numbers), "long_factor": list(2.0 + numbers)}
        options["rope_parameters"] = {**rope, **factors, "partial_rotary_factor": 2 * pairs / head_dim}


def config_class(kind: Kind) -> str:
    return (
        f"{kind.name}TextConfig" if hasattr(transformers, f"{kind.name}TextConfig") else f"{kind.name}Config"
    )


def write_gguf(model: Any, path: Path, kind: Kind) -> None:
    """Write a model as llama.cpp's converter does."""
    config = model.config
    names = {"mistral": "llama", "gemma3_text": "gemma3"}
    architecture = names.get(config.model_type, config.model_type)
    numbers = {name: number for number, name in gguf.MODEL_ARCH_NAMES.items()}
    tensor_names = gguf.get_tensor_name_map(numbers[architecture], config.num_hidden_layers)
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    rope = config.rope_parameters
    rope = rope.get("full_attention", rope)
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    rotary_dim = int(head_dim * rope.get("partial_rotary_factor", 1.0))
    writer.add_rope_dimension_count(rotary_dim)
    writer.add_rope_freq_base(rope["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    kind.metadata(writer, config)
    if rope["rope_type"] == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(rope["factor"])
    if rope["rope_type"] == "llama3":
        plain = rope["rope_theta"] ** (-np.arange(0, head_dim, 2) / head_dim)
        scaled = model.model.rotary_emb.inv_freq.double().numpy()
        writer.add_tensor("rope_freqs.weight", (plain / scaled).astype(np.float32))
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        array = tensor.numpy()
        projection = name.split(".")[-2]
        if kind.permutes and projection in heads:  # neighbouring rows rotate together
            shape = (heads[projection], 2, head_dim // 2, *array.shape[1:])
            array = np.ascontiguousarray(array.reshape(shape).swapaxes(1, 2).reshape(array.shape))
        if "norm" in projection:
            array = array + np.float32(kind.norm_offset)
        writer.add_tensor(tensor_names.get_name(name, (".weight", ".bias")), array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def save(model: Any, directory: Path, form: str, family: str) -> Path:
    """Save a model as "safetensors", "shards" or "gguf". Returns the path for load_model."""
    if form == "gguf":
        write_gguf(model, directory / "model.gguf", KINDS[family])
        return directory / "model.gguf"
    model.save_pretrained(directory, max_shard_size="40KB" if form == "shards" else "1GB")
    return directory


def read_gguf(path: Path, directory: Path, **options: Any) -> Any:
    """Read a GGUF file by transformers, which takes minutes for a large vocabulary.

    So transformers reads a copy of the file that has the tensors and the configuration only.
    """
    file = formats.gguf.open(path)
    kept = {key: value for key, value in file.metadata.typed().items() if not key.startswith("tokenizer.")}
    words = len(file.metadata["tokenizer.ggml.tokens"])
    kept[f"{file.metadata['general.architecture']}.vocab_size"] = formats.gguf.Typed(words, "UINT32")
    formats.gguf.save(directory / path.name, dict(file), kept)
    return transformers.AutoModelForCausalLM.from_pretrained(directory, gguf_file=path.name, **options)
