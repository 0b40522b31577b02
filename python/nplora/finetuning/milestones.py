"""Milestones: records how far a run came, so that after an error the caller knows which results to keep."""

from collections.abc import Callable

from nplora.trainer import Callback, Run, StepRecord


class Milestones(Callback):
    """Records the first step and the end of a run.

    Args:
        on_first_step: function to call after the first step that this call of `finetune` makes, or None.
    Attributes:
        has_ended: whether the training has ended, so that the model has the factors that should be saved.
    """

    def __init__(self, on_first_step: Callable[[], None] | None) -> None:
        self._on_first_step = on_first_step
        self.has_ended = False

    def on_step_end(self, run: Run, record: StepRecord) -> None:
        if self._on_first_step is not None:
            self._on_first_step()
            self._on_first_step = None

    def on_fit_end(self, run: Run) -> None:
        self.has_ended = True
