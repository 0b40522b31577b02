"""RegressorBase: the base class of the regressors, which rescales the targets."""

from __future__ import annotations

from typing import Any, Self

import numpy as np
import numpy.typing as npt
from sklearn.base import RegressorMixin

from nplora.nn import losses
from nplora.sklearn.base import LoRAEstimator, unchanged_on_error

Array = npt.NDArray[Any]


class RegressorBase(RegressorMixin, LoRAEstimator):  # type: ignore[misc]
    """Base class of the regressors. The subclasses define the methods that `LoRAEstimator` lists.

    A new head is trained on targets that are rescaled to mean 0 and variance 1, and `predict` reverses the
    rescaling. With `head="keep"`, the model is trained on the original targets.
    """

    @unchanged_on_error
    def fit(self, X: Any, y: Any) -> Self:
        """Train a new model or, with `warm_start`, continue to train the existing one.

        Args:
            X: the features of n rows.
            y: the targets of the rows, of shape (n,) or (n, targets).
        Returns:
            the estimator.
        Raises:
            ValueError: X or y has a wrong shape, or their lengths differ. KeyboardInterrupt: Ctrl-C.
        """
        x, targets = self._checked(X, y, reset=not self._continues)
        if not self._continues:
            self._measure(targets)
        self._require_columns(targets)
        loss = losses.get(self.loss)
        self._train(x, self._standardised(targets, x), targets.shape[1], lambda _: loss, stratify=None)
        self._set_scale(self._spread, self._centre)
        return self

    @unchanged_on_error
    def partial_fit(self, X: Any, y: Any) -> Self:
        """Train for one pass over the given rows. Each further call continues the training with its own rows.

        The first call computes the mean and the variance of its targets. The further calls rescale their
        targets with the same mean and variance.

        Args:
            X, y: as in `fit`.
        Returns:
            the estimator.
        """
        is_first = not hasattr(self, "model_")
        x, targets = self._checked(X, y, reset=is_first)
        if is_first:
            self._measure(targets)
        self._require_columns(targets)
        y = self._standardised(targets, x)
        self._train_more(x, y, targets.shape[1], losses.get(self.loss))
        self._set_scale(self._spread, self._centre)
        return self

    def predict(self, X: Any) -> Array:
        """Return the predicted targets, of shape (n,) or (n, targets), like y in `fit`."""
        outputs = self._scaled(self._predicted(X))
        return outputs[:, 0] if self._is_vector else outputs

    def _checked(self, X: Any, y: Any, reset: bool) -> tuple[Any, Array]:
        x, targets = self._features_and_targets(X, y, reset, numeric=True)
        array = np.asarray(targets, np.float64)
        if reset:
            self._is_vector = array.ndim == 1
        return x, array.reshape(len(array), -1)

    def _measure(self, targets: Array) -> None:
        """Store the mean and the standard deviation of each target. `_standardised` rescales with them.

        If a new head has no bias, store 0 instead of the mean, and the root mean square instead of the
        standard deviation. If the standard deviation or root mean square is 0, store 1 instead. With
        `head="keep"`, store mean 0 and standard deviation 1.
        """
        if getattr(self, "head", None) == "keep":
            self._centre, self._spread = np.zeros(targets.shape[1]), np.ones(targets.shape[1])
            return
        # Without this scaling by a power of two, the squares of large targets would overflow.
        _, power = np.frexp(np.abs(targets).max(axis=0))
        scaled = np.ldexp(targets, -power)
        centre = scaled.mean(axis=0) if self._has_bias() else np.zeros(targets.shape[1])
        spread = np.ldexp(np.sqrt(((scaled - centre) ** 2).mean(axis=0)), power)
        self._centre, self._spread = np.ldexp(centre, power), np.where(spread > 0, spread, 1.0)

    def _require_columns(self, targets: Array) -> None:
        if targets.shape[1] != len(self._centre):
            raise ValueError(
                f"{type(self).__name__}: y has {targets.shape[1]} targets per row, but earlier rows had "
                f"{len(self._centre)}"
            )

    def _standardised(self, targets: Array, x: Any) -> Array:
        """Return the rescaled targets, in float64 if the features are float64, else in float32."""
        dtype = np.float64 if getattr(x, "dtype", None) == np.float64 else np.float32
        with np.errstate(over="ignore"):
            scaled = ((targets - self._centre) / self._spread).astype(dtype)
        if not np.isfinite(scaled).all():
            raise ValueError(f"{type(self).__name__}: y has a target that is too large for {dtype.__name__}")
        return scaled
