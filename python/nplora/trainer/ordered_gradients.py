"""The gradients of one step on several ranks, with the same bits as on one rank."""

import math
import time
from dataclasses import dataclass
from typing import Any

from nplora.distributed.communicator import Alone
from nplora.distributed.ordered_sum import OrderedSum
from nplora.trainer.checksum import checksum
from nplora.trainer.fused import FusedLoss, PartedLoss, add_measured, take_measured
from nplora.trainer.gradients import Gradients, NonfiniteLoss, StepTotals
from nplora.trainer.meeting import Meeting
from nplora.trainer.training_setup import TrainingSetup


@dataclass
class _Result:
    """The result of a rank's batch, which the rank sends to all ranks.

    Attributes:
        loss: the sum of the batch's losses.
        count: the number of items over which the loss is averaged.
        terms: the number of times that this batch adds gradients to the sum, once for each part of the batch.
        problem: why the loss is not finite; empty if it is finite.
        masks: a list with the number of dropout masks that each layer has drawn for one part of the batch;
            None if each layer has drawn as many masks as `OrderedGradients` assumed.
        measured: the measurements of the loss.
        data: the checksum of all batches of the round, as this rank has read them.
    """

    loss: float = 0.0
    count: int = 0
    terms: int = 0
    problem: str = ""
    masks: list[int] | None = None
    measured: Any = None
    data: int = 0


