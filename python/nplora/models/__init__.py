"""The decoder of a language model: configuration, files, blocks, forward pass, and gradients of adapters."""

from nplora.models.cache import KVCache
from nplora.models.config import ModelConfig
from nplora.models.prefix_cache import PrefixCache
from nplora.models.word_filter import WordFilter

__all__ = ["KVCache", "ModelConfig", "PrefixCache", "WordFilter"]
