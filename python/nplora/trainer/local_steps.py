"""LocalSteps: each rank trains its own copy for some steps; then an outer step combines all copies."""

from typing import Any

import numpy as np
import numpy.typing as npt

from nplora.distributed.ordered_sum import OrderedSum
from nplora.trainer.meeting import Meeting
from nplora.trainer.run_state import RunState, StateCopy
from nplora.trainer.training_setup import TrainingSetup

Array = npt.NDArray[Any]


class LocalSteps:
    """Combines the local steps of all ranks in outer steps (DiLoCo, Douillard et al. 2023, algorithm 1).

    θ are the trained values after the last outer step; θₖ are the values of rank k after its local steps:

        Δ = mean over the ranks of (θ - θₖ);  new θ = the outer optimiser's step from θ with the gradient Δ

    Unlike the paper, this class also averages the moments of the ranks' optimisers. So after an outer step
    all ranks have the same state, and a checkpoint holds one state instead of one state for each rank.

    Attributes:
        every: the number of steps between two outer steps; None: there are no outer steps.
        is_open: whether the ranks have made local steps since the last outer step.
    """

    def __init__(self, setup: TrainingSetup, state: RunState, meeting: Meeting) -> None:
        self.every, self._outer = setup.local_steps, setup.outer
        self._state, self._meeting = state, meeting
        gradients = [] if self.every is None else [p.grad for p in state.parameters]
        self._sum = OrderedSum(meeting.communicator, gradients, setup.communication_dtype)
        self._start = StateCopy()
        self.is_open = False

    def begin(self) -> None:
        """Before the first step after an outer step, copy the current state for `combine` and `undo`."""
        if self.every is not None and not self.is_open:
            self._state.copy_to(self._start)
            self.is_open = True

    @property
    def is_due(self) -> bool:
        """Whether the number of steps is a multiple of `every`, so that an outer step is due."""
        return self.every is not None and self._state.step % self.every == 0

    def combine(self) -> None:
        """Make an outer step, if the ranks have made local steps since the last outer step.

        Raises:
            KeyboardInterrupt, Terminated: a signal has reached one of the ranks.
        """
        if not self.is_open:
            return
        state, outer = self._state, self._outer
        state.updating = True
        state.optimizer.steps = max(  # a rank that had no batch in a step has a lower number
            self._meeting.gather(state.optimizer.steps, f"the outer step after step {state.step}")
        )
        for parameter, before in zip(state.parameters, self._start.values, strict=True):
            np.subtract(before, parameter.value, out=parameter.grad)
            parameter.value[...] = before
        self._add_up()
        outer.step(state.parameters, grad_scale=1 / self._meeting.size)
        for arrays in _moments(state):
            for parameter, array in zip(state.parameters, arrays, strict=True):
                parameter.grad[...] = array
            self._add_up()
            for parameter, array in zip(state.parameters, arrays, strict=True):
                np.divide(parameter.grad, self._meeting.size, out=array)
        state.roll_back()  # clears the gradients
        state.updating = self.is_open = False

    def undo(self) -> bool:
        """Undo all local steps since the last outer step. Return False if there were no local steps."""
        was_open, self.is_open = self.is_open, False
        if was_open:
            self._state.return_to(self._start)
        return was_open

    def _add_up(self) -> None:
        """Replace the gradients by the sums of the gradients of all ranks."""
        self._sum.restart()
        self._sum.keep()
        self._sum.add([1] * self._meeting.size)
        self._sum.finish()


def _moments(state: RunState) -> list[list[Array]]:
    """The optimiser's moments: for each kind of moment, a list with one array for each parameter."""
    arrays = state.optimizer.state_dict(copy=False)
    kinds = dict.fromkeys(name.partition(".")[0] for name in arrays if name != "steps")
    return [[arrays[f"{kind}.{p.name}"] for p in state.parameters] for kind in kinds]
