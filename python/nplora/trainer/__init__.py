"""Training: `Trainer`, and the records and the callbacks of a run."""

from nplora.trainer.batches import Batches
from nplora.trainer.callbacks import Callback
from nplora.trainer.fused import FusedLoss
from nplora.trainer.history import EpochRecord, EvaluationRecord, History, StepRecord
from nplora.trainer.rank_record import RankRecord
from nplora.trainer.run import Run
from nplora.trainer.trainer import Trainer

__all__ = [
    "Batches",
    "Callback",
    "EpochRecord",
    "EvaluationRecord",
    "FusedLoss",
    "History",
    "RankRecord",
    "Run",
    "StepRecord",
    "Trainer",
]
