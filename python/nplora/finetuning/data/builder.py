"""Builder: collects the examples of several sources into a data set, and counts what is cut or skipped."""

from __future__ import annotations

import array
import collections
import dataclasses
import hashlib
from collections.abc import Collection
from typing import Generic, TypeVar

import numpy as np

from nplora.finetuning.data.bad_rows import BadRows
from nplora.finetuning.data.encoding import Encoded
from nplora.finetuning.data.sources import Source
from nplora.finetuning.data.stored import DataReport, Stored
from nplora.formats.errors import DataError, LimitError, counted
from nplora.runtime.giving_way import give_way
from nplora.runtime.user_warning import warn_user

_Made = TypeVar("_Made", bound=Stored)

MOST_EXAMPLES = 1 << 25  # the most examples of an epoch, if weights repeat examples


class Builder(Generic[_Made]):
    """Collects the examples of several sources into a dataset.

    Args:
        max_length, strict: as in `read_dataset`.
        made: the class of the dataset to build. The class defines how many sequences an example has.
        unit: the name of an example in the report.

    Attributes:
        bad: the number and the errors of the bad rows of the current source.
        kind: the name of the row format of the current source, such as "messages".
        unread: for each unused field, the number of rows with this field, in all sources.
    """

    def __init__(
        self, max_length: int | None, strict: bool, made: type[_Made], unit: str = "example"
    ) -> None:
        self._max_length, self._strict = max_length, strict
        self._made, self._unit = made, unit
        self._ids, self._trained, self._starts = array.array("i"), bytearray(), array.array("q", [0])
        self._order = array.array("q")
        self._sources: list[Source] = []
        self._kinds: list[str] = []
        self._first = self._emptied_before = self._emptied = self._unused = 0
        self.bad, self._skipped = BadRows(), BadRows()  # in the current source, and in the earlier ones
        self._left_out = set[str]()
        self._truncated = bytearray()  # for each example, whether it is cut
        self._forms = set[bool]()
        self.unread = collections.Counter[str]()
        self.kind = ""

    def begin(self, source: Source) -> None:
        """Begin a source. All examples that are added after this call belong to `source`."""
        self._sources.append(source)
        self._first = self.stored
        self.bad, self._emptied_before, self.kind = BadRows(), self._emptied, ""

    @property
    def stored(self) -> int:
        """The number of examples so far."""
        return (len(self._starts) - 1) // self._made.sequences

    def add(self, sequences: list[Encoded], where: str, unused: tuple[str, ...] = ()) -> None:
        """Add the sequences of an example, cut to the maximum length.

        If the cut leaves nothing to train on (see the function `is_emptied`), the example is left out.

        Args:
            unused: the fields of the row, "tools" or "documents", that no sequence contains.
        """
        give_way()
        cut = [self._cut(sequence, where) for sequence in sequences]
        is_cut = any(len(one.ids) < len(whole.ids) for one, whole in zip(cut, sequences, strict=True))
        if is_emptied(cut, sequences):
            self._emptied += 1
            return
        self._truncated.append(is_cut)
        left_out = {*unused, *(name for sequence in sequences for name in sequence.unused)}
        self._unused += bool(left_out)
        self._left_out |= left_out
        self._forms.update(sequence.is_chat for sequence in sequences)
        for one in cut:
            self._ids.extend(one.ids)
            self._trained.extend(one.trained)
            self._starts.append(len(self._ids))

    def _cut(self, sequence: Encoded, where: str) -> Encoded:
        """Remove the tokens of the sequence that exceed the maximum length. With `strict`, raise an error."""
        most, count = self._max_length, len(sequence.ids)
        if most is None or count <= most or self._sources[-1].is_text:
            return sequence
        if self._strict:
            least = "at least " * (count <= most + 2)  # encoding stops soon after the limit
            raise DataError(f"{where}: {least}{count:,} tokens, expected at most {most:,}")
        return Encoded(sequence.ids[:most], sequence.trained[:most])

    def end(self) -> None:
        """Finish the current source: repeat its examples according to its weight.

        If the weight is not a whole number, an epoch repeats some examples once more than the others. Hashes
        of the tokens choose the examples that occur more often.

        Raises:
            DataError: the source has no examples. A source that may be empty (`may_be_empty`) is refused
                only if it had rows, and all of them were skipped or left out.
            LimitError: the weight gives an epoch more than `MOST_EXAMPLES` examples.
        """
        source, added, reasons = self._sources[-1], range(self._first, self.stored), self._why()
        if not added and source.may_be_empty and not reasons:
            self._sources.pop()
            return
        if not added:
            raise DataError(f"{source.name}: no examples{reasons}")
        self._skipped.add(self.bad)
        self._kinds.append(self.kind)
        if source.weight > 1 and (count := len(self._order) + len(added) * source.weight) > MOST_EXAMPLES:
            raise LimitError(
                f"{source.name}: weight {source.weight:g} makes {count:.3g} examples in an epoch, "
                f"expected at most {MOST_EXAMPLES:,}"
            )
        epoch = in_epoch(source.weight, len(added))
        if not epoch:
            warn_user(f"{source.name}: with weight {source.weight:g}, an epoch has none of its examples")
        whole, more = divmod(epoch, len(added))
        chosen = set(sorted(added, key=self._digest)[:more] if more else ())
        for index in added:
            self._order.extend([index] * (whole + (index in chosen)))

    def _digest(self, index: int) -> bytes:
        """A hash of the tokens of an example."""
        first, end = index * self._made.sequences, (index + 1) * self._made.sequences
        tokens = self._ids[self._starts[first] : self._starts[end]]
        return hashlib.blake2b(tokens.tobytes(), digest_size=8).digest()

    def _why(self) -> str:
        reasons = [reason] if (reason := self.bad.reason()) else []
        if emptied := self._emptied - self._emptied_before:
            reasons.append(
                f"{emptied} with nothing to train on within max_length={self._max_length}; "
                "a larger maximum keeps more examples"
            )
        return f": {', '.join(reasons)}" if reasons else ""

    def dataset(self) -> _Made:
        """The dataset of all sources.

        Raises:
            DataError: the weights are so small that an epoch has no examples.
        Warns:
            UserWarning: the tokens of some examples lack messages, reasoning, tools or documents of the row.
        """
        source = ", ".join(source.name for source in self._sources)
        if not self._order:
            raise DataError(f"{source}: the weights are so small that an epoch has no examples")
        # Views of the collected values, because copies would double the memory of a large data set.
        ids, starts, order = (
            np.frombuffer(values, type_)
            for values, type_ in ((self._ids, np.int32), (self._starts, np.int64), (self._order, np.int64))
        )
        report = DataReport(
            source, 0, 0, 0, 0, 0, 0, 0, self._emptied, self._skipped.count, tuple(self._skipped.problems),
            self._unused, ", ".join(dict.fromkeys(self._kinds)), self._unit,
            self._forms.pop() if len(self._forms) == 1 else None, dict(self.unread),
        )  # fmt: skip
        made = self._made(ids, np.frombuffer(self._trained, np.bool_), starts, report, order)
        lengths = made.sequence_lengths
        made.report = dataclasses.replace(
            report,
            examples=len(made),
            tokens=int(made.lengths.sum()),
            learned=int(made.targets.sum()),
            shortest=int(lengths.min()),
            median=int(np.median(lengths)),
            longest=int(lengths.max()),
            truncated=int(np.frombuffer(self._truncated, np.uint8)[order].sum()),
        )
        warn_of_unused(source, self._unused, self._left_out, self._unit)
        return made


