"""The kinds of rows: which fields each has, and the `Example` that they mean."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from nplora.finetuning.data.examples import (
    Answered,
    Chat,
    Completion,
    Example,
    Instruction,
    Judged,
    Message,
    MultipleChoice,
    Objects,
    Preference,
    Text,
)
from nplora.formats import strict_json
from nplora.formats.errors import DataError, brief

_MESSAGES = "expected a list of objects with a role and a content"
_CONTEXT = ("tools", "documents")  # fields of a row that the chat template gets besides the messages
_ROLES = ("system", "user", "assistant", "tool", "developer", "function", "ipython")
_TOOL_ROLES = ("tool", "function", "ipython")
_SPEAKERS = {  # of ShareGPT
    "system": "system", "human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant",
    "function_call": "assistant", "observation": "tool", "tool": "tool",
}  # fmt: skip
_LETTERS = tuple("ABCDEFGHIJKLMNOPQRSTUVWXYZ")  # labels of choices for which a row has none
_TURNS = ("human or observation", "gpt or function_call")


@dataclass(frozen=True)
class Kind:
    """A kind of rows.

    Attributes:
        name: what `format` calls it.
        fields: the fields that a row of this kind has, for messages.
        known_by: a row that has one of these fields is of this kind.
        parse: makes an example from the fields of a row.
    """

    name: str
    fields: str
    known_by: tuple[str, ...]
    parse: Callable[[Fields], Example]


class Fields:
    """The fields of a row, with checks. A field that is null counts as missing."""

    def __init__(self, values: Mapping[str, Any], where: str) -> None:
        self.values, self.where = values, where

    def has(self, name: str) -> bool:
        return self.values.get(name) is not None

    def get(self, name: str) -> Any:
        """The value of a field that must be there."""
        if name not in self.values:
            raise self.error(f"{name} is missing; the row has {brief(list(self.values))}")
        return self.values[name]

    def text(self, name: str, may_be_empty: bool = False, default: str | None = None) -> str:
        if default is not None and not self.has(name):
            return default
        value = self.get(name)
        if not isinstance(value, str):
            raise self.error(f"{name} is {brief(value)}, expected a string")
        if not value.strip() and not may_be_empty:
            raise self.error(f"{name} is empty, expected a text")
        return value

    def objects(self, name: str) -> Objects | None:
        """A list of objects, which may be given as JSON text; None if it is missing."""
        value = self.values.get(name)
        if isinstance(value, str):
            value = self._json(name, value) if value.strip() else None
        if value is None:
            return None
        if not isinstance(value, list) or not all(isinstance(item, dict) for item in value):
            raise self.error(f"{name} is {brief(value)}, expected a list of objects")
        return value

    def _json(self, name: str, text: str) -> Any:
        try:
            return _loads(text)
        except ValueError:
            raise self.error(f"{name} is {brief(text)}, expected a list of objects, or one as JSON") from None

    def error(self, problem: str) -> DataError:
        return DataError(f"{self.where}: {problem}")


def _loads(text: str) -> Any:
    """Parse JSON that a text of a row holds, as strictly as the JSON of a file.

    Raises:
        ValueError: the text is not JSON, or exceeds a limit.
    """
    return strict_json.loads(text.encode("utf-8"), "JSON")


# ---- plain texts ----


def _text(row: Fields) -> Example:
    return Text(row.text("text"))


def _completion(row: Fields) -> Example:
    return _answer(row, "completion")


def _answer(row: Fields, name: str) -> Answered:
    """The prompt and one answer: two texts, or two lists of messages."""
    prompt = row.values.get("prompt")
    if isinstance(prompt, list) or isinstance(row.values.get(name), list | dict):
        return _chat(row, [*_messages(row, "prompt", prompt), *_answered(row, name)], prompt)
    return Completion(row.text("prompt", may_be_empty=True), row.text(name))


def _answered(row: Fields, name: str) -> list[Message]:
    """The messages of an answer. The row may give a list of messages, a single message, or only its text."""
    value = row.get(name)
    if isinstance(value, str):
        value = {"role": "assistant", "content": row.text(name)}
    return _messages(row, name, [value] if isinstance(value, dict) else value)


def _instruction(row: Fields) -> Example:
    history = row.values.get("history")
    history = [] if history in (None, "") else history
    is_pairs = isinstance(history, list) and all(
        isinstance(pair, list) and len(pair) == 2 and all(isinstance(text, str) for text in pair)
        for pair in history
    )
    if not is_pairs:
        raise row.error(f"history is {brief(history)}, expected a list of pairs of texts")
    return Instruction(
        row.text("instruction"),
        row.text("output"),
        row.text("input", True, ""),
        row.text("system", True, ""),
        tuple((question, answer) for question, answer in history),
    )


# ---- chats ----


def _openai(row: Fields) -> Example:
    messages = row.get("messages")
    if not isinstance(messages, list) or not messages:
        raise row.error(f"messages is {brief(messages)}, {_MESSAGES}")
    return _chat(row, _messages(row, "messages", messages), None)


def _chat(row: Fields, messages: list[Message], prompt: list[Any] | None) -> Chat:
    tools, documents = (row.objects(name) for name in _CONTEXT)
    return Chat(messages, tools and [_tool(row, tool) for tool in tools], documents, len(prompt or ()))


def _messages(row: Fields, name: str, value: Any) -> list[Message]:
    """Messages as in OpenAI's API, checked, in the form that chat templates read."""
    if not isinstance(value, list):
        raise row.error(f"{name} is {brief(value)}, {_MESSAGES}")
    messages = [_message(row, message) for message in value]
    for before, message in zip([None, *messages], messages, strict=False):
        _check_order(row, before, message)
    return messages


