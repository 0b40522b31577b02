"""Tokenizer: one interface for what a GGUF file or a directory says of a model's text."""

from __future__ import annotations

import datetime
import os
import re
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy.typing as npt

from nplora.formats.errors import FormatError, UnsupportedError, brief
from nplora.tokenizer.chat_template import ChatTemplate, plain
from nplora.tokenizer.streaming import StreamDecoder

Message = Mapping[str, Any]
Objects = Sequence[Mapping[str, Any]] | None  # tools as JSON schemas, or documents

# Tokens that end a turn or a text in one of the model families, whatever their file calls its "eos".
END_TOKENS = (
    "</s>",
    "<|endoftext|>",
    "<|end_of_text|>",
    "<|im_end|>",
    "<|eot_id|>",
    "<|eom_id|>",
    "<|end|>",
    "<end_of_turn>",
    "<｜end▁of▁sentence｜>",
)
MAX_SPECIAL = 1 << 17  # tokens that are looked for in a text before it is cut; models of speech have 65,536
_SPACES = ("▁", "Ġ")  # as the vocabularies of SentencePiece and of byte-level models write a space
# If the first tokens of a long text are wanted, its beginning is encoded: `_CHARACTERS` a token.
# The last tokens of a beginning may change with what follows, so they do not count.
_CHARACTERS, _UNSURE = 8, 1024
_LINE = re.compile(r"\n(?=[^\W\d_])")
_SENTINELS = ("\n", "\x01", "\ue000")  # characters that hardly any token continues
TRAINING_TIME = datetime.datetime(2024, 7, 26)  # the time that chat templates get in training
# A chat is rendered and encoded twice for every turn of the assistant's: messages times turns, in about 10 s.
_MOST_RENDERED = 1 << 19
_TOKENS_PER_MESSAGE = 64
# While a template is rendered, a special token that a message spells out is its number between these two.
_QUOTE, _UNQUOTE = "\U000ff800", "\U000ff801"
_QUOTED = re.compile(f"{_QUOTE}([0-9]+){_UNQUOTE}")

_encoding = threading.Lock()  # one for all tokenizers: the backend holds Python's own lock while it encodes


def _renew_lock() -> None:
    """After a fork: the thread that held the lock may be missing in the child."""
    global _encoding
    _encoding = threading.Lock()


os.register_at_fork(after_in_child=_renew_lock)


@dataclass(frozen=True)
class Chat:
    """A chat as tokens.

    Attributes:
        ids: the tokens.
        turns: the places of the tokens of each assistant's turn, its end included, by the message's index.
        unused: which of "tools" and "documents" were given and change nothing in what the template writes.
    """

    ids: list[int]
    turns: dict[int, range]
    unused: tuple[str, ...] = ()

    @property
    def is_reply(self) -> list[bool]:
        """For each token, whether it belongs to an assistant's turn."""
        replies = {place for turn in self.turns.values() for place in turn}
        return [place in replies for place in range(len(self.ids))]


