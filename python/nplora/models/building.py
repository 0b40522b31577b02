"""Builds a decoder from the description of its family and the tensors in its files."""

from __future__ import annotations

from nplora.models import families
from nplora.models.block import DecoderBlock
from nplora.models.config import ModelConfig
from nplora.models.decoder import Decoder
from nplora.models.rope import Rope, RopeConfig
from nplora.models.weights import Weights, require_tensors
from nplora.nn import Embedding, Linear, RMSNorm


def decoder(config: ModelConfig, weights: Weights) -> tuple[Decoder, Linear]:
    """Build a model's decoder and head from its files."""
    require_tensors(weights, config)
    family, blocks = families.of(config), list[DecoderBlock]()
    tensors = {tensor.name: tensor for tensor in family.tensors(config)}
    ropes = {id(rope): _rope(config, rope) for rope in (config.rope, config.local_rope) if rope is not None}

    def linear(name: str) -> Linear:
        bias = tensors.get(f"{name}.bias")
        return Linear(
            weights.matrix(tensors[f"{name}.weight"]), None if bias is None else weights.vector(bias)
        )

    def norm(name: str) -> RMSNorm:
        return RMSNorm(weights.vector(tensors[f"{name}.weight"]), config.rms_norm_eps)

    embedding = weights.matrix(tensors["model.embed_tokens.weight"])
    for layer in range(config.num_hidden_layers):
        path = f"model.layers.{layer}"
        modules = dict[str, Linear | RMSNorm]()
        modules |= {name: linear(f"{path}.{name}") for name in family.linear_shapes(config)}
        modules |= {name: norm(f"{path}.{name}") for name in family.norm_widths(config)}
        rope = config.rope_of(layer)
        blocks.append(family.block(config, layer, None if rope is None else ropes[id(rope)], modules))
    made = Decoder(
        Embedding(embedding),
        blocks,
        norm("model.norm"),
        config.embedding_multiplier,
        config.logits_scaling,
    )
    return made, Linear(embedding) if config.tie_word_embeddings else linear("lm_head")


def _rope(config: ModelConfig, rope: RopeConfig) -> Rope:
    return Rope(rope, config.head_dim, config.rotary_dim or config.head_dim, config.interleaved)