def _message(row: Fields, message: object) -> Message:
    if not isinstance(message, dict) or not isinstance(message.get("role"), str):
        raise row.error(f"a message is {brief(message)}, {_MESSAGES}")
    role = message["role"]
    if role not in _ROLES:
        raise row.error(f"the role of a message is {brief(role)}, expected one of {', '.join(_ROLES)}")
    message = _with_tool_calls(row, message)
    made = {name: value for name, value in message.items() if value is not None}
    made["content"] = _content(row, message)
    if message.get("tool_calls") not in (None, []):
        made["tool_calls"] = _tool_calls(row, message)
    if role == "assistant" and not made["content"].strip() and not made.get("tool_calls"):
        raise row.error(f"the assistant's content is {brief(message.get('content'))}, expected a text")
    _check_weight(row, message)
    return made


def _with_tool_calls(row: Fields, message: Message) -> Message:
    """The message with the older `function_call` of OpenAI's API as a tool call."""
    called = message.get("function_call")
    if called is None:
        return message
    if message.get("tool_calls") is not None:
        raise row.error("a message has both tool_calls and function_call, expected only one of them")
    if not isinstance(called, dict):
        raise row.error(f"function_call is {brief(called)}, expected an object")
    others = {name: value for name, value in message.items() if name != "function_call"}
    return others | {"tool_calls": [called]}


def _content(row: Fields, message: Message) -> str:
    """The content of a message as one text. Only a message with tool calls may lack content."""
    content = message.get("content")
    if isinstance(content, str):
        return content
    if content is None and message.get("tool_calls"):
        return ""
    if not isinstance(content, list):
        raise row.error(
            f"the content of a message of role {message['role']!r} is {brief(content)}, expected a text"
        )
    for part in content:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind != "text" or not isinstance(part.get("text"), str):
            raise row.error(f'a part of a content is {brief(part)}, expected {{"type": "text", "text": "…"}}')
    return "".join(part["text"] for part in content)


def _tool_calls(row: Fields, message: Message) -> Objects:
    calls = message["tool_calls"]
    if message["role"] != "assistant":
        raise row.error(f"a message of role {message['role']!r} has tool_calls, expected 'assistant'")
    if not isinstance(calls, list) or not all(isinstance(call, dict) for call in calls):
        raise row.error(f"tool_calls is {brief(calls)}, expected a list of objects")
    return [_tool_call(row, call) for call in calls]


def _tool_call(row: Fields, call: dict[str, Any]) -> dict[str, Any]:
    """A tool call whose arguments are an object, because templates write them as JSON themselves."""
    function = call.get("function", call)
    name = function.get("name") if isinstance(function, dict) else None
    if not isinstance(name, str) or not name:
        raise row.error(f"a tool call is {brief(call)}, expected the name of its function")
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        try:
            arguments = _loads(arguments)
        except ValueError:
            arguments = None
    if not isinstance(arguments, dict):
        shown = brief(function.get("arguments"))
        raise row.error(f"the arguments of the tool call {name!r} are {shown}, expected an object")
    made = {"type": "function", "function": {"name": name, "arguments": arguments}}
    return made | ({"id": call["id"]} if "id" in call else {})


