"""Training and use of classifiers of texts and words: rows of files become texts and targets."""

from nplora.finetuning.classification.metrics import ClassificationReport, LabelScore
from nplora.finetuning.classification.options import ClassifyOptions
from nplora.finetuning.classification.prediction import evaluate_classifier, predict_rows
from nplora.finetuning.classification.text_batches import TextBatches, TokenBatches
from nplora.finetuning.classification.training import ClassifierRun, train_classifier

__all__ = [
    "ClassificationReport",
    "ClassifierRun",
    "ClassifyOptions",
    "LabelScore",
    "TextBatches",
    "TokenBatches",
    "evaluate_classifier",
    "predict_rows",
    "train_classifier",
]
