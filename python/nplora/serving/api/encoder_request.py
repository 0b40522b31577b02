"""Reads the bodies of requests to /v1/embeddings and /v1/classify, and makes the answers."""

from __future__ import annotations

import base64
import contextlib
import secrets
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from nplora.formats.errors import FormatError, UnsupportedError, counted
from nplora.lm import Encoder, TextClassifier
from nplora.lm.classifier import probabilities
from nplora.serving.api.models import Models
from nplora.serving.api.sentences import Sentences
from nplora.serving.fields import Fields, checked_integer, checked_list, checked_text, wrong
from nplora.serving.jobs.shapes import Shape
from nplora.serving.request_error import RequestError
from nplora.serving.served_encoder import Model, ServedEncoder, encoder_of

Array = npt.NDArray[Any]

_MOST_INPUTS = 2048  # as in OpenAI's API
_NO_EFFECT = {"user", "priority"}
_COMMON = {"model", "input", "lora", "truncate_prompt_tokens", *_NO_EFFECT}
_EMBEDDINGS = _COMMON | {"encoding_format", "dimensions", "normalize", "prompt_name"}
_UNSUPPORTED: dict[str, tuple[Any, ...]] = {"add_special_tokens": (True,)}


@dataclass(frozen=True)
class EncoderRequest:
    """A checked request for embeddings or classes.

    Attributes:
        name: the name of the model in the answer.
        model: the model, with its adapter.
        ids: the token ids of each text, as int64 arrays, which take much less memory than lists. If the
            classifier labels words, a long text is divided into windows, and each window has its own array.
        base64: whether embeddings are sent as base64.
        dimensions: the number of values of an embedding; None: all values.
        normalize: whether embeddings are scaled to length 1.
        classifier: the classifier that computes the classes; None: the request is for embeddings.
        sentences: the texts whose words the classifier labels; None: the classifier labels whole texts.
    """

    name: str
    model: Model
    ids: list[Array]
    base64: bool = False
    dimensions: int | None = None
    normalize: bool = True
    classifier: TextClassifier | None = None
    sentences: Sentences | None = None

    def embeddings(self, rows: Array) -> Shape:
        """OpenAI's response object for `rows` (texts, dim), the embeddings that the engine has computed."""
        if self.dimensions is not None and self.dimensions < rows.shape[1]:
            rows = rows[:, : self.dimensions]
            if self.normalize:
                rows = rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12)
        data = [
            {
                "object": "embedding",
                "index": index,
                "embedding": _base64(row) if self.base64 else row.tolist(),
            }
            for index, row in enumerate(rows)
        ]
        return {"object": "list", "data": data, "model": self.name, "usage": self._usage()}

    def classes(self, logits: Array) -> Shape:
        """vLLM's response object for classes.

        Args:
            logits: array (texts, outputs). If the classifier labels words, the shape is (tokens, outputs).
        """
        assert self.classifier is not None
        labels, task = self.classifier.labels, self.classifier.task
        if self.sentences is not None:
            data = self.sentences.tagged(self.classifier, logits)
        elif task == "regression":
            data = [{"index": i, "values": row.tolist()} for i, row in enumerate(logits)]
        else:
            data = [
                {
                    "index": i,
                    "label": labels[int(row.argmax())],
                    "probs": row.tolist(),
                    "num_classes": len(labels),
                }
                for i, row in enumerate(probabilities(task, logits))
            ]
        return {
            "id": f"classify-{secrets.token_hex(12)}",
            "object": "list",
            "created": int(time.time()),
            "model": self.name,
            "labels": list(labels),
            "data": data,
            "usage": self._usage(),
        }

    def _usage(self) -> Shape:
        tokens = sum(map(len, self.ids))
        return {"prompt_tokens": tokens, "total_tokens": tokens}


