"""Language models and encoders: loading, adapters, training steps, text generation and embeddings."""

from nplora.lm.encoder import Encoder
from nplora.lm.encoder_loading import load_encoder
from nplora.lm.language_model import LanguageModel
from nplora.lm.loading import load_model

__all__ = ["Encoder", "LanguageModel", "load_encoder", "load_model"]
