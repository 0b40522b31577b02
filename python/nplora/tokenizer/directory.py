"""The tokenizer in a model's directory: tokenizer.json, and what stands beside it."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from nplora.formats import files, strict_json
from nplora.formats.errors import FormatError, UnsafeError, UnsupportedError, brief
from nplora.formats.files import StrPath
from nplora.tokenizer.tokenizer import Tokenizer, backend_package

MAX_TOKENIZER = 100_000_000  # bytes
MAX_CONFIG = 20_000_000
MAX_PATTERN = 1000  # characters
_MAX_TEMPLATE = 1_000_000


def from_directory(path: StrPath) -> Tokenizer:
    """The tokenizer of a model's directory, as transformers writes it.

    tokenizer.json alone is needed. tokenizer_config.json names BOS, EOS and the chat template (or
    chat_template.jinja has it), generation_config.json more tokens that end a turn. Padding and truncation
    that tokenizer.json asks for are switched off: they are the business of who makes batches.

    Raises:
        FileNotFoundError: there is no tokenizer.json.
        FormatError: a file is damaged or says something that is not possible.
        UnsafeError: a regular expression in it could run for ever.
        ModuleNotFoundError: the package `tokenizers` is not installed.
    """
    directory = Path(path)
    backend = _backend(directory / "tokenizer.json")
    config = read_json(directory / "tokenizer_config.json")
    generation = read_json(directory / "generation_config.json")
    source = files.name(directory)
    ends = generation.get("eos_token_id")
    return Tokenizer(
        backend,
        source,
        bos_id=_named(backend, config, "bos_token", source),
        eos_id=_named(backend, config, "eos_token", source),
        end_ids=[_checked(backend, id_, source) for id_ in (ends if isinstance(ends, list) else [ends])
                 if id_ is not None],
        chat_template=chat_template(directory, config),
    )  # fmt: skip


def _backend(path: Path) -> Any:
    package = backend_package()
    raw = bytes(files.read(path, MAX_TOKENIZER))
    try:
        backend = package.Tokenizer.from_buffer(raw)
    except BaseException as error:  # Rust's panics are no Exceptions
        if isinstance(error, KeyboardInterrupt | SystemExit | MemoryError):
            raise
        raise FormatError(f"{files.name(path)}: not a tokenizer: {brief(str(error), 300)}") from None
    for pattern in _patterns(backend):
        if len(pattern) > MAX_PATTERN or _NESTED.search(pattern):
            raise UnsafeError(
                f"{files.name(path)}: the regular expression {brief(pattern)} could run for ever"
            )
    backend.no_padding()
    backend.no_truncation()
    return backend


# A repeated group with a repetition in it, such as (a+)+, where backtracking takes exponential time. Inner
# groups and character classes are taken for one character each.
_NESTED = re.compile(r"\((?:[^()\\]|\\.)*[*+}](?:[^()\\]|\\.)*\)(?:[*+]|\{\d*,)")


def _patterns(backend: Any) -> Iterator[str]:
    """The regular expressions of all parts."""
    waiting: list[Any] = [
        json.loads(part.__getstate__())
        for part in (backend.normalizer, backend.pre_tokenizer, backend.decoder, backend.post_processor)
        if part is not None
    ]
    while waiting:
        value = waiting.pop()
        if isinstance(value, dict):
            if isinstance(value.get("Regex"), str):
                yield value["Regex"]
            waiting.extend(value.values())
        elif isinstance(value, list):
            waiting.extend(value)


def read_json(path: Path) -> dict[str, Any]:
    """An object of JSON; empty where there is no file."""
    try:
        raw = files.read(path, MAX_CONFIG)
    except FileNotFoundError:
        return {}
    value = strict_json.loads(bytes(raw), files.name(path))
    if not isinstance(value, dict):
        raise FormatError(f"{files.name(path)}: {brief(value)}, expected an object")
    return value


def _named(backend: Any, config: dict[str, Any], key: str, source: str) -> int | None:
    """The id of a token that the configuration names: as a string, or as an object with its content."""
    value = config.get(key)
    name = value.get("content") if isinstance(value, dict) else value
    if name is None:
        return None
    id_: int | None = backend.token_to_id(name) if isinstance(name, str) else None
    if id_ is None:
        raise FormatError(f"{source}: {key} is {brief(value)}, which is no token")
    return id_


def _checked(backend: Any, id_: object, source: str) -> int:
    if type(id_) is not int or id_ < 0 or backend.id_to_token(id_) is None:
        raise FormatError(f"{source}: eos_token_id {brief(id_)} of generation_config.json is no token")
    return id_


def chat_template(directory: Path, config: dict[str, Any]) -> str | None:
    path = directory / "chat_template.jinja"
    try:
        return bytes(files.read(path, _MAX_TEMPLATE)).decode("utf-8")
    except FileNotFoundError:
        template = config.get("chat_template")
    except UnicodeDecodeError as error:
        raise FormatError(f"{files.name(path)}: not UTF-8 at byte {error.start:,}") from error
    if isinstance(template, list):  # several, by name
        named = {
            entry["name"]: entry.get("template")
            for entry in template
            if isinstance(entry, dict) and "name" in entry
        }
        template = named.get("default")
    if not isinstance(template, str | None):
        raise UnsupportedError(f"{files.name(directory)}: chat_template is {brief(template)}")
    return template
