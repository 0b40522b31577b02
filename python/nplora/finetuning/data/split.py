"""Divides the rows of sources into rows to train on and rows to evaluate on."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
from collections.abc import Callable, Iterator

from nplora.finetuning.data.dataset import ReadOptions, parsed
from nplora.finetuning.data.examples import (
    Chat,
    Example,
    Judged,
    MultipleChoice,
    Preference,
    Text,
    through_template,
)
from nplora.finetuning.data.kinds import Kind
from nplora.finetuning.data.renaming import ColumnNames
from nplora.finetuning.data.rows import Row
from nplora.finetuning.data.sources import Source
from nplora.formats.errors import DataError, LimitError, counted


class Division:
    """Sources whose rows are divided into training rows and held-out rows.

    A hash of the text of a row's example decides whether the row is held out. So a row that is held out stays
    held out when other rows are added or the order changes. Rows with the same text are either all held out
    or all trained on. The weights of the sources apply only to the rows to train on. Each source is read only
    once. While the rows to train on are read, the held-out rows are stored in memory, and the method
    `held_out` returns them later.

    Attributes:
        train: the sources of the rows to train on. After the last source has been read to its end, a
            DataError is raised if there are no rows to train on, or no held-out rows, or if no row has a
            field that `options.columns` renames.
    """

    def __init__(
        self,
        op: str,
        sources: list[Source],
        share: float,
        options: ReadOptions,
        require: Callable[[Kind, str], None] | None = None,
    ) -> None:
        """
        Args:
            share: the share of the rows that are held out, on average.
            options: how rows become examples.
            require: a function that raises a DataError if a row's kind cannot be used, as in `parsed`.
        Raises:
            ValueError: a source is a plain text, which has no rows.
        """
        for source in sources:
            if source.is_text:
                raise ValueError(f"{op}: {source.name} is a plain text, which has no rows to hold out")
        self._sources, self._share, self._options, self._require = sources, share, options, require
        self._names = ColumnNames(options.columns)
        self._rows = dict[int, int]()  # the number of rows of each source that was read to its end
        self._held_out = dict[int, list[Row]]()
        self.train = [
            dataclasses.replace(source, read=functools.partial(self._read, number), may_be_empty=True)
            for number, source in enumerate(sources)
        ]

    def held_out(self) -> list[Source]:
        """The sources of the held-out rows. Call this method after all sources in `train` have been read."""
        return [
            dataclasses.replace(
                source, name=f"{source.name}, held out", read=functools.partial(iter, rows), weight=1.0
            )
            for number, source in enumerate(self._sources)
            if (rows := self._held_out[number])
        ]

    def _read(self, number: int) -> Iterator[Row]:
        """Yield the training rows of source `number`, and its bad rows, whose errors the caller reports."""
        rows, held_out, kind = 0, list[Row](), None
        for row in self._sources[number].read():
            rows += 1
            self._names.look_in(row)
            try:
                found = parsed(row, kind, self._options, self._require)
                kind = found.kind
                self._names.count(row, self._sources[number], found.is_renamed)
                is_held = is_held_out(text_of(found.example, row.where), self._share)
            except (DataError, LimitError) as error:
                yield Row(row.where, {}, error)
                continue
            if is_held:
                held_out.append(row)
            else:
                yield row
        if not rows:
            raise DataError(f"{self._sources[number].name}: no examples")
        self._rows[number], self._held_out[number] = rows, held_out
        if len(self._rows) == len(self._sources):
            self._names.require()
            self._require_two_sides()

    def _require_two_sides(self) -> None:
        rows, held_out = sum(self._rows.values()), sum(map(len, self._held_out.values()))
        names = ", ".join(source.name for source in self._sources)
        if held_out in (0, rows):
            use, change = ("evaluate", "larger") if not held_out else ("train", "smaller")
            raise DataError(
                f"{names}: valid_split={self._share} holds out {held_out} of {counted(rows, 'row')}, which "
                f"leaves none to {use} on; expected a {change} share, or a separate file of validation data"
            )


def is_held_out(text: str, share: float) -> bool:
    """Whether an example with this text is held out, decided by a hash of the text without white space."""
    digest = hashlib.blake2b("".join(text.split()).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") < share * 2.0**64


def text_of(example: Example, where: str) -> str:
    """The messages, prompts, answers, choices and tool calls of an example, joined.

    Roles, reasoning, tools, documents, identifiers, weights and judgements are left out.

    Raises:
        DataError: a tool call has an argument that JSON cannot represent.
    """
    try:
        return "".join(_texts(example))
    except (TypeError, ValueError) as error:
        raise DataError(
            f"{where}: a tool call has an argument that JSON cannot represent, but valid_split needs it as "
            f"JSON: {error}"
        ) from error


def _texts(example: Example) -> Iterator[str]:
    """The texts of messages, prompts, answers, choices and tool calls, in order."""
    example = through_template(example)
    if isinstance(example, Preference):
        yield from _texts(example.chosen)
        yield from _texts(example.rejected)
    elif isinstance(example, Judged):
        yield from _texts(example.answer)
    elif isinstance(example, MultipleChoice):
        yield from (message["content"] for message in example.messages)
        yield from example.choices
    elif isinstance(example, Chat):
        for message in example.messages:
            yield message["content"]
            for call in message.get("tool_calls") or ():
                function = call["function"]
                yield function["name"] + json.dumps(function["arguments"], sort_keys=True, allow_nan=False)
    elif isinstance(example, Text):
        yield example.text
