"""LoRARegressor: a scikit-learn regressor that adapts a pretrained NumPy network with LoRA."""

from __future__ import annotations

from typing import Any

import numpy as np

from nplora.formats.files import StrPath
from nplora.nn.module import Module
from nplora.sklearn.arrays import ArrayEstimator
from nplora.sklearn.regression import RegressorBase


class LoRARegressor(RegressorBase, ArrayEstimator):
    """Adapt a pretrained network to targets of your own, with LoRA and a new head.

    For arguments that are not listed here, see `LoRAClassifier`. If `network` is None, the estimator uses
    random features, as `LoRAClassifier` does.

        >>> rng = np.random.default_rng(0)
        >>> X = rng.normal(size=(200, 4))
        >>> y = np.sin(X[:, 0]) + 100
        >>> model = nplora.sklearn.LoRARegressor(random_state=0).fit(X[:150], y[:150])
        >>> model.score(X[150:], y[150:]) > 0.8
        True

    Args:
        head: as in `LoRAClassifier`. With "keep", the model is trained on the original targets. Otherwise, it
            is trained on targets that are rescaled to mean 0 and variance 1, and `predict` reverses the
            rescaling.
        loss: "mse" or "huber".
    Attributes:
        model_, n_iter_, loss_curve_, validation_curve_, n_features_in_, feature_names_in_: as in
            `LoRAClassifier`.
    """

    def __init__(
        self,
        network: Module | StrPath | None = None,
        *,
        rank: int = 8,
        alpha: float = 16,
        dropout: float = 0.0,
        targets: list[str] | None = None,
        head: str = "replace",
        random_features: int = 128,
        activation: str = "relu",
        loss: str = "mse",
        lr: float = 5e-3,
        epochs: int = 40,
        batch_size: int = 32,
        weight_decay: float = 0.01,
        schedule: str = "cosine",
        early_stopping: bool = False,
        validation_fraction: float = 0.1,
        patience: int = 5,
        checkpoint_dir: StrPath | None = None,
        warm_start: bool = False,
        random_state: int | np.random.RandomState | None = None,
        verbose: bool = False,
    ) -> None:
        self.network = network
        self.rank = rank
        self.alpha = alpha
        self.dropout = dropout
        self.targets = targets
        self.head = head
        self.random_features = random_features
        self.activation = activation
        self.loss = loss
        self.lr = lr
        self.epochs = epochs
        self.batch_size = batch_size
        self.weight_decay = weight_decay
        self.schedule = schedule
        self.early_stopping = early_stopping
        self.validation_fraction = validation_fraction
        self.patience = patience
        self.checkpoint_dir = checkpoint_dir
        self.warm_start = warm_start
        self.random_state = random_state
        self.verbose = verbose

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.target_tags.multi_output = True
        return tags
