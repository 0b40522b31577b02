"""LoRATextClassifier: a scikit-learn classifier that adapts a pretrained encoder with LoRA."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from nplora.formats.files import StrPath
from nplora.sklearn.classification import ClassifierBase
from nplora.sklearn.texts import TextEstimator


class LoRATextClassifier(ClassifierBase, TextEstimator):
    """Classify texts with a pretrained encoder, LoRA and a new head.

    X is a list or a column of texts. The fits of a grid search share the frozen weights. A pickled estimator
    contains the path of the encoder and the trained values, but not the frozen weights.

        >>> X = ["where is my parcel", "my delivery is late", "return an order", "a refund"]
        >>> y = ["delivery", "delivery", "return", "return"]
        >>> model = nplora.sklearn.LoRATextClassifier("encoder-model", epochs=20, lr=1e-2, random_state=0)
        >>> model.fit(X, y).predict(["my parcel is late", "return a refund"])
        array(['delivery', 'return'], dtype='<U8')

    Args:
        model: the path of an encoder, as for `nplora.load_encoder`.
        rank, alpha, dropout, layers: the settings of LoRA, as in `Encoder.add_lora`.
        targets: the layers to adapt: "all-linear", or a list with the last parts of the layers' dotted names.
        max_length: the number of tokens to which longer texts are cut; None: the encoder's own limit.
        lr: the peak learning rate; None: 0.8 / hidden size of the model, at most 2e-3.
        epochs, batch_size, weight_decay, schedule: the settings of AdamW and of the training, as in
            `Trainer`.
        compute: the arithmetic of the products with frozen weights: "float32", "bfloat16" or "int8".
        class_weight: a dict from labels to weights, "balanced", or None.
        early_stopping: hold rows out, stop after `patience` epochs without a lower loss on these rows, and
            use the trained values of the epoch with the lowest loss.
        validation_fraction: the fraction of the rows that is held out.
        patience: the number of epochs without a lower loss after which the training stops.
        calibrate: hold rows out, and divide the logits by the temperature that gives the lowest cross entropy
            on these rows.
        checkpoint_dir, warm_start, random_state, verbose: as in `LoRAClassifier`.
    Attributes:
        classes_: the labels in sorted order.
        model_: the trained `TextClassifier`. `nplora.save_adapter(estimator.model_, directory)` saves the
            model's adapter in PEFT's format.
        n_iter_, loss_curve_, validation_curve_: as in `LoRAClassifier`.
        temperature_: the number by which logits are divided; 1 without calibration.
    """

    _task = "single"

    def __init__(
        self,
        model: StrPath | None = None,
        *,
        rank: int = 8,
        alpha: float = 16,
        dropout: float = 0.0,
        targets: str | Sequence[str] = "all-linear",
        layers: str | None = None,
        max_length: int | None = None,
        lr: float | None = None,
        epochs: int = 3,
        batch_size: int = 32,
        weight_decay: float = 0.01,
        schedule: str = "cosine",
        compute: str = "float32",
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
        self.model = model
        self.rank = rank
        self.alpha = alpha
        self.dropout = dropout
        self.targets = targets
        self.layers = layers
        self.max_length = max_length
        self.lr = lr
        self.epochs = epochs
        self.batch_size = batch_size
        self.weight_decay = weight_decay
        self.schedule = schedule
        self.compute = compute
        self.class_weight = class_weight
        self.early_stopping = early_stopping
        self.validation_fraction = validation_fraction
        self.patience = patience
        self.calibrate = calibrate
        self.checkpoint_dir = checkpoint_dir
        self.warm_start = warm_start
        self.random_state = random_state
        self.verbose = verbose
