"""LoRAClassifier: a scikit-learn classifier that adapts a pretrained NumPy network with LoRA."""

from __future__ import annotations

from typing import Any

import numpy as np

from nplora.formats.files import StrPath
from nplora.nn.module import Module
from nplora.sklearn.arrays import ArrayEstimator
from nplora.sklearn.classification import ClassifierBase


class LoRAClassifier(ClassifierBase, ArrayEstimator):
    """Adapt a pretrained network to classes of your own, with LoRA and a new head.

    The frozen weights are never copied: clones and the fits of a grid search share them. By default, every
    frozen linear layer and convolution gets a LoRA layer, except a head that is replaced.

    If `network` is None, the network is one frozen layer with random weights, and LoRA adapts this layer.
    Such random features are enough to try the estimator. If you have no pretrained network, scikit-learn's
    models are the better choice.

        >>> rng = np.random.default_rng(0)
        >>> X = rng.normal(size=(200, 4))
        >>> y = np.where(X[:, 0] * X[:, 1] > 0, "same", "different")
        >>> network = nplora.Sequential(nplora.Linear(rng.normal(size=(64, 4))), nplora.ReLU(),
        ...                             nplora.Linear(rng.normal(size=(10, 64)) / 8))
        >>> model = nplora.sklearn.LoRAClassifier(network, rank=4, random_state=0).fit(X[:150], y[:150])
        >>> model.predict(X[150:153]).shape, model.score(X[150:], y[150:]) > 0.8
        ((3,), True)

    Args:
        network: a Module, such as a Sequential (`fit` does not change this Module); the path of a safetensors
            file, as in `read_network`; or None for random features.
        rank, alpha, dropout: the settings of the LoRA layers, as in `LoRALinear`. If d_in or d_out of a layer
            is less than `rank`, the layer's rank is the smaller of d_in and d_out. The layer's scale stays
            alpha / `rank`.
        targets: the names of the layers to adapt, or the last parts of their dotted names; None: all layers.
        head: "replace": a new trained layer replaces the network's last linear layer. "append": a new trained
            layer follows the network. "keep": the network's outputs are the logits of the classes in sorted
            order, and LoRA also adapts the last layer.
        random_features: the number of random features, if `network` is None.
        activation: "relu", "gelu", "silu" or "tanh": the activation of the random features, or the activation
            between the layers of a network that is read from a file.
        lr, epochs, batch_size, weight_decay, schedule: the settings of AdamW and of the training, as in
            `Trainer`.
        class_weight: a dict from labels to weights, "balanced", or None.
        early_stopping: hold rows out, stop after `patience` epochs without a lower loss on these rows, and
            use the trained values of the epoch with the lowest loss.
        validation_fraction: the fraction of the rows that is held out.
        patience: the number of epochs without a lower loss after which the training stops.
        calibrate: hold rows out, and divide the logits by the temperature that gives the lowest cross entropy
            on these rows. A label with the probability 0.8 is then right in about 80 % of the cases. The
            predicted labels do not change.
        checkpoint_dir: a directory for checkpoints. Each fit writes to a subdirectory whose name depends on
            the settings and the data. With an integer as `random_state`, you can repeat a fit. A fit that was
            interrupted continues from its checkpoint, and the result has the same bits as without the
            interruption. If the same fit was already finished, `fit` only loads its result.
        warm_start: whether `fit` continues to train the model of the last fit, instead of training a new
            model.
        random_state: the seed of the LoRA weights, the head, the order of the rows, and the choice of
            held-out rows.
        verbose: whether to show progress.
    Attributes:
        classes_: the labels in sorted order.
        model_: the adapted network. `nplora.save_adapter(estimator.model_, directory)` saves its adapter.
        temperature_: the number by which logits are divided; 1 without calibration.
        n_iter_: the number of epochs of the last fit.
        loss_curve_: the training loss of each epoch.
        validation_curve_: with early stopping, the loss on the held-out rows after each epoch.
        n_features_in_, feature_names_in_: as in scikit-learn.
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
        lr: float = 5e-3,
        epochs: int = 40,
        batch_size: int = 32,
        weight_decay: float = 0.01,
        schedule: str = "cosine",
        class_weight: dict[Any, float] | str | None = None,
        early_stopping: bool = False,
        validation_fraction: float = 0.1,
        patience: int = 5,
        calibrate: bool = False,
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
        self.lr = lr
        self.epochs = epochs
        self.batch_size = batch_size
        self.weight_decay = weight_decay
        self.schedule = schedule
        self.class_weight = class_weight
        self.early_stopping = early_stopping
        self.validation_fraction = validation_fraction
        self.patience = patience
        self.calibrate = calibrate
        self.checkpoint_dir = checkpoint_dir
        self.warm_start = warm_start
        self.random_state = random_state
        self.verbose = verbose