class Tokenizer:
    """Encodes and decodes text with a model's own vocabulary and rules.

    Make one with `from_gguf` or `from_directory`.

    Attributes:
        eos_id: the token that ends a text, None where the model names none.
        bos_id: the token that begins one, None where the model names none.
        eos_ids: all tokens after which generation ends: `eos_id` and the ends of turns.
        vocab_size: one more than the largest id.
        chat_template: how the model writes a chat, None where it names none.
    """

    def __init__(
        self,
        backend: Any,
        source: str,
        *,
        vocab_size: int,
        bos_id: int | None,
        eos_id: int | None,
        end_ids: Iterable[int] = (),
        chat_template: str | None = None,
    ) -> None:
        self._backend = backend
        self.source = source
        added = backend.get_added_tokens_decoder()
        self._special = {token.content: id_ for id_, token in added.items() if token.special}
        names = sorted(self._special, key=len, reverse=True)
        self._special_pattern = re.compile(f"({'|'.join(map(re.escape, names)) or '(?!)'})")
        self.vocab_size, self.bos_id, self.eos_id = vocab_size, bos_id, eos_id
        named = {self._special[name] for name in END_TOKENS if name in self._special}
        self.eos_ids = frozenset({*end_ids, *named, *({eos_id} - {None})})
        self.chat_template = None if chat_template is None else ChatTemplate(chat_template, source)

    def __repr__(self) -> str:
        return f"Tokenizer({self.source!r}, {self.vocab_size} tokens)"

    # ---- text ----

    def encode(
        self,
        text: str,
        add_special_tokens: bool = False,
        *,
        parse_special: bool = False,
        most: int | None = None,
    ) -> list[int]:
        """The tokens of a text.

        Args:
            add_special_tokens: begin (and end) it as the model has it: BOS for many, nothing for some.
            parse_special: read "<|im_end|>" and its like as the tokens that they name, as in the output of
                `apply_chat_template`. Off, for text of strangers, they are letters like others.
            most: how many tokens are wanted. For a long text, the first `most` are returned and the rest is
                not read. For a short one, all are returned, which may be more.
        Raises:
            ValueError: half a surrogate pair, which UTF-8 cannot hold.
            FormatError: the model's own rules do not fit the text, such as no token for what is unknown.
        """
        return self._encode_beginning(text, most, add_special_tokens, parse_special)[0]

    def _encode_beginning(
        self, text: str, most: int | None, add_special_tokens: bool = False, parse_special: bool = False
    ) -> tuple[list[int], bool]:
        """The tokens as `encode` gives them, and whether they are all. If not, over `_UNSURE` more follow."""
        _require_text(text)
        size = len(text) if most is None else _CHARACTERS * (most + _UNSURE)
        while most is not None and size < len(text):
            ids = self._encode(text[: _cut(text, size)], add_special_tokens, parse_special)
            if len(ids) > most + 2 * _UNSURE:
                return ids[:most], False
            size *= 4
        return self._encode(text, add_special_tokens, parse_special), True

    def _encode(self, text: str, add_special_tokens: bool, parse_special: bool) -> list[int]:
        with _encoding:  # the option is one of the backend, for all who use it
            self._backend.encode_special_tokens = not parse_special
            with backend_errors(f"{self.source}: the tokenizer fails with {brief(text)}"):
                ids: list[int] = self._backend.encode(text, add_special_tokens=add_special_tokens).ids
        return ids

    def encode_prompt(self, text: str, most: int | None = None) -> list[int]:
        """The tokens of a text to be continued: begun as the model wants it, without an EOS at its end.

        `most` is as in `encode`.
        """
        ids, is_whole = self._encode_beginning(text, most, add_special_tokens=True)
        return ids[:-1] if is_whole and ids and ids[-1] == self.eos_id else ids

    def encode_continuation(self, text: str, most: int | None = None) -> list[int]:
        """The tokens of a text that follows another, without the space that some models put before a text.

        `most` is as in `encode`.
        """
        alone = self.encode("a")
        if not alone or not self._text(alone[0]).startswith(_SPACES):
            return self.encode(text, most=most)
        for before in _SENTINELS:
            head = self.encode(before)
            ids = self.encode(before + text, most=None if most is None else most + len(head))
            if ids[: len(head)] == head:
                return ids[len(head) :]
        return self.encode(text, most=most)

    def decode(self, ids: Iterable[int] | npt.NDArray[Any], skip_special_tokens: bool = False) -> str:
        """The text of tokens; bytes that are not UTF-8 become U+FFFD.

        Raises:
            ValueError: an id is not below `vocab_size`. FormatError: the model's own rules fail.
        """
        listed = [int(id_) for id_ in ids]
        if listed and (min(listed) < 0 or max(listed) >= self.vocab_size):
            worst = min(listed) if min(listed) < 0 else max(listed)
            raise ValueError(f"Tokenizer.decode: id {worst}, expected 0 to {self.vocab_size - 1}")
        with backend_errors(f"{self.source}: the tokenizer fails with the ids {brief(listed)}"):
            text: str = self._backend.decode(listed, skip_special_tokens=skip_special_tokens)
        return text

    def stream(self, skip_special_tokens: bool = True, context: Sequence[int] = ()) -> StreamDecoder:
        """A decoder that takes token after token and gives whole characters.

        Args:
            context: the tokens before the first one, if there are any: their text is not given again.
        """
        return StreamDecoder(self.decode, skip_special_tokens, context)

    # ---- chats ----

    def apply_chat_template(
        self,
        messages: Sequence[Message],
        add_generation_prompt: bool = False,
        *,
        tools: Objects = None,
        documents: Objects = None,
    ) -> str:
        """A chat as the model writes it: the text of its template.

        Args:
            messages: dictionaries with "role" and "content", and whatever else the template knows.
            add_generation_prompt: end with the beginning of the assistant's next turn.
            tools: the functions that the assistant may call, as JSON schemas.
            documents: what the assistant may read, dictionaries with "title" and "text".
        Raises:
            ValueError: there is no template, or it refuses the messages; `UnsafeError`, `FormatError`: it is
                not one to be run.
            TypeError: a message, a tool or a document is not a dictionary of what JSON can hold.
        """
        return self._render(messages, add_generation_prompt, None, _given(tools, documents))

    def _render(
        self,
        messages: Sequence[Message],
        add_generation_prompt: bool,
        now: datetime.datetime | None,
        given: dict[str, Any],
    ) -> str:
        if self.chat_template is None:
            raise ValueError(
                f"{self.source}: the model has no chat template; a prompt and its completion need none"
            )
        return self.chat_template.render(
            messages,
            add_generation_prompt,
            now,
            bos_token=self._text(self.bos_id),
            eos_token=self._text(self.eos_id),
            **given,
        )

    def encode_chat(
        self,
        messages: Sequence[Message],
        add_generation_prompt: bool = False,
        *,
        tools: Objects = None,
        documents: Objects = None,
    ) -> list[int]:
        """The tokens of a chat. A special token that a message spells out is encoded as its letters.

        Arguments and errors are those of `apply_chat_template`.
        """
        given = self._quoted_given(tools, documents)
        return self._encode_rendered(
            self._render(self._quoted(messages), add_generation_prompt, None, given)
        )[0]

    def encode_conversation(
        self,
        messages: Sequence[Message],
        *,
        tools: Objects = None,
        documents: Objects = None,
        most: int | None = None,
    ) -> Chat:
        """The tokens of a whole chat, and which of them the assistant said.

        The template is rendered up to the beginning and up to the end of each of the assistant's turns; the
        tokens between are the turn. A template that asks for the time gets `TRAINING_TIME`, so that the
        same chat has the same tokens tomorrow.

        Args:
            messages, tools, documents: as in `apply_chat_template`.
            most: as in `encode`. Turns that begin after these tokens are left out.
        Raises:
            UnsupportedError: a beginning is not how the whole begins, so that no tokens are the turn's own.
            ValueError: so many turns in so long a chat that this would take minutes; or as
                `apply_chat_template`.
        """
        given = self._quoted_given(tools, documents)
        quoted = self._quoted(messages)
        text = self._render(quoted, False, TRAINING_TIME, given)
        ids, is_whole = self._encode_rendered(text, most)
        indices = [index for index, message in enumerate(messages) if message.get("role") == "assistant"]
        if len(indices) * (len(messages) + len(ids) / _TOKENS_PER_MESSAGE) > _MOST_RENDERED:
            raise ValueError(
                f"a chat of {len(messages):,} messages and {len(ids):,} tokens is too long to tell its "
                f"{len(indices):,} assistant's turns apart: split it"
            )
        turns = {}
        for index in indices:
            before, _ = self._encode_rendered(self._render(quoted[:index], True, TRAINING_TIME, given), most)
            self._require_beginning(before, ids, is_whole, f"before message {index + 1}")
            if not is_whole and len(before) >= len(ids):
                break
            said, said_whole = self._encode_rendered(
                self._render(quoted[: index + 1], False, TRAINING_TIME, given), most
            )
            self._require_beginning(said, ids, is_whole, f"up to message {index + 1}")
            ends = [place for place in range(len(before), len(said)) if said[place] in self.eos_ids]
            # what a template writes after the end is never generated
            stop = ends[-1] + 1 if ends and said_whole else len(said)
            turns[index] = range(len(before), min(stop, len(ids)))
        unused = tuple(name for name in given if self._is_unused(name, quoted, given, text))
        return Chat(ids, turns, unused)

    def _is_unused(self, name: str, quoted: Sequence[Message], given: dict[str, Any], text: str) -> bool:
        """Whether the template writes the same text without the tools, or the documents, that are given."""
        if not given[name]:
            return False
        try:
            return self._render(quoted, False, TRAINING_TIME, {**given, name: None}) == text
        except ValueError:  # it needs them
            return False

    def _require_beginning(self, part: list[int], ids: list[int], is_whole: bool, which: str) -> None:
        """Refuse messages whose tokens are not the first ones of the chat, as far as those were encoded."""
        if (part if is_whole else part[: len(ids)]) != ids[: len(part)]:
            raise UnsupportedError(
                f"{self.source}: the chat template writes the messages {which} (the assistant's) in another "
                "way if more follow, so the tokens of that message are not known"
            )

    def _quoted_given(self, tools: Objects, documents: Objects) -> dict[str, Any]:
        return {name: plain(value, self._quote_text) for name, value in _given(tools, documents).items()}

    def _text(self, id_: int | None) -> str:
        return "" if id_ is None else str(self._backend.id_to_token(id_) or "")

    def _quoted(self, messages: Sequence[Message]) -> list[Message]:
        return [self._quote(message) for message in messages]

    def _quote(self, message: Message) -> Message:
        """The message, every special token in its strings replaced by a sign for it."""
        if not isinstance(message, Mapping):
            raise TypeError(f"a message of a chat is {brief(message)}, expected a dictionary")
        quoted: Message = plain(message, self._quote_text)
        return quoted

    def _quote_text(self, text: str) -> str:
        text = text.replace(_QUOTE, "\ufffd").replace(_UNQUOTE, "\ufffd")
        return self._special_pattern.sub(lambda found: f"{_QUOTE}{self._special[found[0]]}{_UNQUOTE}", text)

    def _encode_rendered(self, text: str, most: int | None = None) -> tuple[list[int], bool]:
        """As `_encode_beginning`, of what a template wrote."""
        if _QUOTE not in text:
            return self._encode_beginning(text, most, parse_special=True)
        ids = list[int]()
        for piece, is_special in _pieces(text, self._special_pattern):
            if is_special:
                ids.append(self._special[piece])
            else:
                left = None if most is None else max(0, most - len(ids))
                piece = _QUOTED.sub(lambda found: self._text(int(found[1])), piece)
                more, is_whole = self._encode_beginning(piece, left)
                ids += more
                if not is_whole:
                    return ids[:most], False
            if most is not None and len(ids) > most + 2 * _UNSURE:
                return ids[:most], False
        return ids, True


