"""FusedLoss: a model and its loss in one, where the output that lies between them is too large to be kept."""

from typing import Any, Protocol, runtime_checkable

from nplora.nn.module import Module


@runtime_checkable
class FusedLoss(Protocol):
    """What `Trainer` takes as a loss where forward, loss and backward are one call."""

    def count(self, x: Any, y: Any) -> int:
        """What the mean runs over: labelled tokens. 0 gives loss 0 and no gradient."""

    def forward_backward(self, model: Module, x: Any, y: Any, factor: float) -> float:
        """The sum of the losses of a batch; adds `factor` times its gradient to those of the parameters."""

    def evaluate(self, model: Module, x: Any, y: Any) -> float:
        """The mean loss of a batch, without dropout."""

    def blame(self, model: Module, x: Any) -> str:
        """Where the first value that is not finite appears, after a loss that is not."""

    def settings(self) -> dict[str, Any]:
        """What must be the same for a run to go on, as JSON has it."""
