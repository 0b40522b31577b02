"""Reads the added tokens of a tokenizer.json. Also holds the limit for the size of such a file."""

import json
from collections import Counter
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import Any

from nplora.formats import strict_json
from nplora.formats.errors import FormatError, brief

TOKENIZER = "tokenizer.json"
TOKENIZER_CONFIG = "tokenizer_config.json"
FILES = (TOKENIZER, TOKENIZER_CONFIG)  # an adapter with new tokens has these files too
MAX_BYTES = 100_000_000
MAX_SPECIAL = 1 << 17  # special tokens, which are searched for in each text; speech models have 65,536
# The largest accepted number of values in tokenizer.json at each depth. Depth 1 holds the file's fields.
# Depth 2 holds the added tokens and the fields of the tokenizer's model. Depth 3 holds the vocabulary, the
# merges and the fields of the added tokens; the largest files in use have 850,000 values at this depth.
# Depth 4 holds the two parts of each merge.
MOST_VALUES = (1000, MAX_SPECIAL + 1000, 3 << 19, 1 << 21, 1 << 16)
MAX_TEXT = 1 << 12  # characters of an added token
_MAX_ID = 1 << 31


@dataclass(frozen=True)
class AddedToken:
    """A token that a tokenizer.json lists outside the vocabulary of its BPE, WordPiece or other model.

    Attributes:
        id: the token's id, which is also the number of the token's row in the embedding.
        text: the text that becomes this token.
        special: whether the token is a control token, such as the token that ends a text. Plain text never
            becomes a special token.
    """

    id: int
    text: str
    special: bool = False


def added_tokens(raw: bytes, source: str, wanted: Collection[int] | None = None) -> tuple[AddedToken, ...]:
    """Read the added tokens of a tokenizer.json.

    Args:
        source: the file's name in error messages.
        wanted: the ids of the tokens to return, or None for all.
    Raises:
        FormatError: the file is damaged. LimitError: the file holds too many values.
    """
    fields = strict_json.loads(raw, source, MOST_VALUES)
    listed = fields.get("added_tokens") if isinstance(fields, dict) else None
    if not isinstance(listed, list | None):
        raise FormatError(f"{source}: added_tokens is {brief(listed)}, expected a list")
    found = _distinct([_token(entry, "content", source) for entry in listed or ()], source)
    return tuple(token for token in found if wanted is None or token.id in wanted)


def dumps(tokens: Iterable[AddedToken]) -> str:
    """Write tokens as a short JSON text for the metadata of an adapter."""
    rows = [{"id": token.id, "text": token.text, "special": token.special} for token in tokens]
    return json.dumps(rows, allow_nan=False)


def loads(text: str, source: str) -> tuple[AddedToken, ...]:
    """Read the text that `dumps` wrote.

    Raises:
        FormatError: the text is damaged.
    """
    listed = strict_json.loads(text.encode(), source)
    if not isinstance(listed, list):
        raise FormatError(f"{source}: {brief(listed)}, expected a list of tokens")
    return _distinct([_token(entry, "text", source) for entry in listed], source)


def _distinct(tokens: list[AddedToken], source: str) -> tuple[AddedToken, ...]:
    for what, values in (("id", [t.id for t in tokens]), ("text", [t.text for t in tokens])):
        if len(set(values)) < len(values):
            twice = Counter(values).most_common(1)[0][0]
            raise FormatError(f"{source}: two added tokens have the {what} {brief(twice)}")
    return tuple(tokens)


def _token(entry: Any, key: str, source: str) -> AddedToken:
    fields: dict[str, Any] = entry if isinstance(entry, dict) else {}
    id_, text, special = fields.get("id"), fields.get(key), fields.get("special", False)
    is_text = isinstance(text, str) and 0 < len(text) <= MAX_TEXT
    if type(id_) is not int or not 0 <= id_ < _MAX_ID or not is_text or type(special) is not bool:
        raise FormatError(
            f"{source}: an added token is {brief(entry)}, expected an id, a text of 1 to {MAX_TEXT:,} "
            "characters, and whether it is special"
        )
    return AddedToken(id_, str(text), special)
