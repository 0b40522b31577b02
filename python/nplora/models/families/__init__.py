"""Finds a model's family by its name in config.json or in GGUF metadata."""

from __future__ import annotations

from nplora.formats.errors import UnsupportedError, brief
from nplora.models.config import ModelConfig
from nplora.models.encoder_config import EncoderConfig
from nplora.models.families.bert import Bert
from nplora.models.families.distilbert import DistilBert
from nplora.models.families.encoder_family import EncoderFamily
from nplora.models.families.family import Family
from nplora.models.families.gemma3 import EmbeddingGemma, Gemma3
from nplora.models.families.granite import Granite
from nplora.models.families.llama import Llama
from nplora.models.families.mistral import Mistral
from nplora.models.families.modernbert import ModernBert
from nplora.models.families.mpnet import MpNet
from nplora.models.families.olmo2 import Olmo2
from nplora.models.families.phi3 import Phi3
from nplora.models.families.qwen2 import Qwen2
from nplora.models.families.qwen3 import Qwen3
from nplora.models.families.roberta import Roberta
from nplora.models.families.smollm3 import SmolLM3
from nplora.models.families.tensor_spec import TensorSpec
from nplora.models.families.xlm_roberta import XlmRoberta

__all__ = [
    "BIDIRECTIONAL",
    "ENCODERS",
    "FAMILIES",
    "EncoderFamily",
    "Family",
    "TensorSpec",
    "bidirectional_by_architecture",
    "by_architecture",
    "by_model_type",
    "encoder_by_architecture",
    "encoder_by_model_type",
    "encoder_of",
    "find",
    "find_architecture",
    "of",
]

FAMILIES: tuple[Family, ...] = (
    Llama(),
    Mistral(),
    Qwen2(),
    Qwen3(),
    Gemma3(),
    SmolLM3(),
    Granite(),
    Olmo2(),
    Phi3(),
)

# Language models whose tokens also attend to later tokens. Each has its own architecture name in GGUF. Only
# `load_encoder` reads these models.
BIDIRECTIONAL: tuple[Family, ...] = (EmbeddingGemma(),)

ENCODERS: tuple[EncoderFamily, ...] = (
    Bert(),
    Roberta(),
    XlmRoberta(),
    DistilBert(),
    MpNet(),
    ModernBert(),
)


def by_model_type(source: str, name: str) -> Family:
    """Find a family by the `model_type` in a config.json.

    Args:
        source: the file's name, for error messages.
    Raises:
        UnsupportedError: the family is unknown; the message lists the known families.

    >>> by_model_type("config.json", "qwen3").architecture
    'qwen3'
    """
    return _find(source, "model_type", {family.model_type: family for family in FAMILIES}, name)


def by_architecture(source: str, name: str) -> Family:
    """Find a family by the `general.architecture` in a GGUF file.

    If several families have this architecture, the first of these families is returned.

    Args:
        source: the file's name, for error messages.
    Raises:
        UnsupportedError: the name is unknown; the message lists the known names.

    >>> by_architecture("model.gguf", "llama").model_type
    'llama'
    """
    known = {family.architecture: family for family in reversed(FAMILIES)}
    return _find(source, "general.architecture", known, name)


def of(config: ModelConfig) -> Family:
    """The family of a decoder with this configuration."""
    return by_model_type(config.source, config.model_type)


def encoder_of(config: EncoderConfig) -> EncoderFamily:
    """The family of an encoder with this configuration."""
    return next(family for family in ENCODERS if family.model_type == config.model_type)


def encoder_by_model_type(model_type: str) -> EncoderFamily | None:
    """The family of encoders with this `model_type`, or None.

    >>> encoder_by_model_type("bert").blocks
    'encoder.layer'
    """
    return next((family for family in ENCODERS if family.model_type == model_type), None)


def encoder_by_architecture(architecture: str, tokenizer: str = "") -> EncoderFamily | None:
    """The family of encoders with this GGUF architecture, or None.

    If several families have this architecture, return the family that uses `tokenizer`. If none of them uses
    this tokenizer, return the first family with this architecture.

    >>> encoder_by_architecture("bert").model_type
    'bert'
    >>> encoder_by_architecture("bert", "t5").model_type
    'xlm-roberta'
    """
    found = [family for family in ENCODERS if family.architecture == architecture]
    return next((family for family in found if family.gguf_tokenizer == tokenizer), next(iter(found), None))


def bidirectional_by_architecture(architecture: str) -> Family | None:
    """The family in `BIDIRECTIONAL` that has this GGUF architecture, or None.

    >>> bidirectional_by_architecture("gemma-embedding").model_type
    'gemma3_text'
    """
    return next((family for family in BIDIRECTIONAL if family.architecture == architecture), None)


def find(model_type: str) -> Family | None:
    """The family with this `model_type`, or None if it is unknown.

    >>> find("gpt2") is None
    True
    """
    return next((family for family in FAMILIES if family.model_type == model_type), None)


def find_architecture(architecture: str) -> Family | None:
    """The first family with this GGUF architecture, or None if it is unknown.

    >>> find_architecture("gemma3").ties_embeddings
    True
    """
    return next((family for family in FAMILIES if family.architecture == architecture), None)


def _find(source: str, field: str, known: dict[str, Family], name: str) -> Family:
    if name not in known:
        words = ", ".join(sorted(known))
        is_encoder = name in {family.architecture for family in BIDIRECTIONAL} or any(
            name in (family.model_type, family.architecture) for family in ENCODERS
        )
        hint = (
            "; this is an encoder, which nplora.load_encoder reads (commands: embed, classify)"
            if is_encoder
            else ""
        )
        raise UnsupportedError(f"{source}: {field} is {brief(name)}, expected one of {words}{hint}")
    return known[name]
