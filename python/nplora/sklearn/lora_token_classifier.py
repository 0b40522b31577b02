"""LoRATokenClassifier: a scikit-learn estimator that labels words, with a pretrained encoder and LoRA."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from typing import Any, Self

import numpy as np
import numpy.typing as npt
from sklearn.utils.validation import check_is_fitted

from nplora.finetuning import TokenBatches
from nplora.finetuning.classification.text_batches import ids_fingerprint
from nplora.formats.errors import brief, counted
from nplora.formats.files import StrPath
from nplora.lm.word_ids import NO_TAG, WordIds
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
_KINDS = {"str": str, "bool": bool | np.bool_, "int": int | np.integer}  # all labels are of one kind


class LoRATokenClassifier(LabelledBase, TextEstimator):
    """Label the words of sentences with a pretrained encoder, LoRA and a new head.

    X is a list of sentences. Each sentence is a list of words. y has a list of labels for each sentence. The
    model predicts the label of a word at the word's first token. Only the first tokens of words enter the
    loss, as in `train_classifier`. As with `LoRATextClassifier`, the fits of a grid search share the frozen
    weights, and a pickled estimator does not contain the frozen weights.

        >>> X = [["where", "is", "my", "parcel"], ["return", "an", "order"]] * 4
        >>> y = [["O", "O", "O", "B-THING"], ["O", "O", "B-THING"]] * 4
        >>> model = nplora.sklearn.LoRATokenClassifier("encoder-model", epochs=40, lr=1e-2, random_state=0)
        >>> model.fit(X, y).predict([["return", "an", "order"], ["return", "my", "parcel"]])
        [['O', 'O', 'B-THING'], ['O', 'O', 'B-THING']]

    Args:
        model: the path of an encoder, as for `nplora.load_encoder`.
        rank, alpha, dropout, layers: the settings of LoRA, as in `Encoder.add_lora`.
        targets: the layers to adapt: "all-linear", or a list with the last parts of the layers' dotted names.
        max_length: the number of tokens to which `fit` cuts longer sentences; None: the encoder's own limit.
            `predict` does not cut a longer sentence, but splits it into windows of this length, as
            `TextClassifier.predict_words` does.
        lr: the peak learning rate; None: 0.8 / hidden size of the model, at most 2e-3.
        epochs, batch_size, weight_decay, schedule: the settings of AdamW and of the training, as in
            `Trainer`.
        compute: the arithmetic of the products with frozen weights: "float32", "bfloat16" or "int8".
        class_weight: a dict from labels to weights, "balanced", or None.
        early_stopping: hold sentences out, stop after `patience` epochs without a lower loss on these
            sentences, and use the trained values of the epoch with the lowest loss.
        validation_fraction: the fraction of the sentences that is held out.
        patience: the number of epochs without a lower loss after which the training stops.
        checkpoint_dir, warm_start, random_state, verbose: as in `LoRAClassifier`.
    Attributes:
        classes_: the labels in sorted order.
        model_: the trained `TextClassifier`. `nplora.save_adapter(estimator.model_, directory)` saves the
            model's adapter in PEFT's format.
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
        self.checkpoint_dir = checkpoint_dir
        self.warm_start = warm_start
        self.random_state = random_state
        self.verbose = verbose

    @unchanged_on_error
    def fit(self, X: Any, y: Any) -> Self:
        """Train a new model or, with `warm_start`, continue to train the existing one.

        Args:
            X: the words of n sentences. y: the labels of these words: all texts, all integers or all bool.
                There must be at least two different labels.
        Returns:
            the estimator.
        Raises:
            ValueError: X or y is invalid, no word has a token, or y has only one label.
            TypeError: an item of X is not a list of texts, or an item of y is not a list.
            KeyboardInterrupt: Ctrl-C.
        """
        x, labels = self._checked(X, y, reset=not self._continues)
        classes, numbers = np.unique(labels, return_inverse=True)
        self._set_classes(classes)
        self._train(x, self._targets(x, numbers), len(classes), self._loss, stratify=None)
        self._set_scale(1.0)
        return self

    def predict(self, X: Any) -> list[list[Any]]:
        """Return the most likely label of each word of each sentence.

        If the tokenizer drops all characters of a word, the word has no token and gets None.
        """
        return self._predicted_labels(self._fitted_features(X))

    def predict_proba(self, X: Any) -> list[Array]:
        """Return an array (words, classes) for each sentence, with NaN for a word without a token."""
        x = self._fitted_features(X)
        words, logits = _joined(x), self._outputs(x)
        nothing = np.full(len(self.classes_), np.nan)
        found = words.per_word(list(np.exp(log_probabilities(logits))))
        return [
            np.array([nothing if row is None else row for row in rows]).reshape(-1, len(nothing))
            for rows in found
        ]

    def score(self, X: Any, y: Any) -> float:
        """Return the share of words with the right label. A word without a token counts as wrong.

        Raises the same errors as `fit` if X or y has a wrong form.
        """
        x = self._fitted_features(X)
        true = self._checked_labels(x, y).tolist()
        found = itertools.chain(*self._predicted_labels(x))
        return float(np.mean([ours == theirs for ours, theirs in zip(found, true, strict=True)]))

    # ---- methods that the fit loop calls ----

    def _checked(self, X: Any, y: Any, reset: bool) -> tuple[list[Sentence], Array]:
        x = self._features(X, reset)
        labels = self._checked_labels(x, y)
        if all((first < 0).all() for _, first in x):
            raise ValueError(f"{type(self).__name__}: no word of X has a token")
        return x, labels

    def _unknown(self, labels: Array) -> set[Any]:
        """The labels that are not in `classes_`. Unlike in the base class, True does not count as the label
        1."""
        is_mixed = (labels.dtype == bool) != (self.classes_.dtype == bool)
        return set(labels.tolist()) if is_mixed else super()._unknown(labels)

    def _targets(self, x: Sequence[Sentence], numbers: Array) -> Array:
        """For each sentence, the target of each word. The target of a word without a token is NO_TAG."""
        ends = np.cumsum([len(first) for _, first in x])
        made = np.empty(len(x), object)
        for i, (own, (_, first)) in enumerate(zip(np.split(numbers, ends[:-1]), x, strict=True)):
            made[i] = np.where(first < 0, NO_TAG, own)
        return made

    def _loss(self, targets: Array) -> CrossEntropy:
        return super()._loss(np.concatenate(list(targets)))

    def _features(self, X: Any, reset: bool) -> list[Sentence]:
        """Return a pair for each sentence: its token ids, and the index of each word's first token.

        Sentences that are too long are cut.
        """
        sentences, longest = self._sentences(X), self._longest(reset)
        words = self._encoder.word_ids(sentences, longest)
        self._warn_if_cut(words.cut, longest, "sentence")
        return list(zip(words.ids, words.first, strict=True))

    def _sentences(self, X: Any) -> list[tuple[str, ...]]:
        sentences = sentences_of(type(self).__name__, "X", X)
        if not sentences or not all(sentences):
            what = "a sentence" if sentences else "X"
            raise ValueError(
                f"{type(self).__name__}: {what} is empty, expected sentences of at least one word"
            )
        return sentences

    def _checked_labels(self, x: Sequence[Sentence], y: Any) -> Array:
        """The labels of all words of all sentences."""
        op, given = type(self).__name__, _lists(type(self).__name__, y)
        if len(given) != len(x):
            raise ValueError(f"{op}: y has labels for {counted(len(given), 'sentence')}, but X has {len(x)}")
        for i, (own, (_, first)) in enumerate(zip(given, x, strict=True)):
            if len(own) != len(first):
                raise ValueError(
                    f"{op}: y[{i}] has {counted(len(own), 'label')}, expected {len(first)}, one for each word"
                )
        kinds = sorted({_kind(type(label)) for own in given for label in own})
        if len(kinds) != 1 or kinds[0] not in _KINDS:
            names = ", ".join(kinds)
            raise ValueError(
                f"{op}: y has labels of type {names}, expected only texts, only integers or only bool"
            )
        return np.array(list(itertools.chain(*given)))

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

    def _fitted_features(self, X: Any) -> list[Sentence]:
        """Return the features like `_features`, but without cutting long sentences."""
        check_is_fitted(self, "model_")
        words = self.model_.encoder.word_ids(self._sentences(X))
        return list(zip(words.ids, words.first, strict=True))

    def _predicted_labels(self, x: Sequence[Sentence]) -> list[list[Any]]:
        return _joined(x).per_word(self.classes_[self._outputs(x).argmax(axis=1)].tolist())


def _kind(of: type) -> str:
    """Return "str", "bool" or "int" for a type of labels; for any other type, the type's own name.

    The type bool does not count as an integer type.
    """
    return next((name for name, types in _KINDS.items() if issubclass(of, types)), of.__name__)


def _lists(op: str, y: Any) -> list[list[Any]]:
    """Return the labels of each sentence as a list. Raises TypeError if `y` is not a list of lists."""
    if not isinstance(y, Iterable) or isinstance(y, str):
        raise TypeError(f"{op}: y is {brief(y)}, expected a list of lists of labels")
    made = list[list[Any]]()
    for i, own in enumerate(y):
        labels = own.tolist() if isinstance(own, np.ndarray) else own
        if not isinstance(labels, list | tuple):
            raise TypeError(f"{op}: y[{i}] is {brief(own)}, expected a list of labels, one for each word")
        made.append(list(labels))
    return made


def _joined(x: Sequence[Sentence]) -> WordIds:
    return WordIds([ids for ids, _ in x], [first for _, first in x])
