"""LoRAEstimator: the base class of all estimators, with the fit loop, held-out rows and checkpoints."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Concatenate, NamedTuple, ParamSpec, TypeVar

import numpy as np
import numpy.typing as npt
from sklearn.base import BaseEstimator
from sklearn.model_selection import train_test_split
from sklearn.utils import _safe_indexing, check_random_state
from sklearn.utils.validation import check_array, check_consistent_length, check_is_fitted

from nplora import _check
from nplora.nn.losses import Loss
from nplora.nn.module import Module
from nplora.nn.optim import SCHEDULES, AdamW
from nplora.runtime.user_warning import warn_user
from nplora.trainer import Batches, Callback, History, Trainer
from nplora.trainer.batches import ArrayBatches
from nplora.trainer.evaluation import predict
from nplora.trainer.fingerprint import base_fingerprint, fingerprint

Array = npt.NDArray[Any]

_PREDICTION_ROWS = 256
_UNSEEN = ("checkpoint_dir", "network", "verbose", "warm_start")  # not in the digest that names a checkpoint


P = ParamSpec("P")
T = TypeVar("T")
E = TypeVar("E", bound="LoRAEstimator")


def unchanged_on_error(method: Callable[Concatenate[E, P], T]) -> Callable[Concatenate[E, P], T]:
    """Decorate a method: if it raises an error, the estimator's attributes get back their earlier values.

    So the estimator can still predict after the error. If the method was training an existing model further,
    this model keeps the changes that the training made before the error.
    """

    @functools.wraps(method)
    def safe(self: E, /, *args: P.args, **options: P.kwargs) -> T:
        earlier = dict(self.__dict__)
        try:
            return method(self, *args, **options)
        except BaseException:
            self.__dict__.clear()
            self.__dict__.update(earlier)
            raise

    return safe


class HeldOut(NamedTuple):
    """The held-out rows, on which a fit does not train: their features from `_features`, and their
    targets."""

    x: Any
    y: Array


class LoRAEstimator(BaseEstimator):  # type: ignore[misc]
    """Base class of the estimators: trains a model that maps the features of n rows to outputs (n, k).

    The model can be any Module. Its `forward` takes a batch of features, and its `backward` takes the
    gradient of the loss with respect to the outputs. The constructor of a subclass takes the parameters of
    `LoRAClassifier`, except those that describe the network. A subclass defines these methods:

        _features(X, reset)         check X and return the features: an array, or a list with one item per row
        _build(x, outputs, seed)    return a new model whose `forward` takes these features

    A subclass may override other methods. If the features of a subclass are not arrays, the subclass
    overrides `_batches`, `_outputs` and `_identity`.
    """

    # ---- what a subclass defines ----

    def _features(self, X: Any, reset: bool) -> Any:
        """Check X, and return its features in the form that `_batches` and `_outputs` take.

        Args:
            reset: whether a new model is fitted. If `reset` is False, X must have the same features as in the
                earlier fit.
        """
        raise NotImplementedError

    def _features_and_targets(self, X: Any, y: Any, reset: bool, numeric: bool) -> tuple[Any, Array]:
        """Check X and y. Return a pair (features, targets). `numeric`: whether targets must be numbers."""
        features = self._features(X, reset)
        dtype = np.float64 if numeric else None
        targets: Array = check_array(y, ensure_2d=False, dtype=dtype, input_name="y")
        check_consistent_length(features, targets)
        return features, targets

    def _build(self, x: Any, outputs: int, seed: int) -> Module:
        """Return a new model for these features and this number of outputs."""
        raise NotImplementedError

    def _batches(self, x: Any, y: Array, shuffle: bool, seed: int) -> Batches:
        """Return batches of features and targets. A class label is encoded as its index in `classes_`."""
        op, size = f"{type(self).__name__}.fit", self.batch_size
        return ArrayBatches(op, x, y, size, shuffle, seed)

    def _outputs(self, x: Any) -> Array:
        """Return the outputs (n, k) of the fitted model for the given features, in float64."""
        return predict(self.model_, x, _PREDICTION_ROWS).astype(np.float64)

    def _identity(self, x: Any) -> str:
        """Return a text that identifies the features, for the name of a checkpoint's directory."""
        return fingerprint(np.asarray(x), whole=True)

    def _target_identity(self, y: Array) -> str:
        """Return a text that identifies the targets, for the name of a checkpoint's directory."""
        return fingerprint(y, whole=True)

    def _peak_lr(self) -> Any:
        """Return the peak learning rate of a fit. `AdamW` checks it."""
        return self.lr

    def _callbacks(
        self, batches: Batches, loss: Loss
    ) -> contextlib.AbstractContextManager[Sequence[Callback]]:
        """Return a context manager that yields the callbacks of one call of `Trainer.fit`."""
        return contextlib.nullcontext(())

    # ---- the fit loop ----

    def _train(
        self, x: Any, y: Array, outputs: int, loss: Callable[[Array], Loss], stratify: Any
    ) -> HeldOut | None:
        """Train on features and targets. Return the rows that were held out; None if no rows were held out.

        Args:
            loss: a function that takes the targets of the training rows and returns a `Loss` object.
            stratify: a label for each row. Rows are held out such that each label is as frequent among the
                held-out rows as among all rows. None: the held-out rows are drawn at random.
        """
        self._check_settings()
        seed = self._seed()
        held_out, rows = None, np.arange(len(y))
        if self._holds_out:
            rows, others = train_test_split(
                rows, test_size=self.validation_fraction, random_state=seed, stratify=stratify
            )
            held_out = HeldOut(_safe_indexing(x, others), y[others])
            x, y = _safe_indexing(x, rows), y[rows]
        if not self._continues:
            self.model_ = self._build(x, outputs, seed)
        self._start_run(seed)
        validation = self._batches(*held_out, False, seed) if held_out and self.early_stopping else None
        criterion = loss(y)
        self._run(
            self._batches(x, y, True, seed),
            criterion,
            self.schedule,
            seed,
            epochs=self.epochs,
            validation=validation,
            patience=self.patience if validation else None,
            **self._checkpoint(x, y, held_out, criterion, seed),
        )
        return held_out

    def _train_more(self, x: Any, y: Array, outputs: int, loss: Loss) -> None:
        """Train the model (a new one if there is none) for one pass over these rows. No rows are held out."""
        self._check_settings()
        if not hasattr(self, "model_"):
            self._start_run(self._seed())
            self.model_ = self._build(x, outputs, self._first_seed)
        seed = self._first_seed + self._calls
        self._calls += 1
        self._run(self._batches(x, y, True, seed), loss, "constant", seed, epochs=1)

    def _start_run(self, seed: int) -> None:
        """Create a new optimiser, and start the count of the calls of `partial_fit` at 1."""
        self._first_seed, self._calls = seed, 1
        self._optimizer = AdamW(self._peak_lr(), weight_decay=self.weight_decay)

    def _run(self, batches: Batches, loss: Loss, schedule: str, seed: int, **options: Any) -> None:
        with self._unscaled(), self._callbacks(batches, loss) as callbacks:
            trainer = Trainer(
                self.model_, loss, self._optimizer, schedule=schedule, seed=seed, callbacks=callbacks,
                progress=bool(self.verbose),
            )  # fmt: skip
            history: History = trainer.fit(batches, **options)
            if history.interrupted:
                raise KeyboardInterrupt
        self.n_iter_ = len(history.epochs)
        self.loss_curve_ = [record.loss for record in history.epochs]
        self.validation_curve_ = [record.val_loss for record in history.epochs if record.val_loss is not None]

    @property
    def _continues(self) -> bool:
        """Whether `fit` continues to train the existing model."""
        return bool(self.warm_start) and hasattr(self, "model_")

    @property
    def _holds_out(self) -> bool:
        """Whether a fit holds out rows, to stop early or to calibrate."""
        return bool(self.early_stopping) or bool(getattr(self, "calibrate", False))

    def _seed(self) -> int:
        return int(check_random_state(self.random_state).randint(2**31 - 1))

    def _check_settings(self) -> None:
        op = type(self).__name__
        _check.rank(op, self.rank)
        _check.number(op, "alpha", self.alpha)
        _check.probability(op, "dropout", self.dropout)
        _check.integer(op, "epochs", self.epochs, least=1)
        _check.integer(op, "batch_size", self.batch_size, least=1)
        _check.integer(op, "patience", self.patience, least=1)
        _check.choice(op, "schedule", self.schedule, SCHEDULES)

    # ---- checkpoints ----

    def _checkpoint(
        self, x: Any, y: Array, held_out: HeldOut | None, loss: Loss, seed: int
    ) -> dict[str, Any]:
        """Return the options with which `Trainer.fit` writes its checkpoints to a directory for this fit.

        The directory's name contains a digest of the settings, the network, the data and the initial values
        of the trained arrays. So each fit of a grid search has its own directory, and a repeated fit finds
        its checkpoint.
        """
        if self.checkpoint_dir is None:
            return {}
        if not isinstance(self.random_state, int | np.integer):
            warn_user(
                f"{type(self).__name__}: with checkpoint_dir and without an integer random_state, a repeated "
                "fit does not continue an interrupted one, because it draws other random numbers"
            )
        start = [(p.name, fingerprint(p.value, whole=True)) for p in self.model_.parameters()]
        settings = {k: repr(v) for k, v in self.get_params(deep=False).items() if k not in _UNSEEN}
        parts = [settings, seed, repr(loss), base_fingerprint(self.model_, whole=True), start]
        for features, targets in [(x, y), *([held_out] if held_out else [])]:
            parts += [self._identity(features), self._target_identity(targets)]
        digest = hashlib.sha256(repr(parts).encode()).hexdigest()
        directory = Path(self.checkpoint_dir, f"{type(self).__name__}-{digest[:16]}")
        os.makedirs(self.checkpoint_dir, exist_ok=True)
        return {"checkpoint_dir": directory, "resume": True}

    # ---- predictions ----

    def _has_bias(self) -> bool:
        """Whether the head that training adds has a bias. If so, the bias can represent the mean of the
        targets."""
        return True

    def _set_scale(self, factor: Array | float, offset: Array | float = 0.0) -> None:
        """Set the scale with which a fitted model predicts: scaled outputs = factor · outputs + offset."""
        self._scale = np.asarray(factor, np.float64), np.asarray(offset, np.float64)

    def _unscaled(self) -> contextlib.AbstractContextManager[None]:
        """A context in which the model's outputs are not scaled, because training needs unscaled outputs."""
        return contextlib.nullcontext()

    def _scaled(self, outputs: Array) -> Array:
        """Return factor · outputs + offset."""
        factor, offset = self._scale
        return np.asarray(outputs * factor + offset)

    def _predicted(self, X: Any) -> Array:
        """Check X and return the outputs of the fitted model."""
        check_is_fitted(self, "model_")
        return self._outputs(self._features(X, reset=False))
