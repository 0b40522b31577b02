"""Decoders of language models: their descriptions, files and blocks, forward, and backward to adapters."""

from nplora.models.cache import KVCache
from nplora.models.config import ModelConfig
from nplora.models.prefix_cache import PrefixCache

__all__ = ["KVCache", "ModelConfig", "PrefixCache"]
