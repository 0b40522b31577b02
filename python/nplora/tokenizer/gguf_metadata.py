"""Converts the JSON files of a byte-level BPE tokenizer to GGUF metadata."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from nplora.formats import files, gguf, strict_json
from nplora.formats.errors import FormatError, UnsupportedError, brief
from nplora.formats.files import StrPath
from nplora.formats.gguf import Typed
from nplora.formats.tokenizer_json import MAX_BYTES, MOST_VALUES, TOKENIZER, TOKENIZER_CONFIG, AddedToken
from nplora.tokenizer import byte_level
from nplora.tokenizer.directory import chat_template, read_json
from nplora.tokenizer.directory import from_directory as from_tokenizer_json
from nplora.tokenizer.gguf_vocabulary import CONTROL, KEY, NORMAL, UNUSED, USER_DEFINED, from_gguf

_SPECIAL = {"bos": "bos_token", "eos": "eos_token", "unknown": "unk_token", "padding": "pad_token"}
_NEW_SCORE = -1000.0  # llama.cpp's converter gives added tokens this score
_SAMPLES = (
    "Hello hello, it's THE théâtre's 1234567 don't\n\n  we'll\tgo \r\n ... (a+b) == {c}; ",
    "e\u0301 \u212b ﬁ ½ 日本語 한국어 العربية ☃ 👩‍🚀 \u00a0\u3000",
)


def from_directory(path: StrPath, vocab_size: int) -> dict[str, Any]:
    """Convert the tokenizer of a directory to metadata of a GGUF file, in the form that llama.cpp uses.

    An embedding may have more rows than the tokenizer has tokens. So unused tokens are added until the
    vocabulary has `vocab_size` tokens, one for each row of the embedding. If the package `tokenizers` is
    installed, this function also checks that the original and the converted tokenizer encode and decode a
    few texts alike.

    Raises:
        UnsupportedError: GGUF metadata cannot describe this tokenizer exactly.
        FormatError: tokenizer.json is damaged, or has token ids beyond the vocabulary.
        FileNotFoundError: there is no tokenizer.json.
    """
    directory = Path(path)
    source = files.name(directory / TOKENIZER)
    raw = bytes(files.read(directory / "tokenizer.json", MAX_BYTES))
    fields = strict_json.loads(raw, source, MOST_VALUES)
    if not isinstance(fields, dict):
        raise FormatError(f"{source}: {brief(fields)}, expected an object")
    pre = byte_level.require_known(fields, source)
    added = _added(fields, source)
    for token in added:
        byte_level.require_plain_token(token, pre, source)
    tokens, types = _tokens(fields["model"], added, vocab_size, source)
    config = read_json(directory / TOKENIZER_CONFIG)
    special = _special(config, {token: id_ for id_, token in enumerate(tokens)})
    metadata: dict[str, Any] = {
        f"{KEY}model": "gpt2",
        f"{KEY}pre": pre,
        f"{KEY}tokens": Typed(tokens, "STRING"),
        f"{KEY}token_type": Typed(types, "INT32"),
        f"{KEY}merges": Typed(_merges(fields["model"], source), "STRING"),
    }
    metadata |= {f"{KEY}{key}_token_id": Typed(id_, "UINT32") for key, id_ in special.items()}
    for key, ids in zip(("bos", "eos"), byte_level.ends(fields, source), strict=True):
        if ids and ids != [special.get(key)]:
            raise UnsupportedError(
                f"{source}: the tokenizer adds the tokens {brief(ids)}, expected only {_SPECIAL[key]}"
            )
        metadata[f"{KEY}add_{key}_token"] = bool(ids)
    template = chat_template(directory, config)
    if template is not None:
        metadata["tokenizer.chat_template"] = template
    _require_alike(directory, metadata, [token["content"] for token in added])
    return metadata


def with_tokens(metadata: Mapping[str, Typed], tokens: Sequence[AddedToken], size: int) -> dict[str, Typed]:
    """Add tokens to the metadata of a GGUF model.

    Args:
        size: the number of rows of the embedding. An unused token is added for each row that has no token.
    Raises:
        FormatError: the metadata contain no tokenizer.
    """
    if f"{KEY}tokens" not in metadata:
        raise FormatError(f"the model has no metadata '{KEY}tokens', so no tokens can be added")
    listed = list(metadata[f"{KEY}tokens"].value)
    known = metadata.get(f"{KEY}token_type")
    kinds = [NORMAL] * len(listed) if known is None else [int(kind) for kind in known.value]
    more = range(len(listed), size)
    listed += [f"[PAD{id_}]" for id_ in more]
    kinds += [UNUSED] * len(more)
    for token in tokens:
        listed[token.id], kinds[token.id] = token.text, CONTROL if token.special else USER_DEFINED
    made = {**metadata, f"{KEY}tokens": Typed(listed, "STRING"), f"{KEY}token_type": Typed(kinds, "INT32")}
    if scores := metadata.get(f"{KEY}scores"):
        made[f"{KEY}scores"] = Typed([*map(float, scores.value), *[_NEW_SCORE] * len(more)], "FLOAT32")
    for key in metadata:
        if key.endswith(".vocab_size"):
            made[key] = Typed(size, metadata[key].type)
    return made


def _special(config: dict[str, Any], ids: dict[str, int]) -> dict[str, int]:
    """Return a dict from keys of `_SPECIAL` to token ids, for the tokens that tokenizer_config.json names."""
    values = {key: config.get(name) for key, name in _SPECIAL.items()}
    texts = {key: value.get("content") if isinstance(value, dict) else value for key, value in values.items()}
    return {key: ids[text] for key, text in texts.items() if isinstance(text, str) and text in ids}


def _require_alike(directory: Path, metadata: dict[str, Any], added: list[str]) -> None:
    """Raise UnsupportedError if the tokens of the converted tokenizer differ from those of the original."""
    try:
        theirs = from_tokenizer_json(directory)
    except ModuleNotFoundError:
        return
    ours = from_gguf(gguf.loads(gguf.dumps({}, metadata)))
    for text in (*_SAMPLES, *added, "a".join(added)):
        for parse_special in (False, True):
            ids = theirs.encode(text, True, parse_special=parse_special)
            if ours.encode(text, True, parse_special=parse_special) != ids or ours.decode(
                ids
            ) != theirs.decode(ids):
                raise UnsupportedError(
                    f"{theirs.source}: {brief(text)} would become different tokens in GGUF"
                )


def _added(fields: dict[str, Any], source: str) -> list[dict[str, Any]]:
    added = fields.get("added_tokens", [])
    if not isinstance(added, list):
        raise FormatError(f"{source}: added_tokens is {brief(added)}, expected a list")
    for token in added:
        if not isinstance(token, dict) or not isinstance(token.get("content"), str):
            raise FormatError(f"{source}: an added token is {brief(token)}, expected an object")
    return added


def _tokens(
    model: dict[str, Any], added: list[dict[str, Any]], vocab_size: int, source: str
) -> tuple[list[str], list[int]]:
    """Return two lists with one entry for each id: the tokens, and their kinds (such as NORMAL).

    For an id without a token, the kind is UNUSED.
    """
    found: dict[int, tuple[str, int]] = {}
    vocab = model.get("vocab")
    if not isinstance(vocab, dict):
        raise FormatError(f"{source}: vocab is {brief(vocab)}, expected an object of tokens")
    entries = [(token, id_, NORMAL) for token, id_ in vocab.items()]
    kinds = {True: CONTROL, False: USER_DEFINED}
    entries += [(token["content"], token.get("id"), kinds[bool(token.get("special"))]) for token in added]
    for token, id_, kind in entries:
        if type(id_) is not int or not 0 <= id_ < vocab_size:
            raise FormatError(
                f"{source}: token {brief(token)} has id {brief(id_)}, expected below {vocab_size:,}"
            )
        if found.get(id_, (token, 0))[0] != token:
            raise FormatError(
                f"{source}: tokens {brief(found[id_][0])} and {brief(token)} both have id {id_}"
            )
        found[id_] = token, kind
    known = [found.get(id_, (f"[PAD{id_}]", UNUSED)) for id_ in range(vocab_size)]
    return [token for token, _ in known], [kind for _, kind in known]


def _merges(model: dict[str, Any], source: str) -> list[str]:
    """Return each merge as a text "left right". In newer files, a merge is a list of two strings."""
    merges = model.get("merges")
    if not isinstance(merges, list):
        raise FormatError(f"{source}: merges are {brief(merges)}, expected a list")
    texts = [" ".join(map(str, merge)) if isinstance(merge, list) else merge for merge in merges]
    for text in texts:
        if not isinstance(text, str) or text.count(" ") != 1:
            raise FormatError(f"{source}: a merge is {brief(text)}, expected two tokens")
    return texts
