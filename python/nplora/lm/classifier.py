"""TextClassifier: an encoder and a head that classifies texts or tokens, or predicts numbers."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from nplora import _check
from nplora.formats.label_record import LabelRecord, shown
from nplora.lm import adapting
from nplora.lm.classifier_head import ClassifierHead, HeadSaved
from nplora.lm.encoder import Encoder, EncoderSaved, Ids
from nplora.lm.word_ids import WordIds
from nplora.nn.module import Gradient, Module, Saved, inference
from nplora.tokenizer.words import sentences_of

Array = npt.NDArray[Any]


@dataclasses.dataclass(frozen=True, slots=True)
class ClassifierSaved(Saved):
    """The values that `TextClassifier.backward` needs."""

    encoder: EncoderSaved
    head: HeadSaved
    shape: tuple[int, ...]


class TextClassifier(Module):
    """An encoder with a trainable head for classification or regression.

    `nplora.new_classifier` and `nplora.load_classifier` create classifiers.

    The layers have the same names as in transformers' model for the task, such as
    `bert.encoder.layer.0.attention.self.query` and `classifier`.

        >>> import nplora
        >>> encoder = nplora.load_encoder("encoder-model")
        >>> classifier = nplora.new_classifier(encoder, ["order", "refund"])
        >>> classifier.predict_proba(["where is my parcel"]).shape
        (1, 2)

    Attributes:
        encoder: the encoder.
        head: the pooling and the layers after the encoder.
        labels: the names of the outputs.
        task: "single" (each text has one label), "multi" (each text has any number of labels) or "regression"
            (each output is a number).
        max_length: the largest number of tokens of a text; longer texts are cut. `predict_words` does not cut
            longer sentences, but divides them into windows. `max_length` can be changed.
    """

    def __init__(self, encoder: Encoder, head: ClassifierHead, record: LabelRecord) -> None:
        self.encoder, self.head, self._record = encoder, head, record
        longest = encoder.config.max_position_embeddings
        self.max_length = min(record.max_length or encoder.max_length, longest)
        whole = [name for name, step in head.steps.items() if step.local_parameters()]
        parts = {part for name in whole for part in name.split(".")}
        self.saved_names = tuple(name for name in head.spec.saved if name in parts)

    def _walk(self, prefix: str, seen: set[int]) -> Iterator[tuple[str, Module]]:
        if id(self) in seen:
            return
        seen.add(id(self))
        yield prefix, self
        for name, module in self.encoder.model._walk("", seen):
            yield ".".join(filter(None, (self.encoder.prefix, name or "body"))), module
        yield from self.head._walk("", seen)

    def exchange(self, replaced: Mapping[int, Module]) -> None:
        super().exchange(replaced)
        self.head.exchange(replaced)

    @property
    def labels(self) -> tuple[str, ...]:
        return self._record.labels

    @property
    def task(self) -> str:
        return self._record.task

    @property
    def label_record(self) -> LabelRecord:  # type: ignore[override]
        """The task and the labels, in the form that saved adapters store."""
        return dataclasses.replace(self._record, max_length=self.max_length)

    @property
    def classifies_tokens(self) -> bool:
        """Whether each token has its own label, as in named entity recognition.

        >>> import nplora
        >>> encoder = nplora.load_encoder("encoder-model")
        >>> nplora.new_classifier(encoder, ["no", "name"], tokens=True).classifies_tokens
        True
        """
        return self.head.spec.pooling is None

    # ---- what adapters and checkpoints need ----

    @property
    def task_type(self) -> str:  # type: ignore[override]
        """PEFT's name for the task: "SEQ_CLS" or "TOKEN_CLS"."""
        return "TOKEN_CLS" if self.classifies_tokens else "SEQ_CLS"

    @property
    def source(self) -> Path:
        """The file or directory that the encoder was read from."""
        return self.encoder.source

    def configuration(self) -> str:
        return f"{self.encoder.configuration()} {self.task} {self.labels}"

    def base_digest(self) -> str | None:
        return self.encoder.base_digest()

    def stored_row_order(self, name: str) -> Array | None:
        return self.encoder.stored_row_order(name)

    @_check.keywords
    def add_lora(
        self,
        rank: int = 8,
        alpha: float = 16,
        targets: str | Iterable[str] = adapting.ALL_LINEAR,
        layers: str | Sequence[int] | None = None,
        dropout: float = 0.0,
        use_rslora: bool = False,
        use_dora: bool = False,
        seed: int = 0,
        init: str = "zero",
        rank_pattern: Mapping[str, int] | str | None = None,
        alpha_pattern: Mapping[str, float] | str | None = None,
        freeze_B: bool = False,
    ) -> None:
        """Put a LoRA adapter on layers of the encoder. Arguments and errors are those of `Encoder.add_lora`.

        >>> import nplora
        >>> classifier = nplora.new_classifier(nplora.load_encoder("encoder-model"), ["a", "b"])
        >>> classifier.add_lora(rank=2, targets="query", layers="last:1")
        >>> list(classifier.adapter_layers())
        ['bert.encoder.layer.1.attention.self.query']
        """
        self.encoder.add_lora(
            rank, alpha, targets, layers, dropout, use_rslora, use_dora, seed, init, rank_pattern,
            alpha_pattern, freeze_B,
        )  # fmt: skip

    # ---- inference ----

    def __call__(self, x: Ids) -> Array:
        """The logits for the token ids of each text, without dropout.

        >>> import nplora
        >>> classifier = nplora.new_classifier(nplora.load_encoder("encoder-model"), ["a", "b"])
        >>> classifier([[2, 5, 3], [2, 5, 6, 3]]).shape
        (2, 2)
        """
        return self.logits_of_ids(x)

    def logits_of_ids(self, ids: Ids, batch_size: int | None = None) -> Array:
        """The logits for the token ids of each text. The ids include the special tokens.

            >>> import nplora
            >>> classifier = nplora.new_classifier(nplora.load_encoder("encoder-model"), ["a", "b"])
            >>> classifier.logits_of_ids([[2, 5, 3]]).shape
            (1, 2)

        Args:
            batch_size: the number of texts that are computed together. None: a batch has about 2,048 tokens.
        Returns:
            an array (texts, outputs), float32. If tokens are classified, the shape is (tokens, outputs).
        """
        if batch_size is not None:
            _check.integer("logits", "batch_size", batch_size, least=1)
        made = [np.empty((0, len(self.labels)), np.float32)]
        with inference():
            for states, starts in self.encoder.packed_states("logits", ids, batch_size, self.head.pooling):
                made.append(self.head.run(states, starts)[0])
        return np.concatenate(made)

    def logits(self, texts: Iterable[str], batch_size: int | None = None) -> Array:
        """The logits of each text: float32 (texts, outputs). For a regression, the logits are the
        predictions.

            >>> import nplora
            >>> classifier = nplora.new_classifier(nplora.load_encoder("encoder-model"), ["a", "b"])
            >>> classifier.logits(["a cat", "a dog"]).shape
            (2, 2)

        Args:
            batch_size: as in `logits_of_ids`.
        Raises:
            TypeError: `texts` is one text, or an item is not a text.
        Warns:
            UserWarning: texts were too long, and were cut.
        """
        return self.logits_of_ids(self.encoder.encode(texts, self.max_length), batch_size)

    def predict_proba(self, texts: Iterable[str], batch_size: int | None = None) -> Array:
        """The probability of each label for each text: float64 (texts, outputs).

        With the task "single", the probabilities of a text add up to 1. With the task "multi", the
        probability of each label is independent of the other labels.

            >>> import nplora
            >>> classifier = nplora.new_classifier(nplora.load_encoder("encoder-model"), ["a", "b"])
            >>> probabilities = classifier.predict_proba(["a cat"])
            >>> bool(abs(probabilities.sum() - 1) < 1e-9)
            True

        Raises:
            ValueError: the task is a regression, the classifier classifies tokens, or a logit is NaN or
                infinite.
        """
        self._require_texts("predict_proba")
        return probabilities(self.task, self.logits(texts, batch_size))

    def predict(self, texts: Iterable[str], batch_size: int | None = None) -> list[Any]:
        """The prediction for each text: its label, a list of labels, or a number.

        With the task "multi", the prediction is the list of labels with a probability of at least 0.5.

            >>> import nplora
            >>> classifier = nplora.new_classifier(nplora.load_encoder("encoder-model"), ["a", "b"])
            >>> classifier.predict(["a cat"])[0] in ("a", "b")
            True

        Raises:
            ValueError: the classifier classifies tokens, or a logit is NaN or infinite.
        """
        self._require_texts("predict")
        return self.decided(self.logits(texts, batch_size))

    def _require_texts(self, op: str) -> None:
        if self.classifies_tokens:
            raise ValueError(
                f"{op}: the classifier classifies tokens, not texts; use `predict_words` to label words"
            )

    def predict_words(
        self, sentences: Iterable[Sequence[str]], batch_size: int | None = None
    ) -> list[list[str | None]]:
        """The label of each word of each sentence. This method needs a classifier of tokens.

        The label of a word is the label of its first token. A word gets None if the tokenizer drops all
        characters of the word. A sentence with more than `max_length` tokens is read in overlapping windows,
        see `WordIds.windows`.

            >>> import nplora
            >>> encoder = nplora.load_encoder("encoder-model")
            >>> tagger = nplora.new_classifier(encoder, ["O", "THING"], tokens=True)
            >>> [len(tags) for tags in tagger.predict_words([["my", "parcel"], ["a"]])]
            [2, 1]

        Args:
            sentences: a list of sentences, each of which is a list of words.
            batch_size: as in `logits_of_ids`.
        Raises:
            TypeError: a sentence is not a list of texts.
            ValueError: a word is empty, the classifier classifies texts, or a logit is NaN or infinite.
        """
        if not self.classifies_tokens:
            raise ValueError("predict_words: the classifier is for texts, expected a classifier of tokens")
        words = self.encoder.word_ids(sentences_of("predict_words", "sentences", sentences))
        return words.per_word(self.decided(self.word_logits(words, batch_size)))

    def word_logits(self, words: WordIds, batch_size: int | None = None) -> Array:
        """The logits at the first token of each word. A word without tokens has no row in the result.

            >>> import nplora
            >>> encoder = nplora.load_encoder("encoder-model")
            >>> tagger = nplora.new_classifier(encoder, ["O", "THING"], tokens=True)
            >>> tagger.word_logits(encoder.word_ids([["my", "parcel"]])).shape
            (2, 2)

        Args:
            words: the result of `Encoder.word_ids`.
            batch_size: as in `logits_of_ids`.
        Returns:
            an array (words, outputs), float32. `WordIds.per_word` groups the rows by sentence.
        Raises:
            ValueError: the classifier labels whole texts, not words.
        """
        if not self.classifies_tokens:
            raise ValueError("word_logits: the classifier is for texts, expected a classifier of tokens")
        ids, rows = self.windows(words)
        return self.logits_of_ids(ids, batch_size)[rows]

    def windows(self, words: WordIds, longest: int | None = None) -> tuple[list[list[int]], Array]:
        """Return the token ids of sentences.

        A sentence with more than `max_length` tokens is divided into windows.

            >>> import nplora
            >>> encoder = nplora.load_encoder("encoder-model")
            >>> tagger = nplora.new_classifier(encoder, ["O", "THING"], tokens=True)
            >>> tagger.windows(encoder.word_ids([["my", "parcel"]]))
            ([[2, 26, 27, 3]], array([1, 2]))

        Args:
            longest: the largest number of tokens of a window. None, or a value above `max_length`, means
                `max_length`.
        Returns:
            the tuple that `WordIds.windows` returns.
        Raises:
            ValueError: a window has no room for a word.
        """
        most = self.max_length if longest is None else min(longest, self.max_length)
        around, _ = self.encoder.token_ids([""], self.encoder.config.max_position_embeddings)
        return words.windows(most, around[0])

    def decided(self, logits: Array) -> list[Any]:
        """Return what `predict` returns for texts with these logits.

        >>> import nplora, numpy as np
        >>> classifier = nplora.new_classifier(nplora.load_encoder("encoder-model"), ["a", "b"])
        >>> classifier.decided(np.array([[1.0, 3.0]]))
        ['b']
        """
        require_finite("predict", logits)
        if self.task == "single":
            return [self.labels[i] for i in logits.argmax(axis=-1).tolist()]
        if self.task == "multi":
            return [[self.labels[i] for i in np.flatnonzero(row >= 0).tolist()] for row in logits]
        return [float(row[0]) if len(row) == 1 else row.tolist() for row in logits]

    # ---- training ----

    def forward(self, x: Ids) -> tuple[Array, ClassifierSaved]:
        """The logits for the token ids of each text, and the values that `backward` needs.

        >>> import nplora
        >>> classifier = nplora.new_classifier(nplora.load_encoder("encoder-model"), ["a", "b"])
        >>> logits, saved = classifier.forward([[2, 5, 3], [2, 5, 6, 3]])
        >>> logits.shape
        (2, 2)
        """
        states, encoder = self.encoder.forward_for(self.head.pooling, x)
        logits, head = self.head.run(states, encoder.starts)
        return logits, ClassifierSaved(encoder, head, logits.shape, layer=self)

    def backward(self, dy: Array, saved: ClassifierSaved, need_dx: bool = True) -> Gradient:
        """Accumulate the gradients of the adapters and the head. Return None: token ids have no gradient.

            >>> import nplora
            >>> classifier = nplora.new_classifier(nplora.load_encoder("encoder-model"), ["a", "b"])
            >>> logits, saved = classifier.forward([[2, 5, 3]])
            >>> classifier.backward(logits, saved)

        Args:
            dy: the gradient of the loss with respect to the logits.
        Raises:
            ValueError, TypeError, RuntimeError: as in `Encoder.backward`.
        """
        op = "TextClassifier.backward"
        _check.saved(op, saved, ClassifierSaved)
        rows = _check.shaped(op, "dy", dy, saved.shape, np.float32)
        _check.own(op, saved, self)
        self.encoder.use_up(op, saved.encoder)  # before the head's gradients change
        self.encoder.run_backward(self.head.run_backward(rows, saved.head), saved.encoder)
        return None

    def __repr__(self) -> str:
        names = ", ".join(repr(shown(name)) for name in self.labels[:8]) + (
            ", …" if len(self.labels) > 8 else ""
        )
        kind = {"single": "one of", "multi": "any of", "regression": "numbers"}[self.task]
        lines = repr(self.encoder).splitlines()[:1]
        lines.append(f"  {kind} {names}; {self.num_trainable:,} trained values")
        return "\n".join(["TextClassifier of", *(f"  {line}" for line in lines)])


