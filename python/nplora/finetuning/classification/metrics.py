"""ClassificationReport: how well predictions agree with the true labels."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from nplora.finetuning.classification.entities import count_entities, kinds_of, scheme_of
from nplora.finetuning.classification.picture import draw
from nplora.finetuning.embedding.metrics import pearson, spearman
from nplora.formats import files
from nplora.formats.errors import counted
from nplora.formats.files import StrPath
from nplora.formats.label_record import shown
from nplora.lm.classifier import probabilities, require_finite

Array = npt.NDArray[Any]

_BINS = 15  # bins of confidence for the calibration error, as in Guo et al. 2017
_MOST_IN_CONFUSION = 1000  # labels; a matrix of more labels takes too much memory
_MOST_IN_MATRIX = 12  # labels in a printed confusion matrix


@dataclass(frozen=True)
class LabelScore:
    """How well one label is predicted.

    Attributes:
        precision: among the texts for which this label is predicted, the share that have the label.
        recall: among the texts that have this label, the share for which the label is predicted.
        f1: the harmonic mean of precision and recall; 0 if both are 0.
        support: the number of texts with this label.

    >>> nplora.finetuning.LabelScore(1.0, 0.5, 2 / 3, 4).support
    4
    """

    precision: float
    recall: float
    f1: float
    support: int


@dataclass(frozen=True)
class ClassificationReport:
    """How well the predictions of a classifier match the targets of a data set; `print` shows the report.

    Attributes:
        task: the task of the `TextClassifier`; or "tokens", if words are labelled.
        labels: the names of the outputs.
        examples: the number of texts; for "tokens", the number of words.
        values: the metrics by name. For "single": loss (cross entropy), accuracy, macro_f1 and
            calibration_error. For "tokens": the same metrics, over words. If the labels are tags such as
            B-PER and I-PER, there are also entity_precision, entity_recall and entity_f1, over all entities.
            For "multi": loss, subset_accuracy, micro_f1 and macro_f1. For "regression": loss (mean squared
            error), mae, rmse, r2, pearson and spearman. A metric that is not defined is NaN.
        scores: the scores of each label; empty for a regression.
        confusion: for "single" and "tokens", the number of texts or words for each true label (row) and
            predicted label (column). With more than 1,000 labels, there is no matrix (None).
        entities: for tags such as B-PER, the scores of each kind of entity. A predicted entity is right if
            its kind and all its words are right.
        scheme: the scheme of the entity tags: IOB1, IOB2, IOE, IOBES or BILOU; empty without such tags.

    >>> logits = np.array([[2.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
    >>> report = nplora.finetuning.ClassificationReport.of("single", ["a", "b"], logits, np.array([0, 1, 1]))
    >>> round(report.values["accuracy"], 3), report.confusion.tolist()
    (0.667, [[1, 0], [1, 1]])
    """

    task: str
    labels: tuple[str, ...]
    examples: int
    values: dict[str, float]
    scores: dict[str, LabelScore] = field(default_factory=dict)
    confusion: Array | None = None
    entities: dict[str, LabelScore] = field(default_factory=dict)
    scheme: str = ""

    @property
    def unit(self) -> str:
        """The kind of item that has a label: "text" or "word"."""
        return "word" if self.task == "tokens" else "text"

    @staticmethod
    def of(
        task: str, labels: Sequence[str], logits: Array, targets: Array | Sequence[Array]
    ) -> ClassificationReport:
        """Compare logits (n, outputs) with targets, which have the form that the task's loss function takes.

            >>> labels, logits = ["O", "B-PER", "I-PER"], np.eye(3)[[1, 2, 0, 1]]
            >>> truth = [np.array([1, 2, 0]), np.array([0])]
            >>> report = nplora.finetuning.ClassificationReport.of("tokens", labels, logits, truth)
            >>> report.values["accuracy"], report.values["entity_precision"], report.entities["PER"].recall
            (0.75, 0.5, 1.0)

        Args:
            logits: one row for each text. For "tokens", one row for each word of all sentences, in order.
            targets: for "tokens", a list with an array for each sentence: the label index of each word.
        Raises:
            ValueError: a logit is NaN or infinite.
        """
        names, wide = tuple(labels), np.asarray(logits, np.float64)
        require_finite("ClassificationReport", wide)
        if task == "regression":
            return ClassificationReport(task, names, len(wide), _regression(wide, np.asarray(targets)))
        if task == "multi":
            return _several(names, wide, np.asarray(targets) > 0.5)
        if task == "tokens":
            return _words(names, wide, list(targets))
        return _single(names, wide, np.asarray(targets))

    def as_json(self) -> dict[str, Any]:
        """The report as values that JSON can hold; NaN and infinity become None.

        >>> report = nplora.finetuning.ClassificationReport("regression", ("score",), 1, {"r2": float("nan")})
        >>> report.as_json()["r2"] is None
        True
        """
        values = {name: value if math.isfinite(value) else None for name, value in self.values.items()}
        found: dict[str, Any] = {"task": self.task, "examples": self.examples, **values}
        if self.scores:
            found["labels"] = {name: vars(score) for name, score in self.scores.items()}
        if self.entities:
            found["scheme"] = self.scheme
            found["entities"] = {name: vars(score) for name, score in self.entities.items()}
        if self.confusion is not None:
            found["confusion"] = self.confusion.tolist()
        return found

    def plot(self, output: StrPath, overwrite: bool = False) -> Path:
        """Draw the confusion matrix and the scores of each label in a PNG file.

            >>> logits, truth = np.array([[2.0, 0.0], [1.0, 0.0], [0.0, 1.0]]), np.array([0, 1, 1])
            >>> report = nplora.finetuning.ClassificationReport.of("single", ["a", "b"], logits, truth)
            >>> report.plot("confusion.png", overwrite=True)
            PosixPath('confusion.png')

        Args:
            output: the path of the PNG.
            overwrite: replace an existing file.
        Raises:
            ModuleNotFoundError: matplotlib, from the extra [plot], is not installed.
            ValueError: the report is of a regression, or the name of the output does not end in .png.
            FileExistsError: the output exists, and `overwrite` is not set.
            OSError: the file cannot be written.
        """
        path = Path(output)
        if not self.scores:
            raise ValueError("plot: the task is a regression, which has no labels to draw")
        if files.suffix(path) != ".png":
            raise ValueError(f"plot: the output is {files.name(path)}, expected a name that ends in .png")
        files.require_new(path, overwrite)
        scores = {
            "precision": [score.precision for score in self.scores.values()],
            "recall": [score.recall for score in self.scores.values()],
            "F1": [score.f1 for score in self.scores.values()],
        }
        picture = draw(list(map(shown, self.labels)), scores, self.confusion, f"{self.unit}s")
        files.replace([files.NewFile(path, len(picture), [picture])])
        return path

    def __str__(self) -> str:
        metrics = ", ".join(f"{name} {value:.4f}" for name, value in self.values.items())
        lines = [f"{counted(self.examples, self.unit)}: {metrics}"]
        names = list(map(shown, self.labels))
        if self.entities:
            lines.append(f"scheme of the tags: {self.scheme}")
            lines += _table("entity", "entities", self.entities)
        elif self.scores:
            lines += _table("label", f"{self.unit}s", self.scores)
        if self.confusion is not None and len(self.labels) <= _MOST_IN_MATRIX:
            lines += ["", *_matrix(names, self.confusion)]
        return "\n".join(lines)


def _table(of: str, counted_as: str, scores: Mapping[str, LabelScore]) -> list[str]:
    """The lines of a printed table of scores."""
    names = list(map(shown, scores))
    width = max(5, len(of), *map(len, names))
    lines = [f"{of:<{width}}  precision  recall     f1  {counted_as}"]
    for name, score in zip(names, scores.values(), strict=True):
        lines.append(
            f"{name:<{width}}  {score.precision:9.3f}  {score.recall:6.3f}  {score.f1:5.3f}  "
            f"{score.support:{len(counted_as)}d}"
        )
    return lines


def _matrix(names: Sequence[str], confusion: Array) -> list[str]:
    """The lines of a printed confusion matrix."""
    first = max(16, *map(len, names))
    width = max(5, *map(len, names), len(str(confusion.max())))
    heads = "  ".join(f"{name:>{width}}" for name in names)
    rows = ("  ".join(f"{count:>{width}d}" for count in row) for row in confusion.tolist())
    return [
        f"{'true | predicted':<{first}}  {heads}",
        *(f"{name:<{first}}  {row}" for name, row in zip(names, rows, strict=True)),
    ]


def _single(labels: tuple[str, ...], logits: Array, targets: Array) -> ClassificationReport:
    k, predicted, targets = len(labels), logits.argmax(axis=1), targets.astype(np.intp)
    hits = np.bincount(targets[targets == predicted], minlength=k)
    confusion = None
    if k <= _MOST_IN_CONFUSION:
        confusion = np.bincount(targets * k + predicted, minlength=k * k).reshape(k, k)
    chances = probabilities("single", logits)
    right = predicted == targets
    shifted = logits - logits.max(axis=1, keepdims=True)
    losses = np.log(np.exp(shifted).sum(axis=1)) - shifted[np.arange(len(targets)), targets]
    counts = (hits, np.bincount(predicted, minlength=k), np.bincount(targets, minlength=k))
    scores = _scores(labels, *(own.tolist() for own in counts))
    values = {
        "loss": float(losses.mean()),
        "accuracy": float(right.mean()),
        "macro_f1": float(np.mean([score.f1 for score in scores.values()])),
        "calibration_error": _calibration_error(chances.max(axis=1), right),
    }
    return ClassificationReport("single", labels, len(targets), values, scores, confusion)


def _words(labels: tuple[str, ...], logits: Array, targets: list[Array]) -> ClassificationReport:
    made = _single(labels, logits, np.concatenate(targets))
    values, entities, scheme = dict(made.values), dict[str, LabelScore](), ""
    if kinds := kinds_of(labels):
        predicted = np.split(logits.argmax(axis=1), np.cumsum([len(own) for own in targets])[:-1])
        ours, theirs = ([[labels[i] for i in own.tolist()] for own in each] for each in (predicted, targets))
        hits, found, true = ([each[kind] for kind in kinds] for each in count_entities(ours, theirs))
        scheme = scheme_of(labels, theirs)
        entities = _scores(kinds, hits, found, true)
        every = _scores(["all"], [sum(hits)], [sum(found)], [sum(true)])["all"]
        values |= {f"entity_{name}": getattr(every, name) for name in ("precision", "recall", "f1")}
    return dataclasses.replace(made, task="tokens", values=values, entities=entities, scheme=scheme)


def _several(labels: tuple[str, ...], logits: Array, truth: Array) -> ClassificationReport:
    predicted = logits >= 0
    hits = (predicted & truth).sum(axis=0)
    counts = (hits, predicted.sum(axis=0), truth.sum(axis=0))
    scores = _scores(labels, *(own.tolist() for own in counts))
    total = predicted.sum() + truth.sum()
    losses = np.maximum(logits, 0) - logits * truth + np.log1p(np.exp(-np.abs(logits)))
    values = {
        "loss": float(losses.mean()),
        "subset_accuracy": float((predicted == truth).all(axis=1).mean()),
        "micro_f1": float(2 * hits.sum() / total) if total else 0.0,
        "macro_f1": float(np.mean([score.f1 for score in scores.values()])),
    }
    return ClassificationReport("multi", labels, len(truth), values, scores)


def _regression(predicted: Array, targets: Array) -> dict[str, float]:
    found, truth = predicted.ravel(), np.asarray(targets, np.float64).ravel()
    error = found - truth
    mse, spread = float((error**2).mean()), float(((truth - truth.mean()) ** 2).mean())
    return {
        "loss": mse,
        "mae": float(np.abs(error).mean()),
        "rmse": math.sqrt(mse),
        "r2": 1 - mse / spread if spread else math.nan,
        "pearson": pearson(found, truth) if len(found) > 1 else math.nan,
        "spearman": spearman(found, truth) if len(found) > 1 else math.nan,
    }


def _scores(
    labels: Sequence[str], hits: Sequence[int], predicted: Sequence[int], true: Sequence[int]
) -> dict[str, LabelScore]:
    made = {}
    for name, right, chosen, support in zip(labels, hits, predicted, true, strict=True):
        both = chosen + support
        made[name] = LabelScore(
            right / chosen if chosen else 0.0,
            right / support if support else 0.0,
            2 * right / both if both else 0.0,
            support,
        )
    return made


def _calibration_error(confidence: Array, right: Array) -> float:
    """The mean of |confidence - accuracy| over all bins of confidence    (Guo et al. 2017, eq. 3).

    The weight of a bin is its number of predictions.
    """
    bins = np.minimum((confidence * _BINS).astype(np.intp), _BINS - 1)
    gap = np.bincount(bins, confidence, _BINS) - np.bincount(bins, right.astype(np.float64), _BINS)
    return float(np.abs(gap).sum() / len(right))
