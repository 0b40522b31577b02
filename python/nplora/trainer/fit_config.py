"""FitConfig: the checked arguments of one call of `Trainer.fit`."""

from dataclasses import dataclass

from nplora.trainer.batches import Batches

KEEP = ("best", "last")  # the factors that a model may have after a run


@dataclass(frozen=True)
class FitConfig:
    """The checked arguments of one call.

    Attributes:
        epochs, steps: where the run ends; exactly one of them is given.
        total_steps: the number of steps; None if the number of batches is unknown.
        eval_every: steps between two evaluations, besides those after every epoch; None: only those.
        patience: the run ends after this number of evaluations in a row without a lower loss. None: no early
            stopping.
        keep: the factors that the model has after the run, "best" or "last".
        checkpoint_every: steps between two checkpoints; None: about one checkpoint per epoch.
        save_seconds: the longest time between two checkpoints; infinite: no limit.
    """

    batches: Batches
    validation: Batches | None
    epochs: int | None
    steps: int | None
    total_steps: int | None
    eval_every: int | None
    patience: int | None
    keep: str
    checkpoint_every: int | None
    save_seconds: float
