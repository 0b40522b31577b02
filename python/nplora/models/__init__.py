"""The decoder of a language model: configuration, files, blocks, forward pass, and gradients of adapters."""

from nplora.models.cache import KVCache
from nplora.models.config import ModelConfig
from nplora.models.prefix_cache import PrefixCache

__all__ = ["KVCache", "ModelConfig", "PrefixCache"]
