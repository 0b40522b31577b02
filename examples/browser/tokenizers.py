"""A stand-in for the package tokenizers, which has no build for WebAssembly.

It has what nplora uses of that package for the byte-level BPE of SmolLM2, GPT-2, OLMo and StarCoder, in plain
Python. The names and the results are those of the package; tests/examples/test_browser.py compares them.
Other kinds of tokenizers end in AttributeError or NotImplementedError. The page lays this file beside nplora.
"""

from __future__ import annotations

import functools
import itertools
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

# ---- splitting ----

# GPT-2's expression: 's|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+
# The module re does not know \p{L}, so that a text is searched together with the classes of its characters.
_CONTRACTION = re.compile("'(?:s|t|re|ve|m|ll|d)")
_WORD = re.compile(" ?L+| ?N+| ?O+|[ S]+(?![^ S])|[ S]+")
_DIGIT_OR_TEXT = re.compile("N|[^N]+")
_WHITE_SPACE = "\t\n\v\f\r\x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000"
_IS_WHITE_SPACE = re.compile(f"[{_WHITE_SPACE}]")


class _Classes(dict[int, str]):
    """The class of each character: L letter, N number, " " space, S other white space, O other."""

    def __missing__(self, code: int) -> str:
        character = chr(code)
        if character == " ":
            found = " "
        elif character.isalpha():
            found = "L"
        elif character.isnumeric():
            found = "N"
        else:
            found = "S" if _IS_WHITE_SPACE.match(character) else "O"
        self[code] = found
        return found


_CLASSES = _Classes()


def _words(text: str) -> Iterator[str]:
    classes = text.translate(_CLASSES)
    position = 0
    while position < len(text):
        found = _CONTRACTION.match(text, position) or _WORD.match(classes, position)
        assert found is not None  # every class is in the expression
        yield text[position : found.end()]
        position = found.end()


def _digits(text: str) -> Iterator[str]:
    return (text[found.start() : found.end()] for found in _DIGIT_OR_TEXT.finditer(text.translate(_CLASSES)))


# ---- bytes as characters ----


def _byte_characters() -> dict[int, str]:
    """GPT-2's character for each byte: itself if it is visible, else a character from U+0100 on."""
    visible = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [byte for byte in range(256) if byte not in visible]
    return {byte: chr(byte) for byte in visible} | {byte: chr(256 + i) for i, byte in enumerate(hidden)}


_CHARACTER = _byte_characters()
_BYTE = {character: byte for byte, character in _CHARACTER.items()}


# ---- the parts of a tokenizer ----


class _BPE:
    """Merges the pairs of a word in the order of the list `merges`."""

    def __init__(
        self, vocab: dict[str, int], merges: Sequence[tuple[str, str]], ignore_merges: bool, fuse_unk: bool
    ) -> None:
        self.vocab, self.ranks = dict(vocab), {pair: rank for rank, pair in enumerate(merges)}
        self.ignore_merges = ignore_merges
        self.ids = functools.lru_cache(1 << 16)(self._ids)

    def _ids(self, word: str) -> tuple[int, ...]:
        if self.ignore_merges and word in self.vocab:
            return (self.vocab[word],)
        parts = [character for character in word if character in self.vocab]
        while len(parts) > 1:
            ranks = [self.ranks.get(pair, len(self.ranks)) for pair in itertools.pairwise(parts)]
            least = min(ranks)
            if least == len(self.ranks):
                break
            first = ranks.index(least)
            parts[first : first + 2] = ["".join(parts[first : first + 2])]
        return tuple(self.vocab[part] for part in parts)


@dataclass(frozen=True)
class AddedToken:
    content: str
    special: bool = False
    normalized: bool = True


@dataclass
class _Template:
    """Tokens before and after a text, which has the name "$A"."""

    single: Sequence[str]
    special_tokens: Sequence[tuple[str, int]]

    def around(self) -> tuple[list[int], list[int]]:
        ids, middle = dict(self.special_tokens), list(self.single).index("$A")
        return [ids[name] for name in self.single[:middle]], [ids[name] for name in self.single[middle + 1 :]]


