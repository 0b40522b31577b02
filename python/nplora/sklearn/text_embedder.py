"""TextEmbedder: a scikit-learn transformer that turns texts into embeddings with a pretrained encoder."""

from __future__ import annotations

import os
from typing import Any, Self

import numpy as np
import numpy.typing as npt
from sklearn.base import BaseEstimator, TransformerMixin

from nplora import _check
from nplora.formats.files import StrPath
from nplora.lm import Encoder, load_encoder
from nplora.sklearn.texts import texts_of, versions_of

Array = npt.NDArray[Any]


_UNPICKLED = ("_encoder", "_encoders", "_key")


class TextEmbedder(TransformerMixin, BaseEstimator):  # type: ignore[misc]
    """Turn texts into embeddings, so that a pipeline can pass them to any estimator. Nothing is trained.

        >>> from sklearn.linear_model import LogisticRegression
        >>> from sklearn.pipeline import make_pipeline
        >>> X = ["where is my parcel", "my delivery is late", "return an order", "a refund"]
        >>> y = ["delivery", "delivery", "return", "return"]
        >>> model = make_pipeline(nplora.sklearn.TextEmbedder("encoder-model"), LogisticRegression(C=100))
        >>> model.fit(X, y).predict(["my parcel is late"])
        array(['delivery'], dtype='<U8')

    Args:
        model: the path of an encoder, as for `nplora.load_encoder`.
        pooling: as for `nplora.load_encoder`.
        normalize, prompt, batch_size, max_length: as for `Encoder.embed`.
    """

    def __init__(
        self,
        model: StrPath | None = None,
        *,
        pooling: str | None = None,
        normalize: bool | None = None,
        prompt: str | None = None,
        batch_size: int | None = None,
        max_length: int | None = None,
    ) -> None:
        self.model = model
        self.pooling = pooling
        self.normalize = normalize
        self.prompt = prompt
        self.batch_size = batch_size
        self.max_length = max_length

    def fit(self, X: Any, y: Any = None) -> Self:
        """Check X; load the encoder if it is not loaded or its files have changed. Nothing is trained.

        >>> embedder = nplora.sklearn.TextEmbedder("encoder-model")
        >>> embedder.fit(["a text", "another text"]) is embedder
        True
        """
        texts_of("TextEmbedder", X)
        self._load()
        return self

    def transform(self, X: Any) -> Array:
        """Return the embedding of each text, float32 (texts, dim).

        >>> nplora.sklearn.TextEmbedder("encoder-model").transform(["a text", "another text"]).shape
        (2, 32)
        """
        texts = texts_of("TextEmbedder", X)
        found: Array = self._loaded().embed(
            texts, self.batch_size, self.normalize, self.prompt, max_length=self.max_length
        )
        return found

    def get_feature_names_out(self, input_features: Any = None) -> Array:
        """Return the names of the columns: textembedder0, textembedder1, ...

        >>> nplora.sklearn.TextEmbedder("encoder-model").get_feature_names_out()[:2].tolist()
        ['textembedder0', 'textembedder1']
        """
        return np.array([f"textembedder{i}" for i in range(self._loaded().dim)], object)

    def _loaded(self) -> Encoder:
        """Return the encoder.

        Load the encoder first if it is not loaded, for example after unpickling, or if the parameter `model`
        or `pooling` has changed.
        """
        if getattr(self, "_key", None) != (str(self.model), self.pooling):
            self._load()
        return self._encoder

    def _load(self) -> None:
        """Set `_encoder`: use the encoder in `_shared` if its key still fits, otherwise load an encoder."""
        if not isinstance(self.model, str | os.PathLike):
            raise TypeError(
                f"TextEmbedder: model is {_check.kind(self.model)}, expected the path of an encoder"
            )
        shared, version = self._shared(), (versions_of(self.model), self.pooling)
        if version not in shared:
            made = load_encoder(self.model, pooling=self.pooling)
            shared.clear()  # otherwise, the encoders that clones loaded would stay in memory
            shared[version] = made
        self._encoder, self._key = shared[version], (str(self.model), self.pooling)

    def _shared(self) -> dict[Any, Encoder]:
        """Return a dict that holds the last loaded encoder. This embedder shares the dict with its clones.

        The key of the encoder is a pair: the result of `versions_of` for its files, and the pooling.
        """
        found: dict[Any, Encoder] = self.__dict__.setdefault("_encoders", {})
        return found

    def __sklearn_clone__(self) -> Self:
        made: Self = super().__sklearn_clone__()
        made._encoders = self._shared()
        return made

    def __getstate__(self) -> dict[str, Any]:
        state: dict[str, Any] = super().__getstate__()
        return {name: value for name, value in state.items() if name not in _UNPICKLED}

    def __sklearn_is_fitted__(self) -> bool:
        return True

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.input_tags.two_d_array, tags.input_tags.one_d_array, tags.input_tags.string = False, True, True
        tags.no_validation, tags.requires_fit = True, False
        return tags
