"""TextEstimator: the base class of the estimators that train a pretrained encoder on texts."""

from __future__ import annotations

import contextlib
import functools
import os
import weakref
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from nplora import _check
from nplora.finetuning import TextBatches
from nplora.finetuning.classification.text_batches import ids_fingerprint
from nplora.finetuning.int8_callbacks import int8_callbacks
from nplora.finetuning.int8_check import warn_of_slow_int8
from nplora.finetuning.options import default_lr
from nplora.finetuning.token_progress import speaker
from nplora.formats import files, model_directory
from nplora.formats.errors import FormatError, counted
from nplora.formats.files import StrPath
from nplora.lm import Encoder, TextClassifier, load_encoder, new_classifier
from nplora.lm.classifier_loading import has_output_bias
from nplora.nn.losses import Loss
from nplora.nn.module import Module
from nplora.runtime.user_warning import warn_user
from nplora.sklearn.base import LoRAEstimator
from nplora.trainer import Batches, Callback
from nplora.trainer.fingerprint import base_fingerprint, factors, set_factors
from nplora.weights import COMPUTES

Array = npt.NDArray[Any]
Scale = tuple[Array, Array]  # a factor and an offset of the outputs

# The encoders in use, with keys from `versions_of`. Estimators of one model share its frozen weights.
_loaded: weakref.WeakValueDictionary[tuple[Any, ...], Encoder] = weakref.WeakValueDictionary()


def shared_encoder(op: str, model: StrPath | None, compute: str = "float32") -> Encoder:
    """Load an encoder, or return the encoder that was already loaded from the same files with this `compute`.

    Raises:
        TypeError: `model` is not a path. `load_encoder` lists the other errors.
    """
    if not isinstance(model, str | os.PathLike):
        raise TypeError(f"{op}: model is {_check.kind(model)}, expected the path of an encoder")
    key = (*versions_of(model), compute)
    found = _loaded.get(key)
    if found is None:
        found = _loaded[key] = load_encoder(model, compute, pooling="mean")
    return found


def versions_of(model: StrPath) -> tuple[Any, ...]:
    """Return a key that changes if a file of the model changes.

    The key consists of the path, inode, size and modification time of each file.
    """
    place = Path(files.absolute(model))
    found = {*model_directory.files_of(place)}
    if place.is_dir():  # the modules of sentence-transformers have directories of their own
        found |= {*place.glob("*"), *place.glob("*/*")}
    stats = [(os.fspath(path), path.stat()) for path in sorted(found) if path.exists()]
    return tuple((name, stat.st_ino, stat.st_size, stat.st_mtime_ns) for name, stat in stats)


def texts_of(op: str, X: Any) -> list[str]:
    """Check that X is a sequence of texts, and return the texts as a list.

    Raises:
        ValueError: X is not a sequence of texts, or it is empty.
    """
    if isinstance(X, str) or not np.iterable(X) or getattr(X, "ndim", 1) != 1:
        raise ValueError(f"{op}: X is {_check.kind(X)}, expected a list or a column of texts")
    texts = list(X)
    for i, text in enumerate(texts):
        if not isinstance(text, str):
            raise ValueError(f"{op}: X[{i}] is {_check.kind(text)}, expected a text")
    if not texts:
        raise ValueError(f"{op}: X has no texts")
    return texts


@dataclass(frozen=True)
class StoredClassifier:
    """The pickled parts of a fitted model: everything except the frozen weights.

    Attributes:
        path: the path of the encoder.
        labels, task, lora, max_length, tokens, compute: the arguments with which `_classifier` rebuilds the
            model.
        values: a dict from names to the trained arrays.
        streams: a dict from the layers' names to the states of their random numbers for dropout.
        base: the fingerprint of the frozen weights, by which a changed encoder is detected.
    """

    path: str
    labels: tuple[str, ...]
    task: str
    lora: dict[str, Any]
    max_length: int
    values: dict[str, Array]
    streams: dict[str, list[int]]
    base: str
    tokens: bool = False
    compute: str = "float32"

    def restored(self) -> TextClassifier:
        """Read the encoder again and return the model.

        Raises:
            FormatError: the path now holds a different encoder. OSError: the encoder cannot be read.
        """
        made = _classifier(
            self.path, self.labels, self.task, self.tokens, self.lora, self.max_length, 0, self.compute
        )
        if base_fingerprint(made, whole=True) != self.base:
            raise FormatError(f"{self.path}: this is not the encoder that the estimator was fitted with")
        set_factors(made, self.values)
        made.set_random_state(self.streams)
        return made


def _classifier(
    path: StrPath,
    labels: Sequence[str],
    task: str,
    tokens: bool,
    lora: dict[str, Any],
    max_length: int | None,
    seed: int,
    compute: str,
) -> TextClassifier:
    encoder = shared_encoder("TextEstimator", path, compute).copied({})
    made = new_classifier(encoder, labels, task, tokens, seed)
    if max_length is not None:
        made.max_length = min(max_length, encoder.config.max_position_embeddings)
    made.add_lora(**lora, seed=seed)
    return made


def _inverse(scale: Scale) -> Scale:
    factor, offset = scale
    return 1 / factor, -offset / factor


