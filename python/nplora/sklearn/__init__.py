"""Estimators for scikit-learn, which must be installed: `pip install "nplora[sklearn]"`.

The estimators work in pipelines, grid searches and cross-validation, and can be cloned and pickled.
"""

import importlib.util

if importlib.util.find_spec("sklearn") is None:
    message = 'nplora.sklearn: scikit-learn is not installed: pip install "nplora[sklearn]"'
    raise ModuleNotFoundError(message, name="sklearn")

from nplora.sklearn.lora_classifier import LoRAClassifier
from nplora.sklearn.lora_regressor import LoRARegressor
from nplora.sklearn.lora_text_classifier import LoRATextClassifier
from nplora.sklearn.lora_text_regressor import LoRATextRegressor
from nplora.sklearn.lora_token_classifier import LoRATokenClassifier
from nplora.sklearn.networks import read_network
from nplora.sklearn.text_embedder import TextEmbedder

__all__ = [
    "LoRAClassifier",
    "LoRARegressor",
    "LoRATextClassifier",
    "LoRATextRegressor",
    "LoRATokenClassifier",
    "TextEmbedder",
    "read_network",
]