def _pieces(text: str, special: re.Pattern[str]) -> Iterator[tuple[str, bool]]:
    """The special tokens of a text, and what stands between them."""
    end = 0
    for found in special.finditer(text):
        if found.start() > end:
            yield text[end : found.start()], False
        yield found[0], True
        end = found.end()
    if end < len(text):
        yield text[end:], False


def _require_text(text: str) -> None:
    if not isinstance(text, str):
        raise TypeError(f"Tokenizer.encode: text is a {type(text).__name__}, expected a str")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        message = f"Tokenizer.encode: half a surrogate pair at character {error.start:,}"
        raise ValueError(message) from None


def _cut(text: str, size: int) -> int:
    """A place to cut: before a line that begins with a letter, as every tokenizer does, or at `size`."""
    line = _LINE.search(text, size, 2 * size)
    return line.end() if line else size


def _given(tools: Objects, documents: Objects) -> dict[str, Any]:
    """The variables of a template beside the messages, checked; as in transformers, None counts as given."""
    given = {"tools": tools, "documents": documents}
    for name, value in given.items():
        is_list = isinstance(value, Sequence) and not isinstance(value, str | bytes)
        if value is not None and not (is_list and all(isinstance(item, Mapping) for item in value)):
            raise TypeError(f"{name} of a chat are {brief(value)}, expected a list of dictionaries")
    return given


def backend_package() -> Any:
    """The package `tokenizers`.

    Raises:
        ModuleNotFoundError: it is not installed; the message says what to do.
    """
    try:
        import tokenizers
    except ModuleNotFoundError as error:
        message = 'text needs the package tokenizers: pip install "nplora[llm]"'
        raise ModuleNotFoundError(message, name="tokenizers") from error
    return tokenizers


@contextmanager
def backend_errors(what: str) -> Iterator[None]:
    """What the package `tokenizers` raises, Rust's panics too, which are no Exceptions, as a FormatError."""
    try:
        yield
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt | SystemExit | GeneratorExit | MemoryError | ImportError):
            raise
        raise FormatError(f"{what}: {brief(str(error), 300)}") from None
