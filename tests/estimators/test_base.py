"""The base of the estimators with features that are no arrays: an estimator of texts, made in this test."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sklearn.base import clone
from sklearn.model_selection import GridSearchCV

import nplora
from nplora.sklearn.base import LoRAEstimator
from nplora.sklearn.classification import ClassifierBase

LETTERS = "abcdefghijklmnopqrstuvwxyz "


class Letters:
    """Batches of texts, which the model gets as lists of different lengths."""

    def __init__(self, texts: list[str], labels: Any, size: int) -> None:
        self.texts, self.labels, self.size = texts, labels, size

    @property
    def length(self) -> int:
        return -(-len(self.texts) // self.size)

    def epoch(self, epoch: int, skip: int) -> Iterator[Any]:
        for start in range(skip * self.size, len(self.texts), self.size):
            yield self.texts[start : start + self.size], self.labels[start : start + self.size]

    def identity(self) -> dict[str, Any]:
        return {"texts": self.texts, "labels": self.labels.tolist(), "size": self.size}


class LetterCounts(nplora.Module):
    """Counts letters, and adapts a frozen matrix of the counts."""

    def __init__(self, outputs: int, rank: int) -> None:
        W = np.random.default_rng(0).normal(0, 0.2, (16, len(LETTERS)))
        self.hidden = nplora.LoRALinear(W, rank)
        self.head = nplora.Linear(np.zeros((outputs, 16)), np.zeros(outputs), trainable=True)

    def forward(self, texts: list[str]) -> Any:
        counts = np.array([[text.count(letter) for letter in LETTERS] for text in texts], np.float32)
        h, saved = self.hidden.forward(counts)
        y, head = self.head.forward(h)
        return y, (saved, head)

    def backward(self, dy: Any, saved: Any, need_dx: bool = True) -> Any:
        return self.hidden.backward(self.head.backward(dy, saved[1]), saved[0], False)


class LetterClassifier(ClassifierBase):
    def __init__(self, rank: int = 2, checkpoint_dir: Any = None, early_stopping: bool = False) -> None:
        self.rank, self.checkpoint_dir, self.early_stopping = rank, checkpoint_dir, early_stopping

    alpha, dropout, lr, epochs, batch_size, weight_decay = 4.0, 0.0, 1e-2, 20, 16, 0.0
    schedule, validation_fraction, patience, calibrate = "constant", 0.2, 3, True
    class_weight, warm_start, random_state, verbose = None, False, 0, False

    def _features(self, X: Any, reset: bool) -> list[str]:
        return list(map(str.lower, X))

    def _build(self, x: Any, outputs: int, seed: int) -> nplora.Module:
        model = LetterCounts(outputs, self.rank)
        model.seed(seed)
        return model

    def _batches(self, x: Any, y: Any, shuffle: bool, seed: int) -> Any:
        return Letters(x, y, self.batch_size)

    def _outputs(self, x: Any) -> Any:
        return self.model_(x).astype(np.float64)

    def _identity(self, x: Any) -> str:
        return repr(x)


def texts(rng: np.random.Generator) -> tuple[list[str], list[str]]:
    labels = ["few" if n % 2 else "many" for n in range(120)]
    return [
        "".join(rng.choice(list(LETTERS), 20)) + ("e" * 4 if label == "many" else "") for label in labels
    ], labels


@pytest.mark.slow
def test_an_estimator_of_texts_needs_a_few_methods_only(tmp_path: Path, rng: np.random.Generator) -> None:
    X, y = texts(rng)
    model = LetterClassifier(checkpoint_dir=tmp_path, early_stopping=True).fit(X, y)
    assert isinstance(model, LoRAEstimator)
    assert model.score(X, y) > 0.9
    assert model.predict_proba(X[:3]).shape == (3, 2)
    assert model.temperature_ != 1.0
    np.testing.assert_array_equal(clone(model).fit(X, y).predict_proba(X), model.predict_proba(X))
    assert len(list(tmp_path.iterdir())) == 1
    assert GridSearchCV(LetterClassifier(), {"rank": [1, 2]}, cv=2).fit(X, y).best_score_ > 0.8
    with pytest.raises(ValueError, match=r"inconsistent numbers of samples: \[120, 119\]"):
        LetterClassifier().fit(X, y[1:])
    with pytest.raises(ValueError, match="Input y contains NaN"):
        LetterClassifier().fit(X, np.full(120, np.nan))
    parts = LetterClassifier()
    for _ in range(15):
        parts.partial_fit(X, y, classes=["few", "many"])
    assert parts.score(X, y) > 0.9
