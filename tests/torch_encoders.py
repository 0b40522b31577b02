"""Small random encoders of every family, made by transformers, and their hidden states in float64."""

import zlib
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

Array = np.ndarray[Any, Any]

VOCAB, LONGEST = 80, 150  # some texts are longer than the largest bucket of MPNet's distances
SIZES: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 48,
    "intermediate_size": 72,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "max_position_embeddings": LONGEST + 2,
    "initializer_range": 0.15,  # large enough that every part of the model affects its outputs
}
_DISTILBERT = {"dim": 48, "hidden_dim": 72, "n_layers": 3, "n_heads": 6}
_MODERNBERT = {"num_hidden_layers": 5, "local_attention": 10, "pad_token_id": 0, "eos_token_id": 1,
               "bos_token_id": 1, "cls_token_id": 1, "sep_token_id": 1}  # fmt: skip

# For each kind: the prefix of transformers' classes, and options of the configuration.
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "bert": ("Bert", {}),
    "bert with tanh": ("Bert", {"hidden_act": "gelu_new", "type_vocab_size": 3, "layer_norm_eps": 1e-5}),
    "roberta": ("Roberta", {"type_vocab_size": 1}),
    "xlm-roberta": ("XLMRoberta", {"type_vocab_size": 1}),
    "distilbert": ("DistilBert", _DISTILBERT),
    "mpnet": ("MPNet", {}),
    "modernbert": ("ModernBert", _MODERNBERT),
    "modernbert with biases": (
        "ModernBert",
        {**_MODERNBERT, "attention_bias": True, "mlp_bias": True, "norm_bias": True,
         "layer_types": ["sliding_attention", "full_attention"] * 2 + ["sliding_attention"]},
    ),
}  # fmt: skip


def make(kind: str, head: str = "Model", **changes: Any) -> Any:
    """A random model in float32. Its biases and norms are random too."""
    name, options = KINDS[kind]
    torch.manual_seed(zlib.crc32(kind.encode()))
    config = getattr(transformers, f"{name}Config")(**{**SIZES, **options, **changes})
    config._attn_implementation = "eager"
    model = getattr(transformers, name + head)(config).eval()
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if parameter_name.endswith("bias") or "norm" in parameter_name.lower():
                parameter.add_(0.3 * torch.randn_like(parameter))
    return model


def some_texts(vocab: int = VOCAB, longest: int = LONGEST) -> list[list[int]]:
    """Token ids of texts of very different lengths, none of which is the padding token."""
    rng = np.random.default_rng(3)
    lengths = [5, 1, longest, 17, 2, 70, 12, 49]
    return [rng.integers(3, vocab, min(length, longest)).tolist() for length in lengths]


def hidden_states(model: Any, texts: list[list[int]]) -> list[Array]:
    """The hidden states of each text alone, in the dtype of the model."""
    with torch.no_grad():
        return [model(torch.tensor([ids])).last_hidden_state[0].numpy() for ids in texts]


def save(model: Any, directory: Path) -> Path:
    model.save_pretrained(directory)
    return directory
