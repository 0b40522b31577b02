"""TrainingSetup: the model, the loss, the optimiser, and the settings of a step."""

import inspect
from typing import Any

import numpy.typing as npt

from nplora import _check
from nplora.distributed.communicator import Alone, Communicator, require_communicator
from nplora.distributed.ordered_sum import COMMUNICATION_DTYPES
from nplora.nn import losses, optim
from nplora.nn.losses import LossFunction
from nplora.nn.module import Module
from nplora.nn.optim import SCHEDULES, SGD, AdamW, Optimizer
from nplora.trainer.fused import FusedLoss, MeasuredLoss, MergedLoss
from nplora.trainer.rank_record import RankRecord

# The momentum of the DiLoCo paper is 0.9. In runs with few outer steps, 0.9 overshoots.
OUTER_LR, OUTER_MOMENTUM = 0.7, 0.5

Array = npt.NDArray[Any]


class TrainingSetup:
    """The settings of a `Trainer`. The docstring of `Trainer` describes them."""

    def __init__(
        self,
        model: Module,
        loss: str | LossFunction | FusedLoss,
        optimizer: Optimizer | None,
        schedule: str,
        warmup_steps: int,
        accumulate: int,
        clip_norm: float | None,
        seed: int,
        communicator: Communicator | None = None,
        communication_dtype: str = COMMUNICATION_DTYPES[0],
        local_steps: int | None = None,
        outer_lr: float = OUTER_LR,
        outer_momentum: float = OUTER_MOMENTUM,
    ) -> None:
        if not isinstance(model, Module):
            raise TypeError(f"Trainer: model is a {type(model).__name__}, expected a Module")
        self.model = model
        self.loss = loss if isinstance(loss, FusedLoss) else losses.get(loss)
        self.optimizer = AdamW() if optimizer is None else optimizer
        optim.require("Trainer", self.optimizer)
        self.schedule = _check.choice("Trainer", "schedule", schedule, SCHEDULES)
        self.warmup_steps = _check.integer("Trainer", "warmup_steps", warmup_steps, least=0)
        self.accumulate = _check.integer("Trainer", "accumulate", accumulate, least=1)
        self.clip_norm = None if clip_norm is None else _check.number("Trainer", "clip_norm", clip_norm)
        if self.clip_norm is not None and self.clip_norm <= 0:
            raise ValueError(f"Trainer: clip_norm is {clip_norm}, expected above 0 or None")
        self.seed = _check.integer("Trainer", "seed", seed, least=0)
        self.ranks: list[RankRecord] = []
        self.communication_dtype = _check.choice(
            "Trainer", "communication_dtype", communication_dtype, COMMUNICATION_DTYPES
        )
        self.local_steps = local_steps
        if local_steps is not None:
            self.local_steps = _check.integer("Trainer", "local_steps", local_steps, least=1)
        self.outer_lr = _check.at_least("Trainer", "outer_lr", outer_lr, 0)
        self.outer_momentum = _check.probability("Trainer", "outer_momentum", outer_momentum)
        self.outer = SGD(self.outer_lr, self.outer_momentum, nesterov=self.outer_momentum > 0)
        self.adds_in_order = adds_in_order(communicator is not None, communication_dtype, local_steps)
        self.communicator = Alone() if communicator is None else communicator
        require_communicator("Trainer", self.communicator)
        if self.communicator.size > self.accumulate:
            raise ValueError(f"Trainer: {too_many_ranks(self.communicator.size, self.accumulate)}")
        if self.communicator.size > 1 and _measures_alone(self.loss):
            raise ValueError(
                f"Trainer: the metrics of {type(self.loss).__name__} cannot be merged across ranks: the "
                "loss needs the methods take_measured and add_measured in addition to take_metrics"
            )
        parameters = inspect.signature(model.backward).parameters
        self._skips_dx = "need_dx" in parameters

    def backward(self, gradient: Array, saved: Any) -> None:
        """Run the model's backward pass. If its `backward` has the argument `need_dx`, compute no dx."""
        if self._skips_dx:
            self.model.backward(gradient, saved, need_dx=False)
        else:
            self.model.backward(gradient, saved)


def adds_in_order(on_ranks: bool, communication_dtype: str, local_steps: int | None) -> bool:
    """Whether a step adds up the gradients of batch parts in a fixed order, as `OrderedGradients` does.

    A process that trains alone must use the same order as several ranks if it is to get the same results.

    Args:
        on_ranks: whether the run has a communicator.
    """
    return on_ranks or communication_dtype != COMMUNICATION_DTYPES[0] or local_steps is not None


def too_many_ranks(ranks: int, batches: int) -> str:
    """The error message for the case that some ranks would get no batch in a step."""
    return (
        f"{ranks} ranks need at least {ranks} batches in a step, but there are {batches}: use fewer ranks, "
        f"or accumulate={ranks}"
    )


def _measures_alone(loss: Any) -> bool:
    """Whether a loss has metrics that cannot be merged across ranks."""
    return isinstance(loss, MeasuredLoss) and not isinstance(loss, MergedLoss)
