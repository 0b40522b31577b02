"""Decoder-only language models of the Llama kind, forward, and backward to their adapters."""

from nplora.models.cache import KVCache
from nplora.models.config import ModelConfig
from nplora.models.language_model import LanguageModel
from nplora.models.loading import load_model
from nplora.models.prefix import KeptPrefix

__all__ = ["KVCache", "KeptPrefix", "LanguageModel", "ModelConfig", "load_model"]