@dataclass
class _Encoding:
    ids: list[int] = field(default_factory=list)


class Tokenizer:
    def __init__(self, model: _BPE) -> None:
        self._model = model
        self._names = {id_: token for token, id_ in model.vocab.items()}
        self._added: dict[int, AddedToken] = {}
        self.pre_tokenizer: list[str] = []
        self.decoder: Any = None
        self.post_processor: _Template | None = None
        self.encode_special_tokens = False

    # ---- tokens ----

    def add_tokens(self, tokens: Sequence[AddedToken]) -> None:
        for token in tokens:
            id_ = self.token_to_id(token.content)
            id_ = max(self._names, default=-1) + 1 if id_ is None else id_
            self._names[id_], self._added[id_] = token.content, token

    add_special_tokens = add_tokens

    def get_added_tokens_decoder(self) -> dict[int, AddedToken]:
        return dict(self._added)

    def token_to_id(self, token: str) -> int | None:
        added = next((id_ for id_, each in self._added.items() if each.content == token), None)
        return self._model.vocab.get(token) if added is None else added

    def id_to_token(self, id_: int) -> str | None:
        return self._names.get(id_)

    def num_special_tokens_to_add(self, is_pair: bool) -> int:
        return sum(map(len, self._around()))

    # ---- text ----

    def encode(self, text: str, add_special_tokens: bool = True) -> _Encoding:
        before, after = self._around() if add_special_tokens else ([], [])
        return _Encoding([*before, *self._ids(text), *after])

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        data = bytearray()
        for id_ in ids:
            token = self._names.get(id_, "")
            if skip_special_tokens and id_ in self._added and self._added[id_].special:
                continue
            is_bytes = all(character in _BYTE for character in token)
            data += bytes(_BYTE[character] for character in token) if is_bytes else token.encode()
        return data.decode(errors="replace")

    def to_str(self) -> str:
        """All that decides the tokens of a text. This is not the text of a tokenizer.json."""
        added = {id_: (token.content, token.special) for id_, token in self._added.items()}
        steps = self.pre_tokenizer, self._model.ignore_merges, self._around()
        return json.dumps([self._model.vocab, list(self._model.ranks), added, steps])

    def _around(self) -> tuple[list[int], list[int]]:
        return ([], []) if self.post_processor is None else self.post_processor.around()

    def _ids(self, text: str) -> Iterator[int]:
        names = {
            token.content: id_
            for id_, token in self._added.items()
            if token.content and not (token.special and self.encode_special_tokens)
        }
        if not names:
            yield from self._ids_of_text(text)
            return
        longest_first = sorted(names, key=len, reverse=True)
        for piece in re.split(f"({'|'.join(map(re.escape, longest_first))})", text):
            if piece in names:
                yield names[piece]
            else:
                yield from self._ids_of_text(piece)

    def _ids_of_text(self, text: str) -> Iterator[int]:
        for piece in _digits(text) if "digits" in self.pre_tokenizer else [text]:
            for word in _words(piece):
                yield from self._model.ids("".join(_CHARACTER[byte] for byte in word.encode()))


# ---- the names of the package ----


def _byte_level(add_prefix_space: bool, use_regex: bool) -> str:
    if add_prefix_space or not use_regex:
        raise NotImplementedError("another expression than GPT-2's")
    return "byte-level"


def _only_single_digits(individual_digits: bool) -> str:
    assert individual_digits
    return "digits"


models = SimpleNamespace(BPE=_BPE)
pre_tokenizers = SimpleNamespace(ByteLevel=_byte_level, Digits=_only_single_digits, Sequence=list)
decoders = SimpleNamespace(ByteLevel=lambda: None)
processors = SimpleNamespace(TemplateProcessing=_Template)