class TextEstimator(LoRAEstimator):
    """Base class of the estimators whose inputs are texts. The features of a text are its token ids."""

    model_: TextClassifier
    _task: str
    _tokens = False  # whether the model labels tokens

    def _features(self, X: Any, reset: bool) -> Any:
        """Return the token ids of each text."""
        texts = texts_of(type(self).__name__, X)
        longest = self._longest(reset)
        ids, cut = self._encoder.token_ids(texts, longest)
        self._warn_if_cut(cut, longest, "text")
        return ids

    def _longest(self, reset: bool) -> int:
        """Set `_encoder`, and return the largest number of tokens per text. Longer texts are cut.

        A fitted estimator keeps its encoder and tokenizer, even if the parameter `model`, or the files at
        that path, change later.
        """
        op = type(self).__name__
        if reset or not hasattr(self, "model_"):
            compute = _check.choice(op, "compute", self.compute, COMPUTES)
            self._encoder = shared_encoder(op, self.model, compute)
            warn_of_slow_int8(op, self._encoder)
            longest = self._encoder.max_length
            if self.max_length is not None:
                most = self._encoder.config.max_position_embeddings
                longest = min(_check.integer(op, "max_length", self.max_length, least=1), most)
        else:
            self._encoder = self.model_.encoder
            longest = self.model_.max_length
        return longest

    def _warn_if_cut(self, cut: int, longest: int, unit: str) -> None:
        if cut:
            op = type(self).__name__
            warn_user(f"{op}: cut to {longest} tokens: {counted(cut, unit)}")

    def _build(self, x: Any, outputs: int, seed: int) -> Module:
        targets = self.targets if isinstance(self.targets, str) else tuple(self.targets)
        lora = {
            "rank": self.rank,
            "alpha": self.alpha,
            "targets": targets,
            "layers": self.layers,
            "dropout": self.dropout,
        }
        self._lora, self._path = lora, os.fspath(files.absolute(self.model))
        self._rescaling: list[Scale] = []
        labels = self._labels(outputs)
        return _classifier(
            self.model, labels, self._task, self._tokens, lora, self.max_length, seed, self.compute
        )

    def _labels(self, outputs: int) -> list[str]:
        """Return the names of the model's outputs, which a saved adapter contains."""
        return [f"target_{i}" for i in range(outputs)]

    # The scale of predictions is stored in the head, so that a saved adapter makes the same predictions.

    def _set_scale(self, factor: Array | float, offset: Array | float = 0.0) -> None:
        for earlier in self._rescaling:
            self.model_.head.rescale(*_inverse(earlier))
        super()._set_scale(factor, offset)
        self._rescaling[:] = [self._scale]
        self.model_.head.rescale(*self._scale)

    @contextlib.contextmanager
    def _unscaled(self) -> Iterator[None]:
        earlier = list(self._rescaling)
        for scale in earlier:
            self.model_.head.rescale(*_inverse(scale))
        try:
            yield
        finally:
            for scale in earlier:
                self.model_.head.rescale(*scale)

    def _scaled(self, outputs: Array) -> Array:
        return outputs

    def _has_bias(self) -> bool:
        return has_output_bias(self._encoder)

    def _peak_lr(self) -> Any:
        return default_lr(self._encoder.config.hidden_size) if self.lr is None else super()._peak_lr()

    def _callbacks(
        self, batches: Batches, loss: Loss
    ) -> contextlib.AbstractContextManager[Sequence[Callback]]:
        assert isinstance(batches, TextBatches)
        encoder = self.model_.encoder
        if encoder.compute != self.compute:
            raise ValueError(
                f"{type(self).__name__}: compute is {self.compute!r}, but the fitted model computes in "
                f"{encoder.compute!r}; to change compute, set warm_start=False, then call fit"
            )
        sample = functools.partial(batches.sample_gradient, self.model_, loss)
        say = speaker(True) if self.verbose else warn_user
        return int8_callbacks(self.model_, encoder.model, sample, False, say)

    def _batches(self, x: Any, y: Array, shuffle: bool, seed: int) -> Batches:
        return TextBatches(x, y, self.batch_size, shuffle, seed)

    def _outputs(self, x: Any) -> Array:
        return self.model_.logits_of_ids(x).astype(np.float64)

    def _identity(self, x: Any) -> str:
        return ids_fingerprint(x)

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.input_tags.two_d_array, tags.input_tags.one_d_array, tags.input_tags.string = False, True, True
        tags.no_validation = True
        return tags

    def __getstate__(self) -> dict[str, Any]:
        state: dict[str, Any] = super().__getstate__()
        state = {name: value for name, value in state.items() if name != "_encoder"}
        if isinstance(made := state.get("model_"), TextClassifier):
            values = {name: value.copy() for name, value in factors(made).items()}
            base = base_fingerprint(made, whole=True)
            state["model_"] = StoredClassifier(
                self._path, made.labels, made.task, self._lora,
                made.max_length, values, made.random_state(), base, made.classifies_tokens,
                made.encoder.compute,
            )  # fmt: skip
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        if isinstance(stored := state.get("model_"), StoredClassifier):
            state = {**state, "model_": stored.restored()}
        super().__setstate__(state)
