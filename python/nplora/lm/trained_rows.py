"""Reads the options of `add_lora` that choose tokens and modules to train besides the LoRA factors."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from nplora import _check
from nplora.adapters.trained_rows import EMBEDDING, HEAD, Ids, rows_to_train
from nplora.formats.errors import brief, nearest_names
from nplora.formats.tokenizer_json import MAX_TEXT, AddedToken
from nplora.nn.module import Module
from nplora.tokenizer import Tokenizer

MODULES = {name.rpartition(".")[2]: name for name in (EMBEDDING, HEAD)}
_MOST_SHOWN = 3


class _Model(Protocol):
    @property
    def tokenizer(self) -> Tokenizer: ...
    @property
    def vocab_size(self) -> int: ...


def token_list(op: str, tokens: str | Sequence[str | int]) -> tuple[str | int, ...]:
    """Split a text like "<|im_start|>,2" into texts and ids. An entry that consists of digits is an id.

    Raises:
        TypeError: `tokens` is neither a text nor a list of texts and integers.
        ValueError: an entry is empty.
    """
    given: list[Any] = [tokens]
    if not isinstance(tokens, str):
        if not isinstance(tokens, Iterable):
            raise TypeError(
                f"{op}: trainable_tokens is {_check.kind(tokens)}, expected a list of ids and texts"
            )
        given = list(tokens)
    found = list[str | int]()
    for item in given:
        if isinstance(item, str):
            parts = [part.strip() for part in item.split(",")] if isinstance(tokens, str) else [item]
            found += [int(part) if isinstance(tokens, str) and part.isdecimal() else part for part in parts]
        else:
            found.append(_check.integer(op, "a trainable token", item, least=0))
    if "" in found:
        raise ValueError(f"{op}: trainable_tokens is {brief(tokens)}, expected non-empty texts or ids")
    return tuple(found)


def module_names(op: str, modules: str | Sequence[str]) -> tuple[str, ...]:
    """Split a text like "embed_tokens,lm_head", and check the names.

    Raises:
        ValueError: a name is neither "embed_tokens" nor "lm_head".
        TypeError: `modules` is neither a text nor a list of texts.
    """
    given = _check.texts(op, "modules_to_save", [modules] if isinstance(modules, str) else list(modules))
    names = [name.strip() for text in given for name in text.split(",")]
    for name in names:
        _check.choice(op, "modules_to_save", name.removeprefix("model."), MODULES)
    return tuple(dict.fromkeys(name.removeprefix("model.") for name in names))


def token_ids(op: str, tokens: Sequence[str | int], vocab: int, tokenizer: Tokenizer | None) -> Ids:
    """Convert tokens, each given as an id or a text, to ids. Return None if there are no tokens.

    Raises:
        ValueError: a text is not a token, an id is not in the vocabulary, or a token is given twice. The
            message names all wrong tokens.
    """
    if not tokens:
        return None
    problems, ids = list[str](), dict[int, str | int]()
    for token in tokens:
        id_ = token if isinstance(token, int) else None if tokenizer is None else tokenizer.id_of(token)
        if id_ is None:
            known = [] if tokenizer is None else [text for text in tokenizer.tokens() if text is not None]
            near = nearest_names(str(token), known)[:_MOST_SHOWN]
            hint = f" (the nearest: {', '.join(map(repr, near))})" if near else ""
            problems.append(f"{brief(token)} is not a token of the model{hint}")
        elif id_ >= vocab:
            problems.append(f"{brief(token)} is token {id_}, but the vocabulary ends with {vocab - 1}")
        elif id_ in ids:
            problems.append(
                f"{brief(token)} is given twice" + (f", as {id_} and by its text" * (ids[id_] != token))
            )
        else:
            ids[id_] = token
    if problems:
        raise ValueError(f"{op}: trainable_tokens: {'; '.join(problems)}")
    return np.array(list(ids), np.int64)


def text_list(op: str, tokens: str | Sequence[str]) -> tuple[str, ...]:
    """Split a text like "<tool>,</tool>" into the texts of new tokens, and check them.

    Raises:
        TypeError: `tokens` is neither a text nor a list of texts.
        ValueError: a text is empty, too long, or given twice. The message names all wrong texts.
    """
    texts = _check.texts(op, "add_tokens", tokens.split(",") if isinstance(tokens, str) else tokens)
    if isinstance(tokens, str):
        texts = tuple(text.strip() for text in texts)
    problems = [f"{brief(text)} is given twice" for text, n in Counter(texts).items() if n > 1]
    for text in dict.fromkeys(texts):
        if not text.strip():
            problems.append("a token is empty")
        elif len(text) > MAX_TEXT:
            problems.append(f"{brief(text)} has {len(text):,} characters, expected at most {MAX_TEXT:,}")
        elif not text.isascii() and any("\ud800" <= character <= "\udfff" for character in text):
            problems.append(f"{brief(text)} holds half a surrogate pair")
    if problems:
        raise ValueError(f"{op}: add_tokens: {'; '.join(problems)}")
    return texts


@dataclass(frozen=True)
class NewTokens:
    """The tokens of the option `add_tokens`, divided into new tokens and tokens that the model already has.

    Attributes:
        added: the tokens that the model lacks.
        known: a dict from texts to token ids, for the texts that are tokens of the model already.
    """

    added: tuple[AddedToken, ...] = ()
    known: Mapping[str, int] = field(default_factory=dict)

    @property
    def ids(self) -> list[int]:
        """The ids of all tokens in `known` and `added`. The rows of these tokens are trained."""
        return [*self.known.values(), *(token.id for token in self.added)]


def new_tokens(lm: _Model, op: str, texts: str | Sequence[str]) -> NewTokens:
    """Divide texts into new tokens and tokens that the model already has.

    The ids of new tokens follow the last token of the model's tokenizer. But if the tokenizer has a token,
    and only the embedding lacks a row for it, this token keeps its id.

    Raises:
        ValueError, TypeError: as in `text_list`.
    """
    listed = text_list(op, texts) if texts else ()
    if not listed:
        return NewTokens()
    tokenizer, vocab = lm.tokenizer, lm.vocab_size
    ids = {text: tokenizer.id_of(text) for text in listed}
    known = {text: id_ for text, id_ in ids.items() if id_ is not None and id_ < vocab}
    added, following = list[AddedToken](), tokenizer.vocab_size
    for text in listed:
        if text in known:
            continue
        id_ = ids[text]  # not None: the tokenizer has the token, but the embedding has no row for it
        added.append(AddedToken(following if id_ is None else id_, text))
        following += id_ is None
    return NewTokens(tuple(added), known)


def wanted(
    lm: _Model,
    op: str,
    tokens: str | Sequence[str | int],
    modules: str | Sequence[str],
    targets: Iterable[str],
    new: NewTokens | None = None,
) -> Mapping[str, Ids]:
    """Return a dict from the names of layers to the indices of the rows to train (None: all rows).

    Args:
        targets: the dotted names of the layers that get LoRA factors.
        new: the tokens that are added to the model.
    Raises:
        ValueError: a layer is in both `modules` and `targets`, or has an adapter already; both `tokens` and
            `modules` are given; or a token is both in `tokens` and in `new`. See `token_ids` and
            `module_names` for more reasons.
    """
    assert isinstance(lm, Module)
    listed, names = token_list(op, tokens) if tokens else (), module_names(op, modules) if modules else ()
    if listed and names:
        whole = ", ".join(names)
        raise ValueError(f"{op}: modules_to_save trains all rows of {whole}; leave trainable_tokens out")
    texts = any(isinstance(token, str) for token in listed)
    ids = token_ids(op, listed, lm.vocab_size, lm.tokenizer if texts else None)
    if new is not None and new.ids:
        both = [] if ids is None else np.intersect1d(ids, new.ids).tolist()
        if both:
            raise ValueError(f"{op}: token {both[0]} is in trainable_tokens and in add_tokens; name it once")
        ids = np.array([*([] if ids is None else ids.tolist()), *new.ids], np.int64)
    found = rows_to_train(lm, ids, tuple(MODULES[name] for name in names))
    taken = {*targets, *lm.adapter_layers()}
    shared = {EMBEDDING, HEAD} if found and lm.ties_head else set(found)
    if both := sorted(shared & taken):
        raise ValueError(
            f"{op}: {both[0]} has LoRA factors or trained rows already; its rows cannot be trained as well"
        )
    return found
