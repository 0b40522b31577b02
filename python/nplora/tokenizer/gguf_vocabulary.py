"""Builds a tokenizer from the metadata of a GGUF file."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np

from nplora.formats.errors import FormatError, LimitError, UnsafeError, UnsupportedError, brief
from nplora.formats.gguf import GgufFile, Metadata
from nplora.formats.tokenizer_json import MAX_SPECIAL
from nplora.tokenizer import character_table
from nplora.tokenizer.tokenizer import Tokenizer, backend_package

MAX_TOKENS = 1 << 20
MAX_TOKEN = 1 << 12  # characters
MAX_PIECE = 1 << 7  # characters of a SentencePiece token; every split of a token into two is looked up
MAX_PAIRS = 1 << 23  # characters of all pairs that form a token; the largest vocabularies have 3 million
KEY = "tokenizer.ggml."
_KINDS = ("gpt2", "llama", "t5", "bert")  # the values of tokenizer.ggml.model that nplora knows
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)  # the values of tokenizer.ggml.token_type
_BYTE_TOKEN = re.compile("<0x[0-9A-F]{2}>")
_SPACE = "▁"  # SentencePiece's symbol for a space

# For each `pre`, the rule that splits text before pairs are merged. The regular expressions are OpenAI's, as
# in the models' own tokenizer.json. None means GPT-2's expression, the default of ByteLevel.
_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_ENDING = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
_GPT_4O = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+{_ENDING}|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*{_ENDING}"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SINGLE_DIGITS = ("smollm", "refact", "starcoder")  # every digit is split off first
SPLITS = {
    "default": None,
    "gpt-2": None,
    "modern-bert": None,
    "roberta-bpe": None,
    "olmo": None,
    **dict.fromkeys(SINGLE_DIGITS, None),
    "llama-bpe": _LLAMA3,
    "dbrx": _LLAMA3,
    "smaug-bpe": _LLAMA3,
    "qwen2": _LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}"),
    "gpt-4o": _GPT_4O,
}
_COMPOSES = {"qwen2", "modern-bert"}  # text is normalised (NFC) first
IGNORES_MERGES = {"llama-bpe"}  # a piece of text that is a token becomes this token without any merges
_BEGINS_WITH_BOS = {"llama-bpe"}  # byte-level tokenizers that add BOS if the file has no setting for this


def from_gguf(file: GgufFile) -> Tokenizer:
    """Build the tokenizer of a GGUF model.

    Four kinds of tokenizers are known. Their names in GGUF are "gpt2" for byte-level BPE, "llama" for
    SentencePiece with BPE, "t5" for SentencePiece with Unigram, and "bert" for WordPiece.

    Args:
        file: an open file, from `formats.gguf.open`.
    Raises:
        FormatError: the tokenizer's metadata are missing, have a wrong type or contradict each other.
        LimitError: there are too many tokens or special tokens, or a token is too long.
        UnsupportedError: nplora does not know the file's kind of tokenizer, or its rule to split text.
        ModuleNotFoundError: the package `tokenizers` is not installed.

    >>> from nplora.formats import gguf
    >>> metadata = {
    ...     "tokenizer.ggml.model": "gpt2",
    ...     "tokenizer.ggml.pre": "gpt-2",
    ...     "tokenizer.ggml.tokens": ["a", "b", "ab"],
    ...     "tokenizer.ggml.merges": ["a b"],
    ... }
    >>> tokenizer = from_gguf(gguf.loads(gguf.dumps({}, metadata)))
    >>> tokenizer.encode("abba")
    [2, 1, 0]
    """
    return _Vocabulary(file.metadata, file.source).tokenizer()


class _Vocabulary:
    """Reads the tokens of a file and checks them."""

    def __init__(self, metadata: Metadata, source: str) -> None:
        self.metadata, self.source = metadata, source
        if f"{KEY}model" not in metadata:
            raise FormatError(f"{source}: the file has no tokenizer: no metadata '{KEY}model'")
        self.model = metadata.string(f"{KEY}model")
        if self.model not in _KINDS:
            raise UnsupportedError(
                f"{source}: the tokenizer is {brief(self.model)}, expected one of "
                f"{', '.join(map(repr, _KINDS))}"
            )
        self.types = self._read_types()
        self.ids = self._read_ids()
        self.tokens = list(self.ids)
        self.unknown = self._special("unknown_token_id")
        for id_ in np.flatnonzero(self.types == BYTE):
            if not _BYTE_TOKEN.fullmatch(self.tokens[id_]):
                raise FormatError(f"{source}: byte token {id_} is {brief(self.tokens[id_])}, expected <0xNN>")

    def tokenizer(self) -> Tokenizer:
        names = ("bos_token_id", "eos_token_id", "eot_token_id", "eom_token_id")
        bos, eos, eot, eom = map(self._special, names)
        builders = {"gpt2": self._byte_level, "llama": self._sentencepiece, "t5": self._unigram,
                    "bert": self._wordpiece}  # fmt: skip
        backend = builders[self.model]()
        self._add_special(backend)
        if self.model == "bert":
            self._add_cls_and_sep(backend, bos, eos)
        else:
            self._add_ends(backend, bos, eos)
        return Tokenizer(
            backend,
            self.source,
            vocab_size=len(self.tokens),
            bos_id=bos,
            eos_id=eos,
            end_ids=[id_ for id_ in (eos, eot, eom) if id_ is not None],
            chat_template=self.metadata.string("tokenizer.chat_template", "") or None,
        )

    def _read_types(self) -> np.ndarray[Any, Any]:
        count = len(self.metadata.strings(f"{KEY}tokens"))
        if count > MAX_TOKENS:
            raise LimitError(f"{self.source}: the file has {count:,} tokens, expected at most {MAX_TOKENS:,}")
        if f"{KEY}token_type" not in self.metadata:
            return np.full(count, NORMAL)
        types = self.metadata.array(f"{KEY}token_type", "INT32", count)
        special = int(np.isin(types, (UNKNOWN, CONTROL, USER_DEFINED)).sum())
        if special > MAX_SPECIAL:
            raise LimitError(
                f"{self.source}: the file has {special:,} special tokens, expected at most {MAX_SPECIAL:,}"
            )
        return types

    def _read_ids(self) -> dict[str, int]:
        strings = self.metadata.strings(f"{KEY}tokens")
        ids: dict[str, int] = {}
        longest = MAX_TOKEN if self.model == "gpt2" else MAX_PIECE
        for id_, token in enumerate(strings):
            if len(token) > longest:
                raise LimitError(
                    f"{self.source}: token {id_} has {len(token):,} characters, expected at most {longest:,}"
                )
            if ids.setdefault(token, id_) != id_:
                raise FormatError(f"{self.source}: tokens {ids[token]} and {id_} are both {brief(token)}")
        return ids

    def _special(self, key: str) -> int | None:
        if KEY + key not in self.metadata:
            return None
        id_ = self.metadata.integer(KEY + key)
        if not 0 <= id_ < len(self.tokens):
            raise FormatError(
                f"{self.source}: {KEY}{key} is {id_}, but there are {len(self.tokens):,} tokens"
            )
        return id_

    def _flag(self, key: str, default: bool) -> bool:
        return self.metadata.boolean(KEY + key, default)

    # ---- the kinds ----

    def _byte_level(self) -> Any:
        package = backend_package()
        pre = self.metadata.string(f"{KEY}pre", "default")
        if f"{KEY}pre" not in self.metadata:
            warnings.warn(f"{self.source}: {KEY}pre is missing, so text is split as in GPT-2", stacklevel=5)
        if pre not in SPLITS:
            raise UnsupportedError(
                f"{self.source}: {KEY}pre is {brief(pre)}, expected one of {', '.join(map(repr, SPLITS))}"
            )
        model = package.models.BPE(
            vocab=self.ids, merges=list(self._merges()), ignore_merges=pre in IGNORES_MERGES, fuse_unk=False
        )
        backend = package.Tokenizer(model)
        split, cut = SPLITS[pre], package.pre_tokenizers
        steps = [cut.Digits(individual_digits=True)] if pre in SINGLE_DIGITS else []
        if split is not None:
            steps.append(cut.Split(package.Regex(split), behavior="isolated"))
        steps.append(cut.ByteLevel(add_prefix_space=False, use_regex=split is None))
        backend.pre_tokenizer = cut.Sequence(steps)
        backend.decoder = package.decoders.ByteLevel()
        if pre in _COMPOSES:
            backend.normalizer = package.normalizers.NFC()
        return backend

    def _merges(self) -> Iterator[tuple[str, str]]:
        for number, merge in enumerate(self.metadata.strings(f"{KEY}merges")):
            left, _, right = merge.partition(" ")
            for part in (left, right, left + right):
                if part not in self.ids:
                    raise FormatError(
                        f"{self.source}: merge {number} is {brief(merge)}, but {brief(part)} is not a token"
                    )
            yield self.tokens[self.ids[left]], self.tokens[self.ids[right]]  # existing strings: less memory

    def _sentencepiece(self) -> Any:
        """Build a BPE tokenizer. In each step, it merges the two neighbours that form the best-scored token.

        Unknown characters are encoded as bytes.
        """
        package = backend_package()
        scores, unknown = self._scores(), self._unknown()
        model = package.models.BPE(
            vocab=self.ids,
            merges=self._merges_by_score(scores),
            unk_token=None if unknown is None else self.tokens[unknown],
            fuse_unk=True,
            byte_fallback=True,
        )
        backend = package.Tokenizer(model)
        prefix = self._flag("add_space_prefix", True)
        text, back = package.normalizers, package.decoders
        backend.normalizer = text.Sequence(
            [*([text.Prepend(_SPACE)] if prefix else []), text.Replace(" ", _SPACE)]
        )
        strip = [back.Strip(content=" ", left=1, right=0)] if prefix else []
        backend.decoder = back.Sequence([back.Replace(_SPACE, " "), back.ByteFallback(), back.Fuse(), *strip])
        return backend

    def _unigram(self) -> Any:
        """Build a Unigram tokenizer, which splits a text into the tokens with the largest sum of scores."""
        package, unknown = backend_package(), self._unknown()
        if unknown is None:
            raise FormatError(f"{self.source}: the file has no token for unknown text")
        pieces = list(zip(self.tokens, self._scores().tolist(), strict=True))
        backend = package.Tokenizer(package.models.Unigram(pieces, unk_id=unknown, byte_fallback=False))
        text, steps = package.normalizers, list[Any]()
        if f"{KEY}precompiled_charsmap" in self.metadata:
            raw = self.metadata.array(f"{KEY}precompiled_charsmap", "UINT8").tobytes()
            if character_table.growth(raw, self.source) > character_table.MAX_GROWTH:
                raise UnsafeError(
                    f"{self.source}: {KEY}precompiled_charsmap could make a text more than "
                    f"{character_table.MAX_GROWTH} times as long"
                )
            steps.append(text.Precompiled(raw))
        if self._flag("remove_extra_whitespaces", True):
            steps += [text.Replace(package.Regex(" {2,}"), " "), text.Strip()]
        backend.normalizer = text.Sequence(steps)
        scheme = "always" if self._flag("add_space_prefix", True) else "never"
        backend.pre_tokenizer = package.pre_tokenizers.Metaspace(_SPACE, scheme)
        backend.decoder = package.decoders.Metaspace(_SPACE, scheme)
        return backend

    def _scores(self) -> np.ndarray[Any, Any]:
        """Return the score of each token. Raises FormatError if a score is not finite."""
        scores = self.metadata.array(f"{KEY}scores", "FLOAT32", len(self.tokens))
        if not np.isfinite(scores).all():
            worst = int(np.argmin(np.isfinite(scores)))
            raise FormatError(f"{self.source}: the score of token {worst} is not finite")
        return scores

    def _unknown(self) -> int | None:
        """Return the id of the unknown token: the file's choice, or the first token of type UNKNOWN."""
        first = next(iter(np.flatnonzero(self.types == UNKNOWN).tolist()), None)
        return first if self.unknown is None else self.unknown

    def _merges_by_score(self, scores: np.ndarray[Any, Any]) -> list[tuple[str, str]]:
        """Return all pairs of tokens (left, right) for which left + right is also a token.

        The pairs are sorted by the score of the token left + right, the best first.
        """
        plain = {token: token for token, kind in zip(self.tokens, self.types, strict=True) if kind == NORMAL}
        merges, size = list[tuple[str, str]](), 0
        for id_ in np.argsort(-scores, kind="stable"):
            token = self.tokens[id_]
            for cut in range(1, len(token) if token in plain else 0):
                left, right = plain.get(token[:cut]), plain.get(token[cut:])
                if left is not None and right is not None:
                    merges.append((left, right))  # existing strings, to save memory
                    size += len(token)
            if size > MAX_PAIRS:
                raise LimitError(
                    f"{self.source}: at least {len(merges):,} pairs of tokens each form another token when "
                    "joined: too many pairs to read"
                )
        return merges

    def _wordpiece(self) -> Any:
        """Build BERT's tokenizer.

        In a GGUF file, "▁" marks the tokens that begin a word. In BERT's vocabulary, "##" marks the tokens
        that do not begin a word.
        """
        package = backend_package()
        names = {}
        for id_, (token, kind) in enumerate(zip(self.tokens, self.types, strict=True)):
            plain = token.removeprefix(_SPACE)
            names[token if kind in (UNKNOWN, CONTROL) or plain != token else f"##{token}"] = id_
        vocab = {name.removeprefix(_SPACE): id_ for name, id_ in names.items()}
        if len(vocab) < len(self.tokens):
            raise FormatError(f"{self.source}: two tokens have the same spelling in BERT's vocabulary")
        self.tokens = list(vocab)
        unknown_token = "[UNK]" if self.unknown is None else self.tokens[self.unknown]
        if unknown_token not in vocab:
            raise FormatError(f"{self.source}: the file names no token for unknown text, and has no '[UNK]'")
        model = package.models.WordPiece(vocab=vocab, unk_token=unknown_token, max_input_chars_per_word=100)
        backend = package.Tokenizer(model)
        # If the vocabulary has no capital letters, the model reads only lower case.
        normal = (token for token, kind in zip(self.tokens, self.types, strict=True) if kind == NORMAL)
        is_cased = any(token != token.lower() for token in normal if not token.startswith("["))
        backend.normalizer = package.normalizers.BertNormalizer(lowercase=not is_cased)
        backend.pre_tokenizer = package.pre_tokenizers.BertPreTokenizer()
        backend.decoder = package.decoders.WordPiece()
        return backend

    # ---- special tokens ----

    def _add_special(self, backend: Any) -> None:
        added = backend_package().AddedToken
        for kinds, add in (
            ((UNKNOWN, CONTROL), backend.add_special_tokens),
            ((USER_DEFINED,), backend.add_tokens),
        ):
            chosen = [self.tokens[id_] for id_ in np.flatnonzero(np.isin(self.types, kinds))]
            special = CONTROL in kinds
            # One call adds all tokens, because each call is slow.
            add([added(token, special=special, normalized=False) for token in chosen])

    def _add_cls_and_sep(self, backend: Any, bos: int | None, eos: int | None) -> None:
        """Put [CLS] before and [SEP] after each text.

        Old files store the ids of [CLS] and [SEP] under the keys of BOS and EOS, or not at all.
        """
        ids = {token: id_ for id_, token in enumerate(self.tokens)}
        found = list[int]()
        for name, key, other in (("[CLS]", "cls_token_id", bos), ("[SEP]", "seperator_token_id", eos)):
            id_ = next((i for i in (self._special(key), other, ids.get(name)) if i is not None), None)
            if id_ is None:
                raise FormatError(f"{self.source}: the file has no token {name}")
            found.append(id_)
        _put_around(backend, {"cls": found[0]}, {"sep": found[1]})

    def _add_ends(self, backend: Any, bos: int | None, eos: int | None) -> None:
        """Put BOS before texts if `add_bos_token` is set, and EOS after texts if `add_eos_token` is set.

        The default of each setting depends on the kind of tokenizer.
        """
        begins = self.model == "llama" or self.metadata.string(f"{KEY}pre", "") in _BEGINS_WITH_BOS
        before = {"bos": bos} if bos is not None and self._flag("add_bos_token", begins) else {}
        after = {"eos": eos} if eos is not None and self._flag("add_eos_token", self.model == "t5") else {}
        if before or after:
            _put_around(backend, before, after)


def _put_around(backend: Any, before: dict[str, int], after: dict[str, int]) -> None:
    """Put tokens before and after each text.

    The template for the package `tokenizers` refers to the tokens by the names "bos", "eos", "cls" and "sep",
    not by their texts, because a text such as "$A" has a special meaning in a template.
    """
    backend.post_processor = backend_package().processors.TemplateProcessing(
        single=[*before, "$A", *after], special_tokens=[*before.items(), *after.items()]
    )
