"""The picture of a classifier's report: the confusion matrix, and the scores of each label."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]

_MOST_WITH_NUMBERS = 25  # labels; with more, a cell has no room for a number
_LONGEST = 24  # characters of a label that are shown
_INCHES = 0.45  # for each label


def draw(
    labels: Sequence[str],
    scores: Mapping[str, Sequence[float]],
    confusion: Array | None,
    unit: str = "texts",
) -> bytes:
    """A PNG image. Without a confusion matrix, the picture shows the scores alone.

    Args:
        scores: a dict from the name of each score to a list of its values, one for each label.
        confusion: the number of texts for each true label (row) and predicted label (column).
        unit: the kind of items that have labels: "texts" or "words".
    Raises:
        ModuleNotFoundError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            'plot: matplotlib is not installed: pip install "nplora[plot]"', name=error.name
        ) from error
    names = [label if len(label) <= _LONGEST else label[: _LONGEST - 1] + "…" for label in labels]
    names = [name.replace("$", r"\$") for name in names]  # matplotlib reads $…$ as a formula
    panels, side = (1 if confusion is None else 2), max(4.0, _INCHES * len(names))
    figure = Figure(figsize=(panels * (side + 1.5), side + 1), layout="constrained")
    axes = figure.subplots(1, panels, squeeze=False)[0]
    if confusion is not None:
        _draw_matrix(axes[0], names, confusion, unit)
    _draw_scores(axes[-1], names, scores)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=120)
    return buffer.getvalue()


def _draw_matrix(axes: Any, names: Sequence[str], confusion: Array, unit: str) -> None:
    """Draw the confusion matrix.

    The colour of a cell shows its count divided by the sum of its row, so that rare labels are visible.
    """
    shares = confusion / np.maximum(1, confusion.sum(axis=1, keepdims=True))
    axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    axes.set_xticks(range(len(names)), names, rotation=45, ha="right")
    axes.set_yticks(range(len(names)), names)
    axes.set(xlabel="predicted label", ylabel="true label", title=f"{unit} (colour: share of the row)")
    if len(names) <= _MOST_WITH_NUMBERS:
        for row, column in np.ndindex(confusion.shape):
            colour = "white" if shares[row, column] > 0.5 else "black"
            text = f"{confusion[row, column]:,}"
            axes.text(column, row, text, ha="center", va="center", color=colour, fontsize=8)


def _draw_scores(axes: Any, names: Sequence[str], scores: Mapping[str, Sequence[float]]) -> None:
    height, places = 0.8 / len(scores), np.arange(len(names))
    for index, (name, values) in enumerate(scores.items()):
        axes.barh(places + (index - 1) * height, values, height, label=name)
    axes.set_yticks(places, names)
    axes.set(xlim=(0, 1), title="scores of each label")
    axes.invert_yaxis()
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.08), ncols=len(scores))
