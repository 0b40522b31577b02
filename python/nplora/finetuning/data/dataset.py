"""Dataset: the examples of a file as tokens, which of these tokens are trained, and a report on the file."""

from __future__ import annotations

import collections
import dataclasses
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, SupportsIndex, overload

import numpy.typing as npt

from nplora import _check
from nplora.finetuning.data.builder import Builder
from nplora.finetuning.data.encoding import LEARN, Encoded, Encoder
from nplora.finetuning.data.examples import Example, Preference
from nplora.finetuning.data.kinds import BY_NAME, FIELDS, Kind, lost_context, recognise, renamed
from nplora.finetuning.data.parsing.fields import Fields, renaming
from nplora.finetuning.data.parsing.preferences import forgotten_prompt
from nplora.finetuning.data.renaming import ColumnNames
from nplora.finetuning.data.rows import Row
from nplora.finetuning.data.sources import Data, Source, sources_of
from nplora.finetuning.data.stored import Stored
from nplora.formats.errors import DataError, LimitError, brief, counted, nearest_names
from nplora.lm import LanguageModel
from nplora.models.packing import PackedBatch, pack
from nplora.runtime.user_warning import warn_user
from nplora.tokenizer import Tokenizer

Array = npt.NDArray[Any]

PLAIN_TEXT = "plain text"  # what a report calls the format of a .txt file


