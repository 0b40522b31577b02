"""TextProgress: a line of progress on stderr while a classifier is trained."""

from __future__ import annotations

from nplora.finetuning.token_progress import TokenProgress


class TextProgress(TokenProgress):
    """A line with the mean loss of recent steps, texts per second, peak memory and the time left.

    Args:
        counted: the number of target values of each text or word. For the task "multi", this is the number of
            labels; for other tasks, it is 1.
        unit: "texts", or "words" if words are labelled.
    """

    def __init__(self, counted: int = 1, unit: str = "texts") -> None:
        super().__init__()
        self._counted, self._unit = counted, unit

    def _rate(self, seconds: float) -> str:
        return f"{sum(record.count for record in self._recent) / self._counted / seconds:.1f} {self._unit}/s"
