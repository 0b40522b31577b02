"""Dataset: the examples of a file as tokens, with a mark for each trained token, and a report on the file."""

from __future__ import annotations

import array
import dataclasses
import hashlib
import itertools
import json
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, SupportsIndex, overload

import numpy as np
import numpy.typing as npt

from nplora import _check
from nplora.finetuning.data.encoding import LEARN, Encoded, Encoder
from nplora.finetuning.data.kinds import BY_NAME, Fields, Kind, recognise, renamed
from nplora.finetuning.data.rows import Row
from nplora.finetuning.data.sources import Data, Source, sources_of
from nplora.formats.errors import DataError, FormatError, LimitError, counted
from nplora.models.packing import IGNORED, PackedBatch, pack
from nplora.tokenizer import Tokenizer

Array = npt.NDArray[Any]

_QUOTED = 3  # bad lines that a report quotes
_CONTEXT = ("tools", "documents")


@dataclass(frozen=True)
class DataReport:
    """A summary of a data file; `print` shows it in a line or two.

    Attributes:
        source: the file.
        examples: the number of used rows, or of windows of a plain text.
        tokens: the number of tokens in all examples.
        learned: the number of tokens that count in the loss.
        shortest, median, longest: lengths of the examples, in tokens.
        truncated: the number of examples that were cut to the maximum length.
        emptied: the number of examples that are left out because no trained token remained after the cut.
        skipped: the number of bad rows that were skipped.
        problems: the errors of the first few skipped rows.
        unused: the number of examples with tools or documents that the chat template leaves out, so that the
            model does not see them.
        kind: the format of the rows, as `format` in `read_dataset`, or "plain text".
        chat: whether the chat template wrote the examples; None if it wrote some of them.

    >>> tokenizer = nplora.load_model("model.gguf").tokenizer
    >>> print(nplora.data.read_dataset("valid.jsonl", tokenizer).report)
    valid.jsonl (completion): 4 examples, 36 tokens (12 in the loss); 9 to 9 tokens long, median 9
    """

    source: str
    examples: int
    tokens: int
    learned: int
    shortest: int
    median: int
    longest: int
    truncated: int
    emptied: int
    skipped: int
    problems: tuple[str, ...]
    unused: int = 0
    kind: str = ""
    chat: bool | None = None

    def __str__(self) -> str:
        text = (
            f"{self.source} ({self.kind}): {counted(self.examples, 'example')}, "
            f"{counted(self.tokens, 'token')} ({self.learned:,} in the loss); "
            f"{self.shortest} to {self.longest} tokens long, median {self.median}"
        )
        if self.truncated:
            text += f"; {self.truncated} cut to the maximum length"
        if self.emptied:
            text += f"; {self.emptied} left out, with nothing to train on within the maximum length"
        if self.skipped:
            text += f"; {counted(self.skipped, 'bad row')} skipped, such as: {'; '.join(self.problems)}"
        return text


class Dataset(Sequence[tuple[Array, Array]]):
    """A sequence of examples. Each example is a pair (ids, labels) of int32 arrays of the same length.

    The label -100 marks a token that is not trained. A dataset takes 5 bytes of memory per token.

    Attributes:
        report: a summary of the file.

    >>> tokenizer = nplora.load_model("model.gguf").tokenizer
    >>> dataset = nplora.data.read_dataset("train.jsonl", tokenizer)
    >>> dataset
    Dataset(train.jsonl (completion): 16 examples, ...)
    >>> ids, labels = dataset[0]
    >>> tokenizer.decode(ids[labels != -100])
    '0<|end|>'
    """

    def __init__(
        self, ids: Array, trained: Array, starts: Array, report: DataReport, order: Array | None = None
    ) -> None:
        """
        Args:
            ids, trained: the tokens of all sequences, one after another, and whether each is trained.
            starts: the start of each sequence, and the end.
            order: the sequence of each example; None: each sequence once.
        """
        self._ids, self._trained, self._starts = ids, trained, starts
        self._order = np.arange(len(starts) - 1) if order is None else order
        self.report = report

    def __len__(self) -> int:
        return len(self._order)

    @overload
    def __getitem__(self, index: SupportsIndex) -> tuple[Array, Array]: ...
    @overload
    def __getitem__(self, index: slice) -> list[tuple[Array, Array]]: ...
    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        index = self._order[range(len(self))[index]]
        part = slice(self._starts[index], self._starts[index + 1])
        ids = self._ids[part]
        return ids, np.where(self._trained[part], ids, np.int32(IGNORED))

    @property
    def lengths(self) -> Array:
        """The number of tokens of each example."""
        return np.diff(self._starts)[self._order]

    @property
    def targets(self) -> Array:
        """The number of trained tokens of each example. The first token of an example is never trained."""
        trained = self._trained.astype(np.int64)
        trained[self._starts[:-1]] = 0
        return np.asarray(np.add.reduceat(trained, self._starts[:-1])[self._order])

    @property
    def largest_id(self) -> int:
        """The largest token id."""
        return int(self._ids.max())

    def fingerprint(self) -> str:
        """SHA-256 of the examples. Datasets with the same tokens and the same trained tokens share it."""
        digest = hashlib.sha256()
        for part in (self._ids, self._trained, self._starts):
            digest.update(part.tobytes())
        if not np.array_equal(self._order, np.arange(len(self._starts) - 1)):
            digest.update(self._order.tobytes())
        return digest.hexdigest()

    def batch(self, indices: Array) -> tuple[PackedBatch, Array]:
        """These examples in one batch, and the batch's targets."""
        batch = pack(self[int(index)] for index in indices)
        return batch, batch.targets

    def __repr__(self) -> str:
        return f"Dataset({self.report})"


