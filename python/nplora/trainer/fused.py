"""FusedLoss: forward, loss and backward in one call, for models whose output is too large to keep."""

from typing import Any, Protocol, runtime_checkable

from nplora.nn.module import Module


@runtime_checkable
class FusedLoss(Protocol):
    """A loss for `Trainer` that runs forward, loss and backward in one call."""

    def count(self, x: Any, y: Any) -> int:
        """The number of items that the mean runs over, such as trained tokens; 0: the batch is skipped."""

    def forward_backward(self, model: Module, x: Any, y: Any, factor: float) -> float:
        """Return the sum of the losses of a batch; add `factor` times its gradient to the gradients."""

    def evaluate(self, model: Module, x: Any, y: Any) -> float:
        """The mean loss of a batch, without dropout."""

    def blame(self, model: Module, x: Any) -> str:
        """After a loss that is not finite: where the first value that is not finite appears."""

    def settings(self) -> dict[str, Any]:
        """What must be the same when a run is resumed, as JSON."""
