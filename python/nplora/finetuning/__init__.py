"""Fine-tuning and evaluation of a language model on a file of text."""

from nplora.finetuning.attach import attach_adapter, load_with_adapter
from nplora.finetuning.comparison import Comparison, compare
from nplora.finetuning.evaluation import evaluate, evaluate_batches
from nplora.finetuning.execution import plan
from nplora.finetuning.held_out import held_out_loss
from nplora.finetuning.judging.results import Difference, Evaluation, MeanLoss, Score
from nplora.finetuning.objectives.token_loss import TokenLoss
from nplora.finetuning.options import EvaluateOptions, FinetuneOptions, TeachOptions
from nplora.finetuning.report import FinetuneReport, Sample
from nplora.finetuning.run import finetune
from nplora.finetuning.teach import Taught, teach
from nplora.finetuning.token_progress import TokenProgress
from nplora.finetuning.tuning import Trial, TuneOptions, TuneReport, tune

__all__ = [
    "Comparison",
    "Difference",
    "EvaluateOptions",
    "Evaluation",
    "FinetuneOptions",
    "FinetuneReport",
    "MeanLoss",
    "Sample",
    "Score",
    "Taught",
    "TeachOptions",
    "TokenLoss",
    "TokenProgress",
    "Trial",
    "TuneOptions",
    "TuneReport",
    "attach_adapter",
    "compare",
    "evaluate",
    "evaluate_batches",
    "finetune",
    "held_out_loss",
    "load_with_adapter",
    "plan",
    "teach",
    "tune",
]
