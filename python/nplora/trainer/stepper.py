"""Stepper: computes the updates of the parameters from batches."""

import math
import time
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import numpy.typing as npt

from nplora.nn.losses import NonFiniteLossError
from nplora.nn.optim import schedule
from nplora.trainer.fused import take_metrics
from nplora.trainer.gradients import Gradients, NonfiniteLoss, StepTotals
from nplora.trainer.history import StepRecord
from nplora.trainer.meeting import Meeting
from nplora.trainer.nonfinite import INPUT, TARGETS, nonfinite_parameters
from nplora.trainer.ordered_gradients import OrderedGradients
from nplora.trainer.resuming import first_few
from nplora.trainer.run_state import RunState
from nplora.trainer.training_setup import TrainingSetup

Array = npt.NDArray[Any]


class Stepper:
    """Makes the steps of a run: adds up gradients of batches, clips the sum, and updates the parameters."""

    def __init__(self, setup: TrainingSetup, state: RunState, meeting: Meeting) -> None:
        self._setup, self._state, self._meeting = setup, state, meeting
        self._gradients = OrderedGradients(setup, meeting) if setup.adds_in_order else Gradients(setup)
        self._totals = StepTotals()

    def begin(self) -> None:
        """Begin a step, whose time is measured from this call."""
        self._totals = StepTotals(self._state.step + 1)
        self._gradients.begin()
        take_metrics(self._setup.loss)  # drops the metrics of an unfinished step

    @property
    def work(self) -> tuple[int, float]:
        """The number of items that this rank has processed, and the seconds that it has spent computing.

        Only a run with `TrainingSetup.adds_in_order` counts these numbers. In all other runs, both are 0.
        """
        made = self._gradients
        return (made.items, made.computed) if isinstance(made, OrderedGradients) else (0, 0.0)

    @property
    def has_batches(self) -> bool:
        """Whether the step has at least one batch."""
        return self._totals.batches > 0

    @property
    def is_full(self) -> bool:
        """Whether the step has all of its batches."""
        return self._totals.batches == self._setup.accumulate

    @property
    def has_gradients(self) -> bool:
        """Whether any batch of the step has a label to train on.

        With local steps, only the batches of this rank count.
        """
        return self._totals.own_count > 0

    def gradients(self) -> Mapping[str, Array]:
        """A mapping from parameter names to gradients of the step's mean loss. The arrays are not copied."""
        self._weight_gradients()
        return MappingProxyType({p.name: p.grad for p in self._state.parameters})

    def _weight_gradients(self) -> None:
        """Scale the gradients: turn weighted sums over the batches into gradients of the step's mean loss.

        In the sums, the weight of each batch is the count of this batch divided by the count of the first
        batch.
        """
        totals = self._totals
        if totals.first_count != totals.own_count:
            for parameter in self._state.parameters:
                gradient = parameter.grad
                gradient *= gradient.dtype.type(totals.first_count / totals.own_count)
            totals.first_count = totals.own_count  # so that a second call changes nothing

    def add(self, x: Any, y: Any) -> None:
        """Run one batch forward and backward.

        Raises:
            NonFiniteLossError: the loss of the batch is NaN or infinite.
        """
        self._require_finite(self._gradients.add(x, y, self._totals))

    def complete(self) -> None:
        """Complete the gradients of the step: run batches that have not run yet, and finish the sums.

        Raises:
            NonFiniteLossError: the loss of a batch is NaN or infinite.
        """
        self._require_finite(self._gradients.finish(self._totals))

    def _require_finite(self, problem: NonfiniteLoss | None) -> None:
        if problem is not None:
            batch = self._state.batch + problem.batch
            raise self._nonfinite(f"the loss of batch {batch} {problem.what}")

    def update(self) -> StepRecord:
        """Clip the gradients, update the parameters, and count the step.

        Raises:
            NonFiniteLossError: a gradient is NaN or infinite; no parameter is changed.
        """
        state, setup, totals = self._state, self._setup, self._totals
        factor = schedule(setup.schedule, state.step, state.total_steps or 0, setup.warmup_steps)
        lr = state.optimizer.lr * factor
        norm = self._clip_and_update(lr)
        state.count_step(totals.batches)
        record = StepRecord(
            step=state.step,
            epoch=state.epoch + 1,
            loss=totals.loss / max(1, totals.count),
            count=totals.count,
            lr=lr,
            grad_norm=norm,
            seconds=time.perf_counter() - totals.started,
            metrics=take_metrics(setup.loss),
        )
        state.history.steps.append(record)
        return record

    def _clip_and_update(self, lr: float) -> float:
        """Clip the gradients and update the parameters; return the norm of all gradients before clipping."""
        state, setup, totals = self._state, self._setup, self._totals
        clip_norm = setup.clip_norm
        norm, problem = 0.0, ""
        if totals.own_count:
            self._weight_gradients()
            max_norm = math.inf if clip_norm is None else clip_norm
            state.updating = True
            found = state.optimizer.step(state.parameters, lr=lr, max_norm=max_norm)
            assert found is not None, "the step of an optimizer returns the norm if max_norm is not None"
            norm = found
        if not math.isfinite(norm):
            state.updating = False
            names = nonfinite_parameters(state.parameters, gradients=True)
            problem = f"the loss is finite, but the gradient of {first_few(names, ', ')} is not"
        if setup.local_steps is not None:  # each rank has its own gradient, but all ranks must end together
            problems = self._meeting.gather(problem, f"the update of step {state.step + 1}")
            problem = next(filter(None, problems), "")
        if problem:
            raise self._nonfinite(problem)
        return norm

    def _nonfinite(self, what: str) -> NonFiniteLossError:
        """Make the error for NaN or infinity in a step.

        If the parameters may be the cause, a resumed run starts from an earlier checkpoint. In the first
        step, or if the data are not finite, the parameters are not the cause.
        """
        state = self._state
        blamed = state.step > 0 and not what.endswith((INPUT, TARGETS))
        hint = "; a lower lr may help" if blamed else ""
        error = NonFiniteLossError(f"step {state.step + 1} (epoch {state.epoch + 1}): {what}{hint}")
        state.divergence, state.diverged_after = error if blamed else None, state.step
        return error