def _check_weight(row: Fields, message: Message) -> None:
    weight, role = message.get("weight"), message["role"]
    if weight is None:
        return
    if role != "assistant":
        raise row.error(f"a message of role {role!r} has a weight, expected it for 'assistant' only")
    if isinstance(weight, bool) or weight not in (0, 1):
        raise row.error(f"the weight of a message is {brief(weight)}, expected 0 or 1")


def _check_order(row: Fields, before: Message | None, message: Message) -> None:
    """Check that a tool's result comes after an assistant's message or another result."""
    role = message["role"]
    if role in _TOOL_ROLES and (before is None or before["role"] in ("user", "system", "developer")):
        after = "at the beginning" if before is None else f"after {before['role']!r}"
        raise row.error(f"a message of role {role!r} is {after}, expected it after an assistant's message")


def _tool(row: Fields, tool: dict[str, Any]) -> dict[str, Any]:
    """A tool in the form of OpenAI's API. If the data give only its function, wrap the function."""
    function = tool.get("function", tool)
    name = function.get("name") if isinstance(function, dict) else None
    if not isinstance(name, str) or not name:
        raise row.error(f"a tool is {brief(tool)}, expected an object with the name of its function")
    return tool if "function" in tool else {"type": "function", "function": tool}


# ---- ShareGPT ----


def _sharegpt(row: Fields) -> Example:
    return _chat(row, _conversation(row), None)


def _conversation(row: Fields) -> list[Message]:
    turns = row.get("conversations")
    if not isinstance(turns, list) or not turns:
        raise row.error(f"conversations is {brief(turns)}, expected a list of objects with from and value")
    messages = [_turn(row, turn) for turn in turns]
    spoken = messages[1:] if messages[0]["role"] == "system" else messages
    for place, message in enumerate(spoken):
        if (message["role"] == "assistant") != bool(place % 2) or message["role"] == "system":
            turn = turns[len(messages) - len(spoken) + place]
            wanted = _TURNS[place % 2]
            raise row.error(
                f"turn {place + 1} of the conversation is from {turn['from']!r}, expected {wanted}"
            )
    for before, message in zip([None, *messages], messages, strict=False):
        _check_order(row, before, message)
    if messages[0]["role"] != "system" and (system := row.text("system", True, "")):
        messages.insert(0, {"role": "system", "content": system})
    return messages


def _turn(row: Fields, turn: object) -> Message:
    speaker = turn.get("from") if isinstance(turn, dict) else None
    if not isinstance(turn, dict) or not isinstance(speaker, str):
        raise row.error(f"a turn is {brief(turn)}, expected an object with from and value")
    if speaker not in _SPEAKERS:
        known = ", ".join(_SPEAKERS)
        raise row.error(f"a turn is from {brief(speaker)}, expected one of {known}")
    value = turn.get("value")
    if not isinstance(value, str):
        raise row.error(f"the value of a turn is {brief(value)}, expected a text")
    weight = {"weight": turn["weight"]} if turn.get("weight") is not None else {}
    if speaker != "function_call":
        return _message(row, {"role": _SPEAKERS[speaker], "content": value, **weight})
    try:
        calls = _loads(value)
    except ValueError:
        calls = None
    if not isinstance(calls, dict | list):
        raise row.error(f"a function_call is {brief(value)}, expected a name and arguments as JSON")
    called = calls if isinstance(calls, list) else [calls]
    return _message(row, {"role": "assistant", "content": None, "tool_calls": called, **weight})


# ---- comparisons ----


def _preference(row: Fields) -> Example:
    if row.has("conversations"):
        prompt = _conversation(row)
        sides = [[*prompt, _turn(row, row.get(name))] for name in ("chosen", "rejected")]
        pair = Preference(*(_chat(row, messages, prompt) for messages in sides))
    elif row.has("prompt") and not _has_whole_chats(row):
        pair = Preference(_answer(row, "chosen"), _answer(row, "rejected"))
    else:
        pair = _without_prompt(row)
    for name, answer in (("chosen", pair.chosen), ("rejected", pair.rejected)):
        if isinstance(answer, Chat) and (role := answer.messages[-1]["role"]) != "assistant":
            raise row.error(f"{name} ends with a message of role {role!r}, expected one of the assistant")
    if pair.chosen == pair.rejected:
        raise row.error("chosen and rejected are the same answer, expected two")
    return pair


