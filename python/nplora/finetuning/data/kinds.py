"""The kinds of rows, and how a row's kind is found. The files in `parsing/` make examples from rows."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from nplora.finetuning.data.examples import Chat, Example, Judged, Preference
from nplora.finetuning.data.parsing import choices, messages, preferences, sharegpt, texts
from nplora.finetuning.data.parsing.fields import CONTEXT, Fields
from nplora.formats.errors import DataError, brief, nearest_names


@dataclass(frozen=True)
class Kind:
    """A kind of rows.

    Attributes:
        name: the value of the option `format` for this kind.
        fields: a text for error messages that names the fields of a row of this kind.
        known_by: names of fields. A row with one of these fields is of this kind; `_kinds_with` makes
            exceptions.
        parse: makes an example from the fields of a row.
    """

    name: str
    fields: str
    known_by: tuple[str, ...]
    parse: Callable[[Fields], Example]


KINDS = (
    Kind("messages", "messages", ("messages",), messages.openai),
    Kind("sharegpt", "conversations", ("conversations",), sharegpt.sharegpt),
    Kind("alpaca", "instruction and output", ("instruction",), texts.instruction),
    Kind("completion", "prompt and completion", ("completion",), texts.completion),
    Kind("text", "text", ("text",), texts.text),
    Kind(
        "preference",
        "chosen and rejected",
        ("chosen", "rejected", "preferred_output", "non_preferred_output"),
        preferences.preference,
    ),
    Kind("kto", "an answer and a label", (), preferences.judged),
    Kind("choice", "prompt, choices and answer", ("choices",), choices.multiple_choice),
)
# All fields that the kinds read. These names are the possible keys of `columns`.
FIELDS = (
    "answer", "chosen", "choices", "completion", "conversations", "documents", "history", "input",
    "instruction", "label", "messages", "non_preferred_output", "output", "preferred_output", "prompt",
    "question", "rejected", "system", "text", "tools",
)  # fmt: skip
BY_NAME = {kind.name: kind for kind in KINDS}
_ANSWERS = ("answer", "response", "output", "reply", "target")  # other names of the completion
_EXPECTED = (
    "messages, conversations, instruction and output, prompt and completion, text, or chosen and rejected"
)


def recognise(values: Mapping[str, Any], where: str) -> Kind:
    """Find the kind of a row from the names of its fields.

    Raises:
        DataError: the fields belong to no kind, or to two kinds.
    """
    filled = [name for name, value in values.items() if value is not None and value != ""]
    is_judged = _is_judgement(values.get("label"))
    found = _kinds_with(filled, is_judged) or _kinds_with(list(values), is_judged)
    if len(found) > 1:
        (one, first), (other, second) = list(found.items())[:2]
        raise DataError(
            f"{where}: the row has both {first} and {second}, expected only one of them; set --format to "
            f"{one} or {other} (format={one!r} or {other!r})"
        )
    if not found:
        raise DataError(
            f"{where}: the row has {brief(list(values))}, expected {_EXPECTED}; {_renames(filled)}"
        )
    return BY_NAME[next(iter(found))]


def _is_judgement(label: object) -> bool:
    """Whether a label is a boolean, or the text "true" or "false", as in files without booleans."""
    return label.strip().lower() in ("true", "false") if isinstance(label, str) else isinstance(label, bool)


def _renames(names: list[str]) -> str:
    """The end of the error message for a row whose fields fit no kind: it says how to rename fields.

    If one field has a usual name for a question, and another field has a usual name for an answer, the
    message says how to rename these two fields.
    """
    spelled = {name.lower(): name for name in reversed(names)}
    if separator := _separator_hint(names):
        return separator
    prompt, answer = (
        next((spelled[n] for n in known if n in spelled), None)
        for known in (("prompt", *preferences.PROMPTS), ("completion", *_ANSWERS))
    )
    if prompt is None or answer is None:
        return "--columns OURS=THEIRS (columns={'OURS': 'THEIRS'}) renames fields"
    columns = {"prompt": prompt, "completion": answer}
    return (
        f"--columns prompt={prompt},completion={answer} (columns={columns}) reads the fields "
        f"{prompt!r} and {answer!r}"
    )


def _separator_hint(names: list[str]) -> str:
    """A hint if rows have only one field because the table has another separator; otherwise ""."""
    sign = next((sign for sign in ";\t|," if len(names) == 1 and sign in names[0]), None)
    if sign is None:
        return ""
    return f"{sign!r} seems to separate the columns; a .csv file needs commas, a .tsv file tabs"


def _kinds_with(names: list[str], is_judged: bool) -> dict[str, str]:
    """Find the kinds that a row with these fields may have. Return a dict from each kind to a field of the
    row that is typical of it.

    Args:
        is_judged: whether the row has a label that is true or false. Any other label, which may be the topic
            of a text, counts as a judgement only if the row has a completion.
    """
    found = {kind.name: name for kind in KINDS for name in reversed(kind.known_by) if name in names}
    if "preference" in found and not {"chosen", "rejected"}.isdisjoint(names):
        for prompt in ("sharegpt", "alpaca"):  # in a preference, these fields hold the prompt
            found.pop(prompt, None)
    elif len(found) == 1 and "label" in names:
        [(kind, name)] = found.items()
        if kind == "completion" or (is_judged and kind in ("messages", "sharegpt", "alpaca")):
            return {"kto": name}
    return found or ({"completion": "prompt"} if "prompt" in names else {})


def renamed(values: dict[str, Any], columns: Mapping[str, str], where: str) -> dict[str, Any]:
    """Rename the fields of a row. `columns` maps the names that the formats use to the names in the row.

    Raises:
        DataError: the row lacks a field to be renamed.
    """
    if not columns:
        return values
    for ours, theirs in columns.items():
        if theirs not in values:
            raise DataError(
                f"{where}: the row has no field {theirs!r} that --columns (columns=...) renames; it has "
                f"{brief(list(values))}{_missing_hint(ours, theirs, list(values))}"
            )
    others = {k: v for k, v in values.items() if k not in columns and k not in columns.values()}
    return others | {ours: values[theirs] for ours, theirs in columns.items()}


def _missing_hint(ours: str, theirs: str, names: list[str]) -> str:
    """The end of an error message: a row lacks the field `theirs`, which --columns renames to `ours`."""
    if separator := _separator_hint(names):
        return f"; {separator}"
    if ours in names and theirs in FIELDS:
        return f"; nplora's name comes before the equals sign: {theirs}={ours}"
    near = nearest_names(theirs, names, 1, cutoff=0.6)
    return f"; did you mean {near[0]!r}?" if near else ""


def lost_context(values: Mapping[str, Any], example: Example) -> tuple[str, ...]:
    """Return the names among "tools" and "documents" that the row has, but its example lacks.

    Only a chat can have tools and documents.
    """
    answer: object = example
    if isinstance(example, Preference):
        answer = example.chosen
    elif isinstance(example, Judged):
        answer = example.answer
    if isinstance(answer, Chat):
        return ()
    return tuple(name for name in CONTEXT if _is_given(values.get(name)))


def _is_given(context: object) -> bool:
    return context.strip() not in ("", "[]", "null") if isinstance(context, str) else bool(context)
