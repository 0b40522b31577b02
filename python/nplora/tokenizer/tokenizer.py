"""Tokenizer: one interface to the tokenizers of GGUF files and of Hugging Face directories."""

from __future__ import annotations

import datetime
import hashlib
import itertools
import json
import re
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import numpy.typing as npt

from nplora.formats.errors import FormatError, UnsupportedError, brief
from nplora.formats.tokenizer_json import TOKENIZER, TOKENIZER_CONFIG, AddedToken
from nplora.platform.processes import call_in_forked_child
from nplora.tokenizer import turns as turns_of
from nplora.tokenizer.chat_template import ChatTemplate, plain
from nplora.tokenizer.streaming import StreamDecoder
from nplora.tokenizer.words import first_tokens, sentences_of

Message = Mapping[str, Any]
Objects = Sequence[Mapping[str, Any]] | None  # tools as JSON schemas, or documents

# Tokens that end a turn or a text in some model family, even if the file names another token as EOS.
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
_SPACES = ("▁", "Ġ")  # a space in SentencePiece vocabularies, and a space in byte-level vocabularies
# If only the first tokens of a long text are needed, only the beginning of the text is encoded, with
# `_CHARACTERS` characters for each token. The last tokens of a beginning may depend on the text that follows,
# so the last `_UNSURE` tokens are not used.
_CHARACTERS, _UNSURE = 8, 1024
_NEVER_CUT = 1 << 30  # tokens, more than a text has
_LINE = re.compile(r"\n(?=[^\W\d_])")
_SENTINELS = ("\n", "\x01", "\ue000")  # characters with which hardly any longer token begins
TRAINING_TIME = datetime.datetime(2024, 7, 26)  # the time that chat templates see in training
# A chat is rendered and encoded twice for each assistant turn. If the number of messages times the number of
# turns is `_MOST_RENDERED`, this takes about 10 s.
_MOST_RENDERED = 1 << 19
_TOKENS_PER_MESSAGE = 64
# While a template is rendered, a special token in a message's text is replaced by its id between these two
# characters.
_QUOTE, _UNQUOTE = "\U000ff800", "\U000ff801"
_QUOTED = re.compile(f"{_QUOTE}([0-9]+){_UNQUOTE}")

# One lock for all tokenizers is enough, because the backend holds the GIL while it encodes.
_encoding = threading.Lock()


def _renew_lock() -> None:
    """In a forked process, replace the lock, which a thread of the parent may have held."""
    global _encoding
    _encoding = threading.Lock()


call_in_forked_child(_renew_lock)


@dataclass(frozen=True)
class Chat:
    """A chat as tokens.

    Attributes:
        ids: the tokens.
        turns: a dict with one entry for each assistant message. The key is the index of the message. The
            value is the range of the message's tokens in `ids`, including the token that ends the turn.
        unused: the inputs that the template ignores. Possible names are "messages" (at least one message is
            ignored), "reasoning", "tools" and "documents".
        lost_calls: the tool calls that the template leaves out, as pairs (index of the message, index of the
            call).
    """

    ids: list[int]
    turns: dict[int, range]
    unused: tuple[str, ...] = ()
    lost_calls: tuple[tuple[int, int], ...] = ()

    @property
    def is_reply(self) -> list[bool]:
        """For each token of `ids`, whether it belongs to an assistant's turn."""
        replies = {place for turn in self.turns.values() for place in turn}
        return [place in replies for place in range(len(self.ids))]


