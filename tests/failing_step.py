"""A callback that ends a run with an error, as a power failure would."""

from nplora.trainer import Callback, Run, StepRecord


class FailingStep(Callback):
    """Raises an OSError at the end of a step."""

    def __init__(self, step: int) -> None:
        self._step = step

    def on_step_end(self, run: Run, record: StepRecord) -> None:
        if record.step == self._step:
            raise OSError("the power is gone")