@dataclass(frozen=True)
class ReadOptions:
    """How rows become examples, as in `read_dataset`.

    Raises:
        ValueError, TypeError: a value is out of its range.
    """

    max_length: int | None = None
    learn: str = "completion"
    format: str | None = None
    columns: Mapping[str, str] = dataclasses.field(default_factory=dict)
    chat: bool = False
    skip_bad: bool = False
    strict: bool = False
    op: dataclasses.InitVar[str] = "read_dataset"

    def __post_init__(self, op: str) -> None:
        if self.max_length is not None:
            _check.integer(op, "max_length", self.max_length, least=2)
        _check.choice(op, "learn", self.learn, LEARN)
        if self.format is not None:
            _check.choice(op, "format", self.format, tuple(BY_NAME))
        if not isinstance(self.columns, Mapping):
            raise TypeError(f"{op}: columns is {_check.kind(self.columns)}, expected a dictionary")


@dataclass(frozen=True)
class Part:
    """One side of a data set that is divided by a hash of each row, so that a row stays on its side.

    Attributes:
        share: the share of the rows that are held out, on average.
        held_out: this is the side of the rows that are held out.
    """

    share: float
    held_out: bool

    def has(self, values: Mapping[str, Any]) -> bool:
        text = json.dumps(values, sort_keys=True, default=str, skipkeys=True).encode()
        place = int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "big")
        return (place < self.share * 2.0**64) == self.held_out


def read_dataset(
    data: Data,
    tokenizer: Tokenizer,
    *,
    max_length: int | None = None,
    learn: str = "completion",
    format: str | None = None,
    columns: Mapping[str, str] | None = None,
    chat: bool = False,
    skip_bad: bool = False,
    strict: bool = False,
) -> Dataset:
    """Read training data. The fields of a row decide how it becomes an example:

    - {"messages": [{"role": …, "content": …}]}: the chat template writes the messages. The assistant's turns
      are trained.
    - {"messages": …, "tools": […], "documents": […]}: the chat template also gets the tools and the
      documents, as in transformers.
    - {"conversations": [{"from": …, "value": …}]} (ShareGPT): the same as messages. The row may also have
      "system" and "tools".
    - {"instruction": …, "input": …, "output": …} (Alpaca): a chat. Without a chat template, the text that
      Stanford Alpaca was trained with. "input", "system" and "history" may be missing.
    - {"prompt": "…", "completion": "…"}: both texts are joined and end with EOS. The completion and EOS are
      trained.
    - {"prompt": […], "completion": […]}: lists of messages. The assistant's turns in the completion are
      trained.
    - {"text": "…"}: the text ends with EOS. All tokens are trained.

    All rows of a file have the same format. A plain .txt file is one text, which is split into windows of
    max_length tokens. A message of the assistant with "weight": 0 is read but not trained. A field that is
    null counts as missing.

    Args:
        data: one of these:

            - a .jsonl, .json, .csv, .tsv, .txt, .parquet or .arrow file. Text files may end in .gz too. A
              .json file holds an array, or an object with an array as its "data".
            - rows: an iterable of dictionaries, a data frame of pandas or polars, or a `Dataset` of Hugging
              Face.
            - a list of paths, or of pairs (path, weight). An epoch has each example of a file `weight` times.
              A fraction takes that share of the examples, which stays the same in every epoch.
        tokenizer: the model's tokenizer.
        max_length: maximum tokens of an example; longer examples are cut. A plain text requires max_length.
        learn: "completion" trains the tokens that are listed above; "all" trains all tokens.
        format: format of the rows: "messages", "sharegpt", "alpaca", "completion" or "text"; None: the fields
            decide.
        columns: names of fields in the data, by the name that is listed above: {"prompt": "question"}.
        chat: write prompts and completions with the chat template, as messages of the user and the assistant.
        skip_bad: skip bad rows, and count them.
        strict: refuse an example of more than max_length tokens.
    Raises:
        DataError: the file has no rows, no token can be trained, or a row is wrong. A row is wrong if its
            fields fit no format, two formats, or another format than the rows before; if a field is missing,
            empty or of another type; if a role is unknown or out of order; if a tool call has no name; or if
            a weight is neither 0 nor 1, or belongs to a message that is not the assistant's. The error
            message names the file and the line.
        LimitError: a line is too long, or its JSON exceeds a limit.
        UnsafeError, FormatError: the model's chat template is invalid.
        ValueError: an argument is out of range, or the model has no EOS token or no chat template.
        ModuleNotFoundError: the package `pyarrow` is needed and not installed.
        OSError: the file cannot be read.
    Warns:
        UserWarning: some rows have tools or documents that the chat template leaves out.

    >>> tokenizer = nplora.load_model("model.gguf").tokenizer
    >>> dataset = nplora.data.read_dataset("train.jsonl", tokenizer, max_length=32)
    >>> len(dataset), dataset.report.truncated
    (16, 0)
    >>> rows = [{"question": "1+1=", "answer": "2"}]
    >>> columns = {"prompt": "question", "completion": "answer"}
    >>> tokenizer.decode(nplora.data.read_dataset(rows, tokenizer, columns=columns)[0][0])
    '1+1=2<|end|>'
    """
    op = "read_dataset"
    options = ReadOptions(max_length, learn, format, columns or {}, chat, skip_bad, strict, op)
    return read_sources(op, sources_of(op, data), tokenizer, options)


