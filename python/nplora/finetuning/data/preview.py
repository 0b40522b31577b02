"""A preview of training data: its format, its lengths, what is trained, what is cut, and duplicates."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import re
import statistics
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from nplora import _check
from nplora.finetuning.data.bad_rows import BadRows
from nplora.finetuning.data.builder import MOST_EXAMPLES, in_epoch, is_emptied, left_out_words
from nplora.finetuning.data.dataset import (
    PLAIN_TEXT,
    ReadOptions,
    check_names,
    parsed,
    text_windows,
    tokenizer_of,
    without_prompt_words,
)
from nplora.finetuning.data.encoding import Encoded, Encoder
from nplora.finetuning.data.examples import Judged
from nplora.finetuning.data.kinds import Kind
from nplora.finetuning.data.renaming import ColumnNames
from nplora.finetuning.data.sources import Data, Source, sources_of, splits_of
from nplora.finetuning.data.split import Division
from nplora.finetuning.data.stored import shared_words, unread_words
from nplora.formats.errors import DataError, FormatError, LimitError, counted
from nplora.lm import LanguageModel
from nplora.tokenizer import Tokenizer

_BAR = 40  # characters of the longest bar
_MOST_SHOWN = 2000  # characters of an example
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")  # may confuse a terminal
_TRAINED, _PLAIN = "\x1b[1;32m", "\x1b[0m"
_PURPOSE = {  # what the rows are for, if `finetune` without options does not read them
    "preference": "pairs of answers are for --objective dpo, orpo or kto",
    "kto": "judged answers are for --objective kto",
    "choice": "questions with choices are for `nplora eval`; finetune refuses them",
}


@dataclass(frozen=True)
class Example:
    """A sequence that a preview shows.

    Attributes:
        where: the file and line of the example.
        name: "chosen" or "rejected" for an answer of a pair, "good" or "bad" for a judged answer, "" for any
            other example.
        pieces: the text, divided where training begins or ends. Each piece is a tuple: its text, and whether
            it is trained.
        tokens, trained: the number of tokens, and the number of tokens that count in the loss.
    """

    where: str
    name: str
    pieces: tuple[tuple[str, bool], ...]
    tokens: int
    trained: int

    def text(self, colour: bool) -> str:
        """The text with the trained parts in colour, or between [[ and ]]."""
        begin, end = (_TRAINED, _PLAIN) if colour else ("[[", "]]")
        shown, left = list[str](), _MOST_SHOWN
        for piece, is_trained in self.pieces:
            safe = _CONTROL.sub(lambda found: f"\\x{ord(found[0]):02x}", piece[:left])
            shown.append(f"{begin}{safe}{end}" if is_trained else safe)
            left -= len(piece)
            if left < 0:
                shown.append(" …")
                break
        name = f", {self.name}" if self.name else ""
        return (
            f"{self.where}{name}: {counted(self.tokens, 'token')}, {self.trained:,} trained\n{''.join(shown)}"
        )


@dataclass(frozen=True)
class Part:
    """A summary of the training examples, or of the validation examples.

    Attributes:
        source: the names of the files.
        kinds: the formats of the rows.
        examples: the number of examples. A pair is one example.
        epoch: the number of examples in an epoch. Examples that are left out do not count. If the weight of a
            file repeats an example, each repetition counts.
        lengths: the number of tokens of each sequence before it is cut. A pair has two sequences.
        trained: the number of tokens that count in the loss, before examples are cut.
        cut: the number of examples that are longer than the maximum length.
        lost: the number of tokens that are cut off.
        emptied: the number of examples that are left out because the cut leaves nothing to train on, or makes
            the two answers of a pair equal.
        left_out: what the chat template leaves out: some of "messages", "reasoning", "tools" and "documents".
        unused: the number of examples with messages, reasoning, tools or documents that the chat template
            leaves out.
        unread: a dict from the name of each unused field to the number of rows with this field.
        without_prompt: a dict from the name of a field that probably holds the prompt to the number of
            comparisons that have this field, but no field "prompt".
        repeated: the number of examples that equal an earlier example after the cut. Examples that are left
            out do not count.
        bad: the number of bad rows.
        problems: the errors of the first few bad rows.
    """

    source: str
    kinds: tuple[str, ...]
    examples: int
    epoch: int
    lengths: tuple[int, ...]
    trained: int
    cut: int
    lost: int
    emptied: int
    left_out: tuple[str, ...]
    unused: int
    unread: dict[str, int]
    without_prompt: dict[str, int]
    repeated: int
    bad: int
    problems: tuple[str, ...]

    @property
    def usable(self) -> int:
        """The number of examples that are not left out."""
        return self.examples - self.emptied


@dataclass(frozen=True)
class Preview:
    """The result of `preview`; `print` shows it.

    >>> tokenizer = nplora.load_model("model.gguf").tokenizer
    >>> found: nplora.data.Preview = nplora.data.preview("train.jsonl", tokenizer, valid_split=0.2)
    >>> len(found.train.lengths) + len(found.valid.lengths), found.train.cut, found.shared
    (16, 0, 0)

    Attributes:
        train, valid: summaries of the training examples and of the validation examples; `valid` is None if
            there are no validation examples.
        max_length: the maximum number of tokens of a sequence. In training, longer sequences are cut.
        examples: the first examples to train on.
        shared: the number of validation examples that are equal to a training example.
    """

    train: Part
    valid: Part | None
    max_length: int
    examples: tuple[Example, ...]
    shared: int

    def require_usable(self) -> None:
        """Check that training can use some of the training rows, and some of the validation rows, if any.

        Raises:
            DataError: all rows are bad or are left out; or all are multiple-choice questions, which only
                `nplora eval` reads; or the weights are so small that an epoch has no examples.
        """
        for part in (self.train, self.valid):
            if part is not None and not part.usable:
                reasons = [counted(part.bad, "bad row")] if part.bad else []
                reasons += [f"{part.emptied:,} left out because of the cut"] if part.emptied else []
                raise DataError(f"{part.source}: no row can be used: {', '.join(reasons)}")
        if self.train.kinds == ("choice",):
            raise DataError(f"{self.train.source}: no row can be used: {_PURPOSE['choice']}")
        if not self.train.epoch:
            raise DataError(f"{self.train.source}: the weights are so small that an epoch has no examples")

    def text(self, colour: bool = False) -> str:
        """The preview as text. With `colour`, codes for a terminal show the trained parts in green."""
        blocks = [_summary(self.train, self.max_length)]
        if self.valid is not None:
            blocks.append(_summary(self.valid, self.max_length))
            if self.shared:
                blocks.append(shared_words(self.shared, self.valid.usable))
        blocks.append("\n".join(_histogram(self.train.lengths)))
        if self.examples:
            marks = "in green" if colour else "between [[ and ]]"
            blocks.append(f"The first examples (the trained text is {marks}):")
            blocks += [example.text(colour) for example in self.examples]
        return "\n\n".join(block for block in blocks if block)

    def __str__(self) -> str:
        return self.text()


def preview(
    data: Data,
    tokenizer: Tokenizer | LanguageModel,
    *,
    valid: Data | None = None,
    valid_split: float | None = None,
    examples: int = 3,
    format: str | None = None,
    columns: Mapping[str, str] | None = None,
    chat: bool = False,
    max_length: int = 1024,
    learn: str = "completion",
) -> Preview:
    """Show how training data are read: what is trained, how long the examples are, and what is wrong.

    Bad rows do not end the preview. The preview counts bad rows, and shows the errors of the first few.

    Args:
        data, tokenizer, format, columns, chat, max_length, learn: as for `read_dataset`. The rows may also be
            comparisons. A plain text is divided into the same windows as in `finetune`.
        valid: validation data, in the same form as `data`. The preview counts the validation rows that are
            also in `data`.
        valid_split: share of the examples to hold out, as for `finetune`.
        examples: how many of the first examples are shown.
    Returns:
        the preview; `print` shows it.
    Raises:
        DataError: there are no rows, or a file cannot be divided into rows.
        ValueError, TypeError: an argument is wrong, both `valid` and `valid_split` are given, or
            `valid_split` is given for a plain text, which has no rows.
        Other errors: see `read_dataset`.

    >>> tokenizer = nplora.load_model("model.gguf").tokenizer
    >>> print(nplora.data.preview("train.jsonl", tokenizer, examples=0))
    train.jsonl (completion): 16 examples, 116 tokens (42 in the loss)
    <BLANKLINE>
      tokens  examples
           6         6  ########################################
           7         5  ##################################
           8         0
           9         5  ##################################
      median         7
    """
    op = "preview"
    options = ReadOptions(max_length, learn, format, columns or {}, chat, op=op)
    _check.integer(op, "examples", examples, least=0)
    sources, found = splits_of(op, data)
    if valid_split is not None:
        if valid is not None:
            raise ValueError(f"{op}: valid and valid_split are both given, expected only one of them")
        if not 0 < _check.number(op, "valid_split", valid_split) < 1:
            raise ValueError(f"{op}: valid_split is {valid_split}, expected between 0 and 1")
        if found is not None:
            raise ValueError(f"{op}: valid_split is {valid_split}, but there are validation data already")
    elif valid is not None:
        found = sources_of(op, valid)
    division = None if valid_split is None else Division(op, sources, valid_split, options)
    reader = _Reader(op, tokenizer_of(op, tokenizer), options, max_length)
    # A division itself checks the names in `columns`, over training and held-out rows together.
    train, seen, shown = reader.read(
        sources if division is None else division.train, examples, any_names=division is not None
    )
    if division is not None:
        found = division.held_out()
    if found is None:
        return Preview(train, None, max_length, shown, 0)
    held_out, others, _ = reader.read(found, 0, any_names=True)
    shared = sum(count for digest, count in others.items() if digest in seen)
    return Preview(train, held_out, max_length, shown, shared)


@dataclass(frozen=True)
class _Found:
    """A row that was read without an error, or a window of a plain text.

    `where` is the file and line of the row, and `source` the index of its source. `good` is True for an
    answer that was judged as good, False for an answer that was judged as bad, and None for a row without a
    judgement.
    """

    where: str
    kind: str
    sequences: list[Encoded]
    source: int
    unused: tuple[str, ...]
    good: bool | None
    unread: tuple[str, ...] = ()
    forgotten: str | None = None  # the field that probably holds the prompt

    @property
    def names(self) -> tuple[str, ...]:
        """The name of each sequence, as in `Example.name`."""
        if self.good is not None:
            return ("good" if self.good else "bad",)
        return ("chosen", "rejected") if self.kind == "preference" else ("",)


class _Reader:
    """Reads sources as `read_dataset` does, but continues after a bad row and does not cut long examples."""

    def __init__(self, op: str, tokenizer: Tokenizer, options: ReadOptions, max_length: int) -> None:
        self._op, self._tokenizer, self._options, self._most = op, tokenizer, options, max_length
        self._encoder = Encoder(tokenizer, options.learn == "all", None, options.chat)

    def read(
        self, sources: list[Source], shown: int, any_names: bool = False
    ) -> tuple[Part, dict[bytes, int], tuple[Example, ...]]:
        """Read sources, and summarise them.

        Args:
            shown: the number of examples to return.
            any_names: whether to accept a name in `columns` that no row has.
        Returns:
            a tuple: the summary; a dict from the hash of each example, after the cut, to the number of equal
            examples, without the examples that are left out; and the first `shown` examples.
        """
        lengths, seen, examples, bad = list[int](), dict[bytes, int](), list[Example](), BadRows()
        count = trained = cut = lost = emptied = unused = 0
        kinds, unread, without_prompt = dict[str, None](), Counter[str](), Counter[str]()
        usable, lost_parts = [0] * len(sources), set[str]()
        names = ColumnNames(self._options.columns)
        for found in self._rows(sources, names):
            if isinstance(found, FormatError):
                bad.skip(found)
                continue
            count += 1
            kinds[found.kind] = None
            lengths += [len(sequence.ids) for sequence in found.sequences]
            trained += sum(sum(sequence.trained[1:]) for sequence in found.sequences)
            kept = [Encoded(one.ids[: self._most], one.trained[: self._most]) for one in found.sequences]
            left_out = is_emptied(kept, found.sequences)
            cut += any(len(sequence.ids) > self._most for sequence in found.sequences)
            lost += sum(max(0, len(sequence.ids) - self._most) for sequence in found.sequences)
            emptied += left_out
            usable[found.source] += not left_out
            unused += bool(found.unused)
            lost_parts.update(found.unused)
            unread.update(found.unread)
            without_prompt.update([found.forgotten] if found.forgotten else [])
            if not left_out:
                digest = _digest(kept, found.good)
                seen[digest] = seen.get(digest, 0) + 1
            if count <= shown:
                examples += self._shown(found)
        joined = ", ".join(source.name for source in sources)
        if not count and not bad.count:
            raise DataError(f"{joined}: no examples")
        check_names(names, dataclasses.replace(self._options, any_names=any_names))
        repeated = sum(seen.values()) - len(seen)
        epoch = sum(in_epoch(one.weight, number) for one, number in zip(sources, usable, strict=True))
        part = Part(
            joined, tuple(kinds), count, epoch, tuple(lengths), trained, cut, lost, emptied,
            tuple(sorted(lost_parts)), unused,
            dict(unread), dict(without_prompt), repeated, bad.count, tuple(bad.problems),
        )  # fmt: skip
        return part, seen, tuple(examples)

    def _rows(self, sources: list[Source], names: ColumnNames) -> Iterator[_Found | FormatError]:
        for place, source in enumerate(sources):
            if source.is_text:
                windows = text_windows(self._op, source, self._tokenizer, self._most)
                for number, window in enumerate(windows, 1):
                    where = f"{source.name}, window {number}"
                    yield _Found(where, PLAIN_TEXT, [window], place, (), None)
                continue
            before: Kind | None = None
            for row in source.read():
                names.look_in(row)
                try:
                    before, example, unused, unread, is_renamed, forgotten = parsed(
                        row, before, self._options
                    )
                    sequences = self._encoder.encode(example, row.where)
                except (DataError, LimitError) as error:
                    yield error
                    continue
                names.count(row, source, is_renamed)
                unused = (*unused, *(name for sequence in sequences for name in sequence.unused))
                good = example.good if isinstance(example, Judged) else None
                yield _Found(row.where, before.name, sequences, place, unused, good, tuple(unread), forgotten)

    def _shown(self, found: _Found) -> Iterator[Example]:
        for name, sequence in zip(found.names, found.sequences, strict=True):
            pairs = zip(sequence.ids, [False, *sequence.trained[1:]], strict=True)
            runs = itertools.groupby(pairs, key=lambda pair: pair[1])
            pieces = tuple((self._tokenizer.decode(id_ for id_, _ in run), is_in) for is_in, run in runs)
            yield Example(found.where, name, pieces, len(sequence.ids), sum(sequence.trained[1:]))


def _digest(sequences: list[Encoded], good: bool | None) -> bytes:
    """A hash of an example: its tokens, the marks of trained tokens, and its judgement."""
    said = repr([good, [(one.ids, one.trained) for one in sequences]])
    return hashlib.blake2b(said.encode(), digest_size=16).digest()


def _summary(part: Part, max_length: int) -> str:
    tokens, unit = sum(part.lengths), "pair" if part.kinds == ("preference",) else "example"
    lines = [
        f"{part.source} ({', '.join(part.kinds) or 'no format'}): "
        f"{counted(part.examples, unit)}, {counted(tokens, 'token')} ({part.trained:,} in the loss)"
    ]
    if part.epoch != part.usable:
        refused = f", but at most {MOST_EXAMPLES:,} are possible" if part.epoch > MOST_EXAMPLES else ""
        lines.append(f"  with the weights of the files, an epoch has {counted(part.epoch, unit)}{refused}")
    lines += [f"  {_PURPOSE[kind]}" for kind in part.kinds if kind in _PURPOSE]
    if part.cut:
        lines.append(
            f"  {counted(part.cut, unit)} longer than {max_length:,} tokens: cut, which removes "
            f"{part.lost:,} of {tokens:,} tokens"
        )
    if part.emptied:
        lines.append(f"  {counted(part.emptied, unit)} left out: nothing to train on after the cut")
    if part.repeated:
        lines.append(f"  {counted(part.repeated, unit)} equal to an earlier one")
    if part.unused:
        lines.append(f"  {left_out_words(part.unused, part.left_out, unit)}")
    lines += [f"  {unread_words(part.unread)}"] if part.unread else []
    lines += [f"  {without_prompt_words(part.without_prompt)}"] if part.without_prompt else []
    if part.bad:
        remedy = "which finetune refuses, or skips with --skip-bad (skip_bad=True):"
        lines.append(f"  {counted(part.bad, 'bad row')}, {remedy}")
        lines += [f"    {problem}" for problem in part.problems]
    return "\n".join(lines)


def _histogram(lengths: tuple[int, ...]) -> Iterator[str]:
    """Yield the lines of a histogram: one for each of at most ten ranges of lengths, then the median."""
    if not lengths:
        return
    least, most = min(lengths), max(lengths)
    width = -(-(most - least + 1) // 10)
    counts = [0] * ((most - least) // width + 1)
    for length in lengths:
        counts[(length - least) // width] += 1
    names = [_range(least + n * width, min(least + (n + 1) * width - 1, most)) for n in range(len(counts))]
    column = max(8, *(len(name) + 2 for name in names))
    yield f"{'tokens':>{column}}  examples"
    for name, count in zip(names, counts, strict=True):
        bar = "#" * -(-_BAR * count // max(counts))
        yield f"{name:>{column}}  {count:>8,}  {bar}".rstrip()
    if most > least:
        yield f"{'median':>{column}}  {statistics.median_low(lengths):>8,}"


def _range(first: int, last: int) -> str:
    return f"{first:,}" if first == last else f"{first:,} to {last:,}"
