"""ClassifierBase: the base class of the classifiers, with labels, class weights and calibration."""

from __future__ import annotations

from typing import Any, Self

import numpy as np
import numpy.typing as npt
from sklearn.base import ClassifierMixin
from sklearn.utils.class_weight import compute_class_weight
from sklearn.utils.multiclass import _check_partial_fit_first_call, check_classification_targets
from sklearn.utils.validation import column_or_1d

from nplora.finetuning.classification.class_weights import balanced_weights
from nplora.nn.losses import CrossEntropy, Loss
from nplora.sklearn.base import LoRAEstimator, unchanged_on_error
from nplora.sklearn.calibration import log_probabilities, temperature

Array = npt.NDArray[Any]


class LabelledBase(LoRAEstimator):
    """Base class of the estimators that predict a label for each row or for each word of a row."""

    classes_: Array

    @unchanged_on_error
    def partial_fit(self, X: Any, y: Any, classes: Any = None) -> Self:
        """Train for one pass over the given rows. Each further call continues the training with its own rows.

        No rows are held out, so no call stops early, and the probabilities are not calibrated afterwards.

        Args:
            X, y: as in `fit`, but y does not have to contain all labels.
            classes: all labels that can occur in any call. Only the first call needs this argument.
        Returns:
            the estimator.
        Raises:
            ValueError: `classes` is missing in the first call, or differs in a later call; y has an unknown
                label; or class_weight is "balanced", which needs all rows. Other errors: those of `fit`.
        """
        if isinstance(self.class_weight, str) and self.class_weight == "balanced":
            raise ValueError(
                f"{type(self).__name__}.partial_fit: class_weight='balanced' needs all rows at once; "
                "pass the weights as a dict"
            )
        is_first = _check_partial_fit_first_call(self, classes)
        x, labels = self._checked(X, y, reset=is_first or not hasattr(self, "model_"))
        if unknown := sorted(self._unknown(labels), key=repr):
            raise ValueError(
                f"{type(self).__name__}.partial_fit: y has the unknown label {unknown[0]!r}, expected one of "
                f"{_shown(self.classes_)}"
            )
        targets = self._targets(x, np.searchsorted(self.classes_, labels))
        self._train_more(x, targets, len(self.classes_), self._loss(targets))
        self._set_scale(1.0)
        return self

    # ---- what a subclass defines ----

    def _checked(self, X: Any, y: Any, reset: bool) -> tuple[Any, Array]:
        """Check X and y. Return a pair: the features, and an array (n,) of all labels. `reset`: whether a
        new model is fitted."""
        raise NotImplementedError

    def _targets(self, x: Any, numbers: Array) -> Array:
        """Return the target of each row. The array `numbers` holds each label as an index in `classes_`."""
        return numbers

    # ---- labels and loss ----

    def _unknown(self, labels: Array) -> set[Any]:
        """The labels that are not in `classes_`. As in scikit-learn, True counts as the label 1."""
        return set(np.unique(labels).tolist()) - set(self.classes_.tolist())

    def _set_classes(self, classes: Array) -> None:
        """Set the labels of a fit.

        Raises ValueError if there is only one label, or if this fit continues a fit with different labels.
        """
        if len(classes) < 2:
            raise ValueError(
                f"{type(self).__name__}: the data has only one class, {_shown(classes)}, "
                "expected at least two"
            )
        if self._continues and not np.array_equal(classes, self.classes_):
            raise ValueError(
                f"{type(self).__name__}: warm_start=True, but the data has the classes {_shown(classes)} and "
                f"the earlier fit had {_shown(self.classes_)}"
            )
        self.classes_ = classes

    def _labels(self, outputs: int) -> list[str]:
        """The names of the outputs, as `TextEstimator` stores them in an adapter."""
        return [str(label) for label in self.classes_.tolist()]

    def _loss(self, targets: Array) -> CrossEntropy:
        """The cross entropy with a weight for each label. `targets` are the targets of the training rows."""
        return CrossEntropy(class_weights=self._class_weights(targets))

    def _class_weights(self, numbers: Array) -> tuple[float, ...] | None:
        if self.class_weight is None:
            return None
        if isinstance(self.class_weight, str) and self.class_weight == "balanced":
            return balanced_weights(numbers, len(self.classes_))
        weights = compute_class_weight(self.class_weight, classes=self.classes_, y=self.classes_)
        return tuple(map(float, weights))


class ClassifierBase(ClassifierMixin, LabelledBase):  # type: ignore[misc]
    """Base class of the classifiers.

    The subclasses define the methods that the docstring of `LoRAEstimator` lists.
    """

    @unchanged_on_error
    def fit(self, X: Any, y: Any) -> Self:
        """Train a new model or, with `warm_start`, continue to train the existing one.

        Args:
            X: the features of n rows.
            y: the labels of the rows (n,), at least two different ones.
        Returns:
            the estimator.
        Raises:
            ValueError: X or y is invalid, or y has only one class. KeyboardInterrupt: Ctrl-C.
        """
        x, y = self._checked(X, y, reset=not self._continues)
        classes, encoded = np.unique(y, return_inverse=True)
        self._set_classes(classes)
        self.temperature_ = 1.0
        held_out = self._train(x, encoded, len(classes), self._loss, stratify=encoded)
        self._set_scale(1.0)
        if self.calibrate and held_out is not None:
            self.temperature_ = temperature(self._outputs(held_out.x), held_out.y)
            self._set_scale(1 / self.temperature_)
        return self

    def _train_more(self, x: Any, y: Array, outputs: int, loss: Loss) -> None:
        self.temperature_ = 1.0  # the temperature of an earlier fit does not suit the changed model
        super()._train_more(x, y, outputs, loss)

    def _checked(self, X: Any, y: Any, reset: bool) -> tuple[Any, Array]:
        x, labels = self._features_and_targets(X, y, reset, numeric=False)
        labels = column_or_1d(labels, warn=True)
        check_classification_targets(labels)
        return x, labels

    # ---- predictions ----

    def decision_function(self, X: Any) -> Array:
        """Return the logits (n, classes). For two classes, return an array (n,): the second logit minus the
        first."""
        logits = self._predicted(X)
        return logits[:, 1] - logits[:, 0] if len(self.classes_) == 2 else logits

    def predict_log_proba(self, X: Any) -> Array:
        """Return the logarithms (n, classes) of `predict_proba`."""
        return log_probabilities(self._scaled(self._predicted(X)))

    def predict_proba(self, X: Any) -> Array:
        """Return the probability (n, classes) of each class, in the order of `classes_`."""
        return np.asarray(np.exp(self.predict_log_proba(X)))

    def predict(self, X: Any) -> Array:
        """Return the most likely label of each row (n,)."""
        best = self._predicted(X).argmax(axis=1)
        return np.asarray(self.classes_[best])


def _shown(classes: Array) -> str:
    return ", ".join(map(repr, classes[:10].tolist())) + (", …" if len(classes) > 10 else "")