def _has_whole_chats(row: Fields) -> bool:
    """Whether the prompt is a text and both answers are whole chats, which repeat the prompt."""
    prompt, answers = row.values["prompt"], [row.values.get(name) for name in ("chosen", "rejected")]
    return isinstance(prompt, str) and all(isinstance(a, list) and len(a) > 1 for a in answers)


def _without_prompt(row: Fields) -> Preference:
    """Two texts or chats. The beginning that they share is the prompt."""
    if isinstance(row.values.get("chosen"), str) or isinstance(row.values.get("rejected"), str):
        texts = row.text("chosen"), row.text("rejected")
        shared = _shared(row, *texts)
        return Preference(*(Completion(text[:shared], text[shared:]) for text in texts))
    chats = [_messages(row, name, row.get(name)) for name in ("chosen", "rejected")]
    shared = _shared(row, *chats)
    prompt = row.values.get("prompt")
    asked = [message["content"].strip() for message in chats[0][:shared] if message["role"] == "user"]
    if isinstance(prompt, str) and prompt.strip() not in asked:
        wanted = "expected a message of the user at the beginning of chosen and rejected"
        raise row.error(f"prompt is {brief(prompt)}, {wanted}")
    return Preference(*(_chat(row, messages, messages[:shared]) for messages in chats))


def _shared(row: Fields, one: Sequence[object], other: Sequence[object]) -> int:
    """The number of items at the beginning that both answers share, as TRL's `extract_prompt` counts them.

    A space before the difference belongs to the answers, and each answer has an item at least.
    """
    same = (a == b for a, b in zip(one[:-1], other[:-1], strict=False))
    count = sum(1 for _ in itertools.takewhile(bool, same))
    if count and one[count - 1] == " " and one[count] != other[count]:
        count -= 1
    if not count and one != other:
        raise row.error("chosen and rejected begin differently, expected the same prompt in both")
    return count


def _judged(row: Fields) -> Example:
    label = row.get("label")
    if isinstance(label, str) and label.lower() in ("true", "false"):  # tables in text files have no booleans
        label = label.lower() == "true"
    if not isinstance(label, bool):
        raise row.error(f"label is {brief(label)}, expected true or false")
    return Judged(_answer(row, "completion"), label)


# ---- multiple choice ----


def _multiple_choice(row: Fields) -> Example:
    name = "question" if row.has("question") and not row.has("prompt") else "prompt"
    prompt = row.get(name)
    if isinstance(prompt, list) and prompt:
        prompt = _messages(row, name, prompt)
        if prompt[-1]["role"] == "assistant":
            raise row.error(f"{name} ends with a message of the assistant, expected the user's question")
    else:
        prompt = row.text(name)
    choices, labels = _choices(row)
    return MultipleChoice(prompt, choices, _right_choice(row, choices, labels))


def _choices(row: Fields) -> tuple[tuple[str, ...], list[str] | None]:
    """The choices, and their labels if there are any: texts, or {"text": […], "label": […]} as in ARC."""
    wanted = "expected a list of two or more different texts"
    value: Any = row.get("choices")
    labels: Any = None
    if isinstance(value, dict):
        value, labels = value.get("text"), value.get("label")
    if not isinstance(value, list | tuple) or not all(isinstance(c, str) and c.strip() for c in value):
        raise row.error(f"choices is {brief(row.get('choices'))}, {wanted}")
    if len(value) < 2 or len(set(value)) < len(value):
        raise row.error(f"choices is {brief(value)}, {wanted}")
    if labels is None:
        return tuple(value), None
    if not isinstance(labels, list) or len(set(map(str, labels))) != len(value) or len(labels) != len(value):
        raise row.error(
            f"the labels of choices are {brief(labels)}, expected one for each choice, all different"
        )
    return tuple(value), list(map(str, labels))


