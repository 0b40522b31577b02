"""Language models: loaded from their files, with adapters, trained a step at a time, and generating text."""

from nplora.lm.language_model import LanguageModel
from nplora.lm.loading import load_model

__all__ = ["LanguageModel", "load_model"]