def warn_of_unused(source: str, count: int, names: Collection[str], unit: str = "example") -> None:
    """Warn if the tokens of some examples lack messages, reasoning, tools or documents of the row.

    Args:
        count: the number of these examples.
        names: what the tokens lack, as in `Encoded.unused`.
    """
    if count:
        warn_user(f"{source}: {left_out_words(count, names, unit)}, so the model does not see them")


def left_out_words(count: int, names: Collection[str], unit: str) -> str:
    """A text that says what the tokens lack. For the arguments, see `warn_of_unused`."""
    lost = " or ".join(sorted(names))
    return f"in {counted(count, unit)}, the chat template or the format of the row leaves out {lost}"


def in_epoch(weight: float, examples: int) -> int:
    """The number of a source's examples in an epoch: `weight` times `examples`, rounded to an integer."""
    return int(weight * examples + 0.5)


def is_emptied(cut: list[Encoded], whole: list[Encoded]) -> bool:
    """Whether an example is left out because it was cut.

    The example is left out if, after the cut, one of its sequences has no trained token, or all its sequences
    are equal.
    """
    is_cut = any(len(one.ids) < len(before.ids) for one, before in zip(cut, whole, strict=True))
    return is_cut and (not all(any(one.trained[1:]) for one in cut) or _are_equal(cut))


def _are_equal(sequences: list[Encoded]) -> bool:
    """Whether an example has several sequences, and the cut has made them equal."""
    return len(sequences) > 1 and all(one.ids == sequences[0].ids for one in sequences)