def probabilities(task: str, logits: Array) -> Array:
    """Convert an array of logits (..., outputs) to probabilities (..., outputs), float64.

    Raises:
        ValueError: the task is a regression, or a logit is NaN or infinite.
    """
    if task == "regression":
        raise ValueError("predict_proba: the task is a regression, which has no probabilities")
    require_finite("predict_proba", logits)
    wide = np.asarray(logits, np.float64)
    if task == "multi":
        small = np.exp(-np.abs(wide))
        return np.asarray(np.where(wide >= 0, 1, small) / (1 + small))
    exponentials = np.exp(wide - wide.max(axis=-1, keepdims=True))
    return np.asarray(exponentials / exponentials.sum(axis=-1, keepdims=True))


def require_finite(op: str, logits: Array, places: Sequence[str] = ()) -> None:
    """Raise ValueError if a logit is NaN or infinite.

    Args:
        logits: an array (texts, outputs).
        places: the names of the texts for the error message, such as "line 3". If `places` is empty, the
            message numbers the texts from 0.
    """
    wrong = np.flatnonzero(~np.isfinite(logits).all(axis=-1))
    if len(wrong):
        name = places[wrong[0]] if places else f"texts[{wrong[0]}]"
        raise ValueError(f"{op}: the logits of {name} are NaN or infinite, so the weights are damaged")
