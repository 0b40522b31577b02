"""LabelRecord: describes a classifier's outputs. An adapter file stores the record in its metadata."""

from __future__ import annotations

import json
from dataclasses import dataclass

from nplora.formats import strict_json
from nplora.formats.errors import FormatError, LimitError, brief

TASKS = ("single", "multi", "regression")
MAX_LABELS = 1 << 16
LONGEST_LABEL = 1000  # characters
_SHOWN = 40  # characters of a label in reports


@dataclass(frozen=True)
class LabelRecord:
    """The task of a classifier, and the names of its outputs.

    Attributes:
        task: "single" (one label for each text), "multi" (any number of labels) or "regression" (numbers).
        labels: the name of each output, in order.
        max_length: the maximum number of tokens of a text; longer texts are cut. None: the encoder's own
            maximum.
        tokens: True if the outputs are for each token of a text, False if they are for the whole text.
    """

    task: str
    labels: tuple[str, ...]
    max_length: int | None = None
    tokens: bool = False


def dumps(record: LabelRecord) -> str:
    """The record as JSON."""
    fields = {"task": record.task, "labels": list(record.labels), "max_length": record.max_length}
    return json.dumps(fields | ({"tokens": True} if record.tokens else {}), allow_nan=False)


def is_name(label: str) -> bool:
    """Whether a text can be the name of an output: it has between 1 and `LONGEST_LABEL` characters."""
    return 0 < len(label) <= LONGEST_LABEL


def shown(label: str) -> str:
    """Shorten and escape a label, so that it fits in one line of output.

    The label is cut to 40 characters, and its unprintable characters are escaped.
    """
    cut = label if len(label) <= _SHOWN else label[: _SHOWN - 1] + "…"
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in cut)


def loads(text: str, source: str) -> LabelRecord:
    """Read a record. `source` says in error messages where the text comes from.

    Raises:
        FormatError: the text breaks the format. LimitError: there are too many labels.
    """
    fields = strict_json.loads(text.encode(), source)
    if not isinstance(fields, dict):
        raise FormatError(f"{source}: {brief(fields)}, expected an object")
    task, labels, length = fields.get("task"), fields.get("labels"), fields.get("max_length")
    if task not in TASKS:
        raise FormatError(f"{source}: task is {brief(task)}, expected one of {', '.join(TASKS)}")
    if not isinstance(labels, list) or not labels or not all(isinstance(label, str) for label in labels):
        raise FormatError(f"{source}: labels is {brief(labels)}, expected a non-empty list of texts")
    if len(labels) > MAX_LABELS:
        raise LimitError(f"{source}: labels has {len(labels):,} entries, expected at most {MAX_LABELS:,}")
    wrong = next((name for name in labels if not is_name(name)), None)
    if wrong is not None:
        raise FormatError(f"{source}: a label has {len(wrong):,} characters, expected 1 to {LONGEST_LABEL:,}")
    if len(set(labels)) < len(labels):
        raise FormatError(f"{source}: two labels have the same name")
    if length is not None and (type(length) is not int or length < 1):
        raise FormatError(f"{source}: max_length is {brief(length)}, expected a number of tokens")
    tokens = fields.get("tokens", False)
    if not isinstance(tokens, bool):
        raise FormatError(f"{source}: tokens is {brief(tokens)}, expected true or false")
    return LabelRecord(task, tuple(labels), length, tokens)