class Tokenizer:
    """Encodes and decodes text with a model's own vocabulary and rules.

    `from_gguf` and `from_directory` create a tokenizer. The tokenizer of a model is `lm.tokenizer`.

    Attributes:
        eos_id: the token that ends a text, or None.
        bos_id: the token that begins a text, or None.
        eos_ids: all tokens that end generation: `eos_id` and tokens that end a turn.
        vocab_size: the largest token id plus one.
        chat_template: the model's `ChatTemplate`, or None.

    >>> from nplora.formats import gguf
    >>> from nplora.tokenizer import from_gguf
    >>> metadata = {
    ...     "tokenizer.ggml.model": "gpt2",
    ...     "tokenizer.ggml.pre": "gpt-2",
    ...     "tokenizer.ggml.tokens": ["a", "b", "ab"],
    ...     "tokenizer.ggml.merges": ["a b"],
    ...     "tokenizer.chat_template": "{% for message in messages %}{{ message.content }}{% endfor %}",
    ... }
    >>> tokenizer = from_gguf(gguf.loads(gguf.dumps({}, metadata)))
    >>> tokenizer
    Tokenizer('<bytes>', 3 tokens)
    >>> tokenizer.encode("abba"), tokenizer.decode([2, 1, 0])
    ([2, 1, 0], 'abba')
    >>> tokenizer.apply_chat_template([{"role": "user", "content": "ab"}])
    'ab'
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

    def tokens(self) -> list[str | None]:
        """Return the spelling of every token, ordered by id. An id without a token has the spelling None.

        The same token has the same spelling in a GGUF file and in a Hugging Face directory.

        >>> import nplora
        >>> tokenizer = nplora.load_model("model.gguf").tokenizer
        >>> spelling = tokenizer.tokens()
        >>> [spelling[id_] for id_ in tokenizer.encode("1 + 1")]
        ['1', 'Ġ', '+', 'Ġ', '1']
        """
        return [self._backend.id_to_token(id_) for id_ in range(self.vocab_size)]

    def digest(self) -> str:
        """Return a SHA-256 digest of everything that determines the tokens of a text or a chat.

        >>> import nplora
        >>> tokenizer = nplora.load_model("model.gguf").tokenizer
        >>> len(tokenizer.digest()), tokenizer.digest() == nplora.load_model("model.gguf").tokenizer.digest()
        (64, True)
        """
        template = self.chat_template and self.chat_template.text
        parts = self._backend.to_str(), self.bos_id, self.eos_id, sorted(self.eos_ids), template
        return hashlib.sha256(json.dumps(parts, allow_nan=False).encode()).hexdigest()

    # ---- added tokens ----

    def with_tokens(self, tokens: Iterable[AddedToken]) -> Tokenizer:
        """Return a tokenizer that has all tokens of this tokenizer, and also the given tokens.

        Raises:
            FormatError: a token's id or text belongs to another token.
            UnsupportedError: the ids of this tokenizer have gaps, so new tokens could not get the right ids.

        >>> import nplora
        >>> tokenizer = nplora.load_model("model.gguf").tokenizer
        >>> larger = tokenizer.with_tokens([AddedToken(tokenizer.vocab_size, "<|new|>")])
        >>> larger.encode("<|new|>", parse_special=True) == [tokenizer.vocab_size]
        True
        """
        new = sorted((token for token in tokens if not self._has(token)), key=lambda token: token.id)
        if not new:
            return self
        package = backend_package()
        with backend_errors(f"{self.source}: the tokenizer cannot be copied"):
            backend = type(self._backend).from_str(self._backend.to_str())
        listed, following = list[AddedToken](), self.vocab_size
        for token in new:
            # The backend gives new tokens the next free ids, so fillers take the ids before this token's id.
            listed += [AddedToken(id_, f"<|unused {id_}|>") for id_ in range(following, token.id)]
            listed.append(token)
            following = token.id + 1
        backend.add_tokens(
            [package.AddedToken(token.text, special=token.special, normalized=False) for token in listed]
        )
        for token in listed:
            if backend.id_to_token(token.id) != token.text or backend.token_to_id(token.text) != token.id:
                raise UnsupportedError(
                    f"{self.source}: the tokenizer's ids have gaps, so {brief(token.text)} gets the id "
                    f"{backend.token_to_id(token.text)}, expected {token.id}"
                )
        made = Tokenizer(
            backend, self.source, vocab_size=following, bos_id=self.bos_id, eos_id=self.eos_id,
            end_ids=self.eos_ids,
        )  # fmt: skip
        made.chat_template = self.chat_template
        return made

    def missing(self, tokens: Iterable[AddedToken], rows: int) -> tuple[AddedToken, ...]:
        """Return the adapter's tokens that are missing from this tokenizer or from the model's embedding.

        Args:
            rows: the number of rows of the model's embedding. Tokens whose ids are `rows` or larger have no
                row.
        Raises:
            FormatError: a token's id or text belongs to another token. UnsupportedError: the ids have gaps.

        >>> import nplora
        >>> tokenizer = nplora.load_model("model.gguf").tokenizer
        >>> token = AddedToken(tokenizer.vocab_size, "<|new|>")
        >>> tokenizer.missing([token], rows=tokenizer.vocab_size) == (token,)
        True
        """
        found = tuple(token for token in tokens if token.id >= rows or self.id_of(token.text) != token.id)
        for token in found:
            self._has(token)
        return found

    def _has(self, token: AddedToken) -> bool:
        """Whether the tokenizer has this token.

        Raises FormatError if the text or the id of `token` belongs to another token.
        """
        id_ = self.id_of(token.text)
        there = self._backend.id_to_token(token.id)
        if id_ == token.id:
            return True
        if id_ is not None or there is not None:
            other = (
                f"{brief(token.text)} is token {id_}"
                if id_ is not None
                else f"token {token.id} is {brief(there)}"
            )
            raise FormatError(
                f"{self.source}: the token {brief(token.text)} was added as token {token.id}, but in this "
                f"model {other}; use the model that the token was added to"
            )
        if token.id < self.vocab_size:
            raise UnsupportedError(
                f"{self.source}: {brief(token.text)} cannot become token {token.id}, because this id is a "
                f"gap in the ids of the tokenizer, which go up to {self.vocab_size - 1}"
            )
        return False

    def to_json(self) -> str:
        """Return the text of a tokenizer.json that describes this tokenizer.

        >>> import json, nplora
        >>> tokenizer = nplora.load_model("model.gguf").tokenizer
        >>> json.loads(tokenizer.to_json())["model"]["type"]
        'BPE'
        """
        text: str = self._backend.to_str()
        return text

    def files(self) -> dict[str, bytes]:
        """Return a dict from names to contents: the files from which transformers can read this tokenizer.

        >>> import nplora
        >>> sorted(nplora.load_model("model.gguf").tokenizer.files())
        ['tokenizer.json', 'tokenizer_config.json']
        """
        names = {"bos_token": self._text(self.bos_id), "eos_token": self._text(self.eos_id)}
        config: dict[str, Any] = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "clean_up_tokenization_spaces": False,
            **{key: text for key, text in names.items() if text},
        }
        if self.chat_template is not None:
            config["chat_template"] = self.chat_template.text
        return {
            TOKENIZER: self._backend.to_str(pretty=True).encode(),
            TOKENIZER_CONFIG: json.dumps(config, indent=2, allow_nan=False).encode(),
        }

    # ---- text ----

    def encode(
        self,
        text: str,
        add_special_tokens: bool = False,
        *,
        parse_special: bool = False,
        most: int | None = None,
    ) -> list[int]:
        """Convert text to tokens.

        Args:
            text: the text.
            add_special_tokens: add the tokens that the model puts around a text, such as BOS. Some models
                put no tokens around a text.
            parse_special: read names such as "<|im_end|>" as special tokens. The output of
                `apply_chat_template` needs this. If False, the names are read as plain text, which is right
                for untrusted text.
            most: the number of tokens that the caller needs; None: all tokens. If the text is long, only its
                beginning is encoded, and the first `most` tokens are returned. If the text is not long, all
                tokens are returned, even if there are more than `most`.
        Returns:
            list of token ids.
        Raises:
            ValueError: the text holds half a surrogate pair, which UTF-8 cannot represent.
            FormatError: the tokenizer cannot encode the text, for example because it has no unknown token.

        >>> import nplora
        >>> tokenizer = nplora.load_model("model.gguf").tokenizer
        >>> tokenizer.encode("1+1=")
        [17, 11, 17, 29]
        >>> tokenizer.decode(tokenizer.encode("1+1="))
        '1+1='
        """
        return self._encode_beginning(text, most, add_special_tokens, parse_special)[0]

    def _encode_beginning(
        self, text: str, most: int | None, add_special_tokens: bool = False, parse_special: bool = False
    ) -> tuple[list[int], bool]:
        """Like `encode`, but also return whether the result contains all tokens of the text.

        An incomplete result has only the first `most` tokens; more than `_UNSURE` tokens of the text are
        missing.
        """
        _require_text(text)
        size = len(text) if most is None else _CHARACTERS * (most + _UNSURE)
        while most is not None and size < len(text):
            ids = self._encode(text[: _cut(text, size)], add_special_tokens, parse_special)
            if len(ids) > most + 2 * _UNSURE:
                return ids[:most], False
            size *= 4
        return self._encode(text, add_special_tokens, parse_special), True

    def _encode(self, text: str, add_special_tokens: bool, parse_special: bool) -> list[int]:
        with _encoding:  # all threads share the option below, which the backend stores
            self._backend.encode_special_tokens = not parse_special
            with backend_errors(f"{self.source}: the tokenizer fails with {brief(text)}"):
                ids: list[int] = self._backend.encode(text, add_special_tokens=add_special_tokens).ids
        return ids

    def encode_texts(self, texts: Sequence[str], longest: int) -> tuple[list[list[int]], int]:
        """Encode many texts with the tokens that the model puts around a text, and cut long texts.

        Names of special tokens in the texts are read as plain text.

        Args:
            longest: the maximum number of tokens of a text, including special tokens. A longer text is cut at
                its end, but keeps the special tokens around it.
        Returns:
            the token ids of each text, and the number of texts that were cut.
        Raises:
            TypeError: a text is not a str.
            ValueError: a text holds half a surrogate pair, or `longest` has no room for the special tokens.
            FormatError: the tokenizer cannot encode a text.

        >>> import nplora
        >>> tokenizer = nplora.load_encoder("encoder-model").tokenizer
        >>> ids, cut = tokenizer.encode_texts(["a cat", "a longer text about a cat and a dog"], longest=8)
        >>> [len(each) for each in ids], cut
        ([4, 8], 1)
        """
        found = self._encode_beginnings("encode_texts", texts, longest)
        return [one.ids for one, _ in found], sum(beyond > 0 for _, beyond in found)

    def encode_words(
        self, sentences: Sequence[Sequence[str]], longest: int | None, with_space: bool = True
    ) -> tuple[list[list[int]], list[list[int]], int]:
        """Encode sentences that are given as words, and find the first token of each word.

        A sentence is encoded as its words with a space between them. Names of special tokens
        are read as plain text.

        Args:
            sentences: the words of each sentence.
            longest: the maximum number of tokens of a sentence, as for `encode_texts`; None: no limit.
            with_space: whether a token that is only the space before a word counts as a token of this word.
                In transformers, it does. The tokenizer of XLM-RoBERTa makes such a token before rare
                characters.
        Returns:
            a tuple (ids, first, cut). `ids` has the token ids of each sentence. `first` has a list for each
            sentence: the position of the first token of each word, or -1 for a word without tokens, such as a
            word after the last token that fits. `cut` is the number of sentences that were cut.
        Raises:
            TypeError: a sentence is not a list of texts.
            ValueError: a word is empty or has only spaces. `encode_texts` lists other reasons.
            FormatError: the tokenizer cannot encode a sentence.

        >>> import nplora
        >>> tokenizer = nplora.load_encoder("encoder-model").tokenizer
        >>> ids, first, cut = tokenizer.encode_words([["a", "cat", "sat"]], longest=8)
        >>> len(ids[0]), first, cut
        (5, [[1, 2, 3]], 0)
        """
        checked = sentences_of("encode_words", "sentences", sentences)
        most = _NEVER_CUT if longest is None else longest
        found = self._encode_beginnings("encode_words", [" ".join(words) for words in checked], most)
        first = [
            first_tokens(one.offsets, words, with_space)
            for (one, _), words in zip(found, checked, strict=True)
        ]
        return [one.ids for one, _ in found], first, sum(beyond > 0 for _, beyond in found)

    def _encode_beginnings(self, op: str, texts: Sequence[str], longest: int) -> list[tuple[Any, int]]:
        """Like `_encode_cut`, but encode only the beginning of a very long text."""
        for text in texts:
            _require_text(text)
        around = self._backend.num_special_tokens_to_add(False)
        if longest < around:
            raise ValueError(
                f"{op}: longest is {longest}, expected at least {around}, the number of special tokens "
                "around a text"
            )
        room = 4 * _CHARACTERS * (longest + _UNSURE)
        beginnings = [text if len(text) <= room else text[: _cut(text, room)] for text in texts]
        found = self._encode_cut(beginnings, longest)
        for i, (text, beginning) in enumerate(zip(texts, beginnings, strict=True)):
            if len(beginning) < len(text) and found[i][1] < _UNSURE:  # too few tokens, perhaps many spaces
                found[i] = self._encode_cut([text], longest)[0]
        return found

    def _encode_cut(self, texts: Sequence[str], longest: int) -> list[tuple[Any, int]]:
        """Return a pair for each text: its `tokenizers.Encoding`, and the number of tokens cut off."""
        with _encoding:  # all threads share the options below, which the backend stores
            self._backend.encode_special_tokens = True
            self._backend.enable_truncation(longest)
            try:
                with backend_errors(f"{self.source}: the tokenizer fails with one of {len(texts):,} texts"):
                    found = self._backend.encode_batch(texts, add_special_tokens=True)
            finally:
                self._backend.no_truncation()
        own = self._backend.num_special_tokens_to_add(False)
        return [(one, sum(len(part.ids) - own for part in one.overflowing)) for one in found]

    def encode_prompt(self, text: str, most: int | None = None) -> list[int]:
        """Encode a text that the model should continue, with the model's BOS but without EOS at the end.

        `most` is the number of tokens that the caller needs (see `encode`).

        >>> import nplora
        >>> tokenizer = nplora.load_model("model.gguf").tokenizer
        >>> tokenizer.decode(tokenizer.encode_prompt("1+1="))
        '1+1='
        """
        ids, is_whole = self._encode_beginning(text, most, add_special_tokens=True)
        return ids[:-1] if is_whole and ids and ids[-1] == self.eos_id else ids

    def encode_continuation(self, text: str, most: int | None = None) -> list[int]:
        """Encode a text that continues another text, without the space that some models add before a text.

        `most` is the number of tokens that the caller needs (see `encode`).

        >>> import nplora
        >>> tokenizer = nplora.load_model("model.gguf").tokenizer
        >>> ids = tokenizer.encode_prompt("1+1=") + tokenizer.encode_continuation("2")
        >>> tokenizer.decode(ids, skip_special_tokens=True)
        '1+1=2'
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

    def id_of(self, token: str) -> int | None:
        """Return the id of the token with this text, such as "<|im_end|>"; None if there is no such token.

        >>> import nplora
        >>> tokenizer = nplora.load_encoder("encoder-model").tokenizer
        >>> tokenizer.id_of("[CLS]"), tokenizer.id_of("[no such token]")
        (2, None)
        """
        found: int | None = self._backend.token_to_id(token)
        return found

    def special_in(self, text: str) -> list[str]:
        """Return the special tokens that appear in a text, such as "<|im_end|>", in order.

        >>> import nplora
        >>> tokenizer = nplora.load_encoder("encoder-model").tokenizer
        >>> tokenizer.special_in("A name such as [SEP] in a text")
        ['[SEP]']
        """
        return [found[0] for found in self._special_pattern.finditer(text) if found[0]]

    def decode(self, ids: Iterable[int] | npt.NDArray[Any], skip_special_tokens: bool = False) -> str:
        """Convert tokens to text. Bytes that are not UTF-8 become U+FFFD.

        Args:
            ids: token ids.
            skip_special_tokens: leave out special tokens such as BOS.
        Raises:
            ValueError: an id is negative or not below `vocab_size`.
            FormatError: the tokenizer cannot decode the ids.

        >>> import nplora
        >>> tokenizer = nplora.load_model("model.gguf").tokenizer
        >>> tokenizer.decode(tokenizer.encode("1+1="))
        '1+1='
        """
        listed = [int(id_) for id_ in ids]
        if listed and (min(listed) < 0 or max(listed) >= self.vocab_size):
            worst = min(listed) if min(listed) < 0 else max(listed)
            raise ValueError(f"Tokenizer.decode: id {worst}, expected 0 to {self.vocab_size - 1}")
        with backend_errors(f"{self.source}: the tokenizer fails with the ids {brief(listed)}"):
            text: str = self._backend.decode(listed, skip_special_tokens=skip_special_tokens)
        return text

    def stream(self, skip_special_tokens: bool = True, context: Sequence[int] = ()) -> StreamDecoder:
        """Create a decoder that takes tokens one by one and returns whole characters.

        Args:
            skip_special_tokens: leave out special tokens such as BOS.
            context: tokens before the first token of the stream. The text of these tokens is not returned.

        >>> import nplora
        >>> tokenizer = nplora.load_model("model.gguf").tokenizer
        >>> decoder = tokenizer.stream()
        >>> [decoder.push(id_) for id_ in tokenizer.encode("1+1=")]
        ['1', '+', '1', '=']
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
        now: datetime.datetime | None = None,
    ) -> str:
        """Write a chat as text, using the model's chat template.

        Args:
            messages: dictionaries with "role" and "content", and other keys that the template knows.
            add_generation_prompt: end the text with the start of the assistant's next turn.
            tools: functions that the assistant may call, as JSON schemas.
            documents: texts that the assistant may read, as dictionaries with "title" and "text".
            now: the time that the template sees as the present time; None: the present time.
        Raises:
            ValueError: the model has no chat template, or the template refuses the messages.
            UnsafeError, FormatError: the template is not safe, or not valid Jinja.
            TypeError: a message, tool or document is not a dictionary of values that JSON can represent.

        >>> import nplora
        >>> tokenizer = nplora.load_model("model.gguf").tokenizer
        >>> chat = [{"role": "user", "content": "1+1?"}]
        >>> tokenizer.apply_chat_template(chat, add_generation_prompt=True)  # of a small test model
        '1+1?'
        """
        return self._render(messages, add_generation_prompt, now, _given(tools, documents))

    def _render(
        self,
        messages: Sequence[Message],
        add_generation_prompt: bool,
        now: datetime.datetime | None,
        given: dict[str, Any],
    ) -> str:
        if self.chat_template is None:
            raise ValueError(
                f"{self.source}: the model has no chat template, which chats ('messages') need; use a model "
                "with a chat template, or 'prompt' and 'completion' instead of 'messages'"
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
        now: datetime.datetime | None = None,
        most: int | None = None,
    ) -> list[int]:
        """Encode a chat to tokens. Special tokens in the messages' own text are encoded as plain text.

        `encode` describes `most`. `apply_chat_template` describes the other arguments and the errors.

        >>> import nplora
        >>> tokenizer = nplora.load_model("model.gguf").tokenizer
        >>> ids = tokenizer.encode_chat([{"role": "user", "content": "1+1?"}])
        >>> tokenizer.decode(ids)
        '1+1?'
        """
        given = self._quoted_given(tools, documents)
        text = self._render(self._quoted(messages), add_generation_prompt, now, given)
        return self._encode_rendered(text, most)[0]

    def encode_conversation(
        self,
        messages: Sequence[Message],
        *,
        tools: Objects = None,
        documents: Objects = None,
        most: int | None = None,
    ) -> Chat:
        """Encode a whole chat to tokens, and find the tokens of the assistant's turns.

        For each assistant turn, the chat is rendered twice: up to the start and up to the end of the turn.
        The turn consists of the tokens that only the longer text has. Some templates write earlier messages
        differently when more messages follow. For such templates, a turn is found by the special tokens
        around it (see `nplora.tokenizer.turns`). A template that writes the present time gets
        `TRAINING_TIME`, so that the same chat always has the same tokens.

        Args:
            messages, tools, documents: the chat, as `apply_chat_template` takes it.
            most: the number of tokens that the caller needs (see `encode`). Turns that begin after the
                first `most` tokens are left out.
        Raises:
            UnsupportedError: the template writes earlier messages differently when more messages follow, and
                writes no special tokens around a turn, so the tokens of the turn cannot be found.
            ValueError: the chat has so many turns and tokens that encoding would take minutes.
                `apply_chat_template` lists other reasons.

        >>> import nplora
        >>> tokenizer = nplora.load_model("model.gguf").tokenizer
        >>> messages = [{"role": "user", "content": "1+1?"}, {"role": "assistant", "content": "2"}]
        >>> chat = tokenizer.encode_conversation(messages)
        >>> tokenizer.decode(chat.ids[place] for place in chat.turns[1])
        '2'
        """
        given = self._quoted_given(tools, documents)
        quoted = self._quoted(messages)
        text = self._render(quoted, False, TRAINING_TIME, given)
        ids, is_whole = self._encode_rendered(text, most)
        indices = [index for index, message in enumerate(messages) if message.get("role") == "assistant"]
        unused = tuple(name for name in given if self._is_unused(name, quoted, given, text))
        lost = self._lost(quoted, given, text)
        lost_calls = tuple((index, call) for index, call in lost if call is not None)
        if self._leaves_out_messages(quoted, {index for index, call in lost if call is None}, given, text):
            unused = ("messages", *unused)
        if self._leaves_out_reasoning(quoted, given, text):
            unused = ("reasoning", *unused)
        is_long = len(indices) * (len(messages) + len(ids) / _TOKENS_PER_MESSAGE) > _MOST_RENDERED
        try:
            if not is_long:
                turns = self._turns_by_beginnings(quoted, given, ids, is_whole, indices, most)
                return Chat(ids, turns, unused, lost_calls)
        except UnsupportedError as error:
            with suppress(UnsupportedError):
                return Chat(ids, self._turns_by_marks(quoted, given, text, ids), unused, lost_calls)
            raise error from None
        try:
            return Chat(ids, self._turns_by_marks(quoted, given, text, ids), unused, lost_calls)
        except UnsupportedError:
            raise ValueError(
                f"cannot find the {len(indices):,} assistant turns of a chat of {len(messages):,} messages "
                f"and {len(ids):,} tokens, because the chat is too long: split the chat"
            ) from None

    def _turns_by_beginnings(
        self,
        quoted: list[Message],
        given: dict[str, Any],
        ids: list[int],
        is_whole: bool,
        indices: list[int],
        most: int | None,
    ) -> dict[int, range]:
        """Find each turn by rendering the chat up to the start and up to the end of the turn."""
        turns = {}
        for index in indices:
            if not index:  # without messages, many templates fail or do not write the head of an answer
                raise UnsupportedError(
                    f"{self.source}: the chat begins with the assistant, and the chat template writes no "
                    "special tokens around an answer, so the tokens of message 1 are not known"
                )
            before, _ = self._encode_rendered(self._render(quoted[:index], True, TRAINING_TIME, given), most)
            self._require_beginning(before, ids, is_whole, f"before message {index + 1}")
            if not is_whole and len(before) >= len(ids):
                break
            said, said_whole = self._encode_rendered(
                self._render(quoted[: index + 1], False, TRAINING_TIME, given), most
            )
            self._require_beginning(said, ids, is_whole, f"up to message {index + 1}")
            stop = self._end_of_turn(said, len(before)) if said_whole else len(said)
            turns[index] = range(len(before), min(stop, len(ids)))
        return turns

    def _end_of_turn(self, said: list[int], begin: int) -> int:
        """Return the position after the token that ends the turn. A model generates nothing after this token.

        Some templates write two end tokens: the first token ends the turn, and the second token, perhaps on a
        new line, ends the text. The turn includes only the first of the two.
        """
        ends = [place for place in range(begin, len(said)) if said[place] in self.eos_ids]
        last = ends.pop() if ends else len(said) - 1
        while ends and not self.decode(said[ends[-1] + 1 : last]).strip():
            last = ends.pop()
        return last + 1

    def _turns_by_marks(
        self, quoted: list[Message], given: dict[str, Any], text: str, ids: list[int]
    ) -> dict[int, range]:
        """Find the turns by the special tokens around them. Turns after the end of `ids` are left out."""
        mark = turns_of.mark_of([text])
        marked = self._render(turns_of.with_marks(quoted, mark), False, TRAINING_TIME, given)
        found = turns_of.find_turns(
            quoted,
            self._split(text),
            self._split(marked),
            mark,
            self._prompt_pieces(quoted, given),
            lambda name: self._special[name] in self.eos_ids,
        )
        special = set(self._special.values())
        places = [place for place, id_ in enumerate(ids) if id_ in special]
        heads = {head: self._encode_rendered(head)[0] for head in {turn.head for turn in found.values()}}
        turns = {}
        for index, turn in found.items():
            if turn.first >= len(places):
                break
            begin, head = places[turn.first], heads[turn.head]
            pairs = zip(head, ids[begin : begin + len(head)], strict=False)
            # A token that holds the end of the head and the start of the message belongs to the message.
            begin += sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))
            ends = places[turn.last] + 1 if turn.last is not None and turn.last < len(places) else len(ids)
            turns[index] = range(begin, ends)
        return turns

    def _prompt_pieces(self, quoted: list[Message], given: dict[str, Any]) -> turns_of.Pieces:
        """Return the text that the template adds when the assistant's first answer should begin."""
        index = next(index for index, message in enumerate(quoted) if message.get("role") == "assistant")
        asked, without = (
            self._split(self._render(quoted[:index] or quoted, begins, TRAINING_TIME, given))
            for begins in (True, False)
        )
        same = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(asked, without, strict=False))
        return asked[sum(1 for _ in same) :]

    def _split(self, text: str) -> turns_of.Pieces:
        return list(_pieces(text, self._special_pattern))

    def _is_unused(self, name: str, quoted: Sequence[Message], given: dict[str, Any], text: str) -> bool:
        """Whether the rendered text stays the same without the input `name` ("tools" or "documents")."""
        if not given[name]:
            return False
        try:
            return self._render(quoted, False, TRAINING_TIME, {**given, name: None}) == text
        except ValueError:  # the template needs the tools (or documents)
            return False

    def _lost(self, quoted: list[Message], given: dict[str, Any], text: str) -> list[turns_of.Part]:
        """Return the messages and tool calls that the template leaves out, as `Part`s.

        This function puts a unique mark into each tool call, and into each message that is not the
        assistant's. If a mark is missing in the rendered text, the template has left out the call or the
        message that has this mark.
        """
        mark, lost = turns_of.mark_of([text]), list[turns_of.Part]()
        for by_id in (False, True):
            messages, marks = turns_of.with_written_marks(quoted, mark, by_id)
            try:
                written = self._render(messages, False, TRAINING_TIME, given)
            except ValueError:  # the template refuses marks
                return lost
            missing = [part for part, one in marks.items() if one not in written]
            lost = [part for part in lost if part in missing or part not in marks] if by_id else missing
            if not any(call is not None for _, call in lost):
                break
        return lost

    def _leaves_out_messages(
        self, quoted: list[Message], lost: set[int], given: dict[str, Any], text: str
    ) -> bool:
        """Whether the rendered text stays the same without the messages whose indices are in `lost`."""
        if not lost:
            return False
        written = [message for index, message in enumerate(quoted) if index not in lost]
        try:
            return self._render(written, False, TRAINING_TIME, given) == text
        except ValueError:  # the template needs the lost messages
            return False

    def _leaves_out_reasoning(self, quoted: list[Message], given: dict[str, Any], text: str) -> bool:
        """Whether the messages have reasoning, but the rendered text stays the same without the reasoning."""
        without = turns_of.without_reasoning(quoted)
        if without == quoted:
            return False
        try:
            return self._render(without, False, TRAINING_TIME, given) == text
        except ValueError:  # the template needs the reasoning
            return False

    def _require_beginning(self, part: list[int], ids: list[int], is_whole: bool, which: str) -> None:
        """Check that the chat's tokens `ids` begin with the tokens `part` of the chat's first messages."""
        if (part if is_whole else part[: len(ids)]) != ids[: len(part)]:
            raise UnsupportedError(
                f"{self.source}: the chat template writes the messages {which} differently if more messages "
                "follow, so the tokens of this assistant message are not known"
            )

    def _quoted_given(self, tools: Objects, documents: Objects) -> dict[str, Any]:
        return {name: plain(value, self._quote_text) for name, value in _given(tools, documents).items()}

    def _text(self, id_: int | None) -> str:
        return "" if id_ is None else str(self._backend.id_to_token(id_) or "")

    def _quoted(self, messages: Sequence[Message]) -> list[Message]:
        return [self._quote(message) for message in messages]

    def _quote(self, message: Message) -> Message:
        """Copy a message, and replace every special token in its strings by a placeholder."""
        if not isinstance(message, Mapping):
            raise TypeError(f"a message of a chat is {brief(message)}, expected a dictionary")
        quoted: Message = plain(message, self._quote_text)
        return quoted

    def _quote_text(self, text: str) -> str:
        text = text.replace(_QUOTE, "\ufffd").replace(_UNQUOTE, "\ufffd")
        return self._special_pattern.sub(lambda found: f"{_QUOTE}{self._special[found[0]]}{_UNQUOTE}", text)

    def _encode_rendered(self, text: str, most: int | None = None) -> tuple[list[int], bool]:
        """Like `_encode_beginning`, for a text in which a chat template has written special tokens."""
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
    """Split a text into its special tokens and the text between them."""
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
        message = f"Tokenizer.encode: text has half a surrogate pair at character {error.start:,}"
        raise ValueError(message) from None


