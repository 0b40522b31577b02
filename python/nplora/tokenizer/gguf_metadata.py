"""The tokenizer of a model's directory as metadata of a GGUF file: byte-level BPE, from its JSON alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from nplora.formats import files, strict_json
from nplora.formats.errors import FormatError, brief
from nplora.formats.files import StrPath
from nplora.formats.gguf import Typed
from nplora.tokenizer.directory import MAX_TOKENIZER, chat_template, read_json
from nplora.tokenizer.gguf_vocabulary import CONTROL, KEY, NORMAL, SPLITS, UNUSED, USER_DEFINED

_SPECIAL = {"bos": "bos_token", "eos": "eos_token", "unknown": "unk_token", "padding": "pad_token"}


def from_directory(path: StrPath, vocab_size: int) -> dict[str, Any] | None:
    """The metadata of the tokenizer, as llama.cpp has them; None where it is of a kind that is not known.

    Tokens are filled up to `vocab_size`, the rows of the embedding, with unused ones.

    Raises:
        FormatError: tokenizer.json is damaged, or tells of tokens beyond the vocabulary.
        FileNotFoundError: there is none.
    """
    directory = Path(path)
    source = files.name(directory / "tokenizer.json")
    fields = strict_json.loads(bytes(files.read(directory / "tokenizer.json", MAX_TOKENIZER)), source)
    model = fields.get("model") if isinstance(fields, dict) else None
    if not isinstance(model, dict) or model.get("type") != "BPE":
        return None
    pre = _pre(fields.get("pre_tokenizer"))
    if pre is None:
        return None
    tokens, types = _tokens(fields, model, vocab_size, source)
    ids = {token: id_ for id_, token in enumerate(tokens)}
    config = read_json(directory / "tokenizer_config.json")
    metadata: dict[str, Any] = {
        f"{KEY}model": "gpt2",
        f"{KEY}pre": pre,
        f"{KEY}tokens": Typed(tokens, "STRING"),
        f"{KEY}token_type": Typed(types, "INT32"),
        f"{KEY}merges": Typed(_merges(model, source), "STRING"),
    }
    for key, name in _SPECIAL.items():
        value = config.get(name)
        text = value.get("content") if isinstance(value, dict) else value
        if isinstance(text, str) and text in ids:
            metadata[f"{KEY}{key}_token_id"] = Typed(ids[text], "UINT32")
    for name in ("add_bos_token", "add_eos_token"):
        if isinstance(config.get(name), bool):
            metadata[f"{KEY}{name}"] = config[name]
    template = chat_template(directory, config)
    if template is not None:
        metadata["tokenizer.chat_template"] = template
    return metadata


def _pre(cut: object) -> str | None:
    """llama.cpp's name for how text is cut before pairs are merged; None where it has, or we know, none."""
    steps = cut.get("pretokenizers") if isinstance(cut, dict) and cut.get("type") == "Sequence" else [cut]
    if not isinstance(steps, list) or not all(isinstance(step, dict) for step in steps):
        return None
    kinds = [step.get("type") for step in steps]
    last = steps[-1] if steps else {}
    if last.get("type") != "ByteLevel" or last.get("add_prefix_space", True):
        return None
    use_regex = last.get("use_regex", True)
    if kinds == ["ByteLevel"] and use_regex:
        return "gpt-2"
    if kinds == ["Digits", "ByteLevel"] and steps[0].get("individual_digits") and use_regex:
        return "smollm"
    if kinds == ["Split", "ByteLevel"] and not use_regex and not steps[0].get("invert", False):
        pattern = steps[0].get("pattern")
        regex = pattern.get("Regex") if isinstance(pattern, dict) else None
        isolated = steps[0].get("behavior") == "Isolated"
        return next((n for n, split in SPLITS.items() if split and split == regex and isolated), None)
    return None


def _tokens(
    fields: dict[str, Any], model: dict[str, Any], vocab_size: int, source: str
) -> tuple[list[str], list[int]]:
    """Every token by its id, and its kind; what no token has is unused."""
    found: dict[int, tuple[str, int]] = {}
    vocab, added = model.get("vocab"), fields.get("added_tokens", [])
    if not isinstance(vocab, dict) or not isinstance(added, list):
        raise FormatError(f"{source}: expected an object of tokens, and a list of added ones")
    entries = [(token, id_, NORMAL) for token, id_ in vocab.items()]
    for token in added:
        if not isinstance(token, dict) or not isinstance(token.get("content"), str):
            raise FormatError(f"{source}: an added token is {brief(token)}, expected an object")
        entries.append((token["content"], token.get("id"), CONTROL if token.get("special") else USER_DEFINED))
    for token, id_, kind in entries:
        if type(id_) is not int or not 0 <= id_ < vocab_size:
            raise FormatError(f"{source}: token {brief(token)} has id {brief(id_)}, of {vocab_size:,}")
        if found.get(id_, (token, 0))[0] != token:
            raise FormatError(
                f"{source}: tokens {brief(found[id_][0])} and {brief(token)} both have id {id_}"
            )
        found[id_] = token, kind
    known = [found.get(id_, (f"[PAD{id_}]", UNUSED)) for id_ in range(vocab_size)]
    return [token for token, _ in known], [kind for _, kind in known]


def _merges(model: dict[str, Any], source: str) -> list[str]:
    """As "left right", which newer files have as two strings."""
    merges = model.get("merges")
    if not isinstance(merges, list):
        raise FormatError(f"{source}: merges are {brief(merges)}, expected a list")
    texts = [" ".join(map(str, merge)) if isinstance(merge, list) else merge for merge in merges]
    for text in texts:
        if not isinstance(text, str) or text.count(" ") != 1:
            raise FormatError(f"{source}: a merge is {brief(text)}, expected two tokens")
    return texts