def read_sources(
    op: str, sources: list[Source], tokenizer: Tokenizer, options: ReadOptions, part: Part | None = None
) -> Dataset:
    """The examples of all sources; with `part`, of one side of them only. Raises as `read_dataset`."""
    builder = _Builder(options.max_length, options.strict)
    for source in sources:
        builder.begin(source)
        if source.is_text:
            if part is not None:
                raise ValueError(f"{op}: {source.name} is a plain text, which has no rows to hold out")
            _add_text(op, builder, source, tokenizer, options)
        else:
            _add_rows(builder, source, tokenizer, options, part)
        builder.end()
    dataset = builder.dataset()
    if dataset.report.unused:
        rows = counted(dataset.report.unused, "example")
        warnings.warn(
            f"{dataset.report.source}: {rows} with tools or documents that the chat template leaves out: "
            "the model does not see them",
            stacklevel=3,
        )
    return dataset


def _add_text(op: str, builder: _Builder, source: Source, tokenizer: Tokenizer, options: ReadOptions) -> None:
    """Add a plain text in windows. Neighbours share a token, so that each token but the first is a target."""
    length = options.max_length
    if length is None:
        raise ValueError(f"{op}: max_length is None, but the plain text {source.name} needs one")
    builder.kind = "plain text"
    encoder = Encoder(tokenizer, learn_all=True, max_length=None)
    texts = (str(row.values["text"]) for row in source.read())
    ids = itertools.chain.from_iterable(encoder.text_parts(texts))
    window = list(itertools.islice(ids, length))
    while len(window) > 1:
        builder.add(Encoded(window, [True] * len(window)), source.name)
        window = [window[-1], *itertools.islice(ids, length - 1)]


def _add_rows(
    builder: _Builder, source: Source, tokenizer: Tokenizer, options: ReadOptions, part: Part | None
) -> None:
    encoder = Encoder(tokenizer, options.learn == "all", options.max_length, options.chat)
    kind = None if options.format is None else BY_NAME[options.format]
    for row in source.read():
        if part is not None and not part.has(row.values):
            continue
        try:
            kind = kind_of(row, kind, options)
            values = renamed(row.values, options.columns, row.where)
            example = kind.parse(Fields(values, row.where))
            [sequence] = encoder.encode(example, row.where)
        except (DataError, LimitError) as error:
            if not options.skip_bad:
                raise
            builder.skip(error)
            continue
        builder.kind = kind.name
        has_context = any(row.values.get(name) for name in _CONTEXT)
        unused = sequence.unused or (has_context and kind.name in ("completion", "text"))
        builder.add(dataclasses.replace(sequence, unused=unused), row.where)