class Dataset(Stored, Sequence[tuple[Array, Array]]):
    """A sequence of examples. Each example is a pair (ids, labels) of int32 arrays of the same length.

    The label -100 marks a token that is not trained. A dataset stores 5 bytes per token: its id, and whether
    it is trained.

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

    @overload
    def __getitem__(self, index: SupportsIndex) -> tuple[Array, Array]: ...
    @overload
    def __getitem__(self, index: slice) -> list[tuple[Array, Array]]: ...
    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        return self._labelled(int(self._order[range(len(self))[index]]))

    def batch(self, indices: Array) -> tuple[PackedBatch, Array]:
        """Pack the examples with these indices into one batch. Return the batch and its targets.

        >>> lm = nplora.load_model("model.gguf")
        >>> dataset = nplora.data.read_dataset("train.jsonl", lm.tokenizer)
        >>> batch, targets = dataset.batch(np.array([0, 3]))
        >>> batch.starts  # two sequences of six tokens
        array([ 0,  6, 12])
        """
        batch = pack(self[int(index)] for index in indices)
        return batch, batch.targets


@dataclass(frozen=True)
class ReadOptions:
    """The options that define how rows become examples, as in `read_dataset`.

    Attributes:
        any_names: whether to accept data in which no row has a field that `columns` renames.
    Raises:
        ValueError, TypeError: a value is out of range or has a wrong type.
    """

    max_length: int | None = None
    learn: str = "completion"
    format: str | None = None
    columns: Mapping[str, str] = dataclasses.field(default_factory=dict)
    chat: bool = False
    skip_bad: bool = False
    strict: bool = False
    op: dataclasses.InitVar[str] = "read_dataset"
    any_names: bool = False

    def __post_init__(self, op: str) -> None:
        if self.max_length is not None:
            _check.integer(op, "max_length", self.max_length, least=2)
        _check.choice(op, "learn", self.learn, LEARN)
        if self.format is not None:
            _check.choice(op, "format", self.format, tuple(BY_NAME))
        if not isinstance(self.columns, Mapping):
            raise TypeError(f"{op}: columns is {_check.kind(self.columns)}, expected a dictionary")
        for name, theirs in self.columns.items():
            if name not in FIELDS:
                hint = _hint_of_key(str(name), theirs)
                raise ValueError(f"{op}: columns has the key {brief(name)}, which no format has; {hint}")


def _hint_of_key(name: str, theirs: str) -> str:
    """A hint for a key of `columns` that no format has, and for its value `theirs`."""
    near = nearest_names(name, FIELDS, 1, cutoff=0.6)
    if near and not (theirs in FIELDS and name.lower() in FIELDS):
        return f"did you mean {near[0]!r}?"
    possible = [] if near else [f"possible: {', '.join(FIELDS)}"]
    order = f"nplora's name comes before the equals sign: {theirs}={name}"
    return "; ".join([*possible, *([order] if theirs in FIELDS else [])])


def read_dataset(
    data: Data,
    tokenizer: Tokenizer | LanguageModel,
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
    - {"messages": …, "tools": […], "documents": […]}: the tools and the documents are passed to the chat
      template too, as in transformers.
    - {"conversations": [{"from": …, "value": …}]} (ShareGPT): the same as messages. The row may also have
      "system" and "tools".
    - {"instruction": …, "input": …, "output": …} (Alpaca): a chat. If the model has no chat template, the
      prompt has the wording of Stanford Alpaca. "input", "system" and "history" may be missing.
    - {"prompt": "…", "completion": "…"}: both texts are joined and end with EOS. The completion and EOS are
      trained.
    - {"prompt": […], "completion": […]}: lists of messages. The assistant's turns in the completion are
      trained.
    - {"text": "…"}: the text ends with EOS. All tokens are trained.

    All rows of a file have the same format. A plain .txt file is one text, which is split into windows of
    max_length tokens. A message of the assistant with "weight": 0 is context that is not trained. A field
    that is null counts as missing.

    Args:
        data: one of these:

            - a .jsonl, .json, .csv, .tsv, .txt, .parquet or .arrow file. Text files may end in .gz too. A
              .json file holds an array, or an object with an array as its "data".
            - rows: an iterable of dictionaries, a data frame of pandas or polars, or a `Dataset` of Hugging
              Face.
            - a list of paths, or of pairs (path, weight). An epoch contains each example of a file `weight`
              times. With a weight of 1.5, an epoch contains one half of the examples twice, and the other
              half once. Every epoch contains the same examples.
        tokenizer: the model's tokenizer, or the model.
        max_length: maximum tokens of an example; longer examples are cut. A plain text requires max_length.
        learn: the tokens to train: "completion" trains the tokens that the list of formats names; "all"
            trains all tokens.
        format: format of the rows: "messages", "sharegpt", "alpaca", "completion" or "text". If None, the
            names of the fields decide the format.
        columns: a dict from the formats' field names to the field names in the data, such as
            {"prompt": "question"}.
        chat: write prompts and completions with the chat template, as messages of the user and the assistant.
        skip_bad: skip bad rows, and count them.
        strict: refuse an example of more than max_length tokens.
    Raises:
        DataError: the file has no rows, no token can be trained, or a row is wrong. The error message names
            the file and the line. A row is wrong if its fields fit no format or two formats, or if earlier
            rows have a different format. A row is also wrong if a required field is missing or empty, a field
            has a wrong type, a role is unknown or out of order, or a tool call has no name. A weight must be
            0 or 1, and only a message of the assistant may have weight 1. With `columns`, at least one row
            must have a field that is renamed.
        LimitError: a line is too long, its JSON exceeds a limit, or a weight gives an epoch too many
            examples.
        UnsafeError, FormatError: the model's chat template is invalid.
        ValueError: an argument is out of range, or the model has no EOS token or no chat template.
        ModuleNotFoundError: the package `pyarrow` is needed and not installed.
        OSError: the file cannot be read.
    Warns:
        UserWarning: some rows have messages, reasoning, tools or documents that the chat template leaves out;
            or some rows have none of the fields that `columns` renames.

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
    return read_sources(op, sources_of(op, data), tokenizer_of(op, tokenizer), options)


def tokenizer_of(op: str, given: object) -> Tokenizer:
    """Return the given tokenizer, or the tokenizer of the given model.

    Raises:
        TypeError: the argument is neither a model nor a tokenizer.
    """
    found: Any = given.tokenizer if isinstance(given, LanguageModel) else given
    if not hasattr(found, "eos_id"):
        raise TypeError(
            f"{op}: tokenizer is {_check.kind(found)}, expected a model or its tokenizer, such as "
            "nplora.load_model(path).tokenizer"
        )
    return found  # type: ignore[no-any-return]


def read_sources(op: str, sources: list[Source], tokenizer: Tokenizer, options: ReadOptions) -> Dataset:
    """The examples of all sources. Raises the same errors as `read_dataset`."""
    builder, names = Builder(options.max_length, options.strict, Dataset), ColumnNames(options.columns)
    for source in sources:
        builder.begin(source)
        if source.is_text:
            builder.kind = PLAIN_TEXT
            for window in text_windows(op, source, tokenizer, options.max_length):
                builder.add([window], source.name)
        else:
            add_rows(builder, names, source, tokenizer, options, require_one_answer, one_example)
        builder.end()
    check_names(names, options)
    return builder.dataset()


def text_windows(op: str, source: Source, tokenizer: Tokenizer, length: int | None) -> Iterator[Encoded]:
    """Divide a plain text into windows of `length` tokens. All tokens are trained.

    The last token of a window is also the first token of the next one. So every token of the text except the
    first is a target exactly once.

    Raises:
        ValueError: `length` is None. DataError: the file cannot be read as text.
    """
    if length is None:
        raise ValueError(f"{op}: max_length is None, but the plain text {source.name} needs one")
    encoder = Encoder(tokenizer, learn_all=True, max_length=None)
    texts = (str(row.values["text"]) for row in source.read())
    ids = itertools.chain.from_iterable(encoder.text_parts(texts))
    window = list(itertools.islice(ids, length))
    while len(window) > 1:
        yield Encoded(window, [True] * len(window))
        window = [window[-1], *itertools.islice(ids, length - 1)]


def check_names(names: ColumnNames, options: ReadOptions) -> None:
    """Warn about rows that were read without renaming.

    Raises:
        DataError: `columns` names fields, and no row has any of them.
    """
    if not options.any_names:
        names.require()
    names.warn()


def add_rows(
    builder: Builder[Any],
    names: ColumnNames,
    source: Source,
    tokenizer: Tokenizer,
    options: ReadOptions,
    require: Callable[[Kind, str], None],
    examples_of: Callable[[Example, list[Encoded]], list[list[Encoded]]],
) -> None:
    """Add the rows of a source.

    Args:
        names: counts the rows of all sources that are read without renaming.
        require: a function that is called with the kind of a row, and with the file and line of the row. The
            function raises a DataError if the objective does not read rows of this kind.
        examples_of: a function that groups the sequences of a row into examples (lists of sequences).
    """
    encoder = Encoder(tokenizer, options.learn == "all", options.max_length, options.chat)
    kind: Kind | None = None
    without_prompt = collections.Counter[str]()
    for row in source.read():
        names.look_in(row)
        try:
            kind, example, unused, unread, is_renamed, forgotten = parsed(row, kind, options, require)
            examples = examples_of(example, encoder.encode(example, row.where))
        except (DataError, LimitError) as error:
            builder.bad.skip(error, options.skip_bad)
            continue
        builder.kind = kind.name
        names.count(row, source, is_renamed)
        builder.unread.update(unread.keys())
        for sequences in examples:
            builder.add(sequences, row.where, unused)
        without_prompt.update([forgotten] if forgotten else [])
    if without_prompt:
        warn_user(f"{source.name}: {without_prompt_words(without_prompt)}")


def without_prompt_words(names: Mapping[str, int]) -> str:
    """A warning that some comparisons have no prompt.

    Args:
        names: a dict from the name of each field that probably holds the prompt to the number of rows with
            this field.
    """
    rows, likely = counted(sum(names.values()), "row"), max(names, key=lambda name: names[name])
    return f"found no prompt in {rows} with chosen and rejected; {renaming('prompt', likely)}"


def require_one_answer(kind: Kind, where: str) -> None:
    if kind.name in ("preference", "kto"):
        objective = "dpo" if kind.name == "preference" else "kto"
        ignoring = ""
        if objective == "kto":
            ignoring = (
                "; to ignore the label, set --format to the format of the row: messages, sharegpt, alpaca "
                "or completion"
            )
        raise DataError(
            f"{where}: the row has {kind.fields}; expected one answer to learn. To train on rows of this "
            f"kind, use finetune --objective {objective} (objective={objective!r}){ignoring}"
        )
    if kind.name == "choice":
        raise DataError(
            f"{where}: the row has {kind.fields}, so it is for `nplora eval`; expected one answer to learn"
        )


def one_example(_: Example, sequences: list[Encoded]) -> list[list[Encoded]]:
    """Make one example of all sequences of a row."""
    return [sequences]


def kind_of(
    row: Row,
    before: Kind | None,
    options: ReadOptions,
    require: Callable[[Kind, str], None] = require_one_answer,
) -> Kind:
    """Find the kind of a row, and check that it is the kind of the earlier rows.

    Raises the error that occurred when the row was read, or a DataError.
    """
    return _kind_and_values(row, before, options, require)[0]


class Parsed(NamedTuple):
    """A row after its fields have been read.

    Attributes:
        kind: the format of the row.
        example: the content of the row.
        lost_context: the fields of the row, "tools" or "documents", that are not in the example.
        unread: a dict from the names of the unused fields, as in the data, to their values. Empty fields,
            tools and documents are left out.
        is_renamed: whether the fields were renamed by `columns`.
        forgotten: the name of the field that may hold the prompt, if a comparison has no field "prompt".
    """

    kind: Kind
    example: Example
    lost_context: tuple[str, ...]
    unread: dict[str, Any]
    is_renamed: bool
    forgotten: str | None


def parsed(
    row: Row, before: Kind | None, options: ReadOptions, require: Callable[[Kind, str], None] | None = None
) -> Parsed:
    """Find the kind of a row, as `kind_of` does, and read its fields.

    Args:
        before: the kind of the earlier rows; None: the row may be of any kind.
        require: a function that raises a DataError if the objective does not read rows of this kind, as in
            `add_rows`; None: rows of every kind are read.
    Raises the error that occurred when the row was read, or a DataError.
    """
    kind, values = _kind_and_values(row, before, options, require)
    is_renamed = values is not row.values
    fields, columns = Fields(values, row.where), options.columns if is_renamed else {}
    try:
        example = kind.parse(fields)
    except DataError as error:
        if is_renamed or not options.columns:
            raise
        names = ", ".join(map(repr, options.columns.values()))
        raise DataError(
            f"{error}; the row has none of the fields that --columns (columns=...) renames ({names})"
        ) from error
    unread = {columns.get(name, name): value for name, value in fields.unread().items()}
    replaced = (name for name in columns if row.values.get(name) and name not in columns.values())
    unread |= {name: row.values[name] for name in replaced}
    forgotten = None
    if isinstance(example, Preference) and not values.get("prompt"):
        forgotten = forgotten_prompt(example, unread)
    return Parsed(kind, example, lost_context(values, example), unread, is_renamed, forgotten)


def _renamed(row: Row, options: ReadOptions) -> dict[str, Any]:
    """Rename the fields of a row.

    A row without any of the names in `columns` is returned as it is if it has fields of a format without
    renaming. Otherwise, a missing name is an error.
    """
    try:
        return renamed(row.values, options.columns, row.where)
    except DataError:
        has_any = any(theirs in row.values for theirs in options.columns.values())
        if has_any or not _has_own_names(row, options.format):
            raise
        return row.values


def _has_own_names(row: Row, format: str | None) -> bool:
    """Whether a row has fields with nplora's names: any of them if `format` is set, else a format's."""
    if format is not None:
        return not {*FIELDS}.isdisjoint(row.values)
    try:
        recognise(row.values, row.where)
    except DataError:
        return False
    return True


def _kind_and_values(
    row: Row, before: Kind | None, options: ReadOptions, require: Callable[[Kind, str], None] | None
) -> tuple[Kind, dict[str, Any]]:
    if row.error is not None:
        raise row.error
    values = _renamed(row, options)
    kind = recognise(values, row.where) if options.format is None else BY_NAME[options.format]
    if require is not None:
        require(kind, row.where)
    if before is not None and before is not kind:
        raise DataError(
            f"{row.where}: the row has {kind.fields}, but the earlier rows have {before.fields}; "
            "expected one format in the whole file"
        )
    return kind, values