class OrderedGradients(Gradients):
    """Computes the gradients of a step on several ranks in rounds: in a round, each rank runs one batch.

    Each batch gets the same dropout masks as on one rank. The gradients of the batches (or of their parts, if
    the loss cuts batches into parts) are added in the order of the batches, so the sums have the same bits
    for any number of ranks. With `local_steps`, however, each rank adds only its own batches' gradients.

    Attributes:
        computed: the seconds that this rank has spent in forward and backward passes.
        items: the number of items (such as rows or trained tokens) that this rank has processed.
    """

    def __init__(self, setup: TrainingSetup, meeting: Meeting) -> None:
        super().__init__(setup)
        self._meeting = meeting
        gradients = [p.grad for p in self._parameters]
        self._is_local = setup.local_steps is not None
        self._sum = (
            OrderedSum(Alone(), gradients)
            if self._is_local
            else OrderedSum(meeting.communicator, gradients, setup.communication_dtype)
        )
        self._round: list[tuple[Any, Any]] = []
        self._measured: list[Any] = []  # the measurements of the step's batches, in order
        self._masks = [int(getattr(layer, "dropout", 0.0) > 0) for layer in self._adapters]
        self.computed, self.items = 0.0, 0

    def begin(self) -> None:
        """Begin a step. Drop the batches and gradients of an unfinished step."""
        self._round.clear()
        self._measured.clear()
        self._sum.restart()

    def add(self, x: Any, y: Any, totals: StepTotals) -> NonfiniteLoss | None:
        self._round.append((x, y))
        totals.batches += 1
        is_full = len(self._round) == self._meeting.size or totals.batches == self._setup.accumulate
        return self._run_round(totals) if is_full else None

    def finish(self, totals: StepTotals) -> NonfiniteLoss | None:
        problem = self._run_round(totals) if self._round else None
        if problem is None:
            self._sum.finish()
            for measured in self._measured:
                add_measured(self._setup.loss, measured)
            self._measured.clear()
        return problem

    def _run_round(self, totals: StepTotals) -> NonfiniteLoss | None:
        """Run the batches of the round, one on each rank, and add their gradients."""
        batches, self._round = self._round, []
        parts = [self._parts(x, y) for x, y in batches]
        results = self._results(batches, parts, totals)
        first = totals.batches - len(batches)
        for number, result in enumerate(results[: len(batches)]):
            if result.problem:
                return NonfiniteLoss(first + number + 1, result.problem)
            totals.first_count = totals.first_count or result.count
            totals.count += result.count
            totals.loss += result.loss
            self._measured.append(result.measured)
        added = results[self._meeting.rank :][:1] if self._is_local else results
        totals.own_count += sum(result.count for result in added)
        self._sum.add([result.terms for result in added])
        return None

    def _results(self, batches: list[tuple[Any, Any]], parts: list[int], totals: StepTotals) -> list[_Result]:
        """Run one batch on each rank; return the results of all ranks.

        In a layer, all batches of the round take their dropout masks from one stream of random numbers, one
        batch after the other. So before a rank runs its batch, it must know how many masks the earlier
        batches take. At first, the ranks assume one mask for each part and layer. If this number is wrong,
        they run the round again with the right number.
        """
        start = [layer.dropout_stream for layer in self._adapters]
        data = checksum(batches) if self._meeting.size > 1 else 0
        for _ in range(2):
            self._set_streams(start, sum(parts[: self._meeting.rank]))
            own = self._own_result(batches, parts, totals)
            own.data = data
            results = self._meeting.gather(own, f"the batches of step {totals.step}")
            self._require_same_data(results, totals.step)
            counts = next((result.masks for result in results if result.masks is not None), None)
            if counts is None:
                self._set_streams(start, sum(parts))
                self._count_elsewhere(batches)
                return results
            self._masks = counts
            self._sum.forget()
            self.items -= own.count
        raise RuntimeError(
            f"{type(self._model).__name__}: a layer has drawn more dropout masks in one batch than in "
            "another. Several ranks cannot reproduce this: set the layer's dropout to 0, or train on one rank"
        )

    def _require_same_data(self, results: list[_Result], step: int) -> None:
        for rank, result in enumerate(results):
            if result.data != results[0].data:
                raise ValueError(
                    f"Trainer.fit: in step {step}, the batches of rank {rank} differ from those of rank 0: "
                    "all ranks must read the same data in the same order"
                )

    def _own_result(self, batches: list[tuple[Any, Any]], parts: list[int], totals: StepTotals) -> _Result:
        """Run this rank's batch of the round, if there is one."""
        has_batch = self._meeting.rank < len(batches)
        x, y = batches[self._meeting.rank] if has_batch else (None, None)
        before = [layer.dropout_stream for layer in self._adapters]
        loss = self._setup.loss
        if isinstance(loss, FusedLoss):
            counts = [loss.count(*batch) for batch in batches]
            first_count = totals.first_count or next((count for count in counts if count), 0)
            result = (
                self._run_fused(x, y, counts[self._meeting.rank], first_count) if has_batch else _Result()
            )
        else:
            result = self._run_plain(x, y, has_batch, totals.first_count)
        self.items += result.count
        result.masks = self._unexpected_masks(before, parts[self._meeting.rank] if has_batch else 0)
        if has_batch and not math.isfinite(result.loss):
            self._sum.forget()
            for layer, stream in zip(self._adapters, before, strict=True):
                layer.dropout_stream = stream  # so that the search below uses the same dropout masks
            result.problem = self._blame(result.loss, x, y)
        result.terms, result.measured = self._sum.kept, take_measured(loss)
        return result

    def _run_fused(self, x: Any, y: Any, count: int, first_count: int) -> _Result:
        loss = self._setup.loss
        assert isinstance(loss, FusedLoss)
        if not count:
            return _Result()
        started = time.perf_counter()
        if isinstance(loss, PartedLoss):
            before, loss.after_part = loss.after_part, self._sum.keep
            try:
                value = self._fused(loss, x, y, first_count)
            finally:
                loss.after_part = before
            if math.isfinite(value):
                self._check_parts(loss, loss.parts(x, y))
        else:
            value = self._fused(loss, x, y, first_count)
            self._sum.keep()
        self.computed += time.perf_counter() - started
        if math.isfinite(value):
            self._check_buffers()
        return _Result(value, count)

    def _check_parts(self, loss: PartedLoss, parts: int) -> None:
        """Raise a RuntimeError if the loss has not called `after_part` for every part of the batch.

        Otherwise, the gradients of some parts would be lost.
        """
        if self._sum.kept != parts:
            raise RuntimeError(
                f"{type(loss).__name__}.forward_backward has called after_part {self._sum.kept} times, "
                f"expected {parts}, the number of parts of the batch"
            )

    def _run_plain(self, x: Any, y: Any, has_batch: bool, first_count: int) -> _Result:
        """Run a batch whose number of items is known only after the forward pass."""
        loss, started = self._setup.loss, time.perf_counter()
        assert not isinstance(loss, FusedLoss)
        forward = self._loss_of(loss, x, y) if has_batch else None
        count = 0 if forward is None else forward.count
        self.computed += time.perf_counter() - started
        if not first_count:
            counts = self._meeting.gather(count, "the number of items in the batches of a round")
            first_count = next((count for count in counts if count), 0)
        if forward is None or not count:
            is_bad = forward is not None and not math.isfinite(forward.loss)
            return _Result(forward.loss if forward is not None and is_bad else 0.0)
        started = time.perf_counter()
        self._backward(forward, first_count)
        self._sum.keep()
        self.computed += time.perf_counter() - started
        return _Result(forward.loss * count, count)

    # ---- parts of a batch, and their dropout masks ----

    def _parts(self, x: Any, y: Any) -> int:
        """The number of parts of a batch. The model runs one forward and one backward pass for each part."""
        loss = self._setup.loss
        if not isinstance(loss, FusedLoss):
            return 1
        if not loss.count(x, y):
            return 0
        return loss.parts(x, y) if isinstance(loss, PartedLoss) else 1

    def _set_streams(self, start: list[tuple[int, int]], parts: int) -> None:
        """Set each layer's dropout stream to its state in `start`; skip the masks of `parts` batch parts."""
        for layer, (seed, calls), masks in zip(self._adapters, start, self._masks, strict=True):
            layer.dropout_stream = seed, calls + masks * parts

    def _unexpected_masks(self, before: list[tuple[int, int]], parts: int) -> list[int] | None:
        """The number of masks that each layer has drawn for one part; None if all are as in `_masks`."""
        drawn = [
            layer.dropout_stream[1] - calls for layer, (_, calls) in zip(self._adapters, before, strict=True)
        ]
        if drawn == [masks * parts for masks in self._masks]:
            return None
        return [-(-masks // max(1, parts)) for masks in drawn]

    def _count_elsewhere(self, batches: list[tuple[Any, Any]]) -> None:
        loss = self._setup.loss
        if isinstance(loss, PartedLoss):
            for number, batch in enumerate(batches):
                if number != self._meeting.rank:
                    loss.computed_elsewhere(*batch)