def _cut(text: str, size: int) -> int:
    """Return the position at which to cut a text: `size`, or a better position soon after it.

    The better position is the start of the next line that begins with a letter, if this line begins before
    2 * size. All tokenizers begin a new token at such a line.
    """
    line = _LINE.search(text, size, 2 * size)
    return line.end() if line else size


def _given(tools: Objects, documents: Objects) -> dict[str, Any]:
    """Check `tools` and `documents`, and return them as variables for the template.

    As in transformers, the template also gets variables whose value is None.
    """
    given = {"tools": tools, "documents": documents}
    for name, value in given.items():
        is_list = isinstance(value, Sequence) and not isinstance(value, str | bytes)
        if value is not None and not (is_list and all(isinstance(item, Mapping) for item in value)):
            raise TypeError(f"{name} of a chat are {brief(value)}, expected a list of dictionaries")
    return given


def backend_package() -> Any:
    """Import the package `tokenizers`.

    Raises:
        ModuleNotFoundError: the package is not installed; the message says how to install it.
    """
    try:
        import tokenizers
    except ModuleNotFoundError as error:
        message = 'text needs the package tokenizers: pip install "nplora[llm]"'
        raise ModuleNotFoundError(message, name="tokenizers") from error
    return tokenizers


@contextmanager
def backend_errors(what: str) -> Iterator[None]:
    """Convert errors of the package `tokenizers` to FormatError.

    Rust panics, which are not derived from `Exception`, are also converted.
    """
    try:
        yield
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt | SystemExit | GeneratorExit | MemoryError | ImportError):
            raise
        raise FormatError(f"{what}: {brief(str(error), 300)}") from None
