"""FitConfig: the checked arguments of one call of `Trainer.fit`."""

from dataclasses import dataclass

from nplora.trainer.batches import Batches


@dataclass(frozen=True)
class FitConfig:
    """The arguments of one call of `Trainer.fit`, after all checks.

    Attributes:
        epochs, steps: the length of the run; exactly one of the two is given.
        total_steps: the number of steps in the whole run; None if the number of batches is unknown.
        patience: the run ends after this number of epochs in a row without a lower validation loss. None:
            there is no early stopping.
        checkpoint_every: the number of steps between two checkpoints; None: about one checkpoint per epoch.
        save_seconds: the longest time between two checkpoints, in seconds; infinity: no limit.
    """

    batches: Batches
    validation: Batches | None
    epochs: int | None
    steps: int | None
    total_steps: int | None
    patience: int | None
    checkpoint_every: int | None
    save_seconds: float
