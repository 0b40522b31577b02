"""ModelMerge: reports how much of an adapter was kept when it was merged into a model."""

import math
from collections.abc import Iterable
from dataclasses import dataclass

from nplora.formats.errors import counted
from nplora.lora.merging import MergeReport, weighted_mean
from nplora.weights import storages

_SHOWN = 3  # the number of tensors in a summary
_FINER = dict.fromkeys(storages.BLOCKS, "q8_0") | {
    "q8_0": "float16", "bfloat16": "float16", "float16": "float32", "float32": None, "float64": None,
}  # fmt: skip
_UNAFFECTED = 0.005  # nats per token; such a change of the loss changes the perplexity by half a percent
_NOT_MEASURED = "held-out loss not measured (measure it with nplora merge --check FILE, or check= in Python)"
_LITTLE = 0.5  # if rounding keeps less than this share of a tensor's ΔW, there is a warning


@dataclass(frozen=True)
class HeldOutLoss:
    """The loss on held-out data before and after a merge, in nats per token.

    Attributes:
        on_the_fly: the loss of the base model with the unmerged adapter.
        merged: the loss of the merged model.
        tolerance: the largest accepted rise of the loss.

    >>> print(nplora.adapters.HeldOutLoss(3.6618, 3.6640, tolerance=0.02))
    held-out loss unaffected: 3.6618 -> 3.6640
    >>> print(nplora.adapters.HeldOutLoss(3.6618, 4.3153, tolerance=0.02))
    held-out loss rises by 0.6535: 3.6618 -> 4.3153
    """

    on_the_fly: float
    merged: float
    tolerance: float

    @property
    def is_kept(self) -> bool:
        """Whether the rise of the loss is within the tolerance. False if the merged loss is not finite."""
        return math.isfinite(self.merged) and self.merged - self.on_the_fly <= self.tolerance

    def __str__(self) -> str:
        rise = self.merged - self.on_the_fly
        words = (
            "unaffected"
            if abs(rise) < _UNAFFECTED
            else f"{'rises' if rise > 0 else 'falls'} by {abs(rise):.4f}"
        )
        return f"held-out loss {words}: {self.on_the_fly:.4f} -> {self.merged:.4f}"


@dataclass(frozen=True)
class ModelMerge:
    """A report about the model that `merge_adapter` wrote.

    Attributes:
        target: the file or directory that was written.
        reports: one `MergeReport` for each merged tensor, in the order of the file.
        kept: the number of tensors that were copied unchanged.
        nbytes: the total size of the written files.
        loss: the held-out loss before and after the merge, or None if the loss was not measured.

    >>> done = nplora.merge_adapter("model.gguf", "adapter", "merged.gguf")
    >>> done.target, len(done.reports), done.nbytes == os.path.getsize("merged.gguf")
    ('merged.gguf', 14, True)
    >>> done.delta_kept > 0.9
    True
    """

    target: str
    reports: tuple[MergeReport, ...]
    kept: int
    nbytes: int
    loss: HeldOutLoss | None = None

    @property
    def total(self) -> MergeReport:
        """The report of all tensors together."""
        return MergeReport.of_all(self.target, self.reports)

    @property
    def delta_kept(self) -> float:
        """The share of ΔW that is left in the merged weights after rounding, over all tensors."""
        return self.total.kept

    @property
    def error(self) -> float:
        """The relative error of ΔW, for all tensors together."""
        return self.total.error

    @property
    def noise(self) -> float:
        """The norm of the part of the error that is orthogonal to ΔW, divided by ‖ΔW‖.

        This part is noise, not a loss of ΔW.
        """
        return self.total.noise

    @property
    def change(self) -> float:
        """The relative change ‖ΔW‖ / ‖W‖, for all merged weights together."""
        return self.total.norm / self.total.weight_norm if self.total.weight_norm else 0.0

    def table(self) -> str:
        """Return one line for every merged tensor.

        >>> done = nplora.merge_adapter("model.gguf", "adapter", "merged.gguf")
        >>> len(done.table().splitlines()) == len(done.reports)
        True
        """
        return "\n".join(map(str, self.reports))

    def __str__(self) -> str:
        worst = sorted(self.reports, key=lambda report: report.kept)
        kinds = dict.fromkeys(report.storage for report in self.reports)
        noise = f"{100 * self.noise * self.change:.3g}% of the weights' norm ({self.noise:.3g} times ΔW)"
        head = (
            f"{self.target}: {self.nbytes:,} bytes, {counted(len(self.reports), 'tensor')} merged "
            f"({', '.join(kinds)}), {self.kept} copied"
        )
        lines = [
            *([str(self.loss), head] if self.loss else [head, _NOT_MEASURED]),
            f"the merged weights keep {self.delta_kept:.1%} of the adapter's change (ΔW)",
            f"rounding also adds random noise: {noise}",
            "the tensors that keep the least of ΔW:",
            *(f"  {report}" for report in worst[:_SHOWN]),
        ]
        return "\n".join(lines)

    @property
    def warning(self) -> str:
        """A warning if rounding removed much of a tensor's ΔW, else an empty string.

        The warning suggests a storage format that keeps more of ΔW.
        """
        worst = min(self.reports, key=lambda report: report.kept)
        if worst.kept >= _LITTLE:
            return ""
        finer = _FINER[worst.storage]
        return f"rounding lost much of what {worst.name} learned ({worst.kept:.1%} of its ΔW is kept)" + (
            f": --dtype {finer} keeps more" if finer else ""
        )


def least_kept(reports: Iterable[MergeReport]) -> float:
    """Average the kept shares of ΔW in two ways, and return the smaller mean.

    The first mean is `ModelMerge.delta_kept`. A tensor with a large ‖ΔW‖ can outweigh all other tensors in
    this mean. In the second mean, the weight of a tensor is (‖ΔW‖ / ‖W‖)², the square of the tensor's
    relative change.
    """
    changed = [report for report in reports if report.norm]
    kept = [report.kept for report in changed]
    norms = [report.norm for report in changed]
    relative = [report.norm / (report.weight_norm or report.norm) for report in changed]
    return min(weighted_mean(norms, kept, 1.0), weighted_mean(relative, kept, 1.0))
