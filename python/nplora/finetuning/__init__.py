"""Fine-tuning and evaluation of language models and classifiers on files of text."""

from nplora.finetuning.array_sample import sample_gradient
from nplora.finetuning.attach import attach_adapter, load_with_adapter
from nplora.finetuning.classification import (
    ClassificationReport,
    ClassifierRun,
    ClassifyOptions,
    LabelScore,
    TextBatches,
    TokenBatches,
    evaluate_classifier,
    predict_rows,
    train_classifier,
)
from nplora.finetuning.comparison import Comparison, compare
from nplora.finetuning.evaluation import evaluate, evaluate_batches
from nplora.finetuning.execution import plan
from nplora.finetuning.held_out import held_out_loss
from nplora.finetuning.int8_check import Int8Check
from nplora.finetuning.judging.results import Difference, Evaluation, MeanLoss, Score
from nplora.finetuning.objectives.token_loss import TokenLoss
from nplora.finetuning.options import EvaluateOptions, FinetuneOptions, TeachOptions
from nplora.finetuning.report import FinetuneReport, Sample
from nplora.finetuning.run import finetune
from nplora.finetuning.step_profile import StepProfile
from nplora.finetuning.teach import Taught, teach
from nplora.finetuning.token_progress import TokenProgress
from nplora.finetuning.tuning import Trial, TuneOptions, TuneReport, tune

__all__ = [
    "ClassificationReport",
    "ClassifierRun",
    "ClassifyOptions",
    "Comparison",
    "Difference",
    "EvaluateOptions",
    "Evaluation",
    "FinetuneOptions",
    "FinetuneReport",
    "Int8Check",
    "LabelScore",
    "MeanLoss",
    "Sample",
    "Score",
    "StepProfile",
    "Taught",
    "TeachOptions",
    "TextBatches",
    "TokenBatches",
    "TokenLoss",
    "TokenProgress",
    "Trial",
    "TuneOptions",
    "TuneReport",
    "attach_adapter",
    "compare",
    "evaluate",
    "evaluate_batches",
    "evaluate_classifier",
    "finetune",
    "held_out_loss",
    "load_with_adapter",
    "plan",
    "predict_rows",
    "sample_gradient",
    "teach",
    "train_classifier",
    "tune",
]
