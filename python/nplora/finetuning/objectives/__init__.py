"""Objectives: what a fine-tuning run minimises. Each is a module with an `Objective`."""

from nplora.finetuning.objectives.objective import Objective
from nplora.finetuning.objectives.token_loss import TokenLoss
from nplora.finetuning.options import FinetuneOptions


def objective_of(options: FinetuneOptions) -> Objective:
    """The objective that the options choose."""
    return Objective()


__all__ = ["Objective", "TokenLoss", "objective_of"]
