"""Reads the tokenizer of a model's directory: tokenizer.json and the files beside it."""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from nplora.formats import files, strict_json
from nplora.formats.errors import FormatError, UnsafeError, UnsupportedError, brief
from nplora.formats.files import StrPath
from nplora.formats.tokenizer_json import MAX_BYTES, MOST_VALUES, TOKENIZER, TOKENIZER_CONFIG
from nplora.tokenizer import character_table, split_pattern
from nplora.tokenizer.character_table import MAX_GROWTH
from nplora.tokenizer.tokenizer import Tokenizer, backend_errors, backend_package

MAX_CONFIG = 20_000_000
_MOST_SETTINGS = 1 << 20  # values in each of the other files; an added token takes 8 values
_MAX_TEMPLATE = 1_000_000
_TABLE = "precompiled_charsmap"
_MAY_HAVE_TABLE = re.compile(rb"precompiled_charsmap|\\u00[4-7]")  # the key, or an escaped letter in any key
_SEQUENCES = ("normalizers", "pretokenizers", "decoders", "processors")  # keys of the steps of a Sequence


def from_directory(path: StrPath) -> Tokenizer:
    """Read the tokenizer of a model's directory, from the files that transformers writes.

    Only the file tokenizer.json is required. The file tokenizer_config.json contains the texts of BOS and
    EOS. The chat template is in tokenizer_config.json or in chat_template.jinja. The file
    generation_config.json may list more tokens that end a turn. Settings for padding and truncation in
    tokenizer.json are ignored, because nplora packs sequences without padding.

    Args:
        path: the directory.
    Raises:
        FileNotFoundError: there is no tokenizer.json.
        FormatError: a file is damaged or contradicts itself.
        LimitError: there are too many tokens or special tokens.
        UnsafeError: the tokenizer could run for ever, or make a very long text from a short one.
        ModuleNotFoundError: the package `tokenizers` is not installed.

    >>> import tokenizers
    >>> Path("toy").mkdir(exist_ok=True)
    >>> model = tokenizers.models.BPE({"a": 0, "b": 1, "ab": 2}, [("a", "b")])
    >>> tokenizers.Tokenizer(model).save("toy/tokenizer.json")
    >>> from_directory("toy").encode("abba")
    [2, 1, 0]
    """
    directory = Path(path)
    backend = _backend(directory / TOKENIZER)
    config = read_json(directory / TOKENIZER_CONFIG)
    generation = read_json(directory / "generation_config.json")
    source = files.name(directory)
    ends = generation.get("eos_token_id")
    return Tokenizer(
        backend,
        source,
        vocab_size=max(backend.get_vocab().values(), default=-1) + 1,
        bos_id=_named(backend, config, "bos_token", source),
        eos_id=_named(backend, config, "eos_token", source),
        end_ids=[_checked(backend, id_, source) for id_ in (ends if isinstance(ends, list) else [ends])
                 if id_ is not None],
        chat_template=chat_template(directory, config),
    )  # fmt: skip


def _backend(path: Path) -> Any:
    raw, source = bytes(files.read(path, MAX_BYTES)), files.name(path)
    growth = 1
    if _MAY_HAVE_TABLE.search(raw):  # for a damaged table, the package would print a stack trace
        growth = _growth_of_tables(strict_json.loads(raw, source, MOST_VALUES), source)
    else:
        strict_json.require_size(raw, source, MOST_VALUES)
    with backend_errors(f"{source}: not a tokenizer"):
        backend = backend_package().Tokenizer.from_buffer(raw)
    normalizer = backend.normalizer
    parts = (normalizer, backend.pre_tokenizer, backend.decoder, backend.post_processor)
    for part in parts:
        if part is not None:
            steps = list(_steps(json.loads(part.__getstate__())))
            _require_bounded(steps, source, growth if part is normalizer else 1)
            _require_tokens(backend, steps, source)
    backend.no_padding()
    backend.no_truncation()
    return backend


def _require_tokens(backend: Any, steps: list[dict[str, Any]], source: str) -> None:
    """Raise FormatError if a post-processor adds a token id that does not exist."""
    for step in steps:
        ids = [step[key][1] for key in ("cls", "sep") if key in step]
        if step.get("type") == "TemplateProcessing":
            ids += [id_ for token in step["special_tokens"].values() for id_ in token["ids"]]
        for id_ in ids:
            if backend.id_to_token(id_) is None:
                raise FormatError(
                    f"{source}: {step['type']} adds the token id {id_}, which is not in the vocabulary"
                )


