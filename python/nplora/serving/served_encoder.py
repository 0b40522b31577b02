"""ServedEncoder: an encoder and its named adapters. Some of the adapters may classify texts or words."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from nplora.adapters import Adapter
from nplora.adapters.content import CLASSIFIER_TASKS
from nplora.formats.files import StrPath
from nplora.lm import Encoder, TextClassifier, load_classifier
from nplora.lm.classifier_loading import has_head

Model = Encoder | TextClassifier


class ServedEncoder:
    """An encoder and its named adapters. All adapters share the frozen weights.

    The adapter of a classifier includes a head. If the model's own files contain the head of a classifier,
    the model classifies even without an adapter. All methods may be called from any thread.

    Args:
        encoder: the encoder, without an adapter. The encoder must not change while it is served.
    Attributes:
        encoder: see the arguments.
        classifier: the classifier in the model's files; None if the files contain no classifier.
    Raises:
        FormatError: the files contain the head of a classifier, but this head is broken.
    """

    def __init__(self, encoder: Encoder) -> None:
        self.encoder = encoder
        self.classifier = _own_classifier(encoder)
        self._adapters: dict[str, Adapter] = {}
        self._models: dict[str, Model] = {}
        self._lock = threading.Lock()

    @property
    def source(self) -> Path:
        """The file or directory of the model."""
        return self.encoder.source

    @property
    def adapters(self) -> Mapping[str, Adapter]:
        """The adapters, as a read-only mapping from their names."""
        return MappingProxyType(self._adapters)

    def load_adapter(
        self,
        adapter: Adapter,
        name: str,
        any_base: bool = False,
        dtype: str | None = None,
        replace: bool = False,
    ) -> None:
        """Add an adapter under a name.

        Args:
            dtype: must be None. Rounding an adapter only speeds up decoding, and an encoder does not decode.
        Raises:
            FormatError: the adapter does not fit the model, or belongs to another model.
            ValueError: the name is taken, and `replace` is not set; or `dtype` is given.
        """
        if dtype is not None:
            raise ValueError(
                f"load_adapter: dtype is {dtype!r}, expected None: an encoder's adapters are not rounded"
            )
        made = self._with_adapter(adapter, any_base)
        with self._lock:
            if name in self._adapters and not replace:
                raise ValueError(f"load_adapter: an adapter {name!r} is loaded already")
            self._adapters = {**self._adapters, name: adapter}
            self._models = {**self._models, name: made}

    def _with_adapter(self, adapter: Adapter, any_base: bool) -> Model:
        copy = self.encoder.copied({})
        if adapter.task_type in CLASSIFIER_TASKS:
            made = load_classifier(copy, adapter, any_base=any_base)
            copy.max_length = made.max_length  # texts of requests are cut at the `max_length` of the copy
            return made
        adapter.attach(copy, any_base)
        return copy

    def delete_adapter(self, name: str) -> None:
        """Remove an adapter. Raises KeyError if no adapter has this name."""
        with self._lock:
            adapters, models = dict(self._adapters), dict(self._models)
            del adapters[name], models[name]
            self._adapters, self._models = adapters, models

    def named_model(self, name: str | None) -> Model:
        """The model with the adapter of this name; None: the model without an adapter.

        Raises KeyError for an unknown name.
        """
        return self._models[name] if name is not None else self.classifier or self.encoder


def encoder_of(model: Model) -> Encoder:
    """Return the encoder of a text classifier. If the model is an encoder itself, return the model."""
    return model.encoder if isinstance(model, TextClassifier) else model


def read_adapter(served: Any, path: StrPath, base: StrPath, any_base: bool = False) -> Adapter:
    """Read an adapter, which may include the head of a classifier."""
    return Adapter.read(path, any_base=any_base)


def _own_classifier(encoder: Encoder) -> TextClassifier | None:
    return load_classifier(encoder.copied({})) if has_head(encoder) else None
