"""Builds a decoder or an encoder from the description of its family and the tensors in its files."""

from __future__ import annotations

from collections.abc import Callable

from nplora.models import families
from nplora.models.block import DecoderBlock
from nplora.models.config import ModelConfig
from nplora.models.decoder import Decoder
from nplora.models.encoder_config import EncoderConfig
from nplora.models.encoder_model import EncoderModel
from nplora.models.norms import Norm
from nplora.models.relative_bias import RelativeBias
from nplora.models.rope import Rope, RopeConfig
from nplora.models.weights import Weights, require_fitting, require_tensors
from nplora.nn import Embedding, LayerNorm, Linear, RMSNorm
from nplora.weights import FrozenWeight


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


def encoder(config: EncoderConfig, weights: Weights, is_unused: Callable[[str], bool]) -> EncoderModel:
    """Build an encoder from its files.

    Args:
        is_unused: a function that returns whether a tensor of the file has no effect on the hidden states.
    """
    family = families.encoder_of(config)
    tensors = {tensor.name: tensor for tensor in family.tensors(config)}
    require_fitting(weights, config.model_type, tensors.values(), is_unused)
    ropes = {
        id(rope): Rope(rope, config.head_dim, config.head_dim, interleaved=False)
        for rope in (config.rope, config.local_rope)
        if rope is not None
    }

    def linear(name: str) -> Linear:
        bias = tensors.get(f"{name}.bias")
        return Linear(
            weights.matrix(tensors[f"{name}.weight"]), None if bias is None else weights.vector(bias)
        )

    def norm(name: str) -> LayerNorm:
        bias = tensors.get(f"{name}.bias")
        weight = weights.vector(tensors[f"{name}.weight"])
        return LayerNorm(weight, None if bias is None else weights.vector(bias), config.layer_norm_eps)

    def table(part: str) -> FrozenWeight | None:
        tensor = tensors.get(f"{family.outside[part][0]}.weight") if part in family.outside else None
        return None if tensor is None else weights.matrix(tensor)

    tokens, buckets = table("embed_tokens"), table("relative_bias")
    assert tokens is not None
    bias = None if buckets is None else RelativeBias(buckets.to_numpy())
    blocks = list[DecoderBlock]()
    for layer in range(config.num_hidden_layers):
        path = f"{family.blocks}.{layer}"
        modules = dict[str, Linear | Norm]()
        modules |= {name: linear(f"{path}.{family.layers[name][0]}") for name in family.linear_shapes(config)}
        modules |= {
            name: norm(f"{path}.{family.norms[name][0]}") for name in family.block_norms(config, layer)
        }
        rope = config.rope_of(layer)
        blocks.append(family.block(config, layer, None if rope is None else ropes[id(rope)], bias, modules))
    return EncoderModel(
        config,
        Embedding(tokens),
        table("embed_positions"),
        table("embed_types"),
        norm(family.outside["embed_norm"][0]),
        blocks,
        norm(family.outside["norm"][0]) if "norm" in family.outside else None,
        family.hf_name,
    )


def _rope(config: ModelConfig, rope: RopeConfig) -> Rope:
    return Rope(rope, config.head_dim, config.rotary_dim or config.head_dim, config.interleaved)
