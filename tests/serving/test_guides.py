"""Answers that follow a JSON schema: whatever the model's scores are, the text fits."""

import json
from pathlib import Path
from typing import Any

import live_server
import numpy as np
import pytest

import nplora
from nplora.serving.api import guides
from nplora.serving.fields import Fields
from nplora.serving.request_error import RequestError
from nplora.tokenizer import Tokenizer

pytest.importorskip("llguidance")

SCHEMAS: list[tuple[Any, Any]] = [
    ({"type": "integer", "minimum": 3, "maximum": 12}, lambda value: 3 <= value <= 12),
    ({"enum": ["a", 5, None]}, lambda value: value in ("a", 5, None)),
    ({"type": "string", "pattern": "^[ab]{2,4}$"}, lambda value: 1 < len(value) < 5 and {*value} <= {*"ab"}),
    ({"type": "array", "items": {"type": "boolean"}, "maxItems": 3}, lambda value: len(value) <= 3),
    (
        {"oneOf": [{"type": "null"}, {"type": "object", "properties": {}, "additionalProperties": False}]},
        lambda value: value in (None, {}),
    ),
    (
        {"$defs": {"x": {"type": "string", "maxLength": 2}}, "type": "object",
         "properties": {"é": {"$ref": "#/$defs/x"}}, "required": ["é"], "additionalProperties": False},
        lambda value: set(value) == {"é"} and len(value["é"]) <= 2,
    ),
]  # fmt: skip


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    directory: Path = tmp_path_factory.mktemp("model")
    return nplora.load_model(live_server.save_model(directory)).tokenizer


@pytest.mark.parametrize(
    ("schema", "fits"), SCHEMAS, ids=lambda value: json.dumps(value)[:30] if isinstance(value, dict) else ""
)
def test_random_scores_make_a_text_that_fits(tokenizer: Tokenizer, schema: Any, fits: Any) -> None:
    made = guides.Guides()
    for seed in range(5):
        rng, guide, ids = np.random.default_rng(seed), made.guide(tokenizer, json.dumps(schema)), list[int]()
        while len(ids) < 200:
            scores = rng.standard_normal(tokenizer.vocab_size + 3)  # the model may have more rows
            guide.restrict(scores)
            token = int(scores.argmax())
            guide.advance(token)
            if token in tokenizer.eos_ids:
                break
            ids.append(token)
        text = tokenizer.decode(ids)
        value = json.loads(text)
        assert fits(value)
        assert text == json.dumps(value, ensure_ascii=False) or isinstance(value, str)


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "nothing"},
        {"type": "string", "pattern": "["},
        {"type": "string", "pattern": "(?=a)b"},
        {"type": "object", "properties": {f"p{n}": {} for n in range(20_000)}},
        {"not": {"type": "string"}},
        {"allOf": [{"type": "string", "pattern": f"[a-z]*{letter}[a-z]*"} for letter in "abcdefghijklmnop"]},
        {"$ref": "http://example.org/schema"},
    ],
    ids=lambda schema: json.dumps(schema)[:40],
)  # fmt: skip
def test_a_schema_that_cannot_be_used_is_refused(tokenizer: Tokenizer, schema: Any) -> None:
    with pytest.raises(RequestError) as caught:
        guides.Guides().guide(tokenizer, json.dumps(schema))
    assert caught.value.status == 400
    assert caught.value.code == "invalid_schema"


def test_a_schema_without_any_text_is_refused_at_its_first_token(tokenizer: Tokenizer) -> None:
    guide = guides.Guides().guide(tokenizer, json.dumps({"$ref": "#"}))
    with pytest.raises(RequestError, match="cannot be followed"):
        guide.restrict(np.zeros(tokenizer.vocab_size))


def test_the_formats_of_a_request() -> None:
    schema = {"type": "object", "properties": {"x": {"const": 1}}}
    for given, expected in [
        (None, None),
        ({"type": "text"}, None),
        ({"type": "json_object"}, {"type": "object"}),
        ({"type": "json_schema", "json_schema": {"name": "x", "strict": True, "schema": schema}}, schema),
        ({"type": "json_schema", "schema": schema}, schema),
    ]:
        found = guides.read_format(Fields({"response_format": given}))
        assert (found and json.loads(found)) == expected
    for wrong in [
        {},
        {"type": "xml"},
        {"type": "json_schema"},
        {"type": "json_schema", "json_schema": {"schema": 1}},
        5,
    ]:
        with pytest.raises(RequestError):
            guides.read_format(Fields({"response_format": wrong}))