def kind_of(row: Row, before: Kind | None, options: ReadOptions) -> Kind:
    """The kind of a row, which must be that of the rows before it.

    Raises the row's own error, and DataError.
    """
    if row.error is not None:
        raise row.error
    if options.format is not None and before is not None:
        return before
    kind = recognise(renamed(row.values, options.columns, row.where), row.where)
    if kind.name in ("preference", "kto"):
        raise DataError(f"{row.where}: has {kind.fields}, a comparison; expected one answer to learn")
    if before is not None and before is not kind:
        raise DataError(
            f"{row.where}: has {kind.fields}, and the rows before have {before.fields}; "
            "expected one format in a file"
        )
    return kind


class _Builder:
    """Collects the examples of several sources into a dataset."""

    def __init__(self, max_length: int | None, strict: bool) -> None:
        self._max_length, self._strict = max_length, strict
        self._ids, self._trained, self._starts = array.array("i"), bytearray(), array.array("q", [0])
        self._order = array.array("q")
        self._sources: list[Source] = []
        self._kinds: list[str] = []
        self._first = self._skipped_before = self._emptied_before = 0
        self._truncated = self._emptied = self._skipped = self._unused = 0
        self._problems: list[str] = []
        self._forms = set[bool]()
        self.kind = ""

    def begin(self, source: Source) -> None:
        """Begin with a source; its examples follow."""
        self._sources.append(source)
        self._first = len(self._starts) - 1
        self._skipped_before, self._emptied_before, self.kind = self._skipped, self._emptied, ""

    def add(self, sequence: Encoded, where: str) -> None:
        ids, trained = sequence.ids, sequence.trained
        windows = self._sources[-1].is_text
        if self._max_length is not None and len(ids) > self._max_length and not windows:
            if self._strict:
                least = "at least " * (len(ids) <= self._max_length + 2)  # the rest may not have been read
                count = f"{least}{len(ids):,} tokens"
                raise DataError(f"{where}: {count}, expected at most {self._max_length:,}")
            ids, trained = ids[: self._max_length], trained[: self._max_length]
            if not any(trained[1:]):
                self._emptied += 1
                return
            self._truncated += 1
        self._unused += sequence.unused
        self._forms.add(sequence.is_chat)
        self._ids.extend(ids)
        self._trained.extend(trained)
        self._starts.append(len(self._ids))

    def skip(self, error: FormatError) -> None:
        self._skipped += 1
        if len(self._problems) < _QUOTED:
            self._problems.append(str(error))

    def end(self) -> None:
        """End a source: take its examples as often as its weight says.

        Raises:
            DataError: the source has no examples.
        """
        source, added = self._sources[-1], range(self._first, len(self._starts) - 1)
        if not added:
            raise DataError(f"{source.name}: no examples{self._why()}")
        self._kinds.append(self.kind)
        whole, fraction = divmod(source.weight, 1)
        for index in added:
            copies = int(whole) + (fraction > 0 and self._place(index) < fraction)
            self._order.extend([index] * copies)

    def _place(self, index: int) -> float:
        """A number from 0 to 1 that only the tokens of an example decide."""
        ids = self._ids[self._starts[index] : self._starts[index + 1]].tobytes()
        return int.from_bytes(hashlib.blake2b(ids, digest_size=8).digest(), "big") / 2.0**64

    def _why(self) -> str:
        reasons = list[str]()
        if skipped := self._skipped - self._skipped_before:
            reasons.append(f"{counted(skipped, 'bad row')} skipped ({'; '.join(self._problems)})")
        if emptied := self._emptied - self._emptied_before:
            reasons.append(
                f"{emptied} with nothing to train on within max_length={self._max_length}; "
                "a larger max_length keeps more"
            )
        return f": {', '.join(reasons)}" if reasons else ""

    def dataset(self) -> Dataset:
        """The dataset of all sources.

        Raises:
            DataError: the weights leave no example.
        """
        source = ", ".join(source.name for source in self._sources)
        if not self._order:
            raise DataError(f"{source}: the weights leave no example")
        starts, order = np.array(self._starts, np.int64), np.array(self._order, np.int64)
        report = DataReport(
            source, 0, 0, 0, 0, 0, 0, self._truncated, self._emptied, self._skipped, tuple(self._problems),
            self._unused, ", ".join(dict.fromkeys(self._kinds)),
            self._forms.pop() if len(self._forms) == 1 else None,
        )  # fmt: skip
        made = Dataset(
            np.array(self._ids, np.int32), np.array(self._trained, np.bool_), starts, report, order
        )
        lengths = made.lengths
        made.report = dataclasses.replace(
            report,
            examples=len(made),
            tokens=int(lengths.sum()),
            learned=int(made.targets.sum()),
            shortest=int(lengths.min()),
            median=int(np.median(lengths)),
            longest=int(lengths.max()),
        )
        return made
