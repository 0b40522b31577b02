"""Search for the options of a fine-tuning run: short trials within a time budget."""

from nplora.finetuning.tuning.options import TuneOptions
from nplora.finetuning.tuning.report import TuneReport
from nplora.finetuning.tuning.trial import Trial
from nplora.finetuning.tuning.tune import tune

__all__ = ["Trial", "TuneOptions", "TuneReport", "tune"]
