"""Training: `Trainer`, what it records, and how to hang callbacks into it."""

from nplora.trainer.callbacks import Callback
from nplora.trainer.history import EpochRecord, History, StepRecord
from nplora.trainer.run import Run
from nplora.trainer.trainer import Trainer

__all__ = ["Callback", "EpochRecord", "History", "Run", "StepRecord", "Trainer"]
