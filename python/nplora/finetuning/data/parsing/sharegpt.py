"""ShareGPT's conversations: turns with `from` and `value`."""

from __future__ import annotations

from nplora.finetuning.data.examples import Chat, Message
from nplora.finetuning.data.parsing.fields import Fields, loads, renaming
from nplora.finetuning.data.parsing.messages import chat_of, message_of, read_turns
from nplora.formats.errors import brief

_SPEAKERS = {
    "system": "system", "human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant",
    "function_call": "assistant", "observation": "tool", "tool": "tool",
}  # fmt: skip


def sharegpt(row: Fields) -> Chat:
    return chat_of(row, conversation(row), None)


def conversation(row: Fields) -> list[Message]:
    turns = row.unpacked("conversations")
    if not isinstance(turns, list) or not turns:
        raise row.error(f"conversations is {brief(turns)}, expected a list of objects with from and value")
    if all(isinstance(turn, dict) and {"role", "content"} <= turn.keys() for turn in turns):
        raise row.error(
            f"conversations has messages in the form of OpenAI; {renaming('messages', 'conversations')}"
        )
    messages = read_turns(row, turns, turn_of, "turn")
    if messages[0]["role"] != "system" and (system := row.text("system", True, "")):
        messages.insert(0, {"role": "system", "content": system})
    return messages


def turn_of(row: Fields, turn: object) -> Message:
    speaker = turn.get("from") if isinstance(turn, dict) else None
    if not isinstance(turn, dict) or not isinstance(speaker, str):
        raise row.error(f"a turn is {brief(turn)}, expected an object with from and value")
    if speaker not in _SPEAKERS:
        known = ", ".join(_SPEAKERS)
        raise row.error(f"a turn is from {brief(speaker)}, expected one of {known}")
    value = turn.get("value")
    if not isinstance(value, str):
        raise row.error(f"the value of a turn is {brief(value)}, expected a text")
    others = {name: given for name, given in turn.items() if name not in ("from", "value")}
    if speaker != "function_call":
        calls_tool = turn.get("tool_calls") or turn.get("function_call")
        if _SPEAKERS[speaker] == "assistant" and not value.strip() and not calls_tool:
            raise row.error(f"the value of a turn from {speaker!r} is {brief(value)}, expected a text")
        return message_of(row, {**others, "role": _SPEAKERS[speaker], "content": value})
    try:
        calls = loads(value)
    except ValueError:
        calls = None
    if not isinstance(calls, dict | list) or calls == []:
        raise row.error(f"a function_call is {brief(value)}, expected a name and arguments as JSON")
    called = calls if isinstance(calls, list) else [calls]
    return message_of(row, {**others, "role": "assistant", "content": None, "tool_calls": called})
