"""Dataset: the examples of a file as tokens, with a mark for each trained token, and a report on the file."""

from __future__ import annotations

import array
import errno
import hashlib
import itertools
import os
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, SupportsIndex, overload

import numpy as np
import numpy.typing as npt

from nplora import _check
from nplora.finetuning.data.rows import Row, read_rows
from nplora.formats import files
from nplora.formats.errors import (
    DataError,
    FormatError,
    LimitError,
    UnsafeError,
    UnsupportedError,
    brief,
    counted,
)
from nplora.formats.files import StrPath
from nplora.models.packing import IGNORED
from nplora.tokenizer import Tokenizer

Array = npt.NDArray[Any]

LEARN = ("completion", "all")
_SUFFIXES = (".jsonl", ".csv", ".txt")
_QUOTED = 3  # bad lines that a report quotes
_MESSAGES = "expected a list of objects with a role and a content"
_NOTHING = "nothing to train on, expected an assistant turn of weight 1 with a token before it"
_KINDS = ("messages", "text", "prompt", "completion")
_CONTEXT = ("tools", "documents")  # fields of a row that the chat template gets besides the messages
_ROLES = ("system", "user", "assistant", "tool", "developer", "function", "ipython")


@dataclass(frozen=True)
class _Example:
    """The token ids of a row, a mark for each trained token, and whether tools or documents are unused."""

    ids: list[int]
    trained: list[bool]
    unused: bool = False


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

    >>> tokenizer = nplora.load_model("model.gguf").tokenizer
    >>> print(nplora.data.read_dataset("valid.jsonl", tokenizer).report)
    valid.jsonl: 4 examples, 36 tokens (12 in the loss); 9 to 9 tokens long, median 9
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

    def __str__(self) -> str:
        text = (
            f"{self.source}: {counted(self.examples, 'example')}, {counted(self.tokens, 'token')} "
            f"({self.learned:,} in the loss); {self.shortest} to {self.longest} tokens long, "
            f"median {self.median}"
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
    Dataset(train.jsonl: 16 examples, ...)
    >>> ids, labels = dataset[0]
    >>> tokenizer.decode(ids[labels != -100])
    '0<|end|>'
    """

    def __init__(self, ids: Array, trained: Array, starts: Array, report: DataReport) -> None:
        self._ids, self._trained, self._starts = ids, trained, starts
        self.report = report

    def __len__(self) -> int:
        return len(self._starts) - 1

    @overload
    def __getitem__(self, index: SupportsIndex) -> tuple[Array, Array]: ...
    @overload
    def __getitem__(self, index: slice) -> list[tuple[Array, Array]]: ...
    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        index = range(len(self))[index]
        part = slice(self._starts[index], self._starts[index + 1])
        ids = self._ids[part]
        return ids, np.where(self._trained[part], ids, np.int32(IGNORED))

    @property
    def lengths(self) -> Array:
        """The number of tokens of each example."""
        return np.diff(self._starts)

    @property
    def targets(self) -> Array:
        """The number of trained tokens of each example. The first token of an example is never trained."""
        trained = self._trained.astype(np.int64)
        trained[self._starts[:-1]] = 0
        return np.asarray(np.add.reduceat(trained, self._starts[:-1]))

    @property
    def largest_id(self) -> int:
        """The largest token id."""
        return int(self._ids.max())

    def fingerprint(self) -> str:
        """SHA-256 of the examples. Datasets with the same tokens and the same trained tokens share it."""
        digest = hashlib.sha256()
        for part in (self._ids, self._trained, self._starts):
            digest.update(part.tobytes())
        return digest.hexdigest()

    def __repr__(self) -> str:
        return f"Dataset({self.report})"


def find_splits(path: StrPath) -> tuple[Path, Path | None]:
    """Find the training file and the validation file, if any.

    A directory holds them as train.* and valid.*. If `path` is a file, that file is the training file.

    Raises:
        FileNotFoundError: the path does not exist, or the directory has no train.jsonl, train.csv or
            train.txt.

    >>> train, valid = nplora.data.find_splits(".")
    >>> train.name, valid.name
    ('train.jsonl', 'valid.jsonl')
    """
    given = Path(path)
    if not given.is_dir():
        given.stat()
        return given, None
    return _required(given, "train"), _split(given, "valid")


def find_evaluated(path: StrPath) -> Path:
    """Find the file to evaluate a model on. In a directory it is valid.*, or train.* if there is no valid.*.

    Raises:
        FileNotFoundError: the path does not exist, or the directory has neither valid.* nor train.*.

    >>> nplora.data.find_evaluated(".").name
    'valid.jsonl'
    """
    given = Path(path)
    if given.is_dir():
        return _required(given, "valid", "train")
    given.stat()
    return given


def _required(directory: Path, *names: str) -> Path:
    """The data file of the first split in `names` that the directory has."""
    found = next(filter(None, (_split(directory, name) for name in names)), None)
    if found is None:
        wanted = ", ".join(f"{name}{suffix}" for name in names for suffix in _SUFFIXES)
        raise FileNotFoundError(
            errno.ENOENT, f"the directory has none of these: {wanted}", os.fspath(directory)
        )
    return found


def _split(directory: Path, name: str) -> Path | None:
    return next((file for s in _SUFFIXES if (file := directory / f"{name}{s}").exists()), None)


def read_dataset(
    path: StrPath,
    tokenizer: Tokenizer,
    *,
    max_length: int | None = None,
    learn: str = "completion",
    skip_bad: bool = False,
    strict: bool = False,
) -> Dataset:
    """Read a file of training data.

    The fields of a row decide how it becomes an example:

    - {"prompt": "…", "completion": "…"}: both texts are joined and end with EOS. The completion and EOS are
      trained.
    - {"messages": [{"role": …, "content": …}]}: the chat template writes the messages. The assistant's turns
      are trained.
    - {"messages": …, "tools": […], "documents": […]}: the chat template also gets the tools and the
      documents, as in transformers.
    - {"text": "…"}: the text ends with EOS. All tokens are trained.

    A .csv file has the columns prompt and completion, or the column text. A plain .txt file is one text,
    which is split into windows of max_length tokens. A message of the assistant with "weight": 0 is read but
    not trained. A field that is null counts as missing.

    Args:
        path: a .jsonl, .csv or .txt file.
        tokenizer: the model's tokenizer.
        max_length: maximum tokens of an example; longer examples are cut. A plain text requires max_length.
        learn: "completion" trains the tokens that are listed above; "all" trains all tokens.
        skip_bad: skip bad rows, and count them.
        strict: refuse an example of more than max_length tokens.
    Raises:
        DataError: the file has no rows, no token can be trained, or a row is wrong. A row is wrong if it is
            of no kind or of two kinds; if its completion or text is empty; if its prompt is empty and the
            model has no BOS token; if a role is unknown; if a weight is neither 0 nor 1, or belongs to a
            message that is not the assistant's; or if tools or documents are not a list of objects. The error
            message names the file and the line.
        LimitError: a line is too long, or its JSON exceeds a limit.
        UnsafeError, FormatError: the model's chat template is invalid.
        ValueError: an argument is out of range, or the model has no EOS token or no chat template.
        OSError: the file cannot be read.
    Warns:
        UserWarning: some rows have tools or documents that the chat template leaves out.

    >>> tokenizer = nplora.load_model("model.gguf").tokenizer
    >>> dataset = nplora.data.read_dataset("train.jsonl", tokenizer, max_length=32)
    >>> len(dataset), dataset.report.truncated
    (16, 0)
    """
    op = "read_dataset"
    if max_length is not None:
        _check.integer(op, "max_length", max_length, least=2)
    _check.choice(op, "learn", learn, LEARN)
    plain = files.suffix(path) == ".txt"
    if plain and max_length is None:
        raise ValueError(f"{op}: max_length is None, but the plain text {files.name(path)} needs one")
    encoder = _Encoder(tokenizer, learn == "all", None if plain else max_length)
    builder = _Builder(files.name(path), None if plain else max_length, strict)
    if plain:
        tokens = itertools.chain.from_iterable(encoder.text_parts(read_rows(path)))
        for window in _windows(tokens, max_length or 0):
            builder.add(_Example(window, [True] * len(window)), builder.source)
        return builder.dataset()
    for row in read_rows(path):
        try:
            if row.error is not None:
                raise row.error
            example = encoder.encode(row)
        except (DataError, LimitError) as error:
            if not skip_bad:
                raise
            builder.skip(error)
        else:
            builder.add(example, row.where)
    dataset = builder.dataset()
    if dataset.report.unused:
        rows = counted(dataset.report.unused, "example")
        warnings.warn(
            f"{builder.source}: {rows} with tools or documents that the chat template leaves out: "
            "the model does not see them",
            stacklevel=2,
        )
    return dataset


def _windows(ids: Iterator[int], length: int) -> Iterator[list[int]]:
    """Split tokens into windows.

    Neighbouring windows share one token, so that every token except the first of the text is predicted once.
    """
    window = list(itertools.islice(ids, length))
    while len(window) > 1:
        yield window
        window = [window[-1], *itertools.islice(ids, length - 1)]


class _Encoder:
    """Turns rows into tokens."""

    def __init__(self, tokenizer: Tokenizer, learn_all: bool, max_length: int | None) -> None:
        if tokenizer.eos_id is None:
            raise ValueError(f"{tokenizer.source}: the model has no EOS token to end each example with")
        self._tokenizer, self._eos, self._all = tokenizer, tokenizer.eos_id, learn_all
        self._most = None if max_length is None else max_length + 1  # the rest of a longer row is not encoded

    def encode(self, row: Row) -> _Example:
        values, where = row.values, row.where
        kinds = [key for key in _KINDS if values.get(key) is not None] or [k for k in _KINDS if k in values]
        if len(kinds) > 1 and kinds != ["prompt", "completion"]:
            raise DataError(f"{where}: the row has both {kinds[0]} and {kinds[1]}, expected only one of them")
        if "messages" in kinds:
            example = self._messages(values, where)
        elif "text" in kinds:
            example = self._plain(values, where)
        elif kinds:
            example = self._completion(values, where)
        else:
            keys = brief(list(values))
            raise DataError(f"{where}: the row has {keys}, expected messages, prompt and completion, or text")
        is_cut = self._most is not None and len(example.ids) >= self._most
        if not is_cut and not any(example.trained[1:]):
            raise DataError(f"{where}: {_NOTHING}")
        return example

    def text_parts(self, rows: Iterator[Row]) -> Iterator[list[int]]:
        """Encode one text, part by part, and add EOS at its end."""
        for index, row in enumerate(rows):
            text = row.values["text"]
            encode = self._tokenizer.encode_continuation if index else self._tokenizer.encode_prompt
            yield encode(text)
        yield [self._eos]

    def _plain(self, values: dict[str, Any], where: str) -> _Example:
        ids = [*self._tokenizer.encode_prompt(_text(values, "text", where), self._most), self._eos]
        return _Example(ids, [True] * len(ids), _has_context(values))

    def _completion(self, values: dict[str, Any], where: str) -> _Example:
        """Encode prompt and completion as one text, or separately if joining changes the prompt's tokens."""
        prompt, completion = _text(values, "prompt", where, True), _text(values, "completion", where)
        before, ids = (
            self._tokenizer.encode_prompt(prompt, self._most),
            self._tokenizer.encode_prompt(prompt + completion, self._most),
        )
        if not before:
            raise DataError(f"{where}: prompt is empty, and the model has no BOS token to begin with")
        if ids[: len(before)] != before:
            ids = before + self._tokenizer.encode_continuation(completion, self._most)
        ids.append(self._eos)
        trained = [self._all or place >= len(before) for place in range(len(ids))]
        return _Example(ids, trained, _has_context(values))

    def _messages(self, values: dict[str, Any], where: str) -> _Example:
        messages = values["messages"]
        if not isinstance(messages, list) or not messages:
            raise DataError(f"{where}: messages is {brief(messages)}, {_MESSAGES}")
        for message in messages:
            _check_message(message, where)
        if not self._all and not any(map(_is_trained, messages)):
            raise DataError(f"{where}: {_NOTHING}")
        given = {name: _objects(values, name, where) for name in _CONTEXT}
        try:
            chat = self._tokenizer.encode_conversation(messages, **given, most=self._most)
        except ValueError as error:
            is_template = isinstance(error, FormatError) and not isinstance(error, UnsupportedError)
            if is_template:
                kind = UnsafeError if isinstance(error, LimitError) else type(error)
                raise kind(f"{where}: {error}") from error
            raise DataError(f"{where}: {error}") from error
        trained = [True] * len(chat.ids) if self._all else chat.is_reply
        for index, turn in chat.turns.items():
            if not _is_trained(messages[index]):
                trained[turn.start : turn.stop] = [False] * len(turn)
        return _Example(chat.ids, trained, bool(chat.unused))


def _check_message(message: object, where: str) -> None:
    if not isinstance(message, dict) or not isinstance(message.get("role"), str):
        raise DataError(f"{where}: a message is {brief(message)}, {_MESSAGES}")
    role, weight = message["role"], message.get("weight")
    if role not in _ROLES:
        raise DataError(
            f"{where}: the role of a message is {brief(role)}, expected one of {', '.join(_ROLES)}"
        )
    if role == "assistant" and not _says_something(message):
        raise DataError(
            f"{where}: the assistant's content is {brief(message.get('content'))}, expected a text"
        )
    if weight is None:
        return
    if role != "assistant":
        raise DataError(f"{where}: a message of role {role!r} has a weight, expected it for 'assistant' only")
    if isinstance(weight, bool) or weight not in (0, 1):
        raise DataError(f"{where}: the weight of a message is {brief(weight)}, expected 0 or 1")


def _objects(values: dict[str, Any], name: str, where: str) -> list[dict[str, Any]] | None:
    """The tools or the documents of a row, or None if the row has none."""
    value = values.get(name)
    if value is None:
        return None
    if not isinstance(value, list) or not all(isinstance(item, dict) for item in value):
        raise DataError(f"{where}: {name} is {brief(value)}, expected a list of objects")
    return value


def _has_context(values: dict[str, Any]) -> bool:
    """Whether a row without messages has tools or documents, which only messages can use."""
    return any(values.get(name) for name in _CONTEXT)


def _is_trained(message: dict[str, Any]) -> bool:
    return message["role"] == "assistant" and message.get("weight") != 0


def _says_something(message: dict[str, Any]) -> bool:
    content = message.get("content")
    return bool(content.strip()) if isinstance(content, str) else bool(content or message.get("tool_calls"))


def _text(values: dict[str, Any], key: str, where: str, may_be_empty: bool = False) -> str:
    if key not in values:
        raise DataError(f"{where}: {key} is missing; the row has {brief(list(values))}")
    value = values[key]
    if not isinstance(value, str):
        raise DataError(f"{where}: {key} is {brief(value)}, expected a string")
    if not value.strip() and not may_be_empty:
        raise DataError(f"{where}: {key} is empty, expected a text")
    return value


class _Builder:
    """Collects examples into a dataset."""

    def __init__(self, source: str, max_length: int | None, strict: bool) -> None:
        self.source, self._max_length, self._strict = source, max_length, strict
        self._ids, self._trained, self._starts = array.array("i"), bytearray(), array.array("q", [0])
        self._truncated = self._emptied = self._skipped = self._unused = 0
        self._problems: list[str] = []

    def add(self, example: _Example, where: str) -> None:
        ids, trained = example.ids, example.trained
        if self._max_length is not None and len(ids) > self._max_length:
            if self._strict:
                least = "at least " * (len(ids) <= self._max_length + 2)  # the rest may not have been read
                count = f"{least}{len(ids):,} tokens"
                raise DataError(f"{where}: {count}, expected at most {self._max_length:,}")
            ids, trained = ids[: self._max_length], trained[: self._max_length]
            if not any(trained[1:]):
                self._emptied += 1
                return
            self._truncated += 1
        self._unused += example.unused
        self._ids.extend(ids)
        self._trained.extend(trained)
        self._starts.append(len(self._ids))

    def skip(self, error: FormatError) -> None:
        self._skipped += 1
        if len(self._problems) < _QUOTED:
            self._problems.append(str(error))

    def dataset(self) -> Dataset:
        ids, starts = np.array(self._ids, np.int32), np.array(self._starts, np.int64)
        trained, lengths = np.array(self._trained, np.bool_), np.diff(starts)
        if not len(lengths):
            skipped = f"{counted(self._skipped, 'bad row')} skipped ({'; '.join(self._problems)})"
            reasons = [skipped] * bool(self._skipped)
            emptied = f"{self._emptied} with nothing to train on within max_length={self._max_length}"
            emptied += "; a larger max_length keeps more examples"
            reasons += [emptied] * bool(self._emptied)
            raise DataError(f"{self.source}: no examples{': ' * bool(reasons)}{', '.join(reasons)}")
        first = trained[starts[:-1]].sum()  # the first token of an example is not predicted
        report = DataReport(
            source=self.source,
            examples=len(lengths),
            tokens=len(ids),
            learned=int(trained.sum() - first),
            shortest=int(lengths.min()),
            median=int(np.median(lengths)),
            longest=int(lengths.max()),
            truncated=self._truncated,
            emptied=self._emptied,
            skipped=self._skipped,
            problems=tuple(self._problems),
            unused=self._unused,
        )
        return Dataset(ids, trained, starts, report)
