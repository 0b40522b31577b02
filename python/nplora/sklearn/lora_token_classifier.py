"""LoRATokenClassifier: a pretrained encoder with LoRA that labels words, in scikit-learn's manner."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from typing import Any, Self

import numpy as np
import numpy.typing as npt
from sklearn.utils.validation import check_is_fitted

from nplora.finetuning import TokenBatches
from nplora.finetuning.classification.text_batches import ids_fingerprint
from nplora.formats.errors import counted
from nplora.formats.files import StrPath
from nplora.lm.word_ids import WordIds
from nplora.nn.losses import CrossEntropy
from nplora.sklearn.base import unchanged_on_error
from nplora.sklearn.calibration import log_probabilities
from nplora.sklearn.classification import LabelledBase
from nplora.sklearn.texts import TextEstimator
from nplora.tokenizer.words import sentences_of
from nplora.trainer import Batches
from nplora.trainer.fingerprint import fingerprint

Array = npt.NDArray[Any]
Sentence = tuple[list[int], Array]


class LoRATokenClassifier(LabelledBase, TextEstimator):
    """Label the words of sentences with a pretrained encoder, LoRA and a new head.

    X is a list of sentences, each a list of words. y has a list of labels for each sentence. Only the first
    token of a word is trained and predicts its label, as in `train_classifier`. The fits of a grid search
    share the frozen weights, and pickles are as for `LoRATextClassifier`.

        >>> X = [["where", "is", "my", "parcel"], ["return", "an", "order"]] * 4
        >>> y = [["O", "O", "O", "B-THING"], ["O", "O", "B-THING"]] * 4
        >>> model = nplora.sklearn.LoRATokenClassifier("encoder-model", epochs=40, lr=1e-2, random_state=0)
        >>> model.fit(X, y).predict([["return", "an", "order"], ["return", "my", "parcel"]])
        [['O', 'O', 'B-THING'], ['O', 'O', 'B-THING']]

    Args:
        model: the path of an encoder, as for `nplora.load_encoder`.
        rank, alpha, dropout, layers: the settings of LoRA, as in `Encoder.add_lora`.
        targets: the layers to adapt: "all-linear", or the ends of their names.
        max_length: the number of tokens after which sentences are cut; None: that of the model.
        lr, epochs, batch_size, weight_decay, schedule: the settings of AdamW and of the run, as in `Trainer`.
        class_weight: a dict of weights by label, "balanced", or None.
        early_stopping: hold sentences out, stop after `patience` epochs without a lower loss on them, and
            keep the factors of the best epoch.
        validation_fraction, patience: the share of sentences that is held out, and the epochs to wait.
        checkpoint_dir, warm_start, random_state, verbose: as in `LoRAClassifier`.
    Attributes:
        classes_: the labels in sorted order.
        model_: the trained `TextClassifier`. `nplora.save_adapter(estimator.model_, directory)` saves it
            as PEFT's adapter.
        n_iter_, loss_curve_, validation_curve_: as in `LoRAClassifier`.
    """

    _task = "single"
    _tokens = True

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
        lr: float = 1e-3,
        epochs: int = 3,
        batch_size: int = 32,
        weight_decay: float = 0.01,
        schedule: str = "cosine",
        class_weight: dict[Any, float] | str | None = None,
        early_stopping: bool = False,
        validation_fraction: float = 0.1,
        patience: int = 5,
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
        self.class_weight = class_weight
        self.early_stopping = early_stopping
        self.validation_fraction = validation_fraction
        self.patience = patience
        self.checkpoint_dir = checkpoint_dir
        self.warm_start = warm_start
        self.random_state = random_state
        self.verbose = verbose

    @unchanged_on_error
    def fit(self, X: Any, y: Any) -> Self:
        """Train a new model or, with `warm_start`, continue to train the existing one.

        Args:
            X: the words of n sentences. y: the labels of their words: texts or integers, at least two.
        Returns:
            the estimator.
        Raises:
            ValueError: X or y does not fit, or y has only one label. TypeError: a sentence is not a list of
            texts. KeyboardInterrupt: Ctrl-C.
        """
        x = self._features(X, reset=not self._continues)
        labels = self._checked_labels(x, y)
        self._set_classes(np.unique(np.concatenate(labels)))

        def loss(numbers: Array) -> CrossEntropy:
            known = self.classes_[np.concatenate(list(numbers))]
            return CrossEntropy(class_weights=self._class_weights(self.classes_, known))

        encoded = np.empty(len(labels), object)
        for i, own in enumerate(labels):
            encoded[i] = np.searchsorted(self.classes_, own)
        self._train(x, encoded, len(self.classes_), loss, stratify=None)
        self._set_scale(1.0)
        return self

    def predict(self, X: Any) -> list[list[Any]]:
        """Return the most likely label of each word of each sentence.

        A word without a token gets None: its sentence was cut before it, or the tokenizer drops its
        characters.
        """
        words, logits = self._word_logits(X)
        return words.per_word(self.classes_[logits.argmax(axis=1)].tolist())

    def predict_proba(self, X: Any) -> list[Array]:
        """Return an array (words, classes) for each sentence, with NaN for a word without a token."""
        words, logits = self._word_logits(X)
        nothing = np.full(len(self.classes_), np.nan)
        found = words.per_word(list(np.exp(log_probabilities(logits))))
        return [
            np.array([nothing if row is None else row for row in rows]).reshape(-1, len(nothing))
            for rows in found
        ]

    def score(self, X: Any, y: Any) -> float:
        """Return the share of words with the right label. A word without a token counts as wrong."""
        predicted = self.predict(X)
        pairs = (zip(own, true, strict=True) for own, true in zip(predicted, y, strict=True))
        return float(np.mean([ours == theirs for ours, theirs in itertools.chain(*pairs)]))

    # ---- what the fit loop asks ----

    def _labels(self, outputs: int) -> list[str]:
        return [str(label) for label in self.classes_.tolist()]

    def _features(self, X: Any, reset: bool) -> list[Sentence]:
        """The token ids of each sentence, and the first token of each word."""
        sentences = sentences_of(type(self).__name__, "X", X)
        if not sentences or not all(sentences):
            what = "a sentence" if sentences else "X"
            raise ValueError(
                f"{type(self).__name__}: {what} is empty, expected sentences of at least one word"
            )
        longest = self._longest(reset)
        words = self._encoder.word_ids(sentences, longest)
        self._warn_if_cut(words.cut, longest)
        return list(zip(words.ids, words.first, strict=True))

    def _checked_labels(self, x: Sequence[Sentence], y: Iterable[Any]) -> list[Array]:
        op, given = type(self).__name__, [list(own) for own in y]
        if len(given) != len(x):
            raise ValueError(f"{op}: y has {len(given)} sentences, expected {len(x)} as in X")
        for i, (own, (_, first)) in enumerate(zip(given, x, strict=True)):
            if len(own) != len(first):
                raise ValueError(
                    f"{op}: y[{i}] has {counted(len(own), 'label')}, expected {len(first)}, one for each word"
                )
        kinds = {type(label) for own in given for label in own}
        if not any(all(issubclass(kind, one) for kind in kinds) for one in (str, int | np.integer)):
            names = ", ".join(sorted(kind.__name__ for kind in kinds))
            raise ValueError(f"{op}: the labels in y are of {names}, expected only texts or only integers")
        return [np.array(own) for own in given]

    def _batches(self, x: Any, y: Array, shuffle: bool, seed: int) -> Batches:
        words = _joined(x)
        return TokenBatches(words.ids, words.token_targets(y), self.batch_size, shuffle, seed)

    def _identity(self, x: Any) -> str:
        words = _joined(x)
        return ids_fingerprint(words.ids) + ids_fingerprint([own.tolist() for own in words.first])

    def _target_identity(self, y: Array) -> str:
        return fingerprint(np.concatenate(list(y)), whole=True)

    def _outputs(self, x: Any) -> Array:
        return self.model_.word_logits(_joined(x)).astype(np.float64)

    def _word_logits(self, X: Any) -> tuple[WordIds, Array]:
        check_is_fitted(self, "model_")
        x = self._features(X, reset=False)
        return _joined(x), self._outputs(x)


def _joined(x: Sequence[Sentence]) -> WordIds:
    return WordIds([ids for ids, _ in x], [first for _, first in x])
