"""Guides: restrict an answer to the tokens that a grammar allows, with the package llguidance."""

from __future__ import annotations

import json
import threading
from typing import Any

import numpy as np
import numpy.typing as npt

from nplora.formats.errors import brief
from nplora.serving.fields import Fields
from nplora.serving.request_error import RequestError
from nplora.tokenizer import Tokenizer

Array = npt.NDArray[Any]

_MOST_TOKENIZERS = 4
_PARAM = "response_format"
# The generated JSON has the form of json.dumps. In a schema, oneOf is treated as anyOf.
_RULES = {
    "whitespace_flexible": False,
    "item_separator": ", ",
    "key_separator": ": ",
    "coerce_one_of": True,
}
_LONGEST_SCHEMA = 120_000
# The most schemas that a schema may combine by allOf. If the schemas have patterns, the time to compile them
# grows exponentially with their number.
_MOST_INTERSECTED = 8


def read_format(body: Fields) -> str | None:
    """The JSON schema that `response_format` requires; None: any text is allowed.

    Raises:
        RequestError: the format is unknown, or its schema is not an object.
    """
    given = body.object(_PARAM)
    if given is None:
        return None
    kind = given.choice("type", ("text", "json_object", "json_schema"))
    if kind == "json_object" and given.has("schema"):  # the form of llama.cpp and others
        kind = "json_schema"
    if kind == "json_object":
        return '{"type": "object"}'
    if kind == "json_schema":
        inner = given.object("json_schema") or given  # llama.cpp also accepts the schema in the outer object
        inner.required("schema")
        schema = inner.object("schema")
        return None if schema is None else json.dumps(schema.values, allow_nan=False)
    given.required("type")
    return None


def calls(tools: list[dict[str, Any]]) -> str:
    """The JSON schema that a call to any of `tools` must follow."""
    return json.dumps({"anyOf": [_call(tool["function"]) for tool in tools]}, allow_nan=False)


def _call(function: dict[str, Any]) -> dict[str, Any]:
    fields = {
        "name": {"const": function["name"]},
        "arguments": function.get("parameters") or {"type": "object"},
    }
    return {"type": "object", "properties": fields, "required": list(fields), "additionalProperties": False}


class Guides:
    """Makes guides. `Guides` keeps the data that all guides for a tokenizer share."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._known: dict[int, tuple[Tokenizer, Any]] = {}

    def guide(self, tokenizer: Tokenizer, schema: str) -> Guide:
        """A guide for one answer that follows a JSON schema.

        Raises:
            RequestError: the schema is wrong or too complex, or the package llguidance is not installed.
        """
        package = _package()
        _require_small(schema)
        try:
            grammar = package.LLMatcher.grammar_from_json_schema(schema, overrides=_RULES)
            matcher = package.LLMatcher(self._tokens(package, tokenizer), grammar, log_level=0)
            problem = matcher.get_error()
        except ValueError as error:
            problem = str(error)
        if problem:
            raise RequestError(
                f"the schema cannot be used: {brief(problem, 300)}", param=_PARAM, code="invalid_schema"
            )
        return Guide(matcher)

    def _tokens(self, package: Any, tokenizer: Tokenizer) -> Any:
        with self._lock:
            if id(tokenizer) not in self._known:
                while len(self._known) >= _MOST_TOKENIZERS:
                    del self._known[next(iter(self._known))]
                made = package.LLTokenizer(
                    tokenizer.to_json(), n_vocab=tokenizer.vocab_size, eos_token=sorted(tokenizer.eos_ids)
                )
                # The tokenizer is kept, so that no other object can get its id.
                self._known[id(tokenizer)] = tokenizer, made
            return self._known[id(tokenizer)][1]


def _require_small(schema: str) -> None:
    """Refuse a schema that would take llguidance too long to compile."""
    if len(schema) > _LONGEST_SCHEMA:
        raise RequestError(
            f"the schema has {len(schema):,} characters, at most {_LONGEST_SCHEMA:,} are accepted",
            param=_PARAM,
            code="invalid_schema",
        )
    waiting, count = [json.loads(schema)], 0
    while waiting:
        value = waiting.pop()
        if isinstance(value, dict):
            found = value.get("allOf")
            count += len(found) if isinstance(found, list) else 0
            waiting += value.values()
        elif isinstance(value, list):
            waiting += value
    if count > _MOST_INTERSECTED:
        raise RequestError(
            f"the schema combines {count} schemas by allOf, at most {_MOST_INTERSECTED} are accepted",
            param=_PARAM,
            code="invalid_schema",
        )


class Guide:
    """Implements the engine's `Guide`: lets the model generate only tokens that the grammar allows next."""

    def __init__(self, matcher: Any) -> None:
        self._matcher = matcher

    def restrict(self, scores: Array) -> None:
        bits = np.frombuffer(self._matcher.compute_bitmask(), np.uint8)
        allowed = np.unpackbits(bits, bitorder="little")[: len(scores)].astype(bool)
        if self._matcher.is_error() or not allowed.any():
            problem = self._matcher.get_error() or "the grammar allows no next token"
            raise RequestError(
                f"the schema cannot be followed: {brief(problem, 300)}", param=_PARAM, code="invalid_schema"
            )
        scores[: len(allowed)][~allowed] = -np.inf
        scores[len(allowed) :] = -np.inf

    def advance(self, token: int) -> None:
        self._matcher.consume_token(token)


def _package() -> Any:
    try:
        import llguidance
    except ModuleNotFoundError:
        raise RequestError(
            'response_format and forced tool calls need the package llguidance: pip install "nplora[serve]"',
            400,
            _PARAM,
            "unsupported_parameter",
        ) from None
    return llguidance