def _require_bounded(steps: list[dict[str, Any]], source: str, growth: int) -> None:
    """Raise UnsafeError if the steps of a tokenizer could run for ever, or could make a very long text.

    `growth` is the largest factor by which the character tables in `steps` can lengthen a text.
    """
    for step in steps:
        pattern = step.get("pattern")
        text = pattern.get("Regex") if isinstance(pattern, dict) else None
        if isinstance(text, str) and not split_pattern.is_safe(text):
            raise UnsafeError(f"{source}: the regular expression {brief(text)} could run for ever")
        growth *= _growth(step)
        if growth > MAX_GROWTH:
            raise UnsafeError(
                f"{source}: the step {brief(step.get('type'))} could make a text more than {MAX_GROWTH} "
                "times as long"
            )


def _steps(part: Any) -> Iterator[dict[str, Any]]:
    """Yield all steps of a setting of a tokenizer.json, such as its normalizer.

    A step of the type "Sequence" is yielded, and also each step that the sequence contains.
    """
    waiting = [part]
    while waiting:
        value = waiting.pop()
        if isinstance(value, dict):
            yield value
            waiting.extend(value.get(key) for key in _SEQUENCES if key in value)
        elif isinstance(value, list):
            waiting.extend(value)


def _growth(step: dict[str, Any]) -> int:
    """Return the largest factor by which a step can lengthen a text or the list of its tokens.

    For a step with a character table, return 1, because `_growth_of_tables` computes the factors of tables.
    """
    kind = step.get("type")
    if kind == "Replace":
        replaced = step["pattern"].get("String", " ")
        return max(1, -(-len(step["content"]) // max(1, len(replaced))))
    if kind == "Prepend":
        return 1 + len(step["prepend"])
    if kind == "TemplateProcessing":
        return max(1, len(step["single"]))
    return 1


def _growth_of_tables(fields: Any, source: str) -> int:
    """Return the product of the factors by which a tokenizer.json's character tables can lengthen a text.

    Raises FormatError if a table is damaged.
    """
    growth, waiting = 1, [fields.get("normalizer")] if isinstance(fields, dict) else []
    while waiting:
        value = waiting.pop()
        if isinstance(value, dict):
            table = value.get(_TABLE)
            growth *= _table_growth(table, source) if isinstance(table, str) else 1
        waiting.extend(
            value.values() if isinstance(value, dict) else value if isinstance(value, list) else []
        )
    return growth


def _table_growth(table: str, source: str) -> int:
    """Return `character_table.growth` for a table that is encoded in base64."""
    try:
        content = base64.b64decode(table, validate=True)
    except ValueError as error:  # b64decode raises ValueError for characters beyond ASCII too
        raise FormatError(f"{source}: {_TABLE} is damaged: {error}") from error
    return character_table.growth(content, source)


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object from a file. If the file does not exist, return an empty dictionary."""
    try:
        raw = files.read(path, MAX_CONFIG)
    except FileNotFoundError:
        return {}
    value = strict_json.loads(bytes(raw), files.name(path), _MOST_SETTINGS)
    if not isinstance(value, dict):
        raise FormatError(f"{files.name(path)}: {brief(value)}, expected an object")
    return value


def _named(backend: Any, config: dict[str, Any], key: str, source: str) -> int | None:
    """Return the id of the special token whose text is config[key] or config[key]["content"]."""
    value = config.get(key)
    name = value.get("content") if isinstance(value, dict) else value
    if name is None:
        return None
    id_: int | None = backend.token_to_id(name) if isinstance(name, str) else None
    if id_ is None:
        raise FormatError(f"{source}: {key} is {brief(value)}, which is not in the vocabulary")
    return id_


def _checked(backend: Any, id_: object, source: str) -> int:
    if type(id_) is not int or not 0 <= id_ < 1 << 32 or backend.id_to_token(id_) is None:
        raise FormatError(
            f"{source}: eos_token_id {brief(id_)} of generation_config.json is not in the vocabulary"
        )
    return id_


def chat_template(directory: Path, config: dict[str, Any]) -> str | None:
    path = directory / "chat_template.jinja"
    try:
        return bytes(files.read(path, _MAX_TEMPLATE)).decode("utf-8")
    except FileNotFoundError:
        template = config.get("chat_template")
    except UnicodeDecodeError as error:
        raise FormatError(f"{files.name(path)}: not UTF-8 at byte {error.start:,}") from error
    if isinstance(template, list):  # several named templates
        named = {
            entry["name"]: entry.get("template")
            for entry in template
            if isinstance(entry, dict) and "name" in entry
        }
        template = named.get("default")
    if not isinstance(template, str | None):
        raise UnsupportedError(f"{files.name(directory)}: chat_template is {brief(template)}, expected text")
    return template
