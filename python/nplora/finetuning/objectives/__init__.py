"""`Objective` and its subclasses: the objectives that a fine-tuning run can minimise."""

from nplora.finetuning.objectives.distill import DistillObjective
from nplora.finetuning.objectives.kto import KtoObjective
from nplora.finetuning.objectives.objective import Objective
from nplora.finetuning.objectives.packed_loss import PackedLoss
from nplora.finetuning.objectives.pairs import DpoObjective, OrpoObjective
from nplora.finetuning.objectives.token_loss import TokenLoss
from nplora.finetuning.options import FinetuneOptions

_ALL = (Objective, DpoObjective, OrpoObjective, KtoObjective, DistillObjective)
_BY_NAME = {kind.name: kind for kind in _ALL}


def objective_of(options: FinetuneOptions) -> Objective:
    """Make the objective that `options.objective` names."""
    return _BY_NAME[options.objective](options)


__all__ = ["Objective", "PackedLoss", "TokenLoss", "objective_of"]
