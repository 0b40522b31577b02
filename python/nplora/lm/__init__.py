"""Language models, encoders and classifiers: loading, adapters, training steps, generation, embeddings."""

from nplora.lm.classifier import TextClassifier
from nplora.lm.classifier_loading import load_classifier, new_classifier
from nplora.lm.encoder import Encoder
from nplora.lm.encoder_loading import load_encoder
from nplora.lm.language_model import LanguageModel
from nplora.lm.loading import load_model

__all__ = [
    "Encoder",
    "LanguageModel",
    "TextClassifier",
    "load_classifier",
    "load_encoder",
    "load_model",
    "new_classifier",
]
