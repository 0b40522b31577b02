"""Checks whether GGUF metadata can describe the byte-level BPE tokenizer in a tokenizer.json.

GGUF metadata contain the vocabulary, the merges, and only two other settings of a tokenizer.json: the name of
the rule that splits text (`pre`), and whether each text gets BOS and EOS. All other settings must have the
values that `gguf_vocabulary` assumes.
"""

from __future__ import annotations

from typing import Any, NoReturn

from nplora.formats.errors import UnsupportedError, brief
from nplora.tokenizer.gguf_vocabulary import IGNORES_MERGES, SINGLE_DIGITS, SPLITS

# The values that the BPE model's settings may have. Each of these values means "not used".
_PLAIN: dict[str, tuple[object, ...]] = {
    "dropout": (None, 0),
    "unk_token": (None,),
    "continuing_subword_prefix": (None, ""),
    "end_of_word_suffix": (None, ""),
    "byte_fallback": (None, False),
}
_SEVERAL = {  # the key under which a Sequence lists its steps
    "normalizer": "normalizers",
    "pre_tokenizer": "pretokenizers",
    "decoder": "decoders",
    "post_processor": "processors",
}


def require_known(fields: dict[str, Any], source: str) -> str:
    """Check that GGUF can describe the tokenizer. Return the name of the rule that splits text (`pre`).

    Raises:
        UnsupportedError: a setting has a value that GGUF cannot express, or that nplora does not know.
    """
    model = fields.get("model")
    if not isinstance(model, dict) or model.get("type") != "BPE":
        _refuse(source, "the model", model.get("type") if isinstance(model, dict) else model)
    ignores_merges = bool(model.get("ignore_merges", False))
    pre = _pre(steps(fields, "pre_tokenizer"), ignores_merges)
    if pre is None:
        _refuse(source, "pre_tokenizer", fields.get("pre_tokenizer"))
    for name, known in _PLAIN.items():
        if model.get(name) not in known:
            _refuse(source, name, model[name])
    if ignores_merges != (pre in IGNORES_MERGES):
        _refuse(source, "ignore_merges", ignores_merges)
    for part, kinds in (("normalizer", ["NFC"] if pre == "qwen2" else []), ("decoder", ["ByteLevel"])):
        if [step.get("type") for step in steps(fields, part)] != kinds:
            _refuse(source, part, fields.get(part))
    return pre


def require_plain_token(token: dict[str, Any], pre: str, source: str) -> None:
    """Check that GGUF can describe how the tokenizer finds an added token in a text.

    Raises:
        UnsupportedError: the token absorbs the spaces around it, is found only as a whole word, or is
            searched for in the normalised text.
    """
    switches = ("single_word", "lstrip", "rstrip", *(["normalized"] if pre == "qwen2" else []))
    for name in switches:
        if token.get(name):
            _refuse(source, f"{name} of token {brief(token.get('content'))}", token[name])


def ends(fields: dict[str, Any], source: str) -> tuple[list[int], list[int]]:
    """Return two lists of token ids: the tokens added before each text, and the tokens added after it.

    Raises:
        UnsupportedError: the post-processor does more than add tokens before and after each text.
    """
    whole = "post_processor"
    templates = [step for step in steps(fields, whole) if step.get("type") != "ByteLevel"]
    if not templates:
        return [], []
    if len(templates) > 1 or templates[0].get("type") != "TemplateProcessing":
        _refuse(source, whole, fields[whole])
    sides: list[list[int]] = [[]]
    try:
        for piece in templates[0]["single"]:
            if "SpecialToken" in piece:
                sides[-1] += templates[0]["special_tokens"][piece["SpecialToken"]["id"]]["ids"]
            else:
                sides.append([])
    except (KeyError, TypeError):
        _refuse(source, whole, fields[whole])
    if len(sides) != 2:
        _refuse(source, whole, fields[whole])
    return sides[0], sides[1]


def steps(fields: dict[str, Any], part: str) -> list[dict[str, Any]]:
    """Return the list of steps of a setting such as "normalizer"; an empty list if the setting is null."""
    value = fields.get(part)
    if value is None:
        return []
    is_several = isinstance(value, dict) and value.get("type") == "Sequence"
    found = value.get(_SEVERAL[part]) if is_several else [value]
    if not isinstance(found, list) or not all(isinstance(step, dict) for step in found):
        return [{}]
    return found


def _pre(cuts: list[dict[str, Any]], ignores_merges: bool) -> str | None:
    kinds = [cut.get("type") for cut in cuts]
    last = cuts[-1] if cuts else {}
    if last.get("type") != "ByteLevel" or last.get("add_prefix_space", True):
        return None
    use_regex = last.get("use_regex", True)
    if kinds == ["ByteLevel"] and use_regex:
        return "gpt-2"
    if kinds == ["Digits", "ByteLevel"] and cuts[0].get("individual_digits") and use_regex:
        return SINGLE_DIGITS[0]
    if kinds == ["Split", "ByteLevel"] and not use_regex and not cuts[0].get("invert", False):
        pattern = cuts[0].get("pattern")
        regex = pattern.get("Regex") if isinstance(pattern, dict) else None
        isolated = cuts[0].get("behavior") == "Isolated"
        named = [name for name, split in SPLITS.items() if split and split == regex and isolated]
        return next(
            (n for n in named if ignores_merges == (n in IGNORES_MERGES)), named[0] if named else None
        )
    return None


def _refuse(source: str, part: str, value: object) -> NoReturn:
    raise UnsupportedError(f"{source}: {part} is {brief(value)}, which nplora cannot express in a GGUF file")
