"""FitConfig: the checked arguments of one call of `Trainer.fit`."""

from dataclasses import dataclass

from nplora.trainer.batches import Batches

KEEP = ("best", "last")  # the factors that a model may have after a run


@dataclass(frozen=True)
class FitConfig:
    """The arguments of one call of `Trainer.fit`, after all checks.

    Attributes:
        epochs, steps: the length of the run; exactly one of the two is given.
        total_steps: the number of steps in the whole run; None if the number of batches is unknown.
        eval_every: evaluate after every `eval_every` steps and after every epoch; None: only after every
            epoch.
        patience: the run ends after this number of evaluations in a row without a new lowest validation loss.
            None: there is no early stopping.
        keep: which factors the model has after the run: "best" or "last".
        checkpoint_every: the number of steps between two checkpoints; None: about one checkpoint per epoch.
        change_compute: whether a resumed run may have another arithmetic.
        save_seconds: the longest time between two checkpoints, in seconds; infinity: no limit.
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
    change_compute: bool = False


def require_resume(op: str, change_compute: bool, resume: bool) -> None:
    """Raise a ValueError if `change_compute` is set without `resume`."""
    if change_compute and not resume:
        raise ValueError(
            f"{op}: change_compute=True needs resume=True: a new run has no arithmetic to change"
        )


def require_outer_steps(op: str, eval_every: int | None, local_steps: int | None) -> None:
    """With local steps, check that each evaluation comes directly after an outer step.

    Raises:
        ValueError: an evaluation would come between two outer steps.
    """
    if eval_every is not None and local_steps is not None and eval_every % local_steps:
        raise ValueError(
            f"{op}: eval_every is {eval_every}, expected a multiple of local_steps={local_steps}, because "
            "the ranks have different trained values between outer steps"
        )
