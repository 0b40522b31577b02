"""Decoder-only language models of the Llama kind, forward, and backward to their adapters."""

from nplora.models.cache import KVCache
from nplora.models.config import ModelConfig
from nplora.models.language_model import LanguageModel
from nplora.models.loading import load_model

__all__ = ["KVCache", "LanguageModel", "ModelConfig", "load_model"]