def _right_choice(row: Fields, choices: tuple[str, ...], labels: list[str] | None) -> int:
    """The index of the right choice. The row gives its label, the choice itself, or its index.

    The labels A, B, … of a row without labels come after the choices. Numbers as labels leave no room for
    indices, because the first label may be 0 or 1.
    """
    answer = row.get("answer")
    if isinstance(answer, str | int) and not isinstance(answer, bool):
        names: list[Sequence[str]] = [labels, choices] if labels else [choices, _LETTERS[: len(choices)]]
        for known in names:
            if str(answer) in known and (isinstance(answer, str) or known is labels):
                return known.index(str(answer))
        index = str(answer)
        has_indices = labels is None or not any(label.isdigit() for label in labels)
        if (
            has_indices
            and index.isascii()
            and index.isdigit()
            and len(index) < 9
            and int(index) < len(choices)
        ):
            return int(index)
    wanted = f"0 to {len(choices) - 1}" if labels is None else f"one of the labels {brief(labels)}"
    raise row.error(f"answer is {brief(row.get('answer'))}, expected one of the choices, or {wanted}")


# ---- tools and documents ----


def lacks_context(values: Mapping[str, Any], example: Example) -> bool:
    """Whether a row has tools or documents that its example lacks, because only messages have them."""
    answer: object = example
    if isinstance(example, Preference):
        answer = example.chosen
    elif isinstance(example, Judged):
        answer = example.answer
    return not isinstance(answer, Chat) and any(_is_given(values.get(name)) for name in _CONTEXT)


def _is_given(context: object) -> bool:
    return context.strip() not in ("", "[]", "null") if isinstance(context, str) else bool(context)


# ---- which kind ----

KINDS = (
    Kind("messages", "messages", ("messages",), _openai),
    Kind("sharegpt", "conversations", ("conversations",), _sharegpt),
    Kind("alpaca", "instruction and output", ("instruction",), _instruction),
    Kind("completion", "prompt and completion", ("completion",), _completion),
    Kind("text", "text", ("text",), _text),
    Kind("preference", "chosen and rejected", ("chosen", "rejected"), _preference),
    Kind("kto", "prompt, completion and label", (), _judged),
    Kind("choice", "prompt, choices and answer", ("choices",), _multiple_choice),
)
# All fields that the kinds read, by the names that `columns` maps.
FIELDS = (
    "answer", "chosen", "choices", "completion", "conversations", "documents", "history", "input",
    "instruction", "label", "messages", "output", "prompt", "question", "rejected", "system", "text", "tools",
)  # fmt: skip
BY_NAME = {kind.name: kind for kind in KINDS}
_EXPECTED = (
    "messages, conversations, instruction and output, prompt and completion, text, or chosen and rejected"
)


def recognise(values: Mapping[str, Any], where: str) -> Kind:
    """The kind of a row, by the names of its fields.

    Raises:
        DataError: the row is of no kind, or of two kinds.
    """
    there = [name for name, value in values.items() if value is not None]
    found = _kinds_with(there) or _kinds_with(list(values))
    if len(found) > 1:
        (one, first), (other, second) = list(found.items())[:2]
        raise DataError(
            f"{where}: the row has both {first} and {second}, expected only one of them; format={one!r} or "
            f"{other!r} decides"
        )
    if not found:
        raise DataError(f"{where}: the row has {brief(list(values))}, expected {_EXPECTED}")
    return BY_NAME[next(iter(found))]


def _kinds_with(names: list[str]) -> dict[str, str]:
    """The kinds that fields with these names may belong to, each with the field that shows it."""
    found = {kind.name: name for kind in KINDS for name in reversed(kind.known_by) if name in names}
    if "completion" in found and "label" in names:
        found["kto"] = found.pop("completion")
    if "preference" in found and not {"chosen", "rejected"}.isdisjoint(names):
        found.pop("sharegpt", None)  # in a preference, `conversations` holds the prompt
    return found or ({"completion": "prompt"} if "prompt" in names else {})


def renamed(values: dict[str, Any], columns: Mapping[str, str], where: str) -> dict[str, Any]:
    """The row with its fields renamed to our names. `columns` maps our names to those in the row.

    Raises:
        DataError: the row does not have such a field.
    """
    if not columns:
        return values
    for theirs in columns.values():
        if theirs not in values:
            raise DataError(f"{where}: has no {theirs!r}, which columns names; it has {brief(list(values))}")
    others = {k: v for k, v in values.items() if k not in columns and k not in columns.values()}
    return others | {ours: values[theirs] for ours, theirs in columns.items()}
