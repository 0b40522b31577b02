"""Language models: loading, adapters, training steps, and text generation."""

from nplora.lm.language_model import LanguageModel
from nplora.lm.loading import load_model

__all__ = ["LanguageModel", "load_model"]
