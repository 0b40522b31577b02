"""FitConfig: the checked arguments of one call of `Trainer.fit`."""

from dataclasses import dataclass

from nplora.trainer.batches import Batches


@dataclass(frozen=True)
class FitConfig:
    """The checked arguments of one call.

    Attributes:
        epochs, steps: where the run ends; exactly one of them is given.
        total_steps: the number of steps; None if the number of batches is unknown.
        patience: the run ends after this number of epochs in a row without a lower validation loss. None: no
            early stopping.
        checkpoint_every: steps between two checkpoints; None: about one checkpoint per epoch.
        save_seconds: the longest time between two checkpoints; infinite: no limit.
    """

    batches: Batches
    validation: Batches | None
    epochs: int | None
    steps: int | None
    total_steps: int | None
    patience: int | None
    checkpoint_every: int | None
    save_seconds: float