class EncoderReader:
    """Reads requests for an encoder. Call the methods in a thread, because tokenizing takes time.

    Args:
        longest: the number of tokens of the longest text for which the server has enough memory.
    """

    def __init__(self, models: Models[ServedEncoder], longest: int) -> None:
        self._models, self._longest = models, longest

    def embeddings(self, values: object) -> EncoderRequest:
        """Read the body of /v1/embeddings.

        Raises:
            RequestError: a field is missing, unknown or wrong, or a text is too long.
            KeyError: the adapter was unloaded while the request was read.
        """
        body = Fields(values)
        body.require_known(_EMBEDDINGS, _UNSUPPORTED)
        name, adapter = self._models.chosen(body)
        model = self._models.lm.named_model(adapter)
        if adapter is not None and isinstance(model, TextClassifier):
            raise _wrong_task(f"the model {name!r} is a classifier: use /v1/classify")
        encoder = encoder_of(model)
        return EncoderRequest(
            name,
            model,
            self._input(body, encoder, _prompt(body, encoder)),
            base64=body.choice("encoding_format", ("float", "base64"), "float") == "base64",
            dimensions=body.integer("dimensions", 1, encoder.dim),
            normalize=body.boolean("normalize", True),
        )

    def classes(self, values: object) -> EncoderRequest:
        """Read the body of /v1/classify. The errors are those of `embeddings`."""
        body = Fields(values)
        body.require_known(_COMMON, _UNSUPPORTED)
        name, adapter = self._models.chosen(body)
        model: Model = self._models.lm.named_model(adapter)
        if not isinstance(model, TextClassifier):
            raise _wrong_task(f"the model {name!r} is not a classifier: use /v1/embeddings")
        if model.classifies_tokens:
            sentences, ids = self._sentences(body, model)
            return EncoderRequest(name, model, ids, classifier=model, sentences=sentences)
        return EncoderRequest(name, model, self._input(body, model.encoder, ""), classifier=model)

    def _sentences(self, body: Fields, classifier: TextClassifier) -> tuple[Sentences, list[Array]]:
        """The sentences in the field `input`, and the token ids of each window of the sentences."""
        length = _Length.read(body, classifier.encoder, self._longest)
        inputs, given = _inputs(body), body.required("input")
        if isinstance(given, list) and isinstance(given[0], int):  # `inputs` is a list with this one item
            raise wrong("input[0]", given[0], "a text or a list of words")
        sentences = Sentences.read(inputs)
        with _tokenizing():
            found, ids = sentences.encoded(classifier, self._longest, length.most if length.cuts else None)
        return found, [np.array(text, np.int64) for text in ids]

    def _input(self, body: Fields, encoder: Encoder, prompt: str) -> list[Array]:
        """The token ids of each text.

        The field `input` is a text, a list of texts, a list of tokens, or a list of lists of tokens.
        """
        length, inputs = _Length.read(body, encoder, self._longest), _inputs(body)
        if isinstance(inputs[0], str):
            return [np.array(ids, np.int64) for ids in _encoded(encoder, inputs, prompt, length)]
        if inputs[0] is not body.required("input"):
            every = [_tokens(encoder, f"input[{i}]", one, length) for i, one in enumerate(inputs)]
        else:  # the tokens of a single text
            every = [_tokens(encoder, "input", inputs[0], length)]
        return [np.array(ids, np.int64) for ids in every]


def _inputs(body: Fields) -> list[Any]:
    """The items of the field `input`. A single text, or the tokens of a single text, is one item."""
    given = body.required("input")
    if isinstance(given, str) or (isinstance(given, list) and given and isinstance(given[0], int)):
        given = [given]
    inputs = checked_list("input", given, _MOST_INPUTS)
    if not inputs:
        raise RequestError("input is empty", param="input", code="invalid_value")
    return inputs


@dataclass(frozen=True)
class _Length:
    """How long a text may be.

    Attributes:
        most: the largest number of tokens.
        cuts: whether longer texts are cut. If False, longer texts are refused.
        reason: the words of the error message that explain the limit.
    """

    most: int
    cuts: bool
    reason: str

    @classmethod
    def read(cls, body: Fields, encoder: Encoder, longest: int) -> _Length:
        """Read the field `truncate_prompt_tokens`. The server has memory for `longest` tokens per text."""
        name = "truncate_prompt_tokens"
        is_short = longest < encoder.max_length
        most = min(longest, encoder.max_length)
        reason = "the server has memory for" if is_short else "the model reads"
        given = body.integer(name, -1, most)
        if given == 0:
            raise wrong(name, given, f"-1, or an integer from 1 to {most}")
        return cls(most if given in (None, -1) else given, given is not None, reason)


def _wrong_task(message: str) -> RequestError:
    return RequestError(message, param="model", code="unsupported_task")


def _prompt(body: Fields, encoder: Encoder) -> str:
    """The prompt that is put before each text."""
    name = body.choice("prompt_name", encoder.prompts) if body.has("prompt_name") else None
    try:
        return encoder.prompt_text(name=name)
    except UnsupportedError as error:
        raise RequestError(str(error), param="prompt_name", code="unsupported_parameter") from error


def _encoded(encoder: Encoder, inputs: list[Any], prompt: str, length: _Length) -> list[list[int]]:
    texts = [prompt + checked_text(f"input[{i}]", text, empty=False) for i, text in enumerate(inputs)]
    with _tokenizing():
        ids, shortened = encoder.token_ids(texts, length.most)
    if shortened and not length.cuts:
        raise _too_long(
            f"{shortened:,} of {counted(len(texts), 'text')} {'has' if shortened == 1 else 'have'}", length
        )
    return ids


@contextlib.contextmanager
def _tokenizing() -> Iterator[None]:
    """Turn the errors of a tokenizer into the errors that clients see."""
    try:
        yield
    except FormatError as error:  # the tokenizer does not belong to the model
        raise RequestError(str(error), 500, code="model_error") from error
    except ValueError as error:
        raise RequestError(str(error), param="input", code="invalid_value") from error


def _tokens(encoder: Encoder, name: str, given: object, length: _Length) -> list[int]:
    """Check the tokens that a client sent, and cut them if there are too many. Add no special tokens."""
    if not isinstance(given, list) or not given:
        raise wrong(
            name, given, "a list of token ids that is not empty (or a text, if all items are texts)", "input"
        )
    if len(given) > length.most and not length.cuts:
        raise _too_long(f"{name} has", length)
    largest = encoder.config.vocab_size - 1
    return [
        checked_integer(f"{name}[{i}]", token, 0, largest) for i, token in enumerate(given[: length.most])
    ]


def _too_long(what: str, length: _Length) -> RequestError:
    return RequestError(
        f"{what} more than {length.most:,} tokens, the most that {length.reason}; "
        'set "truncate_prompt_tokens" to -1 to cut long texts',
        param="input",
        code="context_length_exceeded",
    )


def _base64(row: Array) -> str:
    """The values as little-endian float32, in base64."""
    return base64.b64encode(np.ascontiguousarray(row, "<f4").tobytes()).decode()
